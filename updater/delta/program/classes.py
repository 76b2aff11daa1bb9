"""Which contexts share a table: by what that saves in tables and in the map from contexts to these.

Order: merge the two classes whose union costs least more than the two apart, as long as the table saved is
worth it; then move contexts to the class of their neighbours where that saves more of the map than it costs,
and merge again. Used by the encoder alone; equal counts give equal classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_TABLE_BITS = 8.0  # what a level costs, about, and the time that it takes to read
_RUN_BITS = 12.0  # the same of a change of tables from a context to the next
_EXACT = 256.0  # parts of a bit
_PAIRWISE = 512  # classes above which only neighbours are merged
_ROUNDS = 3  # of straightening
_STRAIGHTENED = 1 << 13  # contexts up to which it is done


def assign(counts: Ints) -> NDArray[np.uint8]:
    """[contexts] the class of each of counts [contexts, alphabet]; classes count from 0 by first contexts."""
    classes = _merge(counts)
    used = np.flatnonzero(counts.any(axis=1))
    if not 1 < len(used) <= _STRAIGHTENED:
        return classes
    best, least = classes, _total(counts, classes)
    for _ in range(_ROUNDS):
        classes = _straightened(counts, classes)
        sums = np.zeros((int(classes.max()) + 1, counts.shape[1]), dtype=np.int64)
        np.add.at(sums, classes, counts)
        classes = _numbered(_merge(sums)[classes[used]], used, len(counts))
        total = _total(counts, classes)
        if total >= least:
            break
        best, least = classes, total
    return best


def _cost(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits of the symbols at the entropy of each row (the last axis), and of the row's table."""
    total = counts.sum(axis=-1)
    positive = np.where(counts > 0, counts, 1).astype(np.float64)
    data = total * np.log2(np.maximum(total, 1)) - (counts * np.log2(positive)).sum(axis=-1)
    # A symbol cannot be rarer than 1 in 4096: what rare ones force costs too.
    bits: NDArray[np.float64] = data + _TABLE_BITS * (counts > 0).sum(axis=-1) + 24
    return bits


def _merge(counts: Ints, most: int = 255) -> NDArray[np.uint8]:
    """The class of each context after greedy merging, as `assign`."""
    used = np.flatnonzero(counts.sum(axis=1))
    seen = counts[:, counts.any(axis=0)]
    groups: list[list[int]] = [[int(context)] for context in used]
    sums = [seen[context] for context in used]
    while len(groups) > _PAIRWISE:
        rows = np.stack(sums)
        costs = _cost(rows)
        gains = _cost(rows[:-1] + rows[1:]) - costs[:-1] - costs[1:]
        # The best half of the neighbours at once, each group in one pair only.
        taken = np.zeros(len(groups), dtype=bool)
        left = max(1, min(len(groups) - _PAIRWISE, len(groups) // 4))
        drop = []
        improving = bool((gains < 0).sum() > 8)
        for index in np.argsort(gains, kind="stable"):
            if (
                left
                and (gains[index] < 0 or len(groups) > 4 * _PAIRWISE or not improving)
                and not taken[index]
                and not taken[index + 1]
            ):
                taken[index] = taken[index + 1] = True
                groups[index] += groups[index + 1]
                sums[index] = sums[index] + sums[index + 1]
                drop.append(int(index) + 1)
                left -= 1
        for index in sorted(drop, reverse=True):
            del groups[index], sums[index]
    rows = np.stack(sums) if sums else np.zeros((0, seen.shape[1]), dtype=np.int64)
    costs = _cost(rows)
    gain = np.full((len(rows), len(rows)), np.inf)
    for index in range(len(rows)):
        gain[index, index + 1 :] = _cost(rows[index] + rows[index + 1 :]) - costs[index] - costs[index + 1 :]
    alive = len(rows)
    while alive > 1:
        one, other = divmod(int(gain.argmin()), len(rows))
        if gain[one, other] >= 0 and alive <= most:
            break
        rows[one] += rows[other]
        groups[one] += groups[other]
        groups[other] = []
        costs[one] = _cost(rows[one])
        gain[other, :] = gain[:, other] = np.inf
        alive -= 1
        live = np.array([bool(group) for group in groups])
        fresh = np.where(live, _cost(rows + rows[one]) - costs - costs[one], np.inf)
        gain[one, one + 1 :] = fresh[one + 1 :]
        gain[:one, one] = fresh[:one]
    classes = np.zeros(len(counts), dtype=np.uint8)
    for number, group in enumerate(filter(None, groups)):
        classes[group] = number
    return _numbered(classes[used], used, len(counts))


def _numbered(classes: NDArray[Any], used: NDArray[Any], contexts: int) -> NDArray[np.uint8]:
    """The class of every context from those of the ones that occur, numbered by first contexts.

    What does not occur follows what stands before it: cheapest to send.
    """
    _, first, names = np.unique(classes, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    source = np.searchsorted(used, np.arange(contexts), side="right") - 1
    followed: NDArray[np.uint8] = order.astype(np.uint8)[names][np.maximum(source, 0)]
    return followed


def _straightened(counts: Ints, classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Classes with fewer changes from a context to the next: the cheapest path through all contexts.

    A path pays for the symbols of each context in the table of its class, and for each change.
    """
    used = np.flatnonzero(counts.any(axis=1))
    rows = counts[used][:, counts.any(axis=0)]
    sums = np.zeros((int(classes.max()) + 1, rows.shape[1]), dtype=np.int64)
    np.add.at(sums, classes[used], rows)
    totals = sums.sum(axis=1, keepdims=True)
    bits = np.log2(np.maximum(totals, 1)) - np.log2(np.maximum(sums, 1)) + np.where(sums > 0, 0, _TABLE_BITS)
    bits = np.rint(bits * _EXACT)  # sums of integers are the same in any order
    costs = rows.astype(np.float64) @ bits.T
    paths, sources = costs[0].copy(), np.zeros(costs.shape, dtype=np.uint8)
    stays = np.arange(len(sums))
    for index in range(1, len(rows)):
        best = int(paths.argmin())
        change = paths[best] + _RUN_BITS * _EXACT
        sources[index] = np.where(paths <= change, stays, best)
        paths = np.minimum(paths, change) + costs[index]
    path = np.zeros(len(rows), dtype=np.uint8)
    at = int(paths.argmin())
    for index in range(len(rows) - 1, -1, -1):
        path[index] = at
        at = int(sources[index, at])
    return _numbered(path, used, len(counts))


def _total(counts: Ints, classes: NDArray[np.uint8]) -> float:
    """Bits of the symbols, the tables, and the map from contexts to these."""
    sums = np.zeros((int(classes.max()) + 1, counts.shape[1]), dtype=np.int64)
    np.add.at(sums, classes, counts)
    return float(_cost(sums).sum() + _RUN_BITS * np.count_nonzero(np.diff(classes)))
