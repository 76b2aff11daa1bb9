"""Arrays cut: by blocks, or where only some of their rows have a counterpart in the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from updater.delta.program import layout
from updater.delta.program.planner import Item
from updater.formats.span import Quantisation


def inside(items: Sequence[Item], offset: int, length: int) -> Iterator[Item]:
    """The arrays of a block, places counted from its begin; those that it cuts, in parts."""
    end = offset + length
    for item in items:
        width = item.value.itemsize
        if item.at + item.value.nbytes <= offset or item.at >= end:
            continue
        first = max(0, -(-(offset - item.at) // width))
        last = min(len(item.value), (end - item.at) // width)
        row = _row(item)
        cuts = {first, last}
        if (first, last) != (0, len(item.value)):
            steps = {row} | set(layout.pitches(item.base.axes) if item.base is not None else ())
            for step in steps | ({item.grain} if item.grain else set()):
                cuts |= {cut for cut in (-(-first // step) * step, last // step * step) if first < cut < last}
        for start, stop in pairwise(sorted(cuts)):
            yield part(item, start, stop, offset)


def _row(item: Item) -> int:
    """Elements of one step along the first axis."""
    return len(item.value) // item.shape[0] if len(item.shape) > 1 and item.shape[0] else 1


def part(item: Item, start: int, stop: int, offset: int = 0) -> Item:
    """Elements [start, stop) of an array, its place counted from `offset`."""
    if (start, stop) == (0, len(item.value)):
        return replace(item, at=item.at - offset, record=None, operands=[])
    row = _row(item)
    whole = start % row == 0 and stop % row == 0
    shape = ((stop - start) // row, *item.shape[1:]) if whole and row > 1 else (stop - start,)
    base = item.base
    found = None
    if base is not None and len(base.value) == len(item.value):
        found = layout.part(base.axes, start, stop)
    if base is not None and found is not None:
        base = replace(
            base,
            at=base.at + found[0] * base.value.itemsize,
            axes=found[1],
            value=base.value[start:stop],
            shape=shape,
            quantisation=_cut(base.quantisation, start, stop, row, whole),
        )
    else:
        base = None
    meaning, phase = _cut(item.quantisation, start, stop, row, whole), -1
    if meaning is None and item.phase >= 0:
        meaning, phase = item.quantisation, item.phase + start
    elif meaning is None and _along(item) and start // item.shape[-1] == (stop - 1) // item.shape[-1]:
        meaning, phase = item.quantisation, start % item.shape[-1]
    return replace(
        item,
        at=item.at + start * item.value.itemsize - offset,
        value=item.value[start:stop],
        shape=shape,
        quantisation=meaning,
        owner=-1,
        whole=item.whole or item,
        weights=None,
        phase=phase,
        base=base,
        record=None,
        operands=[],
    )


def _along(item: Item) -> bool:
    """Whether an array's channels run along its last axis."""
    found = item.quantisation
    return found is not None and found.axis is not None and found.axis == len(item.shape) - 1


def _cut(found: Quantisation | None, start: int, stop: int, row: int, whole: bool) -> Quantisation | None:
    if found is None or len(found.scales) == 1:
        return found
    if not whole:
        return None
    if found.axis != 0:
        return found
    rows = slice(start // row, stop // row)
    return Quantisation(found.scales[rows], found.zero_points[rows], 0)
