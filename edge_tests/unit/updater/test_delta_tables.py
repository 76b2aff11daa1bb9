"""Tables of frequencies: which contexts share one, and levels that cost less to send."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from updater.delta.program import classes, tables


def samples(contexts: int, each: int, seed: int) -> NDArray[np.int64]:
    """Counts of codes whose spread grows slowly from a context to the next."""
    random = np.random.default_rng(seed)
    out = np.zeros((contexts, 60), dtype=np.int64)
    for context in range(contexts):
        spread = 0.4 + 3 * (context / contexts) ** 2
        found = np.clip(np.rint(random.normal(30, spread, random.integers(0, each))), 0, 59).astype(np.int64)
        out[context] = np.bincount(found, minlength=60)
    return out


def bits(counts: NDArray[np.int64], found: NDArray[np.uint8]) -> float:
    sums = np.zeros((int(found.max()) + 1, counts.shape[1]), dtype=np.int64)
    np.add.at(sums, found, counts)
    share = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1)
    return float(-(sums * np.log2(np.where(sums > 0, share, 1))).sum())


@pytest.mark.parametrize("seed", range(4))
def test_contexts_join_their_neighbours(seed: int) -> None:
    counts = samples(600, 60, seed)
    merged, found = classes._merge(counts), classes.assign(counts)
    changes = [np.count_nonzero(np.diff(each.astype(int))) for each in (merged, found)]
    assert changes[1] < 0.5 * changes[0]
    assert bits(counts, found) < 1.02 * bits(counts, merged)
    assert bits(counts, found) + 10 * changes[1] < bits(counts, merged) + 10 * changes[0]


def test_classes_are_numbered_by_their_first_contexts() -> None:
    counts = samples(300, 60, 9)
    counts[[0, 1, 50, 51, 299]] = 0
    found = classes.assign(counts).tolist()
    firsts = [found.index(number) for number in range(max(found) + 1)]
    assert firsts == sorted(firsts)
    assert found[50] == found[51] == found[49]
    assert found[299] == found[298]
    assert found[0] == found[1] == found[2] == 0


@pytest.mark.parametrize("contexts", [1, 2, 700])
@pytest.mark.parametrize("each", [2, 5000])
def test_tables_come_back(contexts: int, each: int) -> None:
    counts = samples(contexts, each, contexts)
    counts[contexts // 2, 7] += 1
    model, sent = tables.fit(counts)
    again = tables.read(sent, contexts, 60)
    assert (again.classes == model.classes).all()
    assert (again.frequencies == model.frequencies).all()
    assert (model.frequencies.sum(axis=1) == 4096).all()
    occurring = np.argwhere(counts)
    assert (model.frequencies[model.classes[occurring[:, 0]], occurring[:, 1]] > 0).all()


def test_a_rare_symbol_takes_the_level_that_readers_expect() -> None:
    assert tables._between(9, 6, weight=0.01) == 6
    assert tables._between(9, 6, weight=100.0) == 9
    assert tables._between(6, 6, weight=0.0) == 6
