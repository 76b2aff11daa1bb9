"""Every limit of this room, with its unit and what it guards.

Imported by the worker process too, so nothing is imported here.
"""

from __future__ import annotations

# Messages between the agent and a worker (transport.py).
MAX_FRAME_HEADER_BYTES = 256 << 10
MAX_FRAME_PAYLOAD_BYTES = 128 << 20  # of all tensors of one message, padding included
MAX_TENSORS_PER_MESSAGE = 256
MAX_TENSOR_DIMENSIONS = 16
ARENA_KEEP_BYTES = 4 << 20  # of an arena that stay resident after a larger message (arena.py)
MAX_STAGED_BYTES = 64 << 20  # of inputs that lie ready for one version's processes (staging.py)
RUN_BYTES = 8 << 20  # of inputs that may share a batch and lie one behind the other (staging.py)
STAGED_KEEP_S = 1.0  # that pages stay after several requests had inputs there at once
MAX_RUNS = 4  # of those at once; each keeps its way ahead clear
STAGE_BYTES = 16 << 10  # of a request's inputs together; smaller ones are copied when their turn comes
MAX_LAYOUTS = 128  # of messages that a channel remembers, each way, to build and read their headers once
FRAME_S = 10.0  # a frame once begun is through within this time, or the channel is broken

# Worker processes (worker.py, instance.py).
MAX_INSTANCES = 8  # processes of one version
HANG_S = 30.0  # a request that runs longer, and longer than its own deadline, gets its worker killed
STALL_S = 1.0  # with the running request at this age, no more than MAX_WAITING_ON_STALL wait behind it
MAX_WAITING_ON_STALL = 16
EXIT_S = 2.0  # for a worker to end by itself once told to, and again once terminated
STDERR_TAIL_BYTES = 8 << 10  # of a worker's output, kept for error messages
STDERR_TAIL_LINES = 8  # shown in an error message
MAX_ERROR_CHARACTERS = 1500  # of a runtime's own message
STARTING_NICENESS = 10  # above the agent's, of a worker that starts beside one that serves (priority.py)
OOM_SCORE_ADJUST = 500  # of a worker (-1000 to 1000): the kernel takes it before the agent

# Queues and batches (scheduling.py, curve.py, breaker.py, batching.py).
MAX_QUEUE = 256  # requests of one version that wait; fewer than the front's threads, for other models' sake
LEAST_QUEUE = 48  # that may wait however slow the model is
QUEUE_WAIT_S = 1.0  # over LEAST_QUEUE, a request may wait only if its turn is to be expected within this time
HANDICAP_S = {1: 0.0, 2: 0.2, 3: 2.0}  # of a priority: a request is not overtaken once it waited for so long
WINDOW_BUSY_S = 0.005  # wait for a fuller batch when the worker is busy for more than BUSY_LOAD
WINDOW_IDLE_S = 0.020  # the same for a worker without load
BUSY_LOAD = 0.8  # share of the time
LOAD_HALF_LIFE_S = 0.5  # over which the load is averaged
BATCH_TARGET_S = 0.050  # how long a batch should run at most, unless the model says otherwise
TOO_SLOW, TOO_FAST = 1.2, 0.8  # of its target: the batch size halves, doubles
PAYS = 0.1  # share by which a fuller batch must make a sample cheaper to be worth it
SIZE_SEEN = 3  # batches of a size before its cost counts
CURVE_LATEST = 15  # batches of a size whose median counts
COST_LATEST = 15  # batches whose median says what a request costs at present
CURVE_EVERY = 4  # batches of a size after which the median is taken anew
CURVE_KEEP_S = 60.0  # a size not seen for so long is tried again
SWEEP_S = 1.0  # between looks for sizes that were not seen
MAX_LENGTH_CLASSES = 32
MAX_BATCH = 64  # samples in a batch made of several requests
BATCH_COSINE_MIN = 0.99  # of an answer in a batch to the answer alone, unless the model says otherwise
LEAST_RETRY_S, MOST_RETRY_S = 0.010, 5.0  # of the hint when to try again
BREAKER_ANSWERS = 20  # the latest that the breaker looks at
BREAKER_FIRST_S, BREAKER_MOST_S = 1.0, 30.0  # how long it stays open

# Versions beside the active one (version_policy.py, held_versions.py).
MAX_VERSIONS_LOADED = 8  # of one model; each is a process
HELD_LOOK_S = 60.0  # between two looks though nothing was said to have changed
HELD_MEMORY_RESERVE_BYTES = 32 << 20  # of memory that such a version must leave free

# The gate of low-priority work (host_gate.py, host_load.py).
HOLD_LOAD, SPARE_LOAD = 0.85, 0.30  # of all cores: over the one it waits, under the other it is not held back
GATE_MARGIN = 0.10  # past its bound the load must be for a level to be left
GATE_HALF_LIFE_S = 2.0  # over which the load is averaged
GATE_STALE_S = 10.0  # without a reading for so long, nothing is held
GATE_LOOK_S = 0.1  # between two looks of a queue in which only low-priority requests wait
LOW_HOLD_S = 10.0  # a request that the gate held for so long runs all the same

# Options of a variant (options.py).
MAX_PROVIDERS = 8  # accelerators in one list; each may be tried while a worker starts

# Cascades (cascade.py, cascading.py).
MAX_CASCADE_STEPS = 4  # models in one cascade
CASCADE_SPARE = 0.1  # share of the time left that models after the first leave for the first one's own answer

# Restarts (supervisor.py).
CRASH_LOOP_DEATHS = 3  # a version's deaths that are a crash loop, unless the configuration says otherwise
CRASH_LOOP_WINDOW_S = 60.0  # within this time, unless the configuration says otherwise
MAX_CRASH_LOOP_DEATHS = 100  # that can be configured; their times are remembered
RESTART_FIRST_S = 0.5  # bound of the wait before the second restart; the first has none
RESTART_MOST_S = 60.0
RESTART_LOAD_S = 120.0  # for a restarted worker to load its model

# Growth of worker processes (growth.py, renewing.py); memory is a process's own, neither shared nor of files.
GROWTH_FACTOR = 4  # of what it held once it was checked, and
GROWTH_BYTES = 1 << 30  # on top of that, it may come to hold; caches and larger batches are no leak
GROWTH_LEAST = 0.25  # of what it held then it may grow by in any case
GROWTH_BOX_SHARE = 0.8  # of the box's memory, for all processes of a version together
GROWTH_LOOK_S = 5.0  # between two looks
RENEWAL_RESERVE_BYTES = 32 << 20  # of memory that a process beside the one it takes the place of leaves free
RENEWAL_LOOP_TIMES = 3  # renewals of a version's processes that are too often
RENEWAL_LOOP_WINDOW_S = 600.0  # within this time

# Changes of version (swap.py, judging.py, memory.py, shadow.py).
LATEST_REQUESTS = 1024  # whose outcomes a version is judged by
LATENCY_REQUESTS_FACTOR = 4  # of the minimum: so many requests say something about time
LATENCY_FLOOR_S = 0.005  # a version is not slower by less, whatever the ratio
UNCOMPARED_ERROR_SHARE = 0.5  # of failures that is too much where there is nothing to compare with
WORKER_BASE_BYTES = 64 << 20  # of a worker beside its model
LOADED_BYTES_PER_FILE_BYTE = 2  # runtimes hold the file and the tensors made of it, while they load at least
PHASES_KEPT = 32  # that a change of version went through, for the status
SHADOW_QUEUE = 8  # copies of requests that wait for the version in shadow; more are dropped
SHADOW_QUEUE_BYTES = 32 << 20  # of their inputs and outputs
SHADOW_REQUEST_S = 10.0  # for the version in shadow to answer one

# Routing (router.py).
DRAIN_S = 30.0  # for requests on a worker that is being replaced
RESTART_WAIT_S = 5.0  # a request waits at most so long for a worker that is being restarted
MAX_WAITING_ON_RESTART = 48  # requests of one model; more are refused at once

# The inference front (inference.py, tensors.py).
SERVING_THREADS = 320  # at most, started when needed; each holds a request; more than one model's queue
MAX_CONCURRENT_RPCS = 640  # running, waiting for a thread, and streams; more get RESOURCE_EXHAUSTED
MAX_MESSAGE_BYTES = 64 << 20  # of one request or response
MAX_REQUEST_S = 30.0  # for a request without a deadline, or with a later one
READ_S = 30.0  # for a request to come in whole (slow_requests.py)
READING_MOST = 32  # requests that may take their time to come in; with more, the slow ones are cut off
READ_CROWDED_S = 1.0  # what is slow then
READ_LOOK_S = 0.5  # between two looks at them
MAX_DIMENSION = (1 << 31) - 1
MAX_NAME_CHARACTERS = 128  # of a client's text when it is repeated in a message

# Golden files and warm-up (golden.py).
MAX_GOLDEN_FILE_BYTES = 64 << 20
MAX_GOLDEN_BYTES = 256 << 20  # unpacked, all arrays together
MAX_GOLDEN_ARRAYS = 64
MAX_WARM_UP_BYTES = 64 << 20  # of the inputs made for one warm-up
MAX_STREAMS = 16  # standing at once; each holds a thread
STREAM_IDLE_S = 60.0  # a stream that asked nothing for so long makes room for a new one
MAX_FORMS = 256  # forms of requests that are remembered, parsed and checked (messages.py)
MAX_FORM_BYTES = 4 << 10  # of a form that is remembered
MAX_ANSWER_HEADS = 16  # beginnings of answers that are remembered with a form (plans.py)

CACHE_BYTES = 16 << 20  # of outputs that the response cache keeps, unless the configuration says otherwise
CACHE_ENTRY_BYTES = 1 << 10  # that an entry counts for beside its outputs
MAX_CACHE_COUNTS = 10_000  # keys whose look-ups are counted
CACHE_HALVE_AFTER = 10_000  # look-ups after which the counts are halved
METRICS_CONNECTION_S = 5.0  # for one scrape to come in and be answered (metrics.py)

# Traces (tracing.py).
TRACE_QUEUE = 2048  # spans that wait for the collector; the oldest go first
TRACE_BATCH = 256  # spans in one message to it
TRACE_DELAY_S = 2.0  # that a span waits for others to go with it
TRACE_EXPORT_S = 5.0  # for one message to be taken, repetitions included
TRACE_CLOSE_S = 1.5  # for what waits when the agent stops
TRACE_LOG_S = 60.0  # between two lines in the log about the collector

# System shared memory (shared_memory.py, peer.py).
MAX_REGIONS = 64  # registered at once; each holds a descriptor
MAX_READ_BYTES = 256 << 20  # of inputs read from regions for requests under way, all together
MAX_KEY_CHARACTERS = 255  # of a shared memory object's name: the file system's own bound
PEER_CACHE_S = 10.0  # a connection's user is looked up again after this time
MAX_PEERS = 256  # connections whose user is remembered

# Unix sockets (local_socket.py).
RELAY_BYTES = 256 << 10  # carried at once, of each direction of a connection
MAX_LOCAL_CONNECTIONS = 64  # to inference; each holds two threads and two descriptors
REFUSALS_LOGGED_S = 10.0  # between two lines about callers that were turned away
