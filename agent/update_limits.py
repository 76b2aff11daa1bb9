"""Waits and bounds of updating, syncing and reporting, each with its unit; limits.py has those of serving."""

from __future__ import annotations

# Calls to the control plane (control.py).
CALL_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 5.0  # of the doctor's call
PLAN_SERVER_WAIT_MS = 20_000  # how long one Plan may wait for deltas on the server
PLAN_PENDING_S = 120.0  # for a delta that is being computed; then a full copy is asked for
PLAN_RETRY_LEAST_S = 0.2  # between two Plans
PLAN_RETRY_MOST_S = 30.0
FETCH_TIMEOUT_S = 3600.0  # of one Fetch; what is missing is resumed by the next
FETCH_STALL_S = 30.0  # without a byte: the call is given up and resumed
FETCH_WAITS = 8  # in a row that the control plane may ask for without sending a byte between
HINT_MOST_S = 600.0  # that it is waited for at a time because the control plane says so
HINT_JITTER = 0.1  # of that, added at random
CANCEL_CHECK_S = 0.25  # how soon a blocked call sees that it is no longer wanted
MAX_RECEIVE_BYTES = 4 << 20  # of one message
MAX_BASES = 4096  # digests in one Plan
KEEPALIVE_TIME_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 20_000

# Signed metadata (trust.py).
METADATA_TIMEOUT_S = 20.0  # of one document
REFRESH_TIMEOUT_S = (
    120.0  # of all that one refresh fetches: some four documents, and a root for each rotation
)

# The stream (sync.py).
HEARTBEAT_DEFAULT_S = 30.0  # until the control plane's Welcome says otherwise
HEARTBEAT_LEAST_S = 0.1
HEARTBEAT_MOST_S = 3600.0
REPORT_LEAST_S = 0.2  # between two reports, however fast state changes
STREAM_LIFE_S = 6 * 3600.0  # then it is reopened, so that replicas share the load
STREAM_STABLE_S = 30.0  # a stream that stood so long resets the backoff
RECONNECT_FIRST_S = 1.0  # bound of the first wait
POLL_LEAST_S = 0.1
POLL_MOST_S = 86_400.0
MAX_DESIRED_MODELS = 256  # of one desired state

# The certificate (identity.py).
RENEW_FIRST_S = 2.0  # bound of the first wait after a failure
RENEW_MOST_S = 900.0
RENEW_LOOK_S = 60.0  # how often the clock is looked at while nothing is due
RENEWED_WAIT_S = 5.0  # that a call waits for the next certificate when its own has just ended
FOLLOW_FILES_S = 2.0  # how often another authority's files are looked at

# Progress (installer.py, reporter.py).
PROGRESS_REPORT_S = 0.5  # between two reports of fetched bytes

# Installing.
BLOCK_ROOM_BYTES = 8 << 20  # kept free beside the target for the journal and databases
APPLY_SYNC_BYTES = (
    2 << 20
)  # of target between two fsyncs: every block, since on a slow link a block takes minutes
LEAST_FREE_BYTES = 1 << 20  # beside the reserve; applying stops before the databases cannot be written

# Changes of version (swapping.py).
SHADOW_LOOK_S = 0.1  # between two looks at a version in shadow
SOAK_LOOK_S = 0.5  # at one in its soak
SWAP_LOOK_LEAST_S = 0.02
SWAP_LOOK_MOST_S = 5.0  # after a look that failed

# Telemetry (telemetry.py, outbox.py).
MAX_BATCHES_PER_REPORT = 64
MAX_METRICS_PER_BATCH = 512
TELEMETRY_RETRY_FIRST_S = 2.0
TELEMETRY_RETRY_MOST_S = 900.0

# The local socket (admin.py).
ADMIN_THREADS = 2
ADMIN_CONNECTIONS = 16
ADMIN_TIMEOUT_S = 5.0
ADMIN_REVERT_TIMEOUT_S = 180.0  # a worker may have to load

# The daemon (daemon.py).
BOOT_BEFORE_SERVING_S = 10.0  # models are loaded for so long before requests are taken
STOP_S = 20.0  # for everything to end after SIGTERM; systemd allows 45
LOOP_HANG_S = 900.0  # no life from the reconciler for longer: the watchdog starves. Hashing 16 GiB takes less
WATCHDOG_TICK_S = 1.0
