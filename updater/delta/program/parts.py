"""Arrays cut: by blocks, or where only some of their rows have a counterpart in the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from updater.delta.program import layout
from updater.delta.program.planner import Item
from updater.delta.program.records import BITS, bytes_of
from updater.formats.span import Quantisation


def inside(items: Sequence[Item], offset: int, length: int) -> Iterator[Item]:
    """The arrays of a block, places counted from its begin; those that it cuts, in parts."""
    end = offset + length
    for item in items:
        width = BITS[item.dtype]
        if item.at + item.length <= offset or item.at >= end:
            continue
        first = max(0, -(-8 * (offset - item.at) // width))
        last = min(len(item.value), 8 * (end - item.at) // width)
        row = _row(item)
        cuts = {first, last}
        if (first, last) != (0, len(item.value)):
            steps = {row, _block(item)} | set(layout.pitches(item.base.axes) if item.base is not None else ())
            for step in steps | ({item.grain} if item.grain else set()):
                step = step if step * width % 8 == 0 else 2 * step  # cuts lie between bytes
                cuts |= {cut for cut in (-(-first // step) * step, last // step * step) if first < cut < last}
        for start, stop in pairwise(sorted(cuts)):
            yield part(item, start, stop, offset)


def _block(item: Item) -> int:
    """Elements of the rows, or of the part of one, that a block of scales takes up."""
    found = item.quantisation
    if found is None or not found.block:
        return _row(item)
    return found.block * (_row(item) if found.axis == 0 and len(item.shape) > 1 else 1)


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
            at=base.at + bytes_of(base.dtype, found[0]),
            axes=found[1],
            value=base.value[start:stop],
            shape=shape,
            quantisation=_cut(base.quantisation, start, stop, item.shape),
        )
    else:
        base = None
    meaning, phase = _cut(item.quantisation, start, stop, item.shape), -1
    if meaning is None and item.phase >= 0:
        meaning, phase = item.quantisation, item.phase + start
    elif meaning is None and _along(item) and start // item.shape[-1] == (stop - 1) // item.shape[-1]:
        meaning, phase = item.quantisation, start % item.shape[-1]
    return replace(
        item,
        at=item.at + bytes_of(item.dtype, start) - offset,
        value=item.value[start:stop],
        shape=shape,
        quantisation=meaning,
        owner=-1,
        whole=item.whole or item,
        weights=_weights(item, start, stop),
        phase=phase,
        base=base,
        record=None,
        operands=[],
    )


def _weights(item: Item, start: int, stop: int) -> Item | None:
    """The weights of which elements [start, stop) of an array are the scales or zero points of blocks."""
    weights = item.weights
    if weights is None or weights.quantisation is None or not weights.quantisation.block:
        return None
    size = weights.quantisation.block
    return part(weights, start * size, stop * size) if stop * size <= len(weights.value) else None


def _along(item: Item) -> bool:
    """Whether an array's channels run along its last axis."""
    found = item.quantisation
    return (
        found is not None and not found.block and found.axis is not None and found.axis == len(item.shape) - 1
    )


def _cut(found: Quantisation | None, start: int, stop: int, shape: tuple[int, ...]) -> Quantisation | None:
    """What is left of the scales of an array of that shape for elements [start, stop); None if they do not
    fit these.
    """
    if found is None or len(found.scales) == 1:
        return found
    row = math.prod(shape[1:])
    if not row or start % row or stop % row:
        return None
    if found.axis != 0 and not found.block:
        return found
    first, last = start // row, stop // row
    if not found.block:
        return Quantisation(found.scales[first:last], found.zero_points[first:last], 0)
    if found.axis != 0 or (first % found.block == 0 and last % found.block == 0):
        some = slice(start // found.block, stop // found.block)
        return Quantisation(found.scales[some], found.zero_points[some], found.axis, found.block)
    group = first // found.block
    if group != (last - 1) // found.block or len(shape) != 2:
        return None
    some = slice(group * row, (group + 1) * row)  # rows of one block: a scale for each column
    return Quantisation(found.scales[some], found.zero_points[some], 1)
