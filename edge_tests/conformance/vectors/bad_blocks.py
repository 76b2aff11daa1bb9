"""Invalid vectors of payloads: stream tables, frames, instructions, tensors. The checksums are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edge_tests.conformance.vectors import build
from edge_tests.conformance.vectors.build import (
    CORRUPT,
    INVALID,
    LIMIT,
    LZMA,
    PATCH,
    UNSUPPORTED,
    ZSTD,
    Made,
    Stream,
    Tensor,
    copy,
    literal,
    one_block,
    payload,
    raw,
    varint,
)
from edge_tests.conformance.vectors.samples import BASE
from updater import limits

_TARGET = BASE[:100]
_DAMAGED = (CORRUPT, INVALID)  # a decoder may see either first


def _bad(
    name: str,
    about: str,
    body: bytes,
    *errors: str,
    features: tuple[str, ...] = ("lzma", "patch", "requantise", "tensor"),
) -> Made:
    return Made(name, about, BASE, one_block(BASE, _TARGET, body, features), None, errors)


def tables() -> Iterator[Made]:
    """Stream tables."""
    whole = literal(1, 100)
    yield _bad("no-streams", "A table of no streams.", b"\0", INVALID)
    yield _bad(
        "streams-over-limit", "One stream more than a block may have.", varint(limits.MAX_STREAMS + 1), LIMIT
    )
    yield _bad(
        "streams-missing", "A stream less than the count says.", payload(copy(0, 100), count=2), INVALID
    )
    yield _bad("table-behind", "A byte behind the streams.", payload(copy(0, 100), behind=b"\0"), INVALID)
    yield _bad(
        "table-overlong",
        "A count of streams in a longer form than needed.",
        b"\x81\0" + payload(copy(0, 100))[1:],
        INVALID,
    )
    yield _bad("table-endless", "A count that does not end.", b"\xff" * 20, INVALID)
    yield _bad(
        "coder-unknown", "A coder without a meaning.", payload(whole, Stream(9, BASE[:100], 100)), UNSUPPORTED
    )
    yield _bad(
        "stream-beyond-payload",
        "A stream longer than what is left.",
        payload(whole, Stream(ZSTD, b"x", 100, coded_length=99)),
        INVALID,
    )
    over = limits.STREAM_EXPANSION * 100 + limits.STREAM_OVERHEAD_BYTES + 1
    yield _bad(
        "streams-expand",
        "Streams larger than a block of 100 bytes may have.",
        payload(whole, build.zstd(bytes(over))),
        LIMIT,
    )
    huge = Stream(ZSTD, build.frame(bytes(100)), (1 << 64) - 1)
    yield _bad("stream-huge", "A stream of 2^64 - 1 bytes.", payload(whole, huge), LIMIT)


def frames() -> Iterator[Made]:
    """Zstd frames that lie."""
    whole = literal(1, 100)

    def of(coded: bytes, length: int = 100) -> bytes:
        return payload(whole, Stream(ZSTD, coded, length))

    bomb = build.frame(bytes(1 << 26))
    yield _bad("frame-bomb", "A frame of 64 MiB in a stream of 100 bytes.", of(bomb[:80]), *_DAMAGED)
    yield _bad(
        "frame-larger",
        "A frame that holds a byte more than its stream.",
        of(build.frame(bytes(101))),
        *_DAMAGED,
    )
    yield _bad(
        "frame-smaller",
        "A frame that holds a byte less than its stream.",
        of(build.frame(bytes(99))),
        *_DAMAGED,
    )
    lying = bytearray(build.frame(bytes(99)))
    lying[1] = 100
    yield _bad("frame-lies", "A frame that announces a byte more than it holds.", of(bytes(lying)), CORRUPT)
    yield _bad(
        "frame-without-size",
        "A frame without its content size.",
        of(build.frame(bytes(100), content_size=False)),
        *_DAMAGED,
    )
    large = build.frame(bytes(100), content_size=False, window_log=25)
    yield _bad("frame-window", "A frame that asks for a window of 32 MiB.", of(large), *_DAMAGED)
    yield _bad("frame-none", "Bytes that are no frame.", of(b"\xff no frame"), *_DAMAGED)
    yield _bad("frame-empty", "No bytes where a frame is due.", of(b""), *_DAMAGED)
    coded = payload(literal(1, 100) + b"", Stream(ZSTD, _TARGET, 100), Stream(ZSTD, b"", 0))
    yield _bad("frame-of-nothing", "A coded stream of no bytes.", coded, *_DAMAGED)
    yield _bad("frame-cut", "A frame cut short.", of(build.frame(BASE[:60] + bytes(40))[:-9]), CORRUPT)
    yield _bad(
        "frame-behind",
        "Bytes behind a frame, in its stream.",
        of(build.frame(bytes(100)) + b"\0\0"),
        *_DAMAGED,
    )


def packed() -> Iterator[Made]:
    """Streams of LZMA that lie."""
    whole = literal(1, 100)
    right = build.packed(_TARGET).coded

    def of(coded: bytes, length: int = 100) -> bytes:
        return payload(whole, Stream(LZMA, coded, length))

    yield _bad(
        "lzma-unnamed", "LZMA, though the header does not name the feature.", of(right), INVALID, features=()
    )
    yield _bad(
        "lzma-properties", "Properties of more than 4 bits of position.", of(b"\xe1" + right[1:]), INVALID
    )
    yield _bad("lzma-literal-bits", "Five bits of literal context.", of(b"\x05" + right[1:]), INVALID)
    yield _bad("lzma-empty", "No bytes where properties are due.", of(b""), *_DAMAGED)
    yield _bad("lzma-none", "Properties and nothing more.", of(right[:1]), CORRUPT)
    yield _bad("lzma-cut", "LZMA cut short.", of(right[:-20]), CORRUPT)
    yield _bad("lzma-without-end", "LZMA without the last byte of its end.", of(right[:-1]), CORRUPT)
    yield _bad("lzma-behind", "A byte behind the end marker.", of(right + b"\0"), CORRUPT)
    bomb = build.packed(bytes(1 << 24)).coded
    yield _bad("lzma-bomb", "LZMA of 16 MiB in a stream of 100 bytes.", of(bomb[:80]), CORRUPT)
    yield _bad(
        "lzma-smaller", "LZMA of a byte less than its stream.", of(build.packed(bytes(99)).coded), CORRUPT
    )
    coded = payload(whole + b"", Stream(ZSTD, build.frame(_TARGET), 100), Stream(LZMA, b"", 0))
    yield _bad("lzma-of-nothing", "A coded stream of no bytes.", coded, *_DAMAGED)


def windows() -> Iterator[Made]:
    """Windows of patches."""
    whole = literal(1, 100)

    def of(*window: tuple[int, int], **changes: int) -> bytes:
        coded = build.frame(_TARGET[:50] + bytes(50), BASE)
        return payload(whole, Stream(PATCH, coded, 100, window, **changes))

    yield _bad("window-beyond", "A window's range beyond the base.", of((0, 601)), INVALID)
    yield _bad("window-before", "A window's range before the base.", of((-1, 600)), INVALID)
    yield _bad("window-far", "A window's range at 2^62.", of((1 << 62, 5)), INVALID)
    yield _bad(
        "window-second-beyond",
        "A second range that begins behind the base's end.",
        of((0, 600), (1, 1)),
        INVALID,
    )
    yield _bad("window-empty-range", "A range of no bytes.", of((0, 600), (0, 0)), INVALID)
    yield _bad("window-none", "A window of no ranges.", of(), INVALID)
    yield _bad("window-over-limit", "A window over its limit.", of((0, limits.MAX_WINDOW_BYTES + 1)), LIMIT)
    yield _bad(
        "window-ranges-over-limit",
        "One range more than a window may have.",
        of(range_count=limits.MAX_WINDOW_RANGES + 1),
        LIMIT,
    )
    other = payload(whole, Stream(PATCH, build.frame(_TARGET[:50] + bytes(50), BASE), 100, [(500, 60)]))
    yield _bad("window-another", "A frame that refers beyond the window it is given.", other, CORRUPT)
    listing = copy(0, 100)
    coded = Stream(PATCH, build.frame(listing, BASE), len(listing), [(0, 600)])
    yield _bad("patch-instructions", "Stream 0 as a patch.", payload(coded), INVALID)
    body = payload(whole, build.patch(_TARGET, BASE, [(0, 600)]))
    yield _bad(
        "patch-unnamed", "A patch, though the header does not name the feature.", body, INVALID, features=()
    )


def instructions() -> Iterator[Made]:
    """Instructions."""
    yield _bad("opcode-unknown", "An opcode without a meaning.", payload(b"\x09"), UNSUPPORTED)
    yield _bad("copy-beyond", "A copy that ends one byte behind the base.", payload(copy(501, 100)), INVALID)
    yield _bad("copy-before", "A copy that begins before the base.", payload(copy(-1, 100)), INVALID)
    yield _bad("copy-far", "A copy from 2^62.", payload(copy(1 << 62, 100)), INVALID)
    yield _bad("copy-nothing", "A copy of no bytes.", payload(copy(0, 0) + copy(0, 100)), INVALID)
    yield _bad("copy-huge", "A copy of 2^64 - 1 bytes.", payload(copy(0, (1 << 64) - 1)), INVALID)
    yield _bad("copy-cut", "Instructions that end inside one.", payload(b"\0\0"), INVALID)
    yield _bad("copy-overlong", "A length in a longer form than needed.", payload(b"\0\0\xe4\0"), INVALID)
    yield _bad(
        "block-short", "Instructions that write a byte less than their block.", payload(copy(0, 99)), INVALID
    )
    yield _bad(
        "block-long",
        "Instructions that write a byte more than their block.",
        payload(copy(0, 50) + copy(0, 51)),
        INVALID,
    )
    yield _bad("no-instructions", "No instructions.", payload(b""), INVALID)
    yield _bad(
        "literal-beyond",
        "A literal longer than its stream.",
        payload(literal(1, 100), raw(bytes(99))),
        INVALID,
    )
    yield _bad(
        "literal-nothing", "A literal of no bytes.", payload(literal(1, 0) + copy(0, 100), raw(b"")), INVALID
    )
    yield _bad(
        "stream-left", "A stream with a byte left over.", payload(literal(1, 100), raw(bytes(101))), INVALID
    )
    yield _bad(
        "stream-unused", "A stream that no instruction takes from.", payload(copy(0, 100), raw(b"x")), INVALID
    )
    yield _bad(
        "stream-missing",
        "A literal from a stream that is not there.",
        payload(literal(2, 100), raw(bytes(100))),
        INVALID,
    )
    yield _bad("stream-0", "A literal from the instructions themselves.", payload(literal(0, 100)), INVALID)
    many = limits.MAX_INSTRUCTIONS + 1
    body = payload(build.zstd(copy(0, 1) + copy(-1, 1) * (many - 1)))
    yield Made(
        "instructions-over-limit",
        "One instruction more than a block may have.",
        BASE,
        one_block(BASE, BASE[:1] * many, body),
        None,
        (LIMIT,),
    )


def tensors() -> Iterator[Made]:
    """Tensors."""
    item = Tensor(1, 0, 1, 100, (1,))

    def of(changed: Tensor, *streams: bytes) -> bytes:
        return payload(changed.encode(), *map(raw, streams))

    zeros = bytes(100)
    yield _bad(
        "tensor-unnamed",
        "A tensor, though the header does not name the feature.",
        of(item, zeros),
        INVALID,
        features=(),
    )
    yield _bad(
        "predictor-unknown",
        "A predictor without a meaning.",
        of(replace(item, predictor=3), zeros),
        UNSUPPORTED,
    )
    yield _bad(
        "coding-unknown", "A coding without a meaning.", of(replace(item, coding=2), zeros), UNSUPPORTED
    )
    yield _bad(
        "element-type-unknown",
        "An element type without a meaning.",
        of(replace(item, kind=12), zeros),
        UNSUPPORTED,
    )
    yield _bad(
        "tensor-beyond",
        "A tensor whose elements end behind the base.",
        of(replace(item, distance=501), zeros),
        INVALID,
    )
    yield _bad(
        "tensor-before",
        "A tensor whose elements begin before the base.",
        of(replace(item, distance=-1), zeros),
        INVALID,
    )
    yield _bad(
        "tensor-nothing",
        "A tensor of no elements.",
        payload(replace(item, count=0).encode() + copy(0, 100), raw(b"")),
        INVALID,
    )
    yield _bad(
        "tensor-long", "A tensor longer than its block.", of(replace(item, count=101), bytes(101)), INVALID
    )
    yield _bad("tensor-huge", "A tensor of 2^33 elements.", of(replace(item, count=1 << 33), zeros), INVALID)
    yield _bad("planes-short", "A plane that ends early.", of(item, bytes(99)), INVALID)
    yield _bad(
        "plane-missing",
        "A plane of a stream that is not there.",
        of(replace(item, streams=(2,)), zeros),
        INVALID,
    )
    sparse = replace(item, coding=1, streams=(1, 2), gap_bytes=2)
    yield _bad("gap-beyond", "A gap that leads beyond the tensor.", of(sparse, b"\x62\x01", b"\0\0"), INVALID)
    yield _bad("gap-endless", "A gap whose last byte is 255.", of(sparse, b"\x01\xff", b"\0"), INVALID)
    yield _bad(
        "gap-long", "A gap of 255 elements in a tensor of 100.", of(sparse, b"\xff\x00", b"\0"), INVALID
    )
    yield _bad(
        "gaps-short", "Fewer gap bytes than the instruction takes.", of(sparse, b"\x01", b"\0"), INVALID
    )
    yield _bad(
        "gaps-huge", "2^62 gap bytes.", of(replace(sparse, gap_bytes=1 << 62), b"\1\1", b"\0\0"), INVALID
    )


def requantisations() -> Iterator[Made]:
    """Requantisations out of their ranges."""
    zeros = bytes(100)
    one = (2, 0, 1, 1, 10, 0)  # parameter stream, start, inner, channels, shift, many

    def of(shape: tuple[int, ...], numbers: list[int], kind: int = 1) -> bytes:
        parameters = b"".join(map(build.signed, numbers))
        return payload(Tensor(2, 0, kind, 100, (1,), requantise=shape).encode(), raw(zeros), raw(parameters))

    good = [0, 0, 0]
    yield _bad(
        "requantise-unnamed",
        "Though the header does not name the feature.",
        of(one, good),
        INVALID,
        features=("tensor",),
    )
    yield _bad("requantise-floats", "Floats cannot be requantised.", of(one, good, 2), INVALID)
    yield _bad("multiplier-0", "A multiplier of 0.", of(one, [-1024, 0, 0]), INVALID)
    yield _bad("multiplier-over", "A multiplier over 2^30.", of(one, [(1 << 30) - 1023, 0, 0]), INVALID)
    yield _bad("shift-over", "A shift of 63.", of((2, 0, 1, 1, 63, 0), [-(1 << 62), 0, 0]), INVALID)
    yield _bad("zero-point-over", "A zero point beyond 2^31.", of(one, [0, (1 << 31) + 1, 0]), INVALID)
    yield _bad("channels-0", "No channels.", of((2, 0, 1, 0, 10, 0), [0, 0]), INVALID)
    yield _bad(
        "channels-over-limit",
        "More channels than the limit.",
        of((2, 0, 1, limits.MAX_CHANNELS + 1, 10, 0), good),
        LIMIT,
    )
    yield _bad("inner-0", "Channels of no elements.", of((2, 0, 0, 1, 10, 0), good), INVALID)
    yield _bad("many-2", "A flag that is neither 0 nor 1.", of((2, 0, 1, 1, 10, 2), good), INVALID)
    yield _bad("parameters-short", "A parameter less than the channels need.", of(one, good[:2]), INVALID)
    yield _bad("parameters-left", "A parameter that nothing takes.", of(one, [*good, 0]), INVALID)


def made() -> Iterator[Made]:
    """All of this module."""
    yield from tables()
    yield from frames()
    yield from packed()
    yield from windows()
    yield from instructions()
    yield from tensors()
    yield from requantisations()
