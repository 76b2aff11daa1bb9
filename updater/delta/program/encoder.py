"""Makes the programs of blocks: pairs the arrays of both files once, then plans and codes block by block.

A block's program knows its own bytes and the base, no other block. Arrays that a block cuts are planned by
their whole rows and what is left before and behind these. Every program is run before it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import arrange, planner, reader, writer
from updater.delta.program.arrange import Known
from updater.delta.program.body import Place
from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.planner import Item
from updater.delta.program.records import F32
from updater.formats.span import Quantisation, TensorSpan

Bytes = NDArray[np.uint8]

_LEAST_BYTES = 256  # a smaller block gains nothing by a program
_ALONE_BYTES = 256 << 10  # of a block that is also tried without records
_WINDOW_BYTES = 1 << 20  # of a large base's window beyond the block's own length
_UNBOUNDED = 1 << 62  # each program is held to its own budget when it is coded


@dataclass(frozen=True)
class ProgramBytes:
    """A program.

    Attributes:
        data: its bytes.
        pool_bytes: of these, those of the pools.
        entropy_bytes: what the pools would take at the entropy of their symbols.
        predicted: bytes of the block that follow from the base.
    """

    data: bytes
    pool_bytes: int
    entropy_bytes: float
    predicted: int


class ProgramEncoder:
    """Makes programs for the blocks of one target; safe to use from several threads.

    Args:
        base: the base's bytes.
        base_spans: its tensors.
        target: the target's bytes.
        target_spans: its tensors.
        level: zstd level of skeletons.
        thorough: also tries what takes long.
    """

    def __init__(
        self,
        base: Bytes,
        base_spans: Sequence[TensorSpan],
        target: Bytes,
        target_spans: Sequence[TensorSpan],
        level: int,
        thorough: bool,
    ) -> None:
        self._base, self._target, self._level, self._thorough = base, target, level, thorough
        old, _ = planner.items_of(base, base_spans)
        self._items, self._follows = planner.items_of(target, target_spans)
        with np.errstate(all="ignore"):
            planner.pair(old, self._items)
        places: dict[bytes, int] = {}
        for item in old:
            if item.dtype == F32 and len(item.value) <= 1 << 16:
                places.setdefault(item.content, item.at)
        self._known = Known(base, Operands(self._read, _UNBOUNDED), places)

    def encode(self, offset: int, length: int) -> ProgramBytes | None:
        """The program that writes `length` bytes of the target at `offset`; None if there is none."""
        if length < _LEAST_BYTES:
            return None
        with np.errstate(all="ignore"):  # tensors may hold any bits; what comes out is compared
            return self._encode(offset, length)

    def _encode(self, offset: int, length: int) -> ProgramBytes | None:
        target = self._target[offset : offset + length].tobytes()
        place = self._place(offset, length)
        items = list(_inside(self._items, offset, length))
        ways = [arrange.records_for(self._known, target, items, self._follows)]
        if ways[0] and length <= _ALONE_BYTES:
            ways.append([])
        found: list[ProgramBytes] = []
        for records in ways:
            try:
                program, packed = writer.encode(
                    self._read, target, place, records, self._level, self._thorough
                )
                predicted = sum(record.length for record in records if record.based)
                found.append(ProgramBytes(program, packed.size, packed.entropy, predicted))
            except ProgramError:  # decoders would refuse it
                continue
        if not found:
            return None
        best = min(found, key=lambda program: len(program.data))
        if reader.decode(self._read, best.data, offset, length) != target:
            raise AssertionError(f"the program for the block at byte {offset} writes other bytes")
        return best

    def _place(self, offset: int, length: int) -> Place:
        size = len(self._base)
        if size <= limits.MAX_WINDOW_BYTES:
            return Place(offset, length, 0, size)
        room = min(limits.MAX_WINDOW_BYTES, length + _WINDOW_BYTES)
        middle = offset * size // max(1, len(self._target))
        return Place(offset, length, max(0, min(size - room, middle - _WINDOW_BYTES // 2)), room)

    def _read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(self._base):
            raise ProgramError("a program reads beyond the base")
        return self._base[offset : offset + length].tobytes()


def _inside(items: Sequence[Item], offset: int, length: int) -> Iterator[Item]:
    """The arrays of a block, places counted from its begin; those that it cuts, in parts."""
    end = offset + length
    for item in items:
        width = item.value.itemsize
        if item.at + item.value.nbytes <= offset or item.at >= end:
            continue
        first = max(0, -(-(offset - item.at) // width))
        last = min(len(item.value), (end - item.at) // width)
        row = len(item.value) // item.shape[0] if len(item.shape) > 1 and item.shape[0] else 1
        cuts = {first, last}
        if (first, last) != (0, len(item.value)):
            cuts |= {cut for cut in (-(-first // row) * row, last // row * row) if first < cut < last}
        bounds = sorted(cuts)
        for start, stop in pairwise(bounds):
            yield _part(item, start, stop, row, offset)


def _part(item: Item, start: int, stop: int, row: int, offset: int) -> Item:
    """Elements [start, stop) of an array."""
    if (start, stop) == (0, len(item.value)):
        return replace(item, at=item.at - offset, record=None, operands=[])
    whole = start % row == 0 and stop % row == 0
    shape = ((stop - start) // row, *item.shape[1:]) if whole and row > 1 else (stop - start,)
    base = item.base
    if base is not None and len(base.value) == len(item.value):
        base = replace(
            base,
            at=base.at + start * base.value.itemsize,
            value=base.value[start:stop],
            shape=shape,
            quantisation=_cut(base.quantisation, start, stop, row, whole),
        )
    else:
        base = None
    return replace(
        item,
        at=item.at + start * item.value.itemsize - offset,
        value=item.value[start:stop],
        shape=shape,
        quantisation=_cut(item.quantisation, start, stop, row, whole),
        owner=-1,
        base=base,
        record=None,
        operands=[],
    )


def _cut(found: Quantisation | None, start: int, stop: int, row: int, whole: bool) -> Quantisation | None:
    if found is None or len(found.scales) == 1:
        return found
    if not whole:
        return None
    if found.axis != 0:
        return found
    rows = slice(start // row, stop // row)
    return Quantisation(found.scales[rows], found.zero_points[rows], 0)
