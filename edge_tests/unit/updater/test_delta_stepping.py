"""Arrays that are their base plus small multiples of a step: what approximate updates send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_tests.unit.updater.program_pairs import Arrays, predictors, send
from updater import approximate as ap
from updater.approximate.layers import decode, encode
from updater.delta.program import steps as stepping_steps
from updater.delta.program.arithmetic import Coder
from updater.delta.program.operands import ProgramError
from updater.delta.program.piece import Piece
from updater.delta.program.predictors import step_codes, stepped
from updater.delta.program.records import BF16, F16, F32, STEPPED, Record
from updater.delta.program.steps import shortened

HEAD = 450  # bytes that a delta has beside its blocks and the tables of one pool, about
DTYPES = ("float32", "float16", "bfloat16")
NONE = np.empty(0, dtype=bool)
Words = NDArray[Any]


def entropy(codes: Words) -> float:
    """Bytes of codes by their own frequencies."""
    counts = np.unique(codes, return_counts=True)[1].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def moved(old: Words, dtype: str, codes: Words, steps: Words) -> Words:
    """Words with codes [rows, columns] times a step of each row added; code 0 keeps the word."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = decode(old, dtype).reshape(codes.shape) + codes * steps[:, None]
    return np.where(codes.reshape(-1) != 0, encode(values.reshape(-1), dtype), old)


def drawn(dtype: str, shape: tuple[int, ...], seed: int = 1) -> Words:
    return encode(np.random.default_rng(seed).normal(0, 0.05, shape).reshape(-1), dtype)


def pair(old: Words, new: Words, dtype: str, shape: tuple[int, ...]) -> tuple[Arrays, Arrays]:
    old_file, new_file = (Arrays().add("w", words, dtype, shape=shape) for words in (old, new))
    return old_file, new_file


def some_steps(rows: int, seed: int = 2) -> Words:
    return np.array([shortened(float(x)) for x in np.random.default_rng(seed).uniform(0.002, 0.003, rows)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 300), (300, 17), (5, 20_000), (30, 8, 3, 3)])
def test_signs_with_a_step_for_each_row(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    old = drawn(dtype, shape)
    codes = np.random.default_rng(3).choice([-1, 0, 1], shape, p=[0.45, 0.1, 0.45]).reshape(shape[0], -1)
    new = moved(old, dtype, codes, some_steps(shape[0]))
    summary = send(tmp_path, *pair(old, new, dtype, shape))
    assert predictors(summary) == {"stepped"}
    assert summary.delta_size < entropy(codes) + 1.6 * shape[0] + HEAD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("least", [1, 3, 4])
def test_few_large_codes_with_one_step(tmp_path: Path, dtype: str, least: int) -> None:
    shape = (80, 120)
    rng = np.random.default_rng(4)
    old = drawn(dtype, shape)
    codes = rng.integers(least, 40, shape) * rng.choice([-1, 1], shape) * (rng.random(shape) < 0.05)
    new = moved(old, dtype, codes, np.full(80, 3001 * 2.0**-20))
    summary = send(tmp_path, *pair(old, new, dtype, shape))
    assert predictors(summary) == {"stepped"}
    assert summary.delta_size < entropy(codes) + 2 * HEAD


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_stay_and_words_that_stray(tmp_path: Path, dtype: str) -> None:
    shape = (200, 64)
    old = drawn(dtype, shape)
    codes = np.random.default_rng(5).choice([-1, 1], shape)
    codes[np.arange(200) % 4 != 0] = 0
    new = moved(old, dtype, codes, some_steps(200))
    new[[70, 5000, 12_799]] ^= 0x55
    summary = send(tmp_path, *pair(old, new, dtype, shape))
    assert predictors(summary) == {"stepped"}
    assert summary.delta_size < 50 * 64 / 8 + 50 * 1.6 + HEAD


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_no_code_moves_stay_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    shape, top = (40, 100), {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    old = drawn(dtype, shape)
    sign = 1 << (8 * old.itemsize - 1)
    odd = [top + 1, top | sign, sign, 0, 1, sign | 1, top, (top | sign) + 7, top - 1]
    old[: len(odd)] = np.array(odd, dtype=np.uint64).astype(old.dtype)
    codes = np.random.default_rng(6).choice([-1, 1], shape)
    codes.reshape(-1)[: len(odd)] = 0
    new = moved(old, dtype, codes, some_steps(40))
    assert np.array_equal(new[: len(odd)], old[: len(odd)])
    summary = send(tmp_path, *pair(old, new, dtype, shape))
    assert predictors(summary) == {"stepped"}


def test_blocks_that_cut_rows(tmp_path: Path) -> None:
    shape = (96, 500)
    old = drawn("float32", shape)
    codes = np.random.default_rng(7).choice([-1, 1], shape)
    new = moved(old, "float32", codes, some_steps(96))
    summary = send(tmp_path, *pair(old, new, "float32", shape), 30_000)
    assert predictors(summary) == {"stepped"}
    assert summary.delta_size < codes.size / 8 + 7 * HEAD


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ordinary_change_is_left_to_floats(tmp_path: Path, dtype: str) -> None:
    shape = (90, 100)
    old = drawn(dtype, shape)
    values = decode(old, dtype) + np.random.default_rng(8).normal(0, 0.003, old.size)
    summary = send(tmp_path, *pair(old, encode(values, dtype), dtype, shape))
    assert predictors(summary) == {"float"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("method", "share"), [("sign", 1.0), ("sign", 0.4), ("topk", 0.02), ("threshold", 0.1)]
)
def test_what_approximate_updates_make(tmp_path: Path, dtype: str, method: str, share: float) -> None:
    shape = (60, 150)
    old = drawn(dtype, shape)
    new = encode(decode(old, dtype) + np.random.default_rng(9).normal(0, 0.004, old.size), dtype)
    layer = ap.Layer("w", dtype, shape, 0, old, new)
    found = ap.make_method(method, [layer])
    update = found.update(0, max(1, int(share * found.most)))
    words = ap.realise(layer, update)
    summary = send(tmp_path, *pair(old, words, dtype, shape))
    assert predictors(summary) == {"stepped"}
    rows = 1.6 * np.count_nonzero(update.steps) if len(update.steps) > 1 else 0
    assert summary.delta_size < 1.05 * entropy(update.codes) + rows + HEAD


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-50, 1e50)), min_size=1, max_size=20),
    st.integers(0, 1 << 20),
)
@settings(max_examples=100, deadline=None)
def test_steps_are_sent_exactly(values: list[float], mask: int) -> None:
    steps = np.array([shortened(value) if value else 0.0 for value in values])
    used = np.array([mask >> place & 1 == 1 for place in range(len(steps))])
    for rows in (NONE, used):
        writer = Coder(limit=30)
        stepping_steps.code(writer, len(steps), rows, steps)
        reader = Coder(writer.finish(), 30, 1 << 16)
        found = stepping_steps.code(reader, len(steps), rows, None)
        reader.end()
        assert np.array_equal(found, np.where(used, steps, 0.0) if len(rows) else steps)


def test_a_step_beyond_its_range_is_refused() -> None:
    for step in (2.0**213, 2.0**-190):
        with pytest.raises(ProgramError, match="a step lies outside its range"):
            stepping_steps.code(Coder(limit=30), 1, NONE, np.array([step]))


@given(st.integers(0, 1 << 30), st.sampled_from([F32, F16, BF16]), st.integers(-40, 2))
@settings(max_examples=60, deadline=None)
def test_a_code_is_only_said_where_it_makes_the_word(seed: int, dtype: int, exponent: int) -> None:
    """For words of any bits, and steps far above and below their last places."""
    rng = np.random.default_rng(seed)
    kind = np.dtype("<u4" if dtype == F32 else "<u2")
    old = np.frombuffer(rng.bytes(400 * kind.itemsize), kind)
    record = Record(STEPPED, dtype, 0, 400, 20, steps=np.ldexp(rng.integers(2048, 4096, 20) * 1.0, exponent))
    codes, whole = rng.integers(-356, 357, 400).astype(np.int16), Piece.whole(20, 20)
    with np.errstate(all="ignore"):
        new = stepped(record, old, codes, whole).astype(kind)
        found = step_codes(record, old, new, whole)
        made = stepped(record, old, found, whole)
    assert np.array_equal(made, np.where(found != 0, new, old))
    assert not found[old == new].any()


@pytest.mark.parametrize(("dtype", "kind"), tuple(zip(DTYPES, (F32, F16, BF16), strict=True)))
def test_codes_are_found_where_steps_are_over_the_last_place(dtype: str, kind: int) -> None:
    old, whole = drawn(dtype, (40, 50)), Piece.whole(40, 50)
    record = Record(STEPPED, kind, 0, 2000, 40, steps=some_steps(40))
    codes = np.random.default_rng(10).integers(-60, 61, 2000).astype(np.int16)
    new = stepped(record, old, codes, whole)
    assert np.array_equal(stepped(record, old, step_codes(record, old, new, whole), whole), new)
