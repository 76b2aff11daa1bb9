"""Frequency tables: shared by contexts, quantised, and sent in few bytes.

Order: count symbols by context; find the classes of contexts that share a table (`classes`); quantise the
counts of each class to levels, a fixed number an octave, those of rare symbols closer to what readers expect;
send the map from contexts to classes and the levels through the arithmetic coder; turn levels into 12-bit
frequencies in integers, on both sides alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import classes as assigning
from updater.delta.program.arithmetic import Coder
from updater.delta.program.rans import MAX_SYMBOLS, TOTAL, RansError

Ints = NDArray[np.int64]
Symbols = NDArray[Any]

_OCTAVES = 16  # from the rarest to the most frequent symbol of a table
_PRECISIONS = (1, 2, 4)  # levels an octave
# round(2^16 * 2^(i/8)), i = 0..7
_FRACTIONS = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)
_NEARER = 1 << 13  # levels up to which it is tried what comes of others
_DISTANCE_BITS = (
    0.5,
    3.0,
    4.0,
    5.0,
    6.0,
    7.0,
    7.5,
    8.0,
)  # what a level takes, about, by its distance to the guess


@dataclass(frozen=True)
class Model:
    """What both sides need to code a stream of symbols.

    Attributes:
        classes: [contexts] the table of each context.
        frequencies: [tables, alphabet] 12-bit frequencies.
    """

    classes: NDArray[np.uint8]
    frequencies: NDArray[np.uint32]


def count(symbols: Symbols, contexts: Symbols, context_count: int, alphabet: int) -> Ints:
    """[contexts, alphabet]: how often each symbol occurs in each context."""
    index = contexts.astype(np.int64) * alphabet + symbols
    counts = np.bincount(index, minlength=context_count * alphabet)
    return counts.astype(np.int64).reshape(context_count, alphabet)


def _levels(counts: Ints, precision: int) -> Ints:
    """[classes, alphabet]: 0 for symbols that do not occur, else 1 + the logarithm above the rarest."""
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = np.maximum(counts * float(TOTAL) / total, 0.35)
    levels = np.rint(precision * (np.log2(share) + 1.5)).astype(np.int64) + 1
    return np.where(counts > 0, np.clip(levels, 1, precision * _OCTAVES), 0)


def _nearer(counts: Ints, levels: Ints, precision: int) -> Ints:
    """Levels between those of the counts and the guesses of readers, where the guess is worth what it costs.

    A symbol that occurs n times of N takes about n (1 - n / N) ln 2 / 2 bits more for each octave, squared,
    that its level is off.
    """
    out = np.zeros_like(levels)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    weights = counts * (1 - counts / totals) * (np.log(2) / 2 / precision**2)
    above = [0] * levels.shape[1]
    for row, (given, weight) in enumerate(zip(levels.tolist(), weights.tolist())):
        now = [0] * len(given)
        for column, level in enumerate(given):
            if level:
                guess, _ = _guess(now, above, column)
                now[column] = _between(level, guess, weight[column])
        out[row] = above = now
    return out


def _between(level: int, guess: int, weight: float) -> int:
    step = 1 if guess < level else -1
    last = len(_DISTANCE_BITS) - 1
    ways = range(guess, level + step, step)
    return min(
        ways, key=lambda way: weight * (way - level) ** 2 + _DISTANCE_BITS[min(abs(way - guess), last)]
    )


def _guess(now: list[int], above: list[int], column: int) -> tuple[int, int]:
    """What a level is expected to be, from those before it and above it, and how well that is known."""
    left, up = now[column - 1] if column else 0, above[column]
    corner = above[column - 1] if column else 0
    if left and up and corner:
        return min(max(left, up), max(min(left, up), left + up - corner)), 0
    return left or up or 1, 1


def frequencies(levels: Ints, precision: int) -> NDArray[np.uint32]:
    """[classes, alphabet] 12-bit frequencies of levels: each at least 1 where the level is not 0."""
    if levels.shape[1] > MAX_SYMBOLS or not (levels > 0).any(axis=1).all():
        raise RansError("a table is empty or has more than 256 symbols")
    if levels.max() > precision * _OCTAVES:
        raise RansError("a level lies outside its range")
    step = (levels - 1) * (8 // precision)
    weight = np.where(levels > 0, np.array(_FRACTIONS)[step % 8] << np.maximum(step // 8, 0), 0).astype(
        np.int64
    )
    total = weight.sum(axis=1, keepdims=True)
    out = np.maximum(weight * TOTAL // total, levels > 0).astype(np.int64)
    for row in out:
        left = TOTAL - int(row.sum())
        if left > 0:
            row[row.argmax()] += left
        while left < 0:
            largest = int(row.argmax())
            take = min(-left, max(1, int(row[largest]) // 2))
            row[largest] -= take
            left += take
    table: NDArray[np.uint32] = out.astype(np.uint32)
    return table


def _code_levels(coder: Coder, levels: Ints) -> Ints:
    """Sends levels: each predicted by the one before it and by the same place of the table before."""
    classes, alphabet = levels.shape
    out = np.zeros_like(levels)
    first, last = 0, -1
    above = [0] * alphabet
    for row in range(classes):
        given = levels[row].tolist()
        used = [column for column, level in enumerate(given) if level]
        first += coder.signed("first", (used[0] if used else 0) - first)
        last += coder.signed("last", (used[-1] if used else 0) - last)
        if not 0 <= first <= last < alphabet:
            raise RansError("a table's symbols lie outside their alphabet")
        holes = coder.bit("holes", int(len(used) < last - first + 1))
        now = [0] * alphabet
        for column in range(first, last + 1):
            left, up = now[column - 1] if column > first else 0, above[column]
            if holes and not coder.bit(("used", left > 0, up > 0), int(given[column] > 0)):
                continue
            guess, kind = _guess(now, above, column)
            now[column] = guess + coder.signed(("level", kind), given[column] - guess)
            if not 1 <= now[column] <= _PRECISIONS[-1] * _OCTAVES:
                raise RansError("a level lies outside its range")
        out[row] = above = now
    return out


def build(
    symbols: Symbols,
    contexts: Symbols,
    context_count: int,
    alphabet: int,
    budget: int = limits.MAX_CODED_DECISIONS,
) -> tuple[Model, bytes]:
    """The model for a stream and the bytes that send it, as `fit`."""
    return fit(count(symbols, contexts, context_count, alphabet), budget)


def fit(counts: Ints, budget: int = limits.MAX_CODED_DECISIONS) -> tuple[Model, bytes]:
    """The model for counts of [contexts, alphabet], and the bytes that send it.

    Raises LimitError when it takes more than `budget` decisions.
    """
    classes = assigning.assign(counts)
    number = int(classes.max()) + 1 if len(classes) else 1
    joined = np.zeros((number, counts.shape[1]), dtype=np.int64)
    np.add.at(joined, classes, counts)
    joined[joined.sum(axis=1) == 0, 0] = 1
    best: tuple[float, int, Ints, NDArray[np.uint32]] | None = None
    for precision in _PRECISIONS:
        exact = _levels(joined, precision)
        small = np.count_nonzero(joined) <= _NEARER
        for levels in (exact, _nearer(joined, exact, precision)) if small else (exact,):
            table = frequencies(levels, precision)
            data = -(joined * np.log2(np.maximum(table, 1) / TOTAL)).sum() / 8
            coder = Coder()
            _code_levels(coder, levels)
            size = data + len(coder.finish())
            if best is None or size < best[0]:
                best = (size, precision, levels, table)
    assert best is not None
    coder = Coder(budget=budget)
    code_model(coder, classes, len(counts), counts.shape[1], number, best[1], best[2])
    return Model(classes, best[3]), coder.finish()


def read(data: bytes, context_count: int, alphabet: int, budget: int = limits.MAX_CODED_DECISIONS) -> Model:
    """The model that `fit` sent. Raises RansError, CoderError or LimitError."""
    coder = Coder(data, budget=budget)
    classes, precision, levels = code_model(
        coder, np.zeros(context_count, dtype=np.uint8), context_count, alphabet, 0, 0, None
    )
    coder.end()
    return Model(classes, frequencies(levels, precision))


def _code_runs(coder: Coder, classes: NDArray[np.uint8], out: NDArray[np.uint8], number: int) -> None:
    """Sends which table each context has, as runs: how long each is, and whose."""
    ends = np.append(np.flatnonzero(np.diff(classes)) + 1, len(out)).tolist()
    place, newest, run = 0, -1, 0
    while place < len(out):
        end = place + 1 + coder.unsigned("run", ends[run] - place - 1 if run < len(ends) else 0)
        if end > len(out):
            raise RansError("a run of contexts leads beyond the last")
        value = int(classes[place])
        fresh = newest + 1 < number and coder.bit("new", int(value == newest + 1))
        value = newest + 1 if fresh else coder.bits(value, newest.bit_length())
        if value > newest + int(fresh):
            raise RansError("a context names a table that is not there")
        newest = max(newest, value)
        out[place:end] = value
        place, run = end, run + 1


def code_model(
    coder: Coder,
    classes: NDArray[np.uint8],
    contexts: int,
    alphabet: int,
    number: int,
    precision: int,
    levels: Ints | None,
) -> tuple[NDArray[np.uint8], int, Ints]:
    """Sends a model, or reads it (`levels` is then None): tables of contexts, levels an octave, levels."""
    number = coder.unsigned("number", number)
    power = coder.bits(precision.bit_length() - 1 if precision else 0, 2)
    if 1 << power not in _PRECISIONS:
        raise RansError("a model has levels of an unknown precision")
    if not 1 <= number <= 255:
        raise RansError("a model has no table or more than 255")
    out = np.zeros(contexts, dtype=np.uint8)
    if number > 1:
        _code_runs(coder, classes, out, number)
    empty = np.zeros((number, alphabet), dtype=np.int64)
    return out, 1 << power, _code_levels(coder, empty if levels is None else levels)
