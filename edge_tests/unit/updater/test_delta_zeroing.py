"""Arrays with numbers made zero: by size, all but N of each M, whole channels; and what is not quite so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_tests.unit.updater.program_pairs import Arrays, predictors, send, weights
from updater.delta.program import records
from updater.delta.program.operands import Operands
from updater.delta.program.piece import pieces
from updater.delta.program.predictors import smallest, zeroed

HEAD = 300  # bytes that a delta has beside its blocks, about


def thinned(values: NDArray[np.generic], keep: int, group: int) -> NDArray[np.generic]:
    """The `keep` largest of each `group` of the last axis, zero elsewhere; of equal ones the first stay."""
    out = values.copy().reshape(-1, group)
    for row in out:
        sizes = [abs(float(value)) for value in row]
        for place in sorted(range(group), key=lambda place: (-sizes[place], place))[keep:]:
            row[place] = 0
    return out.reshape(values.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("down", [False, True])
def test_n_of_each_m(tmp_path: Path, dtype: type, keep: int, group: int, down: bool) -> None:
    old = (weights((64, 48)) * 500).astype(dtype)
    new = thinned(old.T, keep, group).T.copy() if down else thinned(old, keep, group)
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"thinned"}
    assert summary.delta_size < HEAD


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("axis", [0, 1])
def test_whole_channels(tmp_path: Path, dtype: type, axis: int) -> None:
    old = (weights((64, 48)) * 500).astype(dtype)
    new = old.copy()
    gone = np.argsort(np.abs(old.astype(np.float64)).sum(axis=1 - axis))[:20]
    new[(gone, slice(None)) if axis == 0 else (slice(None), gone)] = 0
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"masked"}
    assert summary.delta_size < HEAD


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_small_numbers(tmp_path: Path, dtype: type) -> None:
    old = (weights((64, 48)) * 500).astype(dtype)
    new = np.where(np.abs(old) < 17, dtype(0), old)
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"pruned"}
    assert summary.delta_size < HEAD


def test_exceptions_and_signs(tmp_path: Path) -> None:
    old = weights((128, 48))
    new = thinned(old, 2, 4) * np.float32(1)
    new = np.where((new == 0) & (old < 0), np.float32(-0.0), new).astype(np.float32)
    new[3, 5], new[60, 47] = 1.5, np.float32(np.nan)
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"thinned"}
    assert summary.delta_size < HEAD


def test_a_pruned_transposed_array_in_blocks(tmp_path: Path) -> None:
    old = weights((96, 80))
    new = thinned(old, 2, 4).T.copy()
    for block_size in (1 << 20, 7000):
        summary = send(tmp_path, Arrays().add("w", old), Arrays().add("v", new), block_size)
        # What a block cuts off a group of four rows has no group.
        assert summary.delta_size < HEAD + (new.nbytes // block_size) * (120 + 4 * 3 * 96 * 2)


def test_pieces_of_groups_are_alike_however_a_record_is_cut() -> None:
    """Groups down the columns reach over the rows of one piece, and of rows wider than a piece."""
    for shape, by_rows in (
        ((64, 3000), True),
        ((64, 3000), False),
        ((4, 70_000), True),
        ((4, 70_000), False),
    ):
        values = weights(shape)
        data = values.tobytes()
        record = records.Record(
            records.THINNED, records.F32, 0, values.size, shape[0], by_rows=by_rows, zero=2, group=4
        )
        base = Operands(lambda at, length, data=data: data[at : at + length])
        made = np.concatenate([zeroed(base, record, piece) for piece in pieces(*shape)])
        wanted = thinned(values, 2, 4) if by_rows else thinned(values.T.copy(), 2, 4).T.copy()
        assert made.tobytes() == wanted.tobytes()


def test_of_equal_numbers_the_first_stay() -> None:
    assert smallest(np.array([[3, 3, 3, 1], [0, 0, 0, 0]]), 2).tolist() == [
        [False, False, True, True],
        [False, False, True, True],
    ]
