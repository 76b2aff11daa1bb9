"""Every limit of the control plane, named, with its unit. Deployment choices are in config.py instead.

A limit guards memory, disk or time against what devices and operators send, or against a defect of ours.
"""

from __future__ import annotations

from updater.limits import MAX_FILE_BYTES, MAX_MANIFEST_BYTES

# gRPC. The largest messages are a manifest and an upload chunk, 1 MiB each; the rest is room for their
# envelope. A longer message is refused by its length prefix, before it is read.
MAX_CHUNK_BYTES = 1 << 20
MAX_RECEIVE_BYTES = max(MAX_MANIFEST_BYTES, MAX_CHUNK_BYTES) + (1 << 20)
MAX_STREAMS_PER_CONNECTION = 1024  # calls at once on one HTTP/2 connection
# Calls that came but were not yet begun. gRPC's own bounds (1,000; random refusals up to 3,000) turn away a
# quarter of a fleet of 10,000 that comes back in one moment; a waiting call costs a few KB.
MAX_PENDING_CALLS = 12_000  # beyond this some are refused, …
MAX_PENDING_CALLS_HARD = 24_000  # … and beyond this all
KEEPALIVE_TIME_MS = 30_000  # a silent connection is pinged after this
KEEPALIVE_TIMEOUT_MS = 10_000  # and closed when the ping is not answered within this
MIN_CLIENT_PING_INTERVAL_MS = 10_000  # clients that ping more often are sent away
STOP_GRACE_S = 5.0  # calls may finish for so long after SIGTERM

# Threads for database and file work. SQLite has one writer at a time, so writing has one thread.
READER_THREADS = 4
FILE_THREADS = 4
MAX_WAITING_CALLS = 20_000  # database calls that may wait for a thread, enough for a fleet that reconnects
WRITES_TOGETHER = 256  # that share one transaction

# Pages.
DEFAULT_PAGE = 100
MAX_PAGE = 1000

# Registry.
MAX_UPLOAD_BYTES = MAX_FILE_BYTES
UPLOAD_IDLE_S = 60.0  # an upload stream that sends nothing for so long is ended; its bytes are kept
UPLOAD_SYNC_BYTES = 64 << 20  # bytes between two fsyncs of an upload
ABANDONED_UPLOAD_S = 7 * 24 * 3600.0  # an unfinished upload untouched for so long is deleted
MAX_ALIASES = 32
MAX_NAMED_IN_ERROR = 8  # objects listed in one message

# DiffModel.
MAX_BASES = 4096  # digests in one Plan
MAX_PLAN_WAIT_MS = 30_000
MAX_FEATURES = 256
MAX_FEATURE_CHARACTERS = 64
FETCH_BYTES = 256 << 10  # of one Fetch message
CANDIDATES_PER_FILE = 2  # bases tried for one target file
MIN_DELTA_TARGET_BYTES = 4096  # smaller files are only offered in full
BUILD_TIMEOUT_S = 1800.0  # of one delta; the process is killed then
BUILD_MEMORY_BYTES = 6 << 30  # private memory of the process that builds one delta
BUILD_NICENESS = 10
BUILD_OUTPUT_BYTES = 8 << 20  # of the builder's answer, which lists the delta's regions
MAX_BUILDS_WAITING = 4096
MAX_AHEAD_BUILDS = 64  # deltas scheduled by one publication
RETRY_FIRST_S = 60.0  # a failed build is tried again after this, then after twice as long, …
RETRY_MOST_S = 24 * 3600.0  # … at most this
RETRY_AFTER_MS = 1000  # what a device with a pending file is told
OFFER_HOLD_S = 600.0  # an offered delta is not evicted for so long after its last use

# Devices and Sync.
MAX_STORED_INTEGER = (1 << 63) - 1  # what SQLite holds; the wire's uint64 goes further
MAX_GENERATION = 1 << 62  # of a device's desired state; SQLite's integers end at 2^63
MAX_DEVICES = 200_000  # registered; twice the fleet that one control plane is made for
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 128  # of a key and of a value
MAX_TEXT_CHARACTERS = 256  # of agent_version, boot_id, board and the like
MAX_RUNTIMES = 16
MAX_SELECTED_DEVICES = 10_000
MAX_REPORTED_MODELS = 256
MAX_LOADED_DIGESTS = 256  # of one reported model
MAX_FAILURE_CHARACTERS = 2000
MAX_MODEL_REPORT_BYTES = 1 << 20  # of one reported state
ASSIGNED_VERSIONS = 8  # of one model: the newest that a device was given and may ask for
HELLO_TIMEOUT_S = 10.0
SILENT_INTERVALS = 3  # heartbeat intervals without a word after which a stream is closed
TWIN_FLUSH_S = 1.0  # heartbeats and progress reach the database together, this often

# Operators (operators.py).
MAX_OPERATORS = 1000  # with an entry of their own

# What one caller may take (quotas.py). A caller is a device or an operator by its certificate, or an address
# without one. Rates come back each second up to the burst; bytes are of what the caller sends, sent bytes of
# what it is sent.
DEVICE_REQUESTS_PER_S = 10.0
DEVICE_REQUESTS_BURST = 100  # an update of many files, after a reconnection
DEVICE_BYTES_PER_S = 256 << 10
DEVICE_BYTES_BURST = 64 << 20  # an outbox that filled while the box was away
DEVICE_SENT_PER_S = 1 << 20  # 90 GB a day; ...
DEVICE_SENT_BURST = 2 * MAX_FILE_BYTES  # ... and two of the largest files in full, at any speed
DEVICE_DIFFS = 2  # plans at once: one that waits and the one of its successor
OPERATOR_REQUESTS_PER_S = 50.0
OPERATOR_REQUESTS_BURST = 500
OPERATOR_BYTES_PER_S = 1 << 20  # 90 GB a day; …
OPERATOR_BYTES_BURST = 64 << 30  # … at any speed until so much was sent
OPERATOR_SENT_PER_S = 1 << 20
OPERATOR_SENT_BURST = 64 << 30
OPERATOR_DIFFS = 32
ANONYMOUS_REQUESTS_PER_S = 50.0  # a site's boxes that enrol and renew come from one address
ANONYMOUS_REQUESTS_BURST = 2000
ANONYMOUS_BYTES_PER_S = 128 << 10
ANONYMOUS_BYTES_BURST = 8 << 20
ANONYMOUS_SENT_PER_S = 512 << 10  # certificates of some 4 KB, at the rate of calls
ANONYMOUS_SENT_BURST = 16 << 20
SENT_AT_ONCE_BYTES = 32 << 20  # must be there before a download goes on: more than any block of a delta
LEAST_COUNTED_BYTES = 256  # what a small message counts as
DIFF_RETRY_S = 1.0  # what a caller with too many plans is told to wait
MAX_CALLERS = 20_000  # whose use is remembered, a few hundred bytes each

# The audit log (audit_log.py).
AUDIT_RECORD_BYTES = 4096  # of one record
AUDIT_REQUEST_BYTES = 2048  # of what was asked for, in a record; more is cut
AUDIT_TEXT_CHARACTERS = 256  # of one text in it
AUDIT_LIST_ENTRIES = 16  # of one list in it
AUDIT_SEGMENT_BYTES = 8 << 20  # then the next file is begun
AUDIT_WAITING = 4096  # records that may wait for the disk
AUDIT_TOGETHER = 256  # that share one fsync
AUDIT_RETRY_S = 1.0  # between two attempts to open a log that could not be opened
AUDIT_READ_BYTES = 64 << 10  # of one message of ReadRecords
DENIALS_PER_S = 1.0  # of one caller that are recorded one by one; the rest is counted …
DENIALS_BURST = 60  # … beyond so many at once
FIRST_MESSAGE_S = 60.0  # a stream that changes something must say within this what

# Trust.
MAX_METADATA_PARTS = 64  # documents in one publication
MAX_PUBLICATION_BYTES = 3 << 19  # of them together
MAX_ROLES = 1000  # delegated, with those that were taken back
METADATA_KEPT = 4  # versions of a role but roots, so that a device in the middle of a refresh can end it
DESIRED_RESEND_S = (
    1800.0  # a device is sent its desired state again, signed anew; it may have refused the last
)
STATEMENT_LIFE_S = 24 * 3600.0  # in which a device may take up a signed desired state

# Rollouts.
DEFAULT_DEADLINE_S = 3600
MAX_DEADLINE_S = 30 * 24 * 3600
MAX_WHY_CHARACTERS = 500
TICK_S = 1.0  # how often deadlines are looked at
WATCH_INTERVAL_S = 0.2  # the shortest time between two messages of one watch

# Telemetry.
MAX_BATCHES = 64
MAX_METRICS = 512  # of one batch
MAX_ATTRIBUTES = 16
MAX_METRIC_NAME_CHARACTERS = 128
MAX_UNIT_CHARACTERS = 32
DEFAULT_POINTS = 1000
MAX_POINTS = 10_000
TELEMETRY_KEEP_S = 14 * 24 * 3600.0
TELEMETRY_KEEP_ROWS = 5_000_000
TELEMETRY_PRUNE_ROWS = 5_000  # deleted in one transaction, so that writers are not kept waiting

# Upkeep: abandoned uploads, telemetry retention, the delta cache.
UPKEEP_S = 300.0

# Identities (ca.py, enrolment.py, authentication.py).
ROOT_LIFE_S = 20 * 365 * 24 * 3600.0  # of the embedded authority's root: boxes may be away for years
INTERMEDIATE_LIFE_S = 2 * 365 * 24 * 3600.0
INTERMEDIATE_LAST_S = 30 * 24 * 3600.0  # before its end one is replaced that had to serve as long as it can
CERTIFICATE_LIFE_S = 24 * 3600.0  # of what is issued to devices, operators and the control plane itself
BACKDATE_MOST_S = 3600.0  # certificates begin this long before they are made, for clocks that are behind ...
BACKDATE_PART = 1 / 24  # ... but at most this part of their life
AUTHORITY_REFRESH_S = 1.0  # how often files of the authority and dates are looked at
MAX_ENROLMENT_BYTES = 64 << 10  # of one message of somebody without a certificate
MAX_ENROLMENTS = 256  # calls at once of those; more are told to come back
NONCE_LIFE_S = 60.0  # from Challenge to Enrol or Renew
MAX_NONCES = 100_000  # used ones that are remembered until they would have expired anyway
MAX_PENDING_IDENTITIES = 1000  # that wait for an operator; more are told to come with a token
PENDING_KEEP_S = 7 * 24 * 3600.0  # an identity that asked and was not approved is forgotten after this
MAX_TOKENS = 100_000  # neither used nor expired
TOKEN_LIFE_S = 3600
MAX_TOKEN_LIFE_S = 30 * 24 * 3600
TOKEN_KEEP_S = 24 * 3600.0  # a used or expired token is remembered for so long, to say so
MAX_COUNTER = 1 << 62  # of renewals
STALE_RENEWALS = 2  # renewals in a row with the counter before: one is a lost answer, more are two boxes
MAX_READ_CERTIFICATES = 16_384  # of callers, remembered as read
MAX_READ_CHAINS = 64  # from their certificates to the bundle
MAX_PROVEN_CALLERS = 16_384  # whose chain was held against the bundle since a root was dropped
PROVEN_TOGETHER = 64  # of them at once, in a thread
