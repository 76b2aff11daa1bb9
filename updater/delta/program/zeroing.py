"""Finds arrays that are their base with numbers made zero: small ones, all but N of each M, whole channels.

Used by the encoder only. Each way must be exact but for few exceptions; the cheapest is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import planner, predictors
from updater.delta.program.operands import Operands
from updater.delta.program.piece import Piece
from updater.delta.program.planner import Item
from updater.delta.program.records import (
    BF16,
    DTYPES,
    F16,
    F32,
    I8,
    MASKED,
    MAX_GROUP,
    POOL,
    PRUNED,
    THINNED,
    Record,
)

Array = NDArray[Any]
_LEAST = 64  # elements
_WRONG = 0.001  # share of the kept elements that may differ
_SAMPLE = 1 << 12  # elements by which an array is taken for a pruned one ...
_SPARSE = 0.05  # ... with this share of zeros
_ROW_BITS = 6.0  # what a row or column that is zero costs, about


def plan(base: Operands, item: Item) -> None:
    """Gives the item a record, if it is its base with numbers made zero."""
    source = item.base
    if source is None or source.dtype != item.dtype or item.dtype not in (F32, F16, BF16, I8):
        return
    if len(item.value) < _LEAST:
        return
    words = f"<u{item.value.itemsize}"
    old, new = source.value.view(words), item.value.view(words)
    sizes = predictors.magnitudes(old, item.dtype)
    gone = (predictors.magnitudes(new, item.dtype) == 0) & (sizes != 0)
    kept = ~gone
    if not gone.any() or not kept.any() or (old[kept] != new[kept]).mean() > _WRONG:
        return
    bits = 8 * item.value.itemsize
    signed = item.dtype != I8 and bool((new[gone] >> (bits - 1)).any())
    found: list[tuple[float, int, Record]] = []
    for record, cost in _ways(item, sizes, gone):
        record.base_zero = int(signed)
        guess = predictors.zeroed(base, record, Piece.whole(record.rows, record.columns))
        one, two = new, guess
        if item.dtype != I8:
            one, two = predictors.ordered(new, bits), predictors.ordered(guess, bits)
        missed = predictors.difference(one, two, bits)
        cost += planner.settle(record, missed, [record.rows])
        if record.residual != POOL:
            found.append((cost, len(found), record))
    if found:
        item.record = min(found)[2]


def mark(items: list[Item]) -> None:
    """Says where arrays may be cut that keep some numbers of each group down their columns."""
    for item in items:
        source, count = item.base, len(item.value)
        if source is None or source.dtype != item.dtype or item.dtype not in (F32, F16, BF16, I8):
            continue
        words = f"<u{item.value.itemsize}"
        old, new = (predictors.magnitudes(array.value.view(words), item.dtype) for array in (source, item))
        places = slice(None, None, max(1, count // _SAMPLE) | 1)
        if count < _LEAST or ((new[places] == 0) & (old[places] != 0)).mean() < _SPARSE:
            continue
        for record, _ in _thinned(item, old, new == 0):
            if not record.by_rows:
                item.grain = record.group * record.columns
                break


def _ways(item: Item, sizes: Array, gone: Array) -> Iterator[tuple[Record, float]]:
    """Records that may give the item, and what they cost beyond exceptions."""
    assert item.base is not None
    count, fields = len(sizes), item.base.operand()
    # The threshold between the largest gone and the smallest kept; few may lie on the wrong side.
    zeros = int(gone.sum() + (sizes == 0).sum())
    edge = int(np.sort(sizes)[zeros]) if zeros < count else 1 << (8 * DTYPES[item.dtype].itemsize - 1)
    yield Record(PRUNED, item.dtype, item.at, count, zero=edge, **fields), 40.0
    zero = gone | (sizes == 0)
    for rows in planner.splits(item.shape, count):
        matrix = zero.reshape(rows, -1)
        for by_rows in (True, False):
            empty = matrix.all(axis=1 if by_rows else 0)
            if not 0 < empty.sum() < len(empty):
                continue
            other = gone.reshape(rows, -1) & ~(empty[:, None] if by_rows else empty[None, :])
            if other.mean() > _WRONG:
                continue
            record = Record(MASKED, item.dtype, item.at, count, rows, by_rows=by_rows, used=empty, **fields)
            yield record, 40.0 + _ROW_BITS * float(empty.sum())
    yield from _thinned(item, sizes, zero)


def _thinned(item: Item, sizes: Array, zero: Array) -> Iterator[tuple[Record, float]]:
    assert item.base is not None
    count = len(sizes)
    for rows in planner.splits(item.shape, count):
        for by_rows in (True, False):
            matrix = zero.reshape(rows, -1)
            lines = matrix if by_rows else matrix.T
            group = 2
            while group <= MAX_GROUP and lines.shape[1] % group == 0:
                per = (~lines).reshape(-1, group).sum(axis=1)
                keep = int(np.bincount(per).argmax())
                if 0 < keep < group and (per > keep).mean() < _WRONG:
                    record = Record(THINNED, item.dtype, item.at, count, rows, by_rows=by_rows, zero=keep,
                                    group=group, **item.base.operand())  # fmt: skip
                    yield record, 50.0
                    break
                group *= 2
