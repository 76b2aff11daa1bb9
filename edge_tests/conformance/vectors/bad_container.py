"""Invalid vectors of the file: cut, flipped, swapped, for another base, with numbers over their limits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from edge_tests.conformance.vectors import build, samples
from edge_tests.conformance.vectors.build import (
    CORRUPT,
    INVALID,
    LIMIT,
    MISMATCH,
    TRUNCATED,
    UNSUPPORTED,
    WRONG_BASE,
    Block,
    Header,
    Made,
    copy,
    delta,
    literal,
    one_block,
    payload,
    raw,
)
from edge_tests.conformance.vectors.samples import BASE, TARGET
from updater import limits

_HEAD_BYTES = 9  # of a block of the sample: marker, two varints of two bytes, checksum


def _bad(name: str, about: str, data: bytes, *errors: str, base: bytes | None = BASE) -> Made:
    return Made(name, about, base, data, None, errors)


def truncated() -> Iterator[Made]:
    """The sample cut inside each of its structures."""
    header, blocks = samples.sample_header(), samples.sample_blocks()
    start, data = len(header.encode()), delta(header, blocks)
    first = start + _HEAD_BYTES + len(blocks[0].payload)
    cuts = (
        ("nothing", "An empty file.", 0),
        ("magic", "The file ends inside the magic.", 5),
        ("prefix", "The file ends inside the length of the header's body.", 10),
        ("header-body", "The file ends inside the header's body.", 50),
        ("header-checksum", "The file ends inside the header's checksum.", start - 1),
        ("before-blocks", "The file ends behind its header.", start),
        ("block-lengths", "The file ends inside the lengths of a block.", start + 2),
        ("block-checksum", "The file ends inside a block's checksum.", start + _HEAD_BYTES - 2),
        ("payload", "The file ends inside a payload.", first - 1),
        ("between-blocks", "The file ends behind its first block.", first),
        ("end-marker", "The file lacks its end marker.", len(data) - 1),
    )
    for name, about, length in cuts:
        yield _bad(f"cut-{name}", about, data[:length], TRUNCATED)


def flipped() -> Iterator[Made]:
    """Single fields changed behind the checksum's back."""
    header, blocks = samples.sample_header(), samples.sample_blocks()
    encoded = header.encode()
    seed = build.seed_of(encoded)
    good = [block.encode(number, seed) for number, block in enumerate(blocks)]

    def with_header(**changes: object) -> bytes:
        broken = replace(header, checksum=seed, **changes)  # type: ignore[arg-type]
        return broken.encode() + b"".join(good) + b"E"

    def with_block(block: Block) -> bytes:
        return encoded + block.encode(0, seed) + good[1] + b"E"

    checksum = int.from_bytes(good[0][5:9], "little")
    first = replace(blocks[0], checksum=checksum)
    damaged = bytearray(first.payload)
    damaged[-1] ^= 0x10
    yield _bad("flip-magic", "A bit of the magic.", with_header(magic=b"\x88" + build.MAGIC[1:]), INVALID)
    yield _bad("flip-target-size", "The header's target size.", with_header(target_size=401), CORRUPT)
    yield _bad("flip-block-size", "The header's block size.", with_header(block_size=201), CORRUPT)
    yield _bad("flip-feature", "A character of a feature.", with_header(features=("tensos",)), CORRUPT)
    yield _bad(
        "flip-header-checksum",
        "The header's checksum.",
        replace(header, checksum=seed ^ 1).encode() + b"E",
        CORRUPT,
    )
    yield _bad(
        "flip-block-length",
        "A block's target length.",
        with_block(replace(first, target_length=199)),
        CORRUPT,
    )
    yield _bad(
        "flip-payload", "A bit of a payload.", with_block(replace(first, payload=bytes(damaged))), CORRUPT
    )
    yield _bad(
        "flip-block-checksum",
        "A block's checksum.",
        with_block(replace(first, checksum=checksum ^ 1 << 31)),
        CORRUPT,
    )
    yield _bad("flip-marker", "A block's marker.", with_block(replace(first, marker=0x43)), INVALID)
    yield _bad(
        "text-mode", "CR LF became LF on the way.", delta(header, blocks).replace(b"\r\n", b"\n"), INVALID
    )
    yield _bad("not-a-delta", "Another kind of file.", b"PK\3\4 this is no delta at all", INVALID, base=None)


def swapped() -> Iterator[Made]:
    """Blocks where they do not belong, and what follows the end."""
    header, blocks = samples.sample_header(), samples.sample_blocks()
    seed = build.seed_of(header.encode())
    other = build.seed_of(replace(header, block_size=400).encode())
    crossed = [replace(blocks[1], number=1), replace(blocks[0], number=0)]
    yield _bad(
        "blocks-swapped", "Blocks in another order, checksums as they were.", delta(header, crossed), CORRUPT
    )
    yield _bad(
        "block-twice",
        "The first block twice, with its checksum.",
        delta(header, [blocks[0], replace(blocks[0], number=0)]),
        CORRUPT,
    )
    yield _bad(
        "block-of-another-delta",
        "A block whose checksum was begun by another header.",
        delta(header, [replace(blocks[0], seed=other), replace(blocks[1], seed=seed)]),
        CORRUPT,
    )
    yield _bad("end-missing", "A byte that is no end marker.", delta(header, blocks, b"F"), INVALID)
    yield _bad("end-twice", "A byte after the end marker.", delta(header, blocks, b"EE"), INVALID)
    yield _bad("trailing-delta", "Another delta behind the end marker.", delta(header, blocks) * 2, INVALID)
    yield _bad("block-too-few", "An end marker where a block is due.", delta(header, blocks[:1]), INVALID)
    yield _bad(
        "block-too-many", "A block where the end marker is due.", delta(header, [*blocks, blocks[0]]), INVALID
    )
    longer = replace(header, target_size=401, block_count=3)
    yield _bad(
        "target-too-short",
        "Blocks that write less than the target's size.",
        delta(replace(header, target_size=401, block_size=300), blocks),
        INVALID,
    )
    tail = Block(payload(literal(1, 2), raw(b"xy")), 2)
    yield _bad(
        "target-too-long",
        "A last block that writes beyond the target's size.",
        delta(longer, [*blocks, tail]),
        INVALID,
    )


def bases() -> Iterator[Made]:
    """Another base, or none."""
    header, blocks = samples.sample_header(), samples.sample_blocks()
    data = delta(header, blocks)
    yield _bad("base-missing", "No base where the header names one.", data, WRONG_BASE, base=None)
    yield _bad("base-too-short", "A base of another size.", data, WRONG_BASE, base=BASE[:-1])
    yield _bad("base-too-long", "A base with a byte more.", data, WRONG_BASE, base=BASE + b"\0")
    yield _bad(
        "base-changed", "A base of the right size with another byte.", data, WRONG_BASE, base=b"\0" + BASE[1:]
    )
    yield _bad(
        "base-digest",
        "A header with another digest for the base.",
        delta(samples.sample_header(base_digest=hashlib.sha256(b"x").digest()), blocks),
        WRONG_BASE,
    )
    yield _bad(
        "base-size",
        "A header with another size for the base.",
        delta(samples.sample_header(base_size=601), blocks),
        WRONG_BASE,
    )
    yield _bad(
        "target-digest",
        "A header with another digest than that of what the blocks write.",
        delta(samples.sample_header(target_digest=hashlib.sha256(b"x").digest()), blocks),
        MISMATCH,
    )
    yield Made(
        "announced-another",
        "A sound delta to another target than the one that the decoder is told.",
        BASE,
        data,
        None,
        (MISMATCH,),
        announced=TARGET[:-1] + b"?",
    )
    yield _bad(
        "copy-without-base",
        "A copy in a delta that has no base.",
        one_block(None, BASE[:9], payload(copy(0, 9))),
        INVALID,
    )


def headers() -> Iterator[Made]:
    """Headers that say what they must not."""
    header, blocks = samples.sample_header(), samples.sample_blocks()

    def changed(name: str, about: str, error: str, **changes: object) -> Made:
        return _bad(name, about, delta(replace(header, **changes), blocks), error)  # type: ignore[arg-type]

    yield changed("version-0", "Version 0.", UNSUPPORTED, version=0)
    yield changed("version-2", "A later version.", UNSUPPORTED, version=2)
    yield changed("flags-unknown", "A flag that means nothing yet.", INVALID, flags=3)
    yield changed(
        "feature-unknown",
        "A feature that no decoder of this version knows.",
        UNSUPPORTED,
        features=("rans9", "tensor"),
    )
    yield changed("features-unsorted", "Features out of order.", INVALID, features=("tensor", "patch"))
    yield changed("features-twice", "A feature named twice.", INVALID, features=("tensor", "tensor"))
    yield changed("feature-malformed", "A feature's name with a capital.", INVALID, features=("Tensor",))
    yield changed("feature-empty", "A feature's name of no characters.", INVALID, features=("", "tensor"))
    yield changed("feature-missing", "A feature less than the count says.", INVALID, feature_count=2)
    yield changed("header-behind", "A byte behind the features.", INVALID, behind=b"\0")
    yield changed(
        "header-short",
        "A body that ends inside its digests.",
        INVALID,
        flags=1,
        features=(),
        target_digest=b"short",
    )
    yield changed(
        "header-overlong-count",
        "A count of blocks in a longer form than needed.",
        INVALID,
        block_count_width=2,
    )
    yield changed("block-size-0", "A block size of 0.", INVALID, block_size=0)
    yield changed("block-count-0", "No block for a target of 400 bytes.", INVALID, block_count=0)
    yield changed("block-count-low", "Fewer blocks than the target's size needs.", INVALID, block_count=1)
    yield changed("block-count-high", "More blocks than the target has bytes.", INVALID, block_count=401)
    yield changed(
        "blocks-over-limit",
        "More blocks than 1,024 and one for each 4,096 bytes.",
        LIMIT,
        target_size=1500,
        block_size=2,
        block_count=1025,
    )
    yield changed(
        "header-over-limit",
        "A body over its limit, and not there.",
        LIMIT,
        body_length=limits.MAX_DELTA_HEADER_BYTES + 1,
    )
    yield changed(
        "block-size-over-limit", "A block size over its limit.", LIMIT, block_size=limits.MAX_BLOCK_BYTES + 1
    )
    yield changed(
        "target-over-limit",
        "A target over its limit.",
        LIMIT,
        target_size=limits.MAX_TARGET_BYTES + 1,
        block_size=limits.MAX_BLOCK_BYTES,
        block_count=1025,
    )
    yield changed("target-huge", "A target of 2^64 - 1 bytes.", LIMIT, target_size=(1 << 64) - 1)
    names = tuple(f"f{number:02}" for number in range(limits.MAX_FEATURES + 1))
    yield changed("features-over-limit", "One feature more than a header may name.", LIMIT, features=names)
    yield changed("feature-over-limit", "A feature's name of 33 characters.", LIMIT, features=("f" * 33,))


def heads() -> Iterator[Made]:
    """Blocks whose heads say what they must not."""
    target = BASE[:100]
    good = payload(copy(0, 100))

    def of(name: str, about: str, error: str, block: Block, **changes: object) -> Made:
        header = Header(BASE, target, 1, 100, **changes)  # type: ignore[arg-type]
        return _bad(name, about, delta(header, [block]), error)

    yield of("block-longer", "A block longer than the block size.", INVALID, Block(good, 101))
    yield of("block-of-nothing", "A block of no bytes.", INVALID, Block(good, 0))
    limit = 100 + limits.BLOCK_OVERHEAD_BYTES
    yield of(
        "payload-over-limit", "A payload longer than its block may have.", LIMIT, Block(bytes(limit + 1), 100)
    )
    yield of(
        "payload-huge",
        "A payload of 2^64 - 1 bytes, and not there.",
        LIMIT,
        Block(good, 100, payload_length=(1 << 64) - 1),
    )
    fields = build.varint(len(good), 2) + build.varint(100)
    yield of(
        "block-overlong-length",
        "A payload's length in a longer form than needed.",
        INVALID,
        Block(good, 100, fields=fields),
    )
    yield of(
        "block-endless-length", "A length that does not end.", INVALID, Block(good, 100, fields=b"\xff" * 11)
    )


def made() -> Iterator[Made]:
    """All of this module."""
    yield from truncated()
    yield from flipped()
    yield from swapped()
    yield from bases()
    yield from headers()
    yield from heads()
