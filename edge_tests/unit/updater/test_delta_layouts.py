"""Operands that lie otherwise in the base: other orders of axes, parts, 16 bits; hostile ones are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_tests.unit.updater.program_pairs import Arrays, predictors, send, weights
from updater import limits
from updater.delta.program import layout, records, run, writer
from updater.delta.program.arithmetic import Coder
from updater.delta.program.body import Place
from updater.delta.program.operands import Operands, ProgramError
from updater.errors import SluiceError
from updater.formats.span import Quantisation

HEAD = 300  # bytes that a delta has beside its blocks, about


@pytest.mark.parametrize("block_size", [1 << 20, 9000, 1500])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.int32])
def test_transposed_weights_cost_next_to_nothing(tmp_path: Path, dtype: type, block_size: int) -> None:
    old = (weights((96, 80)) * 1000).astype(dtype)
    summary = send(
        tmp_path, Arrays().add("w.weight", old), Arrays().add("onnx::MatMul_7", old.T.copy()), block_size
    )
    blocks = -(-old.nbytes // block_size)
    assert summary.delta_size < HEAD + 90 * blocks
    assert blocks > 1 or predictors(summary) == {"same"}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1::4])
def test_every_order_of_four_axes(tmp_path: Path, order: tuple[int, ...]) -> None:
    old = weights((12, 5, 3, 7))
    new = np.ascontiguousarray(old.transpose(order))
    summary = send(tmp_path, Arrays().add("a", old), Arrays().add("b", new), 2000)
    assert summary.delta_size < HEAD + 3 * 160


def test_square_matrices_of_one_name_may_be_transposed_too(tmp_path: Path) -> None:
    old, other = weights((64, 64)), weights((64, 64), 2)
    new = Arrays().add("w", old.T.copy()).add("v", other)
    summary = send(tmp_path, Arrays().add("w", old).add("v", other), new)
    assert summary.delta_size < HEAD


def test_quantised_weights_of_a_transposed_base(tmp_path: Path) -> None:
    old = weights((256, 200))
    scale = np.abs(old).max(axis=1) / np.float32(127)  # of the target's columns
    codes = np.clip(np.rint(old / scale[:, None]), -127, 127).astype(np.int8).T.copy()
    meaning = Quantisation(tuple(scale.tolist()), (0,) * 256, 1)
    new = Arrays().add("s", scale).add("q", codes, meaning=meaning)
    for block_size in (1 << 20, 30_000):
        summary = send(tmp_path, Arrays().add("w", old), new, block_size)
        assert summary.delta_size < HEAD + 200 * (codes.nbytes // block_size)


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_bases_of_16_bits_predict_float32_and_codes(tmp_path: Path, narrow: str) -> None:
    exact = weights((64, 48))
    if narrow == "float16":
        old: NDArray[np.generic] = exact.astype(np.float16)
        wide = old.astype(np.float32)
    else:
        old = (exact.view(np.uint32) >> 16).astype(np.uint16)
        wide = (old.astype(np.uint32) << 16).view(np.float32)
    base = Arrays().add("w", old, narrow)
    scale = np.float32(np.abs(wide).max()) / np.float32(127)
    codes = np.rint(wide / scale).astype(np.int8)
    summary = send(tmp_path, base, Arrays().add("w", wide))
    assert predictors(summary) == {"cast"}
    assert summary.delta_size < HEAD
    summary = send(
        tmp_path, base, Arrays().add("q", codes, meaning=Quantisation((float(scale),), (0,), None))
    )
    assert predictors(summary) == {"quantised"}
    assert summary.delta_size < HEAD


def test_16_bit_types_become_each_other(tmp_path: Path) -> None:
    half = weights((64, 48)).astype(np.float16)
    words = half.astype(np.float32).view(np.uint32)
    brain = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
    summary = send(tmp_path, Arrays().add("w", half), Arrays().add("w", brain, "bfloat16"))
    assert summary.delta_size < HEAD
    wide = (brain.astype(np.uint32) << 16).view(np.float32)
    summary = send(tmp_path, Arrays().add("w", brain, "bfloat16"), Arrays().add("w", wide.astype(np.float16)))
    assert summary.delta_size < HEAD


@pytest.mark.parametrize("block_size", [1 << 20, 7000])
def test_slices_of_larger_arrays_and_grown_ones(tmp_path: Path, block_size: int) -> None:
    table = weights((300, 32))
    rows = np.sort(np.random.default_rng(5).permutation(300)[:200])
    cases = [
        (table, table[:210], 0),  # a vocabulary cut at the end
        (table, table[40:], 0),  # ... at the beginning
        (table, table[:, :24], 0),  # fewer columns
        (table, np.concatenate([table, weights((6, 32), 3)]), 6 * 32 * 4),  # grown
        (table, table[rows], 500),  # only some rows stay
        (np.concatenate([table, table + 1]), table + 1, 0),  # one part of a fused array
    ]
    for old, new, more in cases:
        summary = send(
            tmp_path, Arrays().add("t", old), Arrays().add("t", np.ascontiguousarray(new)), block_size
        )
        assert summary.delta_size < HEAD + more + 150 * (new.nbytes // block_size)


def test_a_slice_that_was_tuned_is_predicted_too(tmp_path: Path) -> None:
    old = weights((300, 32))
    new = (old[:200] + weights((200, 32), 8) * np.float32(1e-4)).astype(np.float32)
    other = send(tmp_path, Arrays().add("t", weights((300, 32), 9)), Arrays().add("t", new)).delta_size
    assert send(tmp_path, Arrays().add("t", old), Arrays().add("t", new)).delta_size < 0.6 * other


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    old_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    new_dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8", "uint8", "int32"]),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    block_size=st.sampled_from([300, 1000, 1 << 20]),
)
def test_any_bits_in_any_order(
    tmp_path: Path, seed: int, old_dtype: str, new_dtype: str, shape: list[int], block_size: int
) -> None:
    """NaNs with payloads, negative zeros and subnormal numbers are among them."""
    random = np.random.default_rng(seed)
    kinds = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4}
    words = random.integers(0, 256, (*shape, kinds[old_dtype]), dtype=np.uint8).view(f"u{kinds[old_dtype]}")
    old = words.reshape(shape)
    turned = np.ascontiguousarray(old.transpose(random.permutation(len(shape))))
    if old_dtype == new_dtype:
        new = turned
    elif old_dtype == "bfloat16" and new_dtype == "float32":
        new = turned.astype(np.uint32) << 16
    elif old_dtype == "float16" and new_dtype == "float32":
        with np.errstate(all="ignore"):
            new = turned.view(np.float16).astype(np.float32).view(np.uint32)
    else:
        new = random.integers(0, 256, (turned.size, kinds[new_dtype]), dtype=np.uint8)
        new = new.view(f"u{kinds[new_dtype]}").reshape(turned.shape)
    meaning = Quantisation((0.01,), (0,), None) if "int" in new_dtype else None
    send(
        tmp_path,
        Arrays().add("a", old, old_dtype),
        Arrays().add("b", new, new_dtype, meaning),
        block_size,
    )


@settings(max_examples=60, deadline=None)
@given(
    axes=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 60)), min_size=1, max_size=4),
    band=st.integers(1, 40),
    cut=st.integers(1, 30),
)
def test_layouts_are_read_as_their_strides_say(axes: list[tuple[int, int]], band: int, cut: int) -> None:
    data = np.arange(3000, dtype="<u4")
    known = tuple(axes)
    wanted = [
        5 + sum(index * stride for index, (_, stride) in zip(place, axes))
        for place in itertools.product(*(range(size) for size, _ in axes))
    ]
    raw = data.tobytes()
    base = Operands(lambda offset, length: raw[offset : offset + length])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "GATHER_ELEMENTS", band)
        got = [
            value
            for start in range(0, len(wanted), cut)
            for value in base.laid("<u4", 20, known, start, min(cut, len(wanted) - start)).tolist()
        ]
    assert got == wanted
    assert layout.count(known) == len(wanted)
    assert layout.runs(known) * layout.run_length(known) == len(wanted)
    for start, stop in itertools.pairwise(sorted({0, cut % len(wanted), len(wanted)})):
        if (found := layout.part(layout.merged(known), start, stop)) is not None:
            offset, some = found
            assert [5 + offset + layout.place(some, n) for n in range(stop - start)] == wanted[start:stop]


def program(*wanted: records.Record, length: int = 40_000) -> bytes:
    """A program of records alone."""
    place = Place(0, length, 0, 0)
    return writer.encode(lambda _, size: bytes(size), bytes(length), [place], list(wanted), 3, False)[0]


def same(axes: layout.Axes, count: int) -> records.Record:
    return records.Record(records.SAME, records.F32, 0, count, axes=axes)


@pytest.mark.parametrize(
    "record",
    [
        same(((100, 1), (100, 1 << 41)), 10_000),
        same(((100, -1), (100, 1)), 10_000),
        records.Record(records.PEAK, records.F32, 0, 1, two=320_000, axes=((320_000, 0),)),
        records.Record(records.PEAK, records.F32, 0, 1, two=300_000, axes=((300_000, 1 << 20),)),
    ],
)
def test_layouts_that_no_encoder_writes_are_refused(record: records.Record) -> None:
    coder = Coder(limit=30)
    with pytest.raises(ProgramError):
        records.code_records(coder, [record], 40_000, 0, records.RowBits(), records.Share(40_000))


def test_operands_outside_the_base_are_refused() -> None:
    base = weights((100, 100)).tobytes()

    def read(offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(base):
            raise ProgramError("outside")
        return base[offset : offset + length]

    good = program(same(((100, 1), (100, 100)), 10_000))
    assert bytes(run(read, good, 0, 40_000)) == weights((100, 100)).T.tobytes()
    bad = program(same(((100, 1), (100, 101)), 10_000))
    with pytest.raises(SluiceError):
        run(read, bad, 0, 40_000)
