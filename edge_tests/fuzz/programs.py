"""Programs out of choices: invented records, or a sound program whose parts are changed one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import build, programs
from edge_tests.conformance.vectors.programs import Parts
from edge_tests.fuzz.choices import Choices
from edge_tests.fuzz.coders import DrawingCoder
from updater.delta.program import body, records, tables
from updater.delta.program.arithmetic import DEFAULT_LIMIT
from updater.delta.program.records import KINDS, Record, RowBits, Share
from updater.errors import SluiceError

_GROUPS = 2  # of contexts that invented tables cover at most
# What the encoder's own statements make of values that no encoder has.
_FAULTS = (AssertionError, ArithmeticError, LookupError, TypeError, ValueError, SluiceError)


def spoil(data: bytes, choices: Choices) -> bytes:
    """Bytes with a few changes: other values, pieces left out, repeated or put in."""
    out = bytearray(data)
    for _ in range(1 + choices.below(3)):
        at = choices.below(len(out) + 1)
        kind = choices.below(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << choices.below(8)
        elif kind == 1 and at < len(out):
            out[at] = choices.small()
        elif kind == 2:
            del out[at : at + 1 + choices.below(8)]
        elif kind == 3:
            out[at:at] = out[at : at + 1 + choices.below(16)]
        else:
            out[at:at] = choices.bytes(1 + choices.below(8))
    return bytes(out)


def invent(base: bytes, length: int, offset: int, choices: Choices) -> bytes:
    """A program of drawn records for `length` bytes; the encoder adds what fits them, where it can."""
    coder, found = DrawingCoder(choices, body.RECORD_LIMIT), list[Record]()
    parts = Parts((b"", b""))
    try:
        found = records.code_records(coder, None, length, offset, RowBits(), Share(length))
        target = (choices.bytes(16) * (length // 16 + 1))[:length]
        parts = programs.encode(base, target, found, offset)
    except _FAULTS:  # readers will find the same fault, or other bytes
        drawn = (coder.finish(), choices.bytes(choices.below(8)))
        kinds = [name for name in KINDS if choices.below(4) == 0]
        parts = replace(
            parts,
            records=drawn,
            frame=_frame(base, length, found, choices),
            tables={name: _tables(name, choices, None) for name in kinds},
            raw_sizes={name: choices.below(16) for name in kinds},
            stream=bytes([choices.below(4)]) + choices.bytes(choices.below(64)),
            raw=choices.bytes(choices.below(32)),
        )
    return change(parts, length, offset, choices) if choices.below(2) else parts.encode()


def _frame(base: bytes, length: int, found: list[Record], choices: Choices) -> bytes:
    size = max(0, length - sum(record.length for record in found))
    way = choices.below(5)
    if way in (programs.ZSTD, programs.ZSTD_WHOLE):
        return bytes([way]) + build.frame(choices.bytes(size), base)
    return bytes([way]) + choices.bytes(size)


def _tables(name: str, choices: Choices, source: bytes | None) -> bytes:
    """Tables of drawn values, or those of `source` with some changed."""
    kind = KINDS[name]
    contexts = kind.contexts * (1 + choices.below(_GROUPS))
    coder = DrawingCoder(choices, DEFAULT_LIMIT, source)
    with contextlib.suppress(*_FAULTS):  # readers will find the same fault
        tables.code_model(coder, np.zeros(contexts, dtype=np.uint8), contexts, kind.alphabet, 1, 0, None)
    return coder.finish()


def change(parts: Parts, length: int, offset: int, choices: Choices) -> bytes:
    """The program with one or two parts changed."""
    for _ in range(1 + choices.below(2)):
        parts = choices.one(_CHANGES)(parts, length, offset, choices)
    return parts.encode()


def _records(parts: Parts, length: int, offset: int, choices: Choices) -> Parts:
    """Values of the records' own grammar."""
    coder, rows = DrawingCoder(choices, body.RECORD_LIMIT, parts.records[0]), RowBits(parts.records[1])
    with contextlib.suppress(*_FAULTS):
        records.code_records(coder, None, length, offset, rows, Share(length))
    return replace(parts, records=(coder.finish(), parts.records[1]))


def _some_tables(parts: Parts, _length: int, _offset: int, choices: Choices) -> Parts:
    if not parts.tables:
        return _pool(parts, _length, _offset, choices)
    name = choices.one(sorted(parts.tables))
    return replace(parts, tables={**parts.tables, name: _tables(name, choices, parts.tables[name])})


def _pool(parts: Parts, _length: int, _offset: int, choices: Choices) -> Parts:
    """A pool more, or less."""
    name, found = choices.one(sorted(KINDS)), dict(parts.tables)
    if found.pop(name, None) is None:
        found[name] = _tables(name, choices, None)
    return replace(parts, tables=found, raw_sizes={**parts.raw_sizes, name: choices.below(16)})


def _bytes(parts: Parts, _length: int, _offset: int, choices: Choices) -> Parts:
    """Bytes of any part."""
    kind = choices.below(6)
    if kind == 0:
        return replace(parts, records=(spoil(parts.records[0], choices), parts.records[1]))
    if kind == 1:
        return replace(parts, records=(parts.records[0], spoil(parts.records[1], choices)))
    if kind == 2:
        return replace(parts, stream=spoil(parts.stream, choices))
    if kind == 3:
        return replace(parts, raw=spoil(parts.raw, choices))
    if kind == 4:
        return replace(parts, tables={name: spoil(sent, choices) for name, sent in parts.tables.items()})
    return replace(parts, frame=spoil(parts.frame, choices))


def _lanes(parts: Parts, _length: int, _offset: int, choices: Choices) -> Parts:
    return replace(parts, stream=bytes([choices.below(16)]) + parts.stream[1:])


def _way(parts: Parts, _length: int, _offset: int, choices: Choices) -> Parts:
    return replace(parts, frame=bytes([choices.below(5)]) + parts.frame[1:])


def _head(parts: Parts, _length: int, _offset: int, choices: Choices) -> Parts:
    """A number of the head."""
    kind, number = choices.below(6), choices.number()
    if kind == 0:
        return replace(parts, window=(choices.signed(), number))
    if kind == 1:
        return replace(parts, raw_sizes=dict.fromkeys(parts.raw_sizes, number))
    if kind == 2:
        return replace(parts, record_bytes=number)
    if kind == 3:
        return replace(parts, row_bytes=number)
    return replace(parts, stream_bytes=number) if kind == 4 else replace(parts, mask=number & 255)


_CHANGES: tuple[Callable[[Parts, int, int, Choices], Parts], ...] = (
    *(_records, _records, _records, _some_tables, _some_tables, _pool, _bytes, _bytes, _lanes, _way, _head),
)
