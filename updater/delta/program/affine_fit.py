"""Finds factors and offsets that lead from the base's floats to the target's, by least squares.

Used by the encoder only. Order: for each way to see an array as lines (rows or columns of a matrix), on a
sample: whether straight lines explain enough of the change to be paid for; then which numbers of each line
are worth sending; the estimated bits. What wins is fitted to the whole array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import activity, affine
from updater.delta.program.affine import DIGITS, NEUTRAL_FACTOR, NEUTRAL_OFFSET, Affine

Array = NDArray[Any]
_SAMPLE = 1 << 14  # elements by which ways are compared
_LEAST = 32  # elements of an array, and ...
_LEAST_LINE = 8  # ... of a line, for it to have numbers of its own
_WORTH = 64.0  # bits that must be saved, and ...
_WORTH_EACH = 0.004  # ... of each element: less is what chance does to a sample
_LAST_PLACE = 2.0**-25  # of a number, about: how well float32 says it
_NEARLY = 4.0  # last places that a line misses in the mean, for its neighbours to be tried ...
_STEPS = 2  # ... on either side


@dataclass(frozen=True)
class Lines:
    """An array as lines: `rows` of a matrix, or its columns; significant bits of what each is sent."""

    rows: int
    by_rows: bool
    digits: int

    def fit(self, old: Array, new: Array) -> Affine:
        """The factors and offsets of [rows, columns] matrices."""
        return _fit(old, new, self.digits) if self.by_rows else _fit(old.T, new.T, self.digits)

    def change(self, old: Array, new: Array, line: Affine) -> Array:
        """What the prediction misses."""
        factors, offsets = (
            each[:, None] if self.by_rows else each[None, :] for each in (line.factors, line.offsets)
        )
        missed: Array = new - (old * factors + offsets)
        return missed


def best(splits: Sequence[int], old: Array, new: Array, bits: float) -> tuple[float, Lines] | None:
    """The lines that take fewest bits, if fewer than `bits` (as `activity.bits`); None if none do.

    Args:
        splits: numbers of rows that the array can be seen as.
        old: flat float32, finite: the base's.
        new: the target's, alike.
        bits: what the best other way takes.
    """
    count, found = len(old), None
    if count < _LEAST:
        return None
    worth = _WORTH + _WORTH_EACH * count
    for rows in splits:
        one, two = (_sampled(values.reshape(rows, -1)) for values in (old, new))
        share = one.size / count
        plain = _bits(two - one) / share  # of the same sample: chance is alike for both
        for by_rows in (True, False):
            if (count // rows if by_rows else rows) < _LEAST_LINE:
                continue
            if not _explained(one if by_rows else one.T, two if by_rows else two.T, worth * share):
                continue
            for digits in DIGITS:
                lines = Lines(rows, by_rows, digits)
                line = lines.fit(one, two)
                cost = _bits(lines.change(one, two, line)) / share
                cost += affine.bits(line) * (rows / len(one) if by_rows else 1)
                if cost < min(plain, bits) - worth and (found is None or cost < found[0]):
                    found = cost, lines
    return found


def _bits(change: Array) -> float:
    """Estimated bits of changes."""
    least = max(1e-30, float(np.abs(change).mean()) * 0.05)
    return activity.bits(change, activity.fit(change, least), least)


def _sampled(matrix: Array) -> Array:
    """Some rows of a matrix, or the begin of few long ones."""
    rows = len(matrix)
    part = matrix[:: max(1, min(matrix.size // _SAMPLE, rows // 64))]
    return part[:, : max(_LEAST_LINE, _SAMPLE // len(part))] if part.size > 2 * _SAMPLE else part


def _explained(old: Array, new: Array, worth: float) -> bool:
    """Whether straight lines may save more than `worth` bits beyond what it costs to send them."""
    moved = old - old.mean(axis=1, keepdims=True)
    other = new - new.mean(axis=1, keepdims=True)
    energy, crossed = (moved * moved).sum(axis=1), (moved * other).sum(axis=1)
    taken = np.divide(crossed * crossed, energy, out=np.zeros(len(old), old.dtype), where=energy > 0)
    left = np.maximum((other * other).sum(axis=1) - taken, 0)
    change = ((new - old) ** 2).sum(axis=1)
    floor = (new * new).sum(axis=1) * np.float32(_LAST_PLACE) ** 2 + np.float32(1e-37)
    saved = 0.5 * old.shape[1] * np.log2((change + floor) / (left + floor)) - 2 * DIGITS[0]
    return float(np.maximum(saved, 0).sum()) > worth


def _fit(old: Array, new: Array, digits: int) -> Affine:
    """For each row the numbers by least squares that pay: none, a factor, an offset, or both."""
    x, y = old.astype(np.float64), new.astype(np.float64)
    length = x.shape[1]
    x_mean, y_mean = x.mean(axis=1), y.mean(axis=1)
    energy = (x * x).sum(axis=1)
    apart = energy - length * x_mean * x_mean
    crossed = (x * y).sum(axis=1)
    through = np.divide(crossed, energy, out=np.ones(len(x)), where=energy > 0)
    tilted = ((x - x_mean[:, None]) * y).sum(axis=1)
    slope = np.divide(tilted, apart, out=np.ones(len(x)), where=apart > 0)
    neutral = np.ones(len(x))
    ways = []
    for factor, moved in ((neutral, False), (through, False), (neutral, True), (slope, True)):
        factors = affine.rounded(factor, digits, NEUTRAL_FACTOR)
        away = y_mean - factors * x_mean if moved else np.zeros(len(x))
        ways.append((factors, affine.rounded(away, digits, NEUTRAL_OFFSET)))
    spread = np.abs(y).mean(axis=1) * _LAST_PLACE + 1e-38
    costs = []
    for factors, offsets in ways:
        missed = np.abs(new - (old * factors[:, None] + offsets[:, None])).mean(axis=1) + spread
        sent = 1.0 * (factors.view("<u4") != NEUTRAL_FACTOR) + (offsets.view("<u4") != NEUTRAL_OFFSET)
        costs.append(length * np.log2(missed) + (digits + 3) * sent)
    picked = np.argmin(costs, axis=0)
    every = np.arange(len(x))
    factors, offsets = (np.array(each)[picked, every] for each in zip(*ways))
    left = np.abs(new - (old * factors[:, None] + offsets[:, None])).mean(axis=1)
    near = np.flatnonzero((left > 0) & (left < _NEARLY * spread) & (digits == DIGITS[-1]))
    for row in near.tolist():
        factors[row], offsets[row] = _refined(old[row], new[row], factors[row], offsets[row])
    return Affine(digits, factors, offsets)


def _refined(old: Array, new: Array, factor: np.float32, offset: np.float32) -> tuple[np.float32, np.float32]:
    """Of the numbers beside those of a line the pair that meets most elements exactly.

    A sum that was rounded tells its offset up to half its last place; where all of these overlap, it lies.
    """
    best = int(np.count_nonzero(old * factor + offset == new)), factor, offset
    moved = offset.view("<u4") != NEUTRAL_OFFSET
    start = int(factor.view("<u4"))
    half = np.spacing(np.abs(new)).astype(np.float64) / 2
    steps = range(-_STEPS, _STEPS + 1) if start != NEUTRAL_FACTOR else (0,)
    for step in steps:
        near = np.array([start + step], dtype="<u4").view("<f4")[0]
        product, away = old * near, offset
        if moved:
            left = new.astype(np.float64) - product
            low, high = float((left - half).max()), float((left + half).min())
            away = affine.rounded(np.array([(low + high) / 2]), DIGITS[-1], NEUTRAL_OFFSET)[0]
        best = max(best, (int(np.count_nonzero(product + away == new)), near, away), key=lambda way: way[0])
    return best[1], best[2]
