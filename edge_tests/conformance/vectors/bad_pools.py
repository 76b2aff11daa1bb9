"""Invalid vectors of programs: pools, tables, rANS streams, skeletons."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import build, programs
from edge_tests.conformance.vectors.bad_programs import REFUSED, SIZE, bad, copying, pooled
from edge_tests.conformance.vectors.build import CORRUPT, INVALID, LIMIT, Made
from edge_tests.conformance.vectors.programs import Parts
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES
from edge_tests.conformance.vectors.valid_programs import level
from updater import limits
from updater.delta.program import records as ops
from updater.delta.program import tables
from updater.delta.program.arithmetic import Coder
from updater.delta.program.records import KINDS, POOL, SPARSE, Record


def pools() -> Iterator[Made]:
    """Pools, tables, rANS streams."""
    parts, target = pooled()
    sent, stream = parts.tables["codes"], parts.stream

    def of(name: str, about: str, code: str = INVALID, **changes: object) -> Made:
        program = replace(parts, **changes).encode()  # type: ignore[arg-type]
        return Made(name, about, NUMBERS, programs.delta(NUMBERS, target, program), None, (code,))

    def other(state: int) -> bytes:
        return _other_end(sent, target, state)

    yield of("pool-without-tables", "A pool without tables.", tables={"codes": b""})
    yield of("pool-without-stream", "Pools without a stream.", stream=b"")
    yield of("pool-stream-beyond", "A stream longer than its program.", stream_bytes=5000)
    yield of("pool-tables-left", "Tables with a byte left over.", tables={"codes": sent + b"\x80"})
    yield of("pool-cut", "A rANS stream that lacks its last word.", stream=stream[:-2])
    yield of("pool-odd", "A rANS stream that ends inside a word.", stream=stream[:-1])
    yield of("pool-long", "A rANS stream with a word more.", stream=stream + b"\0\0")
    yield of("pool-states-cut", "A rANS stream that ends inside its states.", stream=stream[:2])
    yield of("pool-lanes-over", "More lanes than the limit.", stream=bytes([15]) + stream[1:])
    yield of("pool-lanes-huge", "2^255 lanes.", stream=b"\xff" + stream[1:])
    yield of("pool-raw-left", "Raw bits that nothing takes.", raw_sizes={"codes": 3}, raw=b"\0")
    yield of("pool-raw-beyond", "Raw bits that are not there.", raw_sizes={"codes": 1 << 40})
    yield of("pool-state-left", "A state that does not end between 2^16 and 2^17.", stream=other(3 << 16))
    yield of("pool-payload-left", "Lanes that carry what no pool has.", stream=other((1 << 16) + 5))
    yield _long_lane()
    yield from _tables(of)
    yield from _raw()
    yield from _gaps()


def _long_lane() -> Made:
    """One lane for more symbols than a lane may have."""
    count = limits.MAX_LANE_SYMBOLS + 1
    base, record = bytes(count), Record(ops.CODES, ops.U8, 0, count, residual=POOL, activity=level([2]))
    target = bytes(at % 7 for at in range(count))
    parts = programs.encode(base, target, [record])
    program = replace(parts, stream=b"\0" + parts.stream[1:]).encode()
    about = "More symbols in one lane than a lane may have."
    return Made("pool-lane-over-limit", about, base, programs.delta(base, target, program), None, (LIMIT,))


def _raw() -> Iterator[Made]:
    """Raw bits of floats."""
    floats = Record(ops.FLOAT, ops.F32, 0, 48, 1, PLACES["clean"].at, residual=POOL, activity=level([-14]))
    clean = np.frombuffer(NUMBERS, "<u4", count=48, offset=PLACES["clean"].at)
    moved = (clean + np.arange(48, dtype=np.uint32) * 997).astype("<u4").tobytes()
    whole = programs.encode(NUMBERS, moved, [floats])

    def of(name: str, about: str, changed: Parts) -> Made:
        return Made(name, about, NUMBERS, programs.delta(NUMBERS, moved, changed.encode()), None, (INVALID,))

    size = whole.raw_sizes["float"]
    short = replace(whole, raw_sizes={"float": size - 1}, raw=whole.raw[:-1])
    yield of("pool-raw-short", "Raw bits that end before their records.", short)
    for spare in range(1, 8):
        padded = whole.raw[:-1] + bytes([whole.raw[-1] | 0x100 - (1 << 8 - spare)])
        if padded != whole.raw and whole.raw[-1] < 1 << 8 - spare:
            yield of("pool-padding", "Padding that is not zero.", replace(whole, raw=padded))
            break


def _gaps() -> Iterator[Made]:
    """A gap that leads out of its record: pools of a longer record under a shorter one."""
    target = bytearray(NUMBERS[:SIZE])
    target[399] ^= 1
    long = Record(ops.CODES, ops.U8, 0, SIZE, 1, 0, residual=SPARSE, changed=1)
    whole = programs.encode(NUMBERS, bytes(target), [long])
    coded = programs.code([replace(long, count=396)], SIZE, 0)
    program = replace(whole, records=coded, frame=b"\0" + bytes(4)).encode()
    yield bad("pool-gap-beyond", "A gap that leads beyond its record.", program)


def _other_end(sent: bytes, target: bytes, state: int) -> bytes:
    """The stream of the right symbols, from another state than encoders begin with."""
    model = tables.read(sent, KINDS["codes"].contexts, KINDS["codes"].alphabet)
    row = model.frequencies[model.classes[(2 + 9) * ops.FRACTIONS + ops.FRACTIONS // 2]].tolist()
    words = b""
    for at in reversed(range(len(target))):
        symbol = ops.CODE_EDGE + at % 3
        if state >= row[symbol] << 20:
            words, state = struct.pack("<H", state & 0xFFFF) + words, state >> 16
        state = (state // row[symbol] << 12) + state % row[symbol] + sum(row[:symbol])
    length = state.bit_length() - 1
    bits = (state - (1 << length)).to_bytes((length + 7) // 8, "little")
    return bytes([0, length - 16]) + bits + words


def _many_tables(contexts: int, alphabet: int) -> bytes:
    """255 tables of all symbols, equally frequent."""
    coder, number = Coder(), 255
    classes = np.minimum(np.arange(contexts), number - 1).astype(np.uint8)
    tables.code_model(
        coder, classes, contexts, alphabet, number, 1, np.ones((number, alphabet), dtype=np.int64)
    )
    return coder.finish()


def _tables(of: Callable[..., Made]) -> Iterator[Made]:
    kind = KINDS["codes"]

    def coded(number: int, contexts: Sequence[int] = (), levels: Sequence[int] = (), power: int = 0) -> bytes:
        """Tables as they are sent; `contexts` has the length of each run, less one, and its table."""
        coder = Coder()
        coder.unsigned("number", number)
        coder.bits(power, 2)
        newest = -1
        for place in range(0, len(contexts), 2):
            coder.unsigned("run", contexts[place])
            value = contexts[place + 1]
            fresh = newest + 1 < number and coder.bit("new", int(value == newest + 1))
            if not fresh:
                coder.bits(value, newest.bit_length())
            newest = max(newest, value)
        if levels:
            first, last, *values = levels
            coder.signed("first", first)
            coder.signed("last", last + 1)
            coder.bit("holes", 0)
            for value in values:
                coder.signed(("level", 1), value - 1)
        return coder.finish()

    yield of("tables-0", "No table.", tables={"codes": coded(0)})
    yield of(
        "tables-over-limit",
        "Tables of more decisions than a range of 400 bytes allows.",
        LIMIT,
        tables={"codes": _many_tables(kind.contexts, kind.alphabet)},
    )
    yield of("tables-256", "256 tables.", tables={"codes": coded(256)})
    yield of(
        "tables-run-beyond",
        "A run of contexts that leads beyond the last.",
        tables={"codes": coded(2, (kind.contexts, 0))},
    )
    yield of(
        "tables-unknown",
        "A context whose table is not there yet.",
        tables={"codes": coded(3, (0, 0, 0, 1, 0, 3))},
    )
    yield of(
        "table-beyond",
        "A table whose last symbol lies outside the alphabet.",
        tables={"codes": coded(1, (), (0, kind.alphabet))},
    )
    yield of(
        "table-before",
        "A table whose first symbol lies before the alphabet.",
        tables={"codes": coded(1, (), (-1, 5))},
    )
    yield of(
        "table-empty",
        "A table whose last symbol lies before its first.",
        tables={"codes": coded(1, (), (9, 8))},
    )
    yield of("table-level-0", "A used symbol of level 0.", tables={"codes": coded(1, (), (100, 100, 0))})
    yield of(
        "table-level-over",
        "A level over the range of its precision.",
        tables={"codes": coded(1, (), (100, 100, 17))},
    )
    yield of("table-level-huge", "A level of 2^40.", tables={"codes": coded(1, (), (100, 100, 1 << 40))})
    yield of("tables-endless", "Tables that end before their levels.", tables={"codes": coded(255)})


def skeletons() -> Iterator[Made]:
    """Skeletons."""
    good = copying()
    between = good.frame[1:]

    def of(name: str, about: str, frame: bytes, *errors: str, window: tuple[int, int] = (0, 0)) -> Made:
        return bad(name, about, replace(good, frame=frame, window=window).encode(), errors or (INVALID,))

    yield of("skeleton-missing", "No skeleton.", b"")
    yield of("skeleton-unknown", "A way without a meaning.", b"\4" + between)
    yield of("skeleton-short", "A raw skeleton that lacks a byte.", b"\0" + between[:-1])
    yield of("skeleton-long", "A raw skeleton with a byte more.", b"\0" + between + b"\0")
    damaged = (CORRUPT, INVALID)
    yield of(
        "skeleton-frame-long",
        "A frame of a byte more than the records leave.",
        b"\1" + build.frame(between + b"\0", b""),
        *damaged,
    )
    yield of("skeleton-frame-none", "Bytes that are no frame.", b"\1 no frame", *damaged)
    yield of("skeleton-frame-empty", "No bytes where a frame is due.", b"\2", *damaged)
    bomb = build.frame(bytes(1 << 26))
    yield of("skeleton-bomb", "A frame of 64 MiB.", b"\2" + bomb[:80], *damaged)
    frame = b"\2" + build.frame(NUMBERS[:60], NUMBERS)
    yield of(
        "skeleton-window-another", "A frame that refers beyond its window.", frame, *damaged, window=(0, 9)
    )
    parts = Parts(programs.code([], 9, 0))
    features = ("program", "tracking")
    for name, about, sent, named in (
        ("tracked-unnamed", "The header does not name the feature tracking.", b"\4\0\0", features[:1]),
        ("unknown-5", "A way without a meaning; the header names every feature.", b"\5\0\0", features),
        (
            "tracked-long",
            "A skeleton along the base, with bytes that no decision needs.",
            b"\4" + bytes(30),
            features,
        ),
    ):
        data = programs.delta(None, bytes(9), replace(parts, frame=sent).encode(), named)
        yield Made(f"skeleton-{name}", about, None, data, None, (INVALID,))
    size = limits.MAX_MODELLED_BYTES + 1
    large = Parts(programs.code([], size, 0), frame=b"\3" + bytes(99))
    data = programs.delta(None, bytes(size), large.encode())
    yield Made(
        "skeleton-model-over-limit", "More bytes than the byte model may write.", None, data, None, REFUSED
    )


def made() -> Iterator[Made]:
    """All of this module."""
    yield from pools()
    yield from skeletons()
