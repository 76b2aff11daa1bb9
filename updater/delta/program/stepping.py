"""Finds arrays that are their base with small multiples of a step added: what approximate updates make.

Used by the encoder only, which sees nothing but the two arrays. In order: the step is looked for in a few of
the changed numbers, once for the whole array, then in a few rows; only where it is found there, in all; then
every code is checked. Rule: an ordinary fine-tune is given up after its first few hundred changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import planner, predictors, tokens
from updater.delta.program.piece import Piece
from updater.delta.program.planner import LEAST_ROW, UNTOUCHED, Item
from updater.delta.program.records import BF16, F16, F32, POOL, SOURCES, STEPPED, Record
from updater.delta.program.steps import shortened

Array = NDArray[Any]
Reals = NDArray[np.float64]
_LEAST = 64  # elements
_SAMPLE = 256  # changed numbers in which a step is looked for first ...
_ROWS = 4  # ... and rows
_MANY = 1 << 14  # changed numbers from which a step is then worked out
_PARTS = 8  # the least change is so many steps at most
_ROUNDS = 6  # in which a step's bounds close in
_STRAY = 0.02  # share of the changes that may be no multiple of the step; one ...
_FEW = 8  # ... of at least so many
_VAGUE = 0.25  # mean share of a step that rounding blurs, from which anything would pass for a multiple
_EXCEPTIONS = 200  # elements; _STRAY of them in small arrays
_EXCEPTION_BITS, _STEP_BITS, _RECORD_BITS = 30.0, 11.0, 40.0  # what these cost, about
_SIGNIFICANT = {F32: (23, -126), F16: (10, -14), BF16: (7, -126)}  # explicit bits, least exponent


def plan(item: Item) -> None:
    """Gives an item that has none a record, if it is its base plus multiples of a step and cheaper so."""
    source = item.base
    if source is None or source.dtype != item.dtype or item.dtype not in SOURCES or item.role != "data":
        return
    count = len(item.value)
    if item.record is not None or item.weights is not None or not _LEAST <= count == len(source.value):
        return
    words = f"<u{item.value.itemsize}"
    old, new = source.value.view(words), item.value.view(words)
    changed = old != new
    wide = [rows for rows in planner.splits(item.shape, count) if rows > 1 and count // rows >= LEAST_ROW]
    for rows in (1, *wide):
        steps = _steps(old, new, changed, item.dtype, rows)
        if steps is None:
            continue
        rows = rows if rows > 1 else max(wide, default=1)  # of one step, rows only serve contexts
        record = Record(
            STEPPED, item.dtype, item.at, count, rows, by_rows=len(steps) > 1, steps=steps, residual=POOL,
            **source.operand(),
        )  # fmt: skip
        if _settle(record, old, new, changed):
            item.record = record
            return


def _steps(old: Array, new: Array, changed: NDArray[np.bool_], dtype: int, rows: int) -> Reals | None:
    """The step, or one for each row (0 where none is found); None if a sample has none."""
    if rows == 1:
        few = _some(np.flatnonzero(changed), _SAMPLE)
        bounds = _bounds(*_sizes(old[few], new[few], dtype))
        if bounds is None:
            return None
        many = _some(np.flatnonzero(changed), _MANY)
        bounds = _refined(*bounds, *_sizes(old[many], new[many], dtype))
        step = _short(bounds)
        return np.array([step]) if step else None
    matrix = changed.reshape(rows, -1)
    columns = matrix.shape[1]
    touched = np.flatnonzero(matrix.any(axis=1))
    out = np.zeros(rows)

    def row_step(row: int, most: int) -> float:
        places = row * columns + _some(np.flatnonzero(matrix[row]), most)
        return _short(_bounds(*_sizes(old[places], new[places], dtype)))

    if not all(row_step(row, _SAMPLE) for row in _some(touched, _ROWS).tolist()):
        return None
    for row in touched.tolist():
        out[row] = row_step(row, _MANY)
    return out


def _some(places: Array, most: int) -> Array:
    """At most `most` of some places, evenly spread."""
    return places[:: -(-len(places) // most) or 1] if len(places) > most else places


def _sizes(old: Array, new: Array, dtype: int) -> tuple[Reals, Reals]:
    """How much numbers changed, and by how much the new ones may have been rounded: half their last place."""
    reals, wanted = predictors.reals(old, dtype), predictors.reals(new, dtype)
    size = np.abs(wanted - reals)
    known = np.isfinite(size) & (size > 0)
    digits, least = _SIGNIFICANT[dtype]
    exponents = np.maximum(np.frexp(wanted[known])[1] - 1, least)
    return size[known], np.ldexp(1.0, exponents - digits - 1)


def _bounds(size: Reals, half: Reals) -> tuple[float, float] | None:
    """Bounds of the step of which nearly all sizes are multiples; None if there is none.

    The least change, and the least behind those that may be strays, is taken for 1, 2, ... steps.
    """
    if not len(size):
        return None
    order = np.argsort(size)
    anchors = order[[0, min(len(order) - 1, int(_strays(len(order))) + 1)]]
    parts = np.arange(1, _PARTS + 1)
    low = np.divide.outer(size[anchors] - half[anchors], parts).reshape(-1, 1)
    high = np.divide.outer(size[anchors] + half[anchors], parts).reshape(-1, 1)
    # All are held against the sizes at once: an ordinary change ends here.
    codes = np.rint(2 * size / (low + high))
    sure = (codes > 0) & (codes * (high - low) <= (low + high) / 4)
    fits = sure & (np.abs(size - codes * (low + high) / 2) <= half + codes * (high - low) / 2)
    strays = sure.sum(axis=1) - fits.sum(axis=1)
    likely = (low[:, 0] > 0) & sure.any(axis=1) & (strays <= _strays(len(size)))
    for place in np.flatnonzero(likely).tolist():
        found = _refined(float(low[place, 0]), float(high[place, 0]), size, half)
        if found is not None and _short(found):
            return found
    return None


def _refined(low: float, high: float, size: Reals, half: Reals) -> tuple[float, float] | None:
    """Closer bounds of a step, by the sizes whose codes the bounds already tell."""
    for _ in range(_ROUNDS):
        middle, spread = (low + high) / 2, (high - low) / 2
        codes = np.rint(size / middle)
        sure = (codes > 0) & (codes * spread <= middle / 4)
        if not sure.any():
            return None
        least, most = (size[sure] - half[sure]) / codes[sure], (size[sure] + half[sure]) / codes[sure]
        fits = (least <= high) & (most >= low)
        if not fits.any() or len(fits) - fits.sum() > _strays(len(size)):
            return None
        before = low, high
        low, high = max(low, float(least[fits].max())), min(high, float(most[fits].min()))
        if low > high:
            return None
        if before == (low, high):
            break
    stray = len(size) - int(fits.sum())
    blurred = np.minimum(1.0, 2 * half / low).mean()
    return (low, high) if stray <= _strays(len(size)) and blurred <= _VAGUE else None


def _strays(count: int) -> float:
    """How many of the changes need not be multiples."""
    return max(float(count >= _FEW), _STRAY * count)


def _short(bounds: tuple[float, float] | None) -> float:
    """The step of few bits within bounds; 0 if there is none."""
    if bounds is None:
        return 0.0
    low, high = bounds
    step = shortened((low + high) / 2)
    return step if low * (1 - 1e-12) <= step <= high * (1 + 1e-12) else 0.0


def _settle(record: Record, old: Array, new: Array, changed: NDArray[np.bool_]) -> bool:
    """Fills in what the steps miss and the contexts; whether the record is cheaper than one of floats."""
    bits, whole = 8 * new.itemsize, Piece.whole(record.rows, record.columns)
    codes = predictors.step_codes(record, old, new, whole)
    made = predictors.ordered(predictors.stepped(record, old, codes, whole), bits)
    wanted = predictors.ordered(new, bits)
    missed = predictors.difference(wanted, made, bits)
    places = np.flatnonzero(missed)
    if not codes.any() or len(places) > min(_EXCEPTIONS, _STRAY * record.count):
        return False
    moved = predictors.difference(wanted[changed], predictors.ordered(old[changed], bits), bits)
    symbols, _, widths = tokens.encode(moved)
    floats = _entropy(np.append(symbols.astype(np.int16), np.zeros(record.count - len(moved), np.int16)))
    cost = _entropy(codes) + _EXCEPTION_BITS * len(places) + _STEP_BITS * np.count_nonzero(record.steps)
    if cost + _RECORD_BITS >= floats + float(widths.sum()):
        return False
    record.exceptions = [(int(place), int(missed[place])) for place in places]
    matrix = codes.reshape(record.rows, -1)
    touched = np.asarray(matrix.any(axis=1), dtype=bool)
    if touched.sum() < (1 - UNTOUCHED) * record.rows:
        record.used = touched
        record.steps = np.where(touched, record.steps, 0.0) if record.by_rows else record.steps
    planner.fit_changes(record, matrix.astype(np.float32))
    return True


def _entropy(symbols: Array) -> float:
    """Bits of symbols by their own frequencies."""
    counts = np.unique(symbols, return_counts=True)[1].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum())
