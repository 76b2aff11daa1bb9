"""Writes programs part by part, also such as no encoder writes.

Records go through the encoder's own statements (`code_records`) with a coder that, at chosen places, writes
another value than it is told: so a record may say anything, whatever checks the encoder has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np

from edge_tests.conformance.vectors import build
from updater.delta.program import body, classes, run, skeleton, skeletons, tables, tracking, writer
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.body import Place
from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.records import KINDS, Record, RowBits, Share, code_records
from updater.delta.varint import Reader

RAW, ZSTD, ZSTD_WHOLE, MODEL, TRACKED = range(5)
_UNBOUNDED = 1 << 40  # bytes of target, whose share of the base no record exceeds
ReadBase = Callable[[int, int], bytes]
Tamper = Callable[[str, object, int], int]  # (kind of value, context, value) -> the value to write


def reader_of(base: bytes) -> ReadBase:
    """Reads a base that lies in memory; refuses what lies outside."""

    def read(offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > len(base):
            raise ProgramError("outside the base")
        return base[offset : offset + length]

    return read


class TamperingCoder(Coder):
    """Writes what `tamper` makes of a value, and tells its caller the value itself."""

    def __init__(self, tamper: Tamper) -> None:
        super().__init__(limit=body.RECORD_LIMIT)
        self._tamper = tamper

    def bit(self, context: object, bit: int = 0) -> int:
        super().bit(context, self._tamper("bit", context, bit))
        return bit

    def unsigned(self, context: object, value: int = 0) -> int:
        # Bits of integers have contexts of their own, which no tamper knows: they go through unchanged.
        super().unsigned(context, self._tamper("unsigned", context, value))
        return value

    def signed(self, context: object, value: int = 0) -> int:
        value_to_write = self._tamper("signed", context, value)
        super().unsigned(context, 2 * value_to_write if value_to_write >= 0 else -2 * value_to_write - 1)
        return value


def code(
    records: Sequence[Record], length: int, offset: int, tamper: Tamper | None = None
) -> tuple[bytes, bytes]:
    """The records' bytes, and the bits of their rows."""
    coder = TamperingCoder(tamper) if tamper is not None else Coder(limit=body.RECORD_LIMIT)
    rows = RowBits()
    code_records(coder, list(records), length, offset, rows, Share(_UNBOUNDED))
    return coder.finish(), rows.finish()


@dataclass(frozen=True)
class Parts:
    """A program taken apart; None stands for what is right.

    Attributes:
        records: the records' bytes, and the bits of their rows.
        window: start, against the range's offset in the target, and length.
        tables: by pool, the bytes of its tables.
        raw_sizes: by pool, bytes of its raw bits; 0 for those that are not there.
        stream: the rANS stream of all pools, its lanes' logarithm first.
        raw: the raw bits that the stream does not carry.
        frame: the skeleton with its first byte.
        record_bytes, row_bytes, stream_bytes, mask: what the head says of the others.
    """

    records: tuple[bytes, bytes]
    window: tuple[int, int] = (0, 0)
    tables: Mapping[str, bytes] = field(default_factory=dict)
    raw_sizes: Mapping[str, int] = field(default_factory=dict)
    stream: bytes = b""
    raw: bytes = b""
    frame: bytes = b"\0"
    record_bytes: int | None = None
    row_bytes: int | None = None
    stream_bytes: int | None = None
    mask: int | None = None

    def encode(self) -> bytes:
        """The program's bytes."""
        names = [name for name in KINDS if name in self.tables]
        mask = sum(1 << at for at, name in enumerate(KINDS) if name in names)
        coded, rows = self.records
        head = build.varint(len(coded) if self.record_bytes is None else self.record_bytes)
        head += build.varint(len(rows) if self.row_bytes is None else self.row_bytes)
        head += build.signed(self.window[0]) + build.varint(self.window[1])
        head += bytes([mask if self.mask is None else self.mask])
        for name in names:
            head += build.varint(len(self.tables[name])) + build.varint(self.raw_sizes.get(name, 0))
        if names:
            head += build.varint(len(self.stream) if self.stream_bytes is None else self.stream_bytes)
        sent = b"".join(self.tables[name] for name in names)
        return head + coded + rows + sent + self.stream + self.raw + self.frame


def take_apart(program: bytes, length: int, offset: int = 0) -> Parts:
    """The inverse of `Parts.encode`."""
    reader = Reader(program, "a program")
    record_bytes, row_bytes = reader.varint(), reader.varint()
    opened = body.open_body(program, offset, length)
    packed = opened.packed
    behind = len(opened.skeleton) + packed.size
    coded = program[len(program) - behind - record_bytes - row_bytes : len(program) - behind]
    records = (coded[:record_bytes], coded[record_bytes : record_bytes + row_bytes])
    window = (opened.place.window_start - offset, opened.place.window_length)
    tables = {name: bytes(sent) for name, sent in packed.tables.items()}
    stream, rest, frame = bytes(packed.stream), bytes(packed.raw), bytes(opened.skeleton)
    return Parts(records, window, tables, packed.raw_sizes, stream, rest, frame)


def settle(base: bytes, records: Sequence[Record], filler: bytes, length: int, offset: int = 0) -> bytes:
    """The target of records that are exact: what a decoder makes of them, with `filler` between them."""
    size = length - sum(record.length for record in records)
    parts = Parts(code(records, length, offset), frame=b"\0" + filler[:size])
    return bytes(run(reader_of(base), parts.encode(), offset, length))


def encode(
    base: bytes,
    target: bytes,
    records: Sequence[Record],
    offset: int = 0,
    window: tuple[int, int] | None = None,
) -> Parts:
    """The program of a target, skeleton raw unless it has a window; it is run before it is given."""
    start, length = window or (0, 0)
    place = Place(offset, len(target), start, length)
    copies = [replace(record) for record in records]
    # Tables as they come, without what makes them cheaper: vectors stay as they are when that changes.
    plain = patch.object(classes, "_STRAIGHTENED", 0), patch.object(tables, "_NEARER", -1)
    with np.errstate(all="ignore"), plain[0], plain[1]:
        program = writer.encode(reader_of(base), target, [place], copies, 19, False)[0]
    parts = take_apart(program, len(target), offset)
    if window is None:
        parts = replace(parts, frame=bytes([RAW]) + body.outside(target, list(records)))
    assert run(reader_of(base), parts.encode(), offset, len(target)) == target
    return parts


def known(
    base: bytes, records: Sequence[Record], length: int, window: tuple[int, int], offset: int = 0
) -> body.Known:
    """What a skeleton may refer to."""
    return body.Known(Operands(reader_of(base)), Place(offset, length, *window), list(records))


def skeleton_frame(way: int, of: body.Known, between: bytes) -> bytes:
    """A skeleton coded in one of the five ways."""
    if way == RAW:
        return bytes([RAW]) + between
    if way in (MODEL, TRACKED):
        coder = Coder(limit=skeletons._VISITS, budget=decisions(len(between)))
        code = skeleton.code if way == MODEL else tracking.code
        code(coder, of.rest, len(between), between)
        return bytes([way]) + coder.finish()
    return bytes([way]) + build.frame(between, of.rest if way == ZSTD else of.whole)


def block(program: bytes, length: int, before: bytes = b"", coded: bool = True) -> bytes:
    """The payload of a block that a program writes; `before` are instructions that write the rest."""
    stream = build.raw(program)
    packed = build.zstd(program)
    if coded and len(packed.coded) + 2 < len(program):
        stream = packed
    return build.payload(before + build.program(1, len(program), length), stream)


def delta(base: bytes | None, target: bytes, program: bytes, features: Sequence[str] = ("program",)) -> bytes:
    """A delta that is one program."""
    return build.one_block(base, target, block(program, len(target)), features)
