"""A block's program: records, the pools of their residuals, and the bytes between the records.

Layout: head (varints): bytes of the records' coder and of their rows, start and length of the base's window
(folded, against the block's offset), a mask of the pools that are there, for each of these the bytes of its
tables and of its raw bits, the bytes of their rANS stream; then these parts in order; then the skeleton,
whose first byte says how it is coded. `writer` and `reader` are its two directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from updater import limits
from updater.delta import varint
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.operands import Operands, ProgramError, within
from updater.delta.program.pools import Packed
from updater.delta.program.rans import payload_capacity
from updater.delta.program.records import (
    GIVEN,
    KINDS,
    REDUCING,
    SAME,
    SELF,
    U8,
    Record,
    Share,
    code_records,
)
from updater.delta.program.row_bits import RowBits

RECORD_LIMIT = 30  # visits after which a model of the records' coder keeps its rate


@dataclass(frozen=True)
class Place:
    """Where a program works.

    Attributes:
        offset: of the block in the target.
        length: bytes that it writes.
        window_start, window_length: the part of the base that the skeleton is coded against.
    """

    offset: int
    length: int
    window_start: int
    window_length: int


def outside(data: bytes, records: list[Record]) -> bytes:
    """The bytes that no record covers."""
    parts, end = [], 0
    for record in records:
        parts.append(data[end : record.at])
        end = record.at + record.length
    parts.append(data[end:])
    return b"".join(parts)


class Known:
    """The base's window as the skeleton may refer to it; read when asked for.

    Args:
        base: the base.
        place: where the window lies.
        records: the program's.
    """

    def __init__(self, base: Operands, place: Place, records: list[Record]) -> None:
        self._base, self._place, self._records = base, place, records

    @cached_property
    def whole(self) -> bytes:
        """All of the window."""
        place = self._place
        return self._base.bytes(place.window_start, place.window_length) if place.window_length else b""

    @cached_property
    def rest(self) -> bytes:
        """The window without the arrays that records read."""
        return outside(self.whole, shadow(self._records, self._place))


def shadow(records: list[Record], place: Place) -> list[Record]:
    """The parts of the window that records read as arrays: those bytes are no use to the skeleton."""
    ranges = []
    for record in records:
        if record.op in (SELF, GIVEN, *REDUCING) or record.base < 0:
            continue
        start = record.base - place.window_start
        end = start + record.operand_length
        start, end = max(0, start), min(place.window_length, end)
        if start < end:
            ranges.append(Record(SAME, U8, start, end - start))
    kept: list[Record] = []
    for item in sorted(ranges, key=lambda record: (record.at, -record.length)):
        if not kept or item.at >= kept[-1].at + kept[-1].length:
            kept.append(item)
    return kept


def encode_head(place: Place, record_bytes: int, row_bytes: int, packed: Packed) -> bytes:
    """What stands before a program's parts."""
    names = list(KINDS)
    mask = sum(1 << names.index(name) for name in packed.tables)
    parts = [
        varint.encode(record_bytes),
        varint.encode(row_bytes),
        varint.encode_signed(place.window_start - place.offset),
        varint.encode(place.window_length),
        bytes([mask]),
    ]
    for name, sent in packed.tables.items():
        parts += [varint.encode(len(sent)), varint.encode(packed.raw_sizes[name])]
    if mask:
        parts.append(varint.encode(len(packed.stream)))
    return b"".join(parts)


@dataclass(frozen=True)
class Opened:
    """A program taken apart."""

    place: Place
    records: list[Record]
    packed: Packed
    record_bytes: int
    skeleton: bytes


def open_body(body: bytes | memoryview, offset: int, length: int) -> Opened:
    """Reads the records and cuts the rest. Raises ProgramError, SluiceError(DELTA_INVALID)."""
    reader = varint.Reader(body, "a program")
    record_bytes, row_bytes = reader.varint(), reader.varint()
    window_start, window_length = offset + reader.signed(), reader.varint()
    within("bytes in a program's window", window_length, limits.MAX_WINDOW_BYTES)
    mask = reader.byte()
    if mask >> len(KINDS):
        raise ProgramError("a program has a pool that is not known")
    names = [name for at, name in enumerate(KINDS) if mask >> at & 1]
    sizes = {name: (reader.varint(), reader.varint()) for name in names}
    stream_bytes = reader.varint() if mask else 0
    coder = Coder(reader.take(record_bytes), RECORD_LIMIT, decisions(length))
    rows = RowBits(reader.take(row_bytes))
    share = Share(length)
    share.add(window_length)
    records = code_records(coder, None, length, offset, rows, share)
    coder.end()
    rows.finish()
    tables = {name: reader.take(size) for name, (size, _) in sizes.items()}
    stream = reader.view(stream_bytes)
    raw_sizes = {name: size for name, (_, size) in sizes.items()}
    carried = payload_capacity(1 << min(stream[0], 63)) if stream else 0
    raw = reader.view(max(0, sum(raw_sizes.values()) - carried))
    place = Place(offset, length, window_start, window_length)
    packed = Packed(tables, raw_sizes, stream, raw)
    return Opened(place, records, packed, record_bytes + row_bytes, reader.take(reader.left))
