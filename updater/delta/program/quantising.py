"""Codes of a quantised array from the floats that the base has.

Used by the encoder only. Channels may run along any axis; zero points may differ among them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import planner, predictors, scales
from updater.delta.program.operands import Operands
from updater.delta.program.piece import Piece
from updater.delta.program.planner import Item
from updater.delta.program.records import QUANTISED, SOURCES, Record

Array = NDArray[Any]
_MANY, _RARE = 200, 0.05  # changes from which, and share up to which, their places are coded
_WRONG = 0.2  # share of the codes from which the base is no help


def plan(base: Operands, item: Item, scale: Item, zeros: dict[int, Item]) -> bool:
    """Gives the item a record, if its codes are mostly those of the base's floats.

    Args:
        base: the base.
        item: 8-bit codes.
        scale: its scales.
        zeros: by the number of the weights, arrays of zero points; one that is needed gets a record.
    """
    source, meaning, count = item.base, item.quantisation, len(item.value)
    if source is None or source.dtype not in SOURCES or meaning is None:
        return False
    channels = len(scale.value)
    rows, by_rows = 1, True
    if item.phase >= 0:
        by_rows = False
    elif channels > 1:
        if meaning.axis is None:
            return False
        before, after = math.prod(item.shape[: meaning.axis]), math.prod(item.shape[meaning.axis + 1 :])
        if meaning.block:
            if meaning.groups(item.shape) != channels or math.prod(item.shape) != count:
                return False
            by_rows = after == 1  # a row is a block, or as many rows as a block has share their scales
            rows = channels if by_rows else count // after
        else:
            if before * channels * after != count:
                return False
            by_rows = before == 1 or after > 1
            rows = before * channels if by_rows else before
    differ = len(set(meaning.zero_points)) > 1
    record = Record(
        QUANTISED, item.dtype, item.at, count, rows, by_rows=by_rows, zeros=differ, phase=max(0, item.phase),
        zero=0 if differ else meaning.zero_points[0], **source.operand(),
    )  # fmt: skip
    points = np.array(meaning.zero_points, dtype=np.int16) if differ else None
    whole = Piece.whole(rows, count // rows)
    residual = item.value.astype(np.int64) - predictors.quantise(base, record, scale.value, points, whole)
    changed = np.count_nonzero(residual)
    if changed >= _WRONG * count:
        return False
    if _MANY <= changed < _RARE * count:
        planner.sparse(record, residual, max(planner.splits(item.shape, count)) if channels == 1 else rows)
    else:
        planner.settle(record, residual, planner.splits(item.shape, count) if channels == 1 else [rows])
    operands = [scale]
    if points is not None:
        zero = _zeros(base, item, scale, points, zeros)
        if zero is None:
            return False
        operands.append(zero)
    item.record, item.operands = record, operands
    return True


def _zeros(base: Operands, item: Item, scale: Item, points: Array, zeros: dict[int, Item]) -> Item | None:
    """The array of zero points with its record: that in the block, or one that is only worked out."""
    found = zeros.get(item.number)
    if found is None or not np.array_equal(found.value, points):
        found = Item("given", "", item.dtype, points.shape, 0, points)
    found.record = scales.plan_zeros(base, points, found.at, item.dtype, scale.value, scales.reduced(item))
    if found.record is None:
        return None
    found.record.silent = found.role == "given"
    found.operands = [scale]
    return found
