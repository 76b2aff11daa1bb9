"""Codes of four bits, and of eight, from floats with scales of channels and blocks; and from codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_tests.conformance.plain.delta import decode
from edge_tests.unit.updater.program_pairs import Arrays, predictors, send, weights
from updater import delta
from updater.delta import faults
from updater.delta.program import nibbles, run
from updater.delta.program.encoder import ProgramEncoder
from updater.errors import SluiceError
from updater.formats.span import Quantisation

Array = NDArray[Any]
HEAD = 300  # bytes that a delta has beside its blocks, about
SHAPE, BLOCK = (128, 96), 32
TOP = {"int4": 7, "uint4": 15, "int8": 127, "uint8": 255}


def quantised(values: Array, kind: str, axis: int, block: int) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points of blocks along an axis, as quantisers work them out."""
    groups = np.moveaxis(values, axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, block)
    if kind.startswith("u"):
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scale = ((high - low) / np.float32(TOP[kind])).astype(np.float32)
        zero = np.clip(np.rint(-low.astype(np.float64) / scale), 0, TOP[kind])
        bounds = 0, TOP[kind]
    else:
        scale = (np.abs(groups).max(-1) / np.float32(TOP[kind])).astype(np.float32)
        zero, bounds = np.zeros(scale.shape), (-TOP[kind], TOP[kind])
    codes = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], *bounds)
    codes = codes.reshape(*codes.shape[:-2], -1)
    whole = np.uint8 if kind.startswith("u") else np.int8
    return tuple(np.moveaxis(each, -1, axis) for each in (codes.astype(whole), scale, zero.astype(whole)))  # type: ignore[return-value]


def add(arrays: Arrays, name: str, codes: Array, kind: str, meaning: Quantisation | None = None) -> Arrays:
    """Puts codes behind other arrays, packed if they have four bits."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    return arrays.add(name, nibbles.pack(flat) if "4" in kind else flat, kind, meaning, codes.shape)


def meaning_of(scale: Array, zero: Array, axis: int | None, block: int) -> Quantisation:
    return Quantisation(tuple(scale.reshape(-1).tolist()), tuple(zero.reshape(-1).tolist()), axis, block)


def target_of(values: Array, kind: str, axis: int, block: int = BLOCK) -> Arrays:
    """A file of codes with their scales and zero points."""
    codes, scale, zero = quantised(values, kind, axis, block)
    new = Arrays().add("w_s", scale)
    if kind.startswith("u"):
        add(new, "w_z", zero, kind)
    return add(new, "w_q", codes, kind, meaning_of(scale, zero, axis, block))


@pytest.mark.parametrize("kind", list(TOP))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("source", ["float32", "float16", "transposed"])
def test_scales_of_blocks(tmp_path: Path, kind: str, axis: int, source: str) -> None:
    old = weights(SHAPE)
    if source == "float16":
        old = old.astype(np.float16)
    new = target_of(old.astype(np.float32), kind, axis)
    base = Arrays().add("w", old.T.copy() if source == "transposed" else old)
    summary = send(tmp_path, base, new)
    assert predictors(summary) <= {"quantised", "peak", "spanned", "zeros"}
    assert "quantised" in predictors(summary)
    assert summary.delta_size < HEAD
    assert decode(bytes(base.data), (tmp_path / "d").read_bytes()) == bytes(new.data)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
@pytest.mark.parametrize("axis", [1, 2])
def test_blocks_of_an_inner_axis(tmp_path: Path, kind: str, axis: int) -> None:
    old = weights((6, 64, 32))
    summary = send(tmp_path, Arrays().add("w", old), target_of(old, kind, axis))
    assert summary.delta_size < HEAD


@pytest.mark.parametrize("kind", ["int4", "uint4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_channels(tmp_path: Path, kind: str, axis: int) -> None:
    old = weights(SHAPE)
    codes, scale, zero = quantised(old, kind, 1 - axis, SHAPE[1 - axis])
    new = Arrays().add("w_s", scale)
    if kind.startswith("u"):
        add(new, "w_z", zero, kind)
    add(new, "w_q", codes, kind, meaning_of(scale, zero, axis, 0))
    summary = send(tmp_path, Arrays().add("w", old), new)
    assert "quantised" in predictors(summary)
    assert summary.delta_size < HEAD


@pytest.mark.parametrize("count", [1025, 4097, 6001])
def test_one_scale_and_an_odd_count(tmp_path: Path, count: int) -> None:
    old = weights((count,))
    codes, scale, zero = quantised(old, "int4", 0, count)
    new = add(Arrays(), "w_q", codes, "int4", meaning_of(scale, zero, None, 0)).add("b", weights((9,), 4))
    summary = send(tmp_path, Arrays().add("w", old).add("b", weights((9,), 4)), new, 1000)
    assert predictors(summary) >= {"quantised"}
    assert summary.delta_size < HEAD + count // 2000 * 120


@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_that_blocks_of_the_delta_cut(tmp_path: Path, axis: int) -> None:
    """Codes and scales are cut; what is left of a block of scales says these."""
    old = weights((512, 128)).astype(np.float16)
    new = target_of(old.astype(np.float32), "int4", axis)
    summary = send(tmp_path, Arrays().add("w", old), new, 9001)
    cuts = len(new.data) // 9001
    said = 4 * 128 * 2 if axis == 0 else 0  # scales of the blocks that a cut parts, a part on either side
    left = BLOCK * 128 // 2 if axis == 0 else 128 // 2
    assert summary.delta_size < HEAD + cuts * (200 + said + left // 4)
    assert decode(old.tobytes(), (tmp_path / "d").read_bytes()) == bytes(new.data)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
@pytest.mark.parametrize("block_size", [1 << 20, 3001])
def test_codes_from_codes(tmp_path: Path, kind: str, block_size: int) -> None:
    """A row of an odd length begins in either half of a byte."""
    low, high = (-8, 7) if kind == "int4" else (0, 15)
    whole = np.int8 if kind == "int4" else np.uint8
    random = np.random.default_rng(3)
    old = random.integers(low, high + 1, (131, 77)).astype(whole)
    moved = old + (random.random(old.shape) < 0.05) * random.choice([-1, 1], old.shape)
    new = np.clip(moved, low, high).astype(whole)
    summary = send(tmp_path, add(Arrays(), "w", old, kind), add(Arrays(), "w", new, kind), block_size)
    assert predictors(summary) == {"codes"}
    share = float((old != new).mean())
    entropy = -(share * np.log2(share / 2) + (1 - share) * np.log2(1 - share)) * old.size / 8
    assert summary.delta_size < HEAD + entropy * 1.1 + len(nibbles.pack(new.reshape(-1))) / block_size * 200
    target = nibbles.pack(new.reshape(-1)).tobytes()
    assert decode(nibbles.pack(old.reshape(-1)).tobytes(), (tmp_path / "d").read_bytes()) == target


def test_equal_codes_and_bytes_that_are_no_codes(tmp_path: Path) -> None:
    """What lies behind an odd last code travels, whatever it is."""
    old = np.random.default_rng(3).integers(0, 256, 3001).astype(np.uint8)
    new = old.copy()
    new[-1] |= 0xF0
    base = Arrays().add("w", old, "uint4", None, (6001,))
    assert send(tmp_path, base, base).delta_size < HEAD
    assert send(tmp_path, base, Arrays().add("w", new, "uint4", None, (6001,))).delta_size < HEAD


def test_an_onnx_file_of_four_bits(tmp_path: Path) -> None:
    """From a model of float32 to one whose weights DequantizeLinear makes of packed codes."""
    first, second = weights((256, 64)), weights((64, 128), 2)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
    ]
    save(tmp_path / "old", nodes, [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")])
    tensors, added = [], []
    for name, values, kind, number in (
        ("a", first, "int4", TensorProto.INT4), ("b", second, "uint4", TensorProto.UINT4),
    ):  # fmt: skip
        codes, scale, zero = quantised(values, kind, 0, BLOCK)
        for part, array in (("q", codes), ("z", zero)):
            raw = nibbles.pack(np.ascontiguousarray(array).reshape(-1)).tobytes()
            tensors.append(helper.make_tensor(f"{name}_{part}", number, array.shape, raw, raw=True))
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(scale), f"{name}_s"))
        names = [f"{name}_{part}" for part in "qsz"]
        added.append(helper.make_node("DequantizeLinear", names, [name], axis=0, block_size=BLOCK))
    save(tmp_path / "new", added + nodes, tensors)
    summary = delta.create(tmp_path / "old", tmp_path / "new", tmp_path / "d")
    delta.apply(tmp_path / "old", tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "new").read_bytes()
    assert {region.predictor for region in summary.regions} >= {"quantised", "peak", "spanned", "zeros"}
    assert summary.delta_size < 1000


def save(path: Path, nodes: list[Any], tensors: list[TensorProto]) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in
            (("x", 256), ("y", 128))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def test_damage_to_codes_of_four_bits() -> None:
    """Damaged records of packed codes end with an error, or write the right length."""
    old = weights((64, 32))
    base, target = Arrays().add("w", old), target_of(old, "uint4", 0)
    files = [np.frombuffer(bytes(side.data), dtype=np.uint8) for side in (base, target)]
    length = len(target.data)
    found = ProgramEncoder(files[0], base.spans, files[1], target.spans, 3, False).encode(0, length)
    assert found is not None

    def read(offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > old.nbytes:
            raise faults.invalid("outside")
        return old.tobytes()[offset : offset + size]

    assert bytes(run(read, found.data, 0, length)) == bytes(target.data)
    refused = 0
    for place in range(len(found.data)):
        for bit in range(8):
            damaged = bytearray(found.data)
            damaged[place] ^= 1 << bit
            try:
                assert len(run(read, bytes(damaged), 0, length)) == length
            except SluiceError:
                refused += 1
    assert refused


@given(st.lists(st.integers(-8, 15), max_size=40), st.integers(0, 3))
def test_what_is_packed_comes_back(codes: list[int], skip: int) -> None:
    """Modulo 16, from any place on, with and without a sign; odd ones end with a zero."""
    values = np.array(codes, dtype=np.int16)
    data = nibbles.pack(values)
    assert len(data) == (len(codes) + 1) // 2
    assert len(codes) % 2 == 0 or data[-1] < 16
    skip = min(skip, len(codes))
    some = len(codes) - skip
    assert nibbles.unpack(data, some, skip, False).tolist() == [code % 16 for code in codes[skip:]]
    signed = [(code + 8) % 16 - 8 for code in codes[skip:]]
    assert nibbles.unpack(data, some, skip, True).tolist() == signed
