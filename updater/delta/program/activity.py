"""How strongly the rows and columns of a matrix change: levels that both sides know, as contexts for its
residuals.

The model is separable: the expected change of element (i, j) is 2^((row[i] + column[j]) / 2). The encoder
fits it to
the changes and sends the levels (half octaves) through the arithmetic coder, each against the one before
it; it sends
rows, columns, both or neither, by what they save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.arithmetic import Coder
from updater.delta.program.operands import ProgramError

Ints = NDArray[np.int64]
MAX_LEVEL = 1 << 12
_ROUNDS = 4
_LEVEL_BITS = 2.2  # what a level costs, about
_MIN_ELEMENTS = 64
_SERVED = 8  # elements that a level must serve to be worth its time


@dataclass(frozen=True)
class Activity:
    """Levels of a matrix: `rows` and `columns` in half octaves; one entry stands for all of a side."""

    rows: Ints
    columns: Ints

    def levels(self) -> Ints:
        """[rows or 1, columns or 1]: the level of each element, to be broadcast."""
        levels: Ints = self.rows[:, None] + self.columns[None, :]
        return levels


def _octaves(mean: NDArray[np.float64]) -> Ints:
    levels: Ints = np.rint(2 * np.log2(np.maximum(mean, 1e-300))).astype(np.int64)
    return levels


def _fit(size: NDArray[np.float64], rows: bool, columns: bool) -> Activity:
    u, v = np.full(size.shape[0], size.mean()), np.ones(size.shape[1])
    for _ in range(_ROUNDS if rows and columns else 1):
        if columns:
            v = (size / u[:, None]).mean(axis=0)
        if rows:
            u = (size / v[None, :]).mean(axis=1)
    return Activity(_octaves(u if rows else u[:1]), _octaves(v if columns else v[:1]))


def _bits(size: NDArray[Any], activity: Activity) -> float:
    """Bits by the model of a two-sided exponential with the levels' scale."""
    rows, columns = activity.rows / 2.0, activity.columns / 2.0
    sent = sum(len(side) for side in (rows, columns) if len(side) > 1)
    # The sum over elements of level + |change| / 2^level * log2(e), without an array of levels.
    level = rows.sum() * (size.shape[0] / len(rows)) * size.shape[1]
    level += columns.sum() * (size.shape[1] / len(columns)) * size.shape[0]
    by_rows = size @ np.broadcast_to(np.exp2(-columns), size.shape[1]).astype(np.float32)
    scaled = float((by_rows * np.exp2(-rows)).sum())
    return float(level + scaled * np.log2(np.e) + _LEVEL_BITS * sent)


def fit(change: NDArray[Any], floor: float) -> Activity:
    """The levels of [rows, columns] changes. `floor` is added to each: what counts as no change."""
    size = np.abs(change).astype(np.float32) + np.float32(floor)
    rows, columns = (count > 1 and others >= _SERVED for count, others in (size.shape, size.shape[::-1]))
    sides = {(False, False), (rows, False), (False, columns), (rows, columns)}
    fits = [_fit(size, *side) for side in sorted(sides)]
    return min(fits, key=lambda activity: _bits(size, activity))


def code(
    coder: Coder, shape: tuple[int, int], used: NDArray[np.bool_], activity: Activity | None
) -> Activity:
    """Sends an activity, or reads it when the coder reads (`activity` is then None).

    Of rows that are not `used` (none given: all are) no level is sent; theirs is 0.
    """
    sides = []
    given = (activity.rows, activity.columns) if activity else (None, None)
    if len(used):
        shape = (int(used.sum()), shape[1])
        if activity is not None and len(activity.rows) > 1:
            given = (activity.rows[used], activity.columns)
    for index, (values, count) in enumerate(zip(given, shape)):
        full = coder.bit(("full", index), int(values is not None and len(values) == count))
        out = np.zeros(count if full else 1, dtype=np.int64)
        last, before = 0, 0
        for place in range(len(out)):
            spread = min(3, abs(last - before))
            value = 0 if values is None else int(values[place])
            step = coder.signed(("level", index, min(place, 2), spread), value - last)
            last, before = last + step, last
            if abs(last) > MAX_LEVEL:
                raise ProgramError("an activity level lies outside its range")
            out[place] = last
        sides.append(out)
    if len(used) and len(sides[0]) > 1:
        rows = np.zeros(len(used), dtype=np.int64)
        rows[used] = sides[0]
        sides[0] = rows
    return Activity(sides[0], sides[1])


def fits_of_logarithms(size: NDArray[Any]) -> list[Activity]:
    """Levels by the mean logarithm, which a few large numbers do not move: for rows, columns, both,
    neither.
    """
    logs = 2 * np.log2(np.maximum(np.abs(size).astype(np.float64), 1e-300))
    logs = np.maximum(logs, -300.0)
    mean = float(logs.mean())
    rows = np.rint(logs.mean(axis=1)).astype(np.int64)
    columns = np.rint(logs.mean(axis=0) - mean).astype(np.int64)
    middle, zero = np.array([round(mean)]), np.zeros(1, dtype=np.int64)
    out = [Activity(middle, zero)]
    if size.size >= _MIN_ELEMENTS:
        out += [Activity(rows, zero), Activity(middle, columns), Activity(rows, columns)]
    return out


def sent_bits(activity: Activity) -> float:
    """What sending levels costs, about."""
    total = 0.0
    for side in (activity.rows, activity.columns):
        if len(side) > 1:
            steps = np.abs(np.diff(side))
            total += float((2 * np.log2(steps + 1) + 1).clip(0, np.log2(steps.mean() + 1) + 3).sum())
    return total


def bits(change: NDArray[Any], activity: Activity, floor: float) -> float:
    """Estimated bits of changes coded with these levels, up to a constant an element."""
    return _bits(np.abs(change).astype(np.float32) + np.float32(floor), activity)
