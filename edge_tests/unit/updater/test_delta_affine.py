"""Floats that are the base's times factors plus offsets: exactly, nearly, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_tests.conformance.plain.delta import decode
from edge_tests.unit.updater.program_pairs import Arrays, predictors, send, weights
from updater.delta import faults
from updater.delta.program import affine, affine_fit, run
from updater.delta.program.affine import DIGITS, NEUTRAL_FACTOR, NEUTRAL_OFFSET, Affine
from updater.delta.program.arithmetic import Coder
from updater.delta.program.encoder import ProgramEncoder
from updater.errors import SluiceError

HEAD = 300  # bytes that a delta has beside its blocks, about
ROWS, COLUMNS = 96, 160
WORDS = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=40)


def numbers(axis: int, seed: int, low: float, high: float) -> NDArray[np.float32]:
    """A number for each row (axis 0) or column, as it broadcasts."""
    count = ROWS if axis == 0 else COLUMNS
    out = np.random.default_rng(seed).uniform(low, high, count).astype(np.float32)
    return out[:, None] if axis == 0 else out[None, :]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["factor", "offset", "both", "small offset"])
def test_exact_lines_cost_their_numbers(tmp_path: Path, axis: int, kind: str) -> None:
    old = weights((ROWS, COLUMNS))
    new = old
    if kind in ("factor", "both"):
        new = new * numbers(axis, 2, 0.5, 2)
    if kind != "factor":
        new = new + numbers(axis, 3, -0.2, 0.2) * np.float32(1e-3 if kind == "small offset" else 1)
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"float"}
    lines = ROWS if axis == 0 else COLUMNS
    each = 8 if kind == "both" else 4
    # Of an offset that is much smaller than the numbers, rounding hides the last bits; some lines miss a few.
    assert summary.delta_size < HEAD + lines * each * 1.6
    assert decode(bytes(old.tobytes()), (tmp_path / "d").read_bytes()) == new.tobytes()


@pytest.mark.parametrize("shape", [(300,), (1, 300), (ROWS, COLUMNS), (8, 4, 3, 30)])
def test_one_factor_and_offset_for_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    old = weights(shape)
    new = old * np.float32(0.99931234) + np.float32(0.0123)
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"float"}
    assert summary.delta_size < HEAD


def test_rows_left_alone_cost_nothing(tmp_path: Path) -> None:
    old = weights((512, 64))
    new = old.copy()
    new[100:104] = new[100:104] * np.float32(1.25) + np.float32(0.3)
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert summary.delta_size < HEAD + 4 * 12 + 512 // 8


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_what_noise_leaves_is_as_small_as_without_a_line(tmp_path: Path, spread: float) -> None:
    old = weights((ROWS, COLUMNS))
    noise = np.random.default_rng(5).normal(0, spread, old.shape).astype(np.float32)
    moved = old * numbers(0, 2, 0.8, 1.2) + numbers(0, 3, -0.2, 0.2)
    one = send(tmp_path, Arrays().add("w", moved), Arrays().add("w", moved + noise)).delta_size
    other = send(tmp_path, Arrays().add("w", old), Arrays().add("w", moved + noise)).delta_size
    assert other < one * 1.02 + ROWS * 8


def test_noise_alone_has_no_line() -> None:
    old = weights((ROWS * COLUMNS,))
    new = old + np.random.default_rng(5).normal(0, 1e-3, old.shape).astype(np.float32)
    assert affine_fit.best([1, ROWS], old, new, 0.0) is None


def test_specials_travel(tmp_path: Path) -> None:
    """Numbers that are not finite or subnormal, amid lines; and the plain decoder agrees."""
    old = weights((ROWS, COLUMNS))
    old[0, :6] = [np.nan, np.inf, -np.inf, -0.0, 1e-42, -1e-42]
    old[3] = 0
    with np.errstate(all="ignore"):
        new = (old * numbers(0, 2, 0.5, 2) + numbers(0, 3, -0.2, 0.2)).astype(np.float32)
    new[5, 5], new[6, 6] = np.nan, np.inf
    new[7, 7:9] = np.array([0x7F812345, 0xFFC00001], dtype="<u4").view("<f4")
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("w", new))
    assert predictors(summary) == {"float"}
    assert summary.delta_size < new.nbytes // 8
    assert decode(old.tobytes(), (tmp_path / "d").read_bytes()) == new.tobytes()


@pytest.mark.parametrize("block_size", [1 << 20, 9000])
def test_lines_in_blocks_and_of_transposed_arrays(tmp_path: Path, block_size: int) -> None:
    old = weights((ROWS, COLUMNS))
    new = (old * numbers(0, 2, 0.5, 2) + numbers(0, 3, -0.02, 0.02)).T.copy()
    summary = send(tmp_path, Arrays().add("w", old), Arrays().add("v", new), block_size)
    blocks = -(-new.nbytes // block_size)
    assert summary.delta_size < HEAD + blocks * (200 + ROWS * 8 * 1.5)


def test_damage_to_lines() -> None:
    """Damaged records of factors and offsets end with an error, or write the right length."""
    old = weights((ROWS, COLUMNS))
    new = (old * numbers(0, 2, 0.5, 2) + numbers(0, 3, -0.2, 0.2)).astype(np.float32)
    base, target = Arrays().add("w", old), Arrays().add("w", new)
    files = [np.frombuffer(bytes(side.data), dtype=np.uint8) for side in (base, target)]
    found = ProgramEncoder(files[0], base.spans, files[1], target.spans, 3, False).encode(0, new.nbytes)
    assert found is not None

    def read(offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > old.nbytes:
            raise faults.invalid("outside")
        return old.tobytes()[offset : offset + length]

    assert bytes(run(read, found.data, 0, new.nbytes)) == new.tobytes()
    random, refused = np.random.default_rng(8), 0
    for _ in range(60):
        damaged = bytearray(found.data)
        damaged[int(random.integers(0, len(damaged)))] ^= int(random.integers(1, 256))
        try:
            assert len(run(read, bytes(damaged), 0, new.nbytes)) == new.nbytes
        except SluiceError:
            refused += 1
    assert refused


@given(WORDS, st.sampled_from(DIGITS))
def test_what_is_rounded_can_be_sent(words: list[int], digits: int) -> None:
    """Factors and offsets of any bits, rounded, come back as they were; and are nearest."""
    values = np.array(words, dtype="<u4").view("<f4")
    with np.errstate(all="ignore"):
        factors = affine.rounded(values, digits, NEUTRAL_FACTOR)
        offsets = affine.rounded(values[::-1].copy(), digits, NEUTRAL_OFFSET)
    writing = Coder(limit=30)
    affine.code(writing, digits, len(words), Affine(digits, factors, offsets))
    reading = Coder(writing.finish(), 30)
    found = affine.code(reading, digits, len(words), None)
    reading.end()
    assert found.factors.tobytes() == factors.tobytes()
    assert found.offsets.tobytes() == offsets.tobytes()
    near = np.isfinite(values) & (np.abs(values) > 1e-37) & (np.abs(values) < 1e38)
    error = np.abs(factors[near].astype(np.float64) - values[near]) / np.abs(values[near])
    assert (error <= 2.0**-digits).all()
