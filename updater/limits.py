"""Every limit of this room, with its unit. Formats and the delta have their own sections.

A limit guards memory, disk or time against input that may come from anyone; raising one is safe only as far
as the smallest supported box allows.
"""

from __future__ import annotations

from dataclasses import dataclass

# Manifests.
MAX_MANIFEST_BYTES = 1 << 20
MAX_VARIANTS = 32
MAX_FILES_PER_VARIANT = 256
MAX_TOLERATED_OUTPUTS = 64  # with bounds of their own, of a variant
MAX_ANNOTATIONS = 64  # entries, in each map
MAX_TEXT_CHARACTERS = 1024  # of any free text in a manifest
MAX_FILE_BYTES = 16 << 30  # of one file of a version

# Enrolment (enrolment.py).
ENROLMENT_TIMEOUT_S = 20.0  # of one call

# Trust: signed metadata, as a device takes it from anyone, and keys.
MAX_ROOT_BYTES = 256 << 10  # of one root
MAX_TIMESTAMP_BYTES = 16 << 10
MAX_SNAPSHOT_BYTES = 1 << 20
MAX_TARGETS_BYTES = 1 << 20  # of one targets or delegated role; some 4,000 versions
MAX_ROOT_ROTATIONS = 256  # taken in one refresh
MAX_DELEGATIONS = 32  # roles looked into for one version
MAX_STATEMENT_BYTES = 1 << 20  # of a signed desired state
MAX_KEY_FILE_BYTES = 64 << 10
MAX_ROLE_KEYS = 64  # of one role; each wants a signature checked
MIN_PASSPHRASE_CHARACTERS = 12  # of a new one: whoever has the file can try them at leisure
MAX_PASSPHRASE_CHARACTERS = 1024
SCRYPT_COST = 1 << 16  # of sealing a key: 64 MiB and some 0.2 s for each guess at its passphrase

# Deltas. The decoder's memory follows from the block, the window and the streams of one block.
DEFAULT_BLOCK_BYTES = 8 << 20  # of target that one block writes, unless the encoder is told otherwise
FULL_BLOCK_BYTES = 2 << 20  # the same in a full copy, whose blocks are as long as what they write
MAX_BLOCK_BYTES = 16 << 20  # of target that one block writes
MAX_SMALL_BLOCKS = 1024  # blocks that a delta may have, and one more for each ...
MEAN_BLOCK_BYTES = 4096  # ... so many bytes of its target: each may look at all of its window
MIN_BLOCK_BYTES = 64  # below this the encoder refuses: every element and frame must fit
BLOCK_OVERHEAD_BYTES = 64  # a block's payload is at most its target length and this
STREAM_EXPANSION = 4  # decoded streams of a block, together, are at most this times its target length ...
STREAM_OVERHEAD_BYTES = 4096  # ... and this
MAX_WINDOW_BYTES = 8 << 20  # of base that one block's patches look back into, together
MAX_WINDOW_RANGES = 4096  # of base that one block's windows are gathered from
MAX_STREAMS = 4096  # in one block
MAX_INSTRUCTIONS = 1 << 16  # in one block
MAX_LANE_SYMBOLS = 8192  # of a rANS stream for each lane: a step takes its time however few lanes it moves
MAX_REFERENCES = 64  # records of a program that lead from one to another
MAX_RECORD_NUMBER = 1 << 62  # of any field of a record, either side of zero
MAX_CODED_DECISIONS = 1 << 21  # binary decisions of one arithmetic coded stream, some microseconds each
MAX_MODELLED_BYTES = 256 << 10  # that one block's byte model writes; of these, up to ...
MAX_MIXED_BYTES = 64 << 10  # ... so many go through all its models, some 0.1 ms each
MAX_MODEL_WINDOW_BYTES = 128 << 10  # of base that it looks at
OPERAND_EXPANSION = 24  # a program reads at most this times its target length of the base ...
OPERAND_OVERHEAD_BYTES = 64 << 10  # ... and this
MAX_OPERAND_RUNS = 1 << 18  # of the base that operands of one program are gathered from; a read each
GATHER_ELEMENTS = 1 << 22  # of an operand that are gathered at a time
MAX_CHANNELS = 1 << 20  # of one requantise instruction
MAX_DELTA_HEADER_BYTES = 4096  # of a header's body
MAX_FEATURES = 64  # named in a header
MAX_FEATURE_CHARACTERS = 32  # of one feature's name
MAX_TARGET_BYTES = MAX_FILE_BYTES  # of the file that a delta writes
SYNC_BYTES = 64 << 20  # of target between two fsyncs where the delta lies in a file; a box has its own
MAX_JOURNAL_BYTES = 64 << 10  # of the file beside a partial target that says how far it is whole
ARITHMETIC_ELEMENTS = 1 << 18  # elements that predictors work on at a time; bounds their temporaries
BASE_READ_BYTES = 1 << 20  # of base read at a time by a copy
MAX_ENCODER_THREADS = 64
BLOCKS_AHEAD = 1  # decoded beside the one that is written next, each some five times its length of memory


@dataclass(frozen=True)
class DecodeLimits:
    """What a decoder accepts from a delta, each checked before anything is allocated for it.

    Attributes:
        header_bytes: a header's body.
        block_bytes: target bytes that one block writes.
        window_bytes: base bytes that one block's patches look into, together.
        instructions: instructions of one block.
        target_bytes: the file that the delta writes.
        blocks_ahead: blocks decoded ahead where cores are free; a bound for memory, not for the delta.
    """

    header_bytes: int = MAX_DELTA_HEADER_BYTES
    block_bytes: int = MAX_BLOCK_BYTES
    window_bytes: int = MAX_WINDOW_BYTES
    instructions: int = MAX_INSTRUCTIONS
    target_bytes: int = MAX_TARGET_BYTES
    blocks_ahead: int = BLOCKS_AHEAD
