"""Scales and zero points that follow from the weights of the base, as quantisers work them out.

Used by the encoder only. ONNX keeps scales as tensors of their own, told apart by nothing but their values:
each is linked to the weights that name these values. A scale is the largest magnitude, or the distance from
the least to the greatest number, of a tensor or of each slice along an axis, divided by a number of codes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import layout, predictors
from updater.delta.program.operands import Operands
from updater.delta.program.planner import Item
from updater.delta.program.records import (
    DTYPES,
    EXCEPTIONS,
    F32,
    I8,
    I32,
    MAX_HALVES,
    NIBBLES,
    PEAK,
    SOURCES,
    SPANNED,
    U8,
    ZEROS,
    Record,
)

Array = NDArray[Any]
_EXCEPTIONS = 0.06  # share of the scales that may be others ...
_FEW = 2  # ... or this many


@dataclass
class Room:
    """Bytes of the base that a block may still read for its scales."""

    left: int

    def spend(self, length: int) -> bool:
        """Whether there is room for so many bytes more."""
        if length > self.left:
            return False
        self.left -= length
        return True


def room_of(length: int, window: int, items: list[Item]) -> Room:
    """What a block of `length` bytes may read beside its window and what its arrays follow from."""
    direct = sum(
        len(item.value) * (item.base.value.itemsize + (4 if item.dtype == I32 else 0))
        for item in items
        if item.base is not None
    )
    return Room(limits.OPERAND_EXPANSION * length + limits.OPERAND_OVERHEAD_BYTES - window - direct)


def left_of(length: int, items: list[Item]) -> int:
    """What a block of `length` bytes may read for its window: codes of four bits need much of the base for
    their scales and zero points.
    """
    need = 0
    for item in items:
        if item.dtype in NIBBLES and item.base is not None and item.quantisation is not None:
            reads = 1 + (len(set(item.quantisation.zero_points)) > 1)
            need += reads * len(item.value) * item.base.value.itemsize
    return max(0, room_of(length, 0, items).left - need)


def link(items: list[Item]) -> None:
    """Tells arrays of scales and zero points whose they are."""
    by_content: dict[tuple[int, bytes], list[Item]] = defaultdict(list)
    for item in items:
        if item.role == "data" and item.dtype in (F32, I8, U8, *NIBBLES) and len(item.value) <= 1 << 20:
            by_content[item.dtype, item.content].append(item)
    for number, item in enumerate(items):
        item.number = number
    for item in items:
        meaning = item.quantisation
        if meaning is None or item.base is None or item.base.dtype not in SOURCES or item.whole is not None:
            continue
        wanted = [(F32, np.array(meaning.scales, dtype="<f4").tobytes())]
        if len(set(meaning.zero_points)) > 1 and item.dtype in (I8, U8, *NIBBLES):
            points = np.array(meaning.zero_points, dtype=np.int64).astype(DTYPES[item.dtype])
            wanted.append((item.dtype, points.tobytes()))
        for key in wanted:
            found = [other for other in by_content.get(key, []) if other.weights is None]
            if found:
                min(found, key=lambda other: abs(other.at - item.at)).weights = item


def plan(base: Operands, value: Array, at: int, weights: Item, room: Room) -> Record | None:
    """A record that works scales out, with few exceptions."""
    fields = _reduction(weights, len(value))
    if fields is None:
        return None
    for op in (PEAK, SPANNED):
        record = Record(op, F32, at, len(value), halves=2, **fields)
        plain = predictors.reduce(base, record).astype(np.float64)
        sure = (value > 0) & (plain > 0) & np.isfinite(value) & np.isfinite(plain)
        if not sure.any():
            continue
        halves = round(2 * float(np.median(plain[sure] / value[sure])))
        if not 1 <= halves <= MAX_HALVES:
            continue
        record.halves = halves
        made = predictors.ordered(predictors.reduce(base, record).view("<u4"), 32)
        missed = predictors.difference(predictors.ordered(value.view("<u4"), 32), made, 32)
        if _excepted(record, missed) and room.spend(_length(weights)):
            return record
    return None


def plan_zeros(
    base: Operands, value: Array, at: int, dtype: int, scale: Array, weights: Item
) -> Record | None:
    """A record that works zero points out, for scales that another record has."""
    fields = _reduction(weights, len(value))
    if fields is None:
        return None
    record = Record(ZEROS, dtype, at, len(value), **fields)
    made = predictors.zero_points(base, record, scale)
    _excepted(record, value.astype(np.int16) - made)
    return record


def reduced(item: Item) -> Item:
    """The weights that an array's scales come from: all of them, unless it was cut along the channels."""
    if item.quantisation is not None and item.quantisation.block:
        return item  # whole blocks
    axis = item.quantisation.axis if item.quantisation is not None else None
    return item.whole if item.whole is not None and (axis != 0 or item.phase >= 0) else item


def _excepted(record: Record, missed: Array) -> bool:
    """Makes what a record misses exceptions; whether they are few."""
    places = np.flatnonzero(missed)
    record.exceptions = [(int(place), int(missed[place])) for place in places]
    record.residual = EXCEPTIONS if len(places) else record.residual
    return len(places) <= max(_FEW * (record.count > _FEW), _EXCEPTIONS * record.count)


def _length(weights: Item) -> int:
    assert weights.base is not None
    return weights.base.value.nbytes


def _reduction(weights: Item, channels: int) -> dict[str, Any] | None:
    """The fields of a record that reduces the weights' base to one number for each channel."""
    source, meaning = weights.base, weights.quantisation
    if source is None or meaning is None or source.dtype not in SOURCES:
        return None
    if len(source.value) != len(weights.value) or len(weights.value) % channels:
        return None
    fields: dict[str, Any] = {"two": len(weights.value) // channels, "by_rows": True, **source.operand()}
    axis, shape = meaning.axis, weights.shape
    if channels == 1 or axis is None:
        return fields if channels == 1 else None
    before, after = shape[:axis], shape[axis + 1 :]
    alone = all(size == 1 for size in after)
    if meaning.block:
        if meaning.groups(shape) != channels:
            return None
        if alone:
            return fields
    elif all(size == 1 for size in before):
        return fields
    elif alone:
        return {**fields, "by_rows": False}
    steps = layout.strides(source.axes, shape)
    if steps is None:
        return None
    if meaning.block:  # the blocks in their order, then what lies in one
        sides = [(size, step) for size, step in zip(shape, steps)]
        sides[axis] = (shape[axis] // meaning.block, meaning.block * steps[axis])
        axes = layout.merged((*sides, (meaning.block, steps[axis])))
    else:
        order = [axis, *(place for place in range(len(shape)) if place != axis)]
        axes = layout.merged(tuple((shape[place], steps[place]) for place in order))
    return {**fields, "axes": axes} if len(axes) <= layout.MAX_AXES else None
