"""Every limit of this room, with its unit and what it guards.

Imported by the worker process too, so nothing is imported here.
"""

from __future__ import annotations

# Messages between the agent and a worker (transport.py).
MAX_FRAME_HEADER_BYTES = 256 << 10
MAX_FRAME_PAYLOAD_BYTES = 128 << 20  # of all tensors of one message, padding included
MAX_TENSORS_PER_MESSAGE = 256
MAX_TENSOR_DIMENSIONS = 16
SOCKET_BUFFER_BYTES = 1 << 20  # asked for; the kernel may give less
FRAME_S = 10.0  # a frame once begun is through within this time, or the channel is broken

# Worker processes (worker.py).
HANG_S = 30.0  # a request that runs longer, and longer than its own deadline, gets its worker killed
STALL_S = 1.0  # with the running request at this age, no more than MAX_WAITING_ON_STALL wait behind it
MAX_WAITING_ON_STALL = 3
EXIT_S = 2.0  # for a worker to end by itself once told to, and again once terminated
STDERR_TAIL_BYTES = 8 << 10  # of a worker's output, kept for error messages
STDERR_TAIL_LINES = 8  # shown in an error message
MAX_ERROR_CHARACTERS = 1500  # of a runtime's own message
OOM_SCORE_ADJUST = 500  # of a worker (-1000 to 1000): the kernel takes it before the agent

# Restarts (supervisor.py).
CRASH_LOOP_DEATHS = 3
CRASH_LOOP_WINDOW_S = 60.0
RESTART_FIRST_S = 0.5  # bound of the wait before the second restart; the first has none
RESTART_MOST_S = 60.0
RESTART_LOAD_S = 120.0  # for a restarted worker to load its model

# Routing (router.py).
DRAIN_S = 30.0  # for requests on a worker that is being replaced
RESTART_WAIT_S = 5.0  # a request waits at most so long for a worker that is being restarted
MAX_WAITING_ON_RESTART = 4  # requests of one model; more are refused at once

# The inference front (inference.py, tensors.py).
SERVING_THREADS = 8  # more than STALL and RESTART waiters of one model, so that others are still served
MAX_CONCURRENT_RPCS = 64  # running and queued; more get RESOURCE_EXHAUSTED
MAX_MESSAGE_BYTES = 64 << 20  # of one request or response
MAX_REQUEST_S = 30.0  # for a request without a deadline, or with a later one
MAX_DIMENSION = (1 << 31) - 1
MAX_NAME_CHARACTERS = 128  # of a client's text when it is repeated in a message

# Golden files and warm-up (golden.py).
MAX_GOLDEN_FILE_BYTES = 64 << 20
MAX_GOLDEN_BYTES = 256 << 20  # unpacked, all arrays together
MAX_GOLDEN_ARRAYS = 64
MAX_WARM_UP_BYTES = 64 << 20  # of the inputs made for one warm-up
MAX_STREAMS = 16  # standing at once; each holds a thread
STREAM_IDLE_S = 60.0  # a stream that asked nothing for so long makes room for a new one
SPLIT_MESSAGE_BYTES = 4 << 10  # larger requests have their raw contents left in place (messages.py)

# System shared memory (shared_memory.py, peer.py).
MAX_REGIONS = 64  # registered at once; each holds a descriptor
MAX_KEY_CHARACTERS = 255  # of a shared memory object's name: the file system's own bound
PEER_CACHE_S = 10.0  # a connection's user is looked up again after this time
MAX_PEERS = 256  # connections whose user is remembered
