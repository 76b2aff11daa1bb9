"""Round trips over random tensors of every type, related as training, conversion and pruning relate them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from updater import delta
from updater.digests import digest_file
from updater.formats.span import Quantisation, TensorSpan

Array = NDArray[Any]

# By type: NumPy's words, and ONNX's name.
TYPES = {
    "float64": ("<f8", TensorProto.DOUBLE),
    "float32": ("<f4", TensorProto.FLOAT),
    "float16": ("<f2", TensorProto.FLOAT16),
    "bfloat16": ("<u2", TensorProto.BFLOAT16),
    "float8_e4m3fn": ("u1", TensorProto.FLOAT8E4M3FN),
    "float8_e5m2": ("u1", TensorProto.FLOAT8E5M2),
    "int4": ("u1", TensorProto.INT4),  # packed, two to a byte
    "int8": ("i1", TensorProto.INT8),
    "uint8": ("u1", TensorProto.UINT8),
    "int16": ("<i2", TensorProto.INT16),
    "int32": ("<i4", TensorProto.INT32),
    "int64": ("<i8", TensorProto.INT64),
    "bool": ("u1", TensorProto.BOOL),
}
FLOATS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Patterns of the top bits of a float: both zeros, infinities, NaNs quiet and signalling, subnormals.
SPECIALS = {
    8: (0, 1 << 63, 0x7FF0 << 48, 0xFFF8 << 48 | 7, 0x7FF0 << 48 | 1, 1, 1 << 63 | 5, (1 << 52) - 1),
    4: (0, 1 << 31, 0x7F800000, 0xFFC00007, 0x7F800001, 1, 0x80000005, 0x007FFFFF),
    2: (0, 1 << 15, 0x7C00, 0xFE07, 0x7C01, 1, 0x8005, 0x7F80, 0x7F81, 0xFFC1, 0x03FF),
}
RELATIONS = (
    "same",
    "sparse",
    "dense",
    "other",
    "transposed",
    "cast",
    "quantised",
    "pruned",
    "scaled",
    "moved",
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of one file: its name, type, shape, bytes, and what its codes mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    quantisation: Quantisation | None = None


def packed(dtype: str, count: int) -> int:
    """Words that `count` elements take."""
    return (count + 1) // 2 if dtype == "int4" else count


def values(dtype: str, shape: tuple[int, ...], random: np.random.Generator, special: bool) -> Array:
    """Words of a type: weights of some spread, with special numbers among them if asked for."""
    kind, _ = TYPES[dtype]
    count = int(np.prod(shape))
    if dtype in FLOATS:
        width = FLOATS[dtype]
        numbers = random.normal(0, float(random.choice([1e-4, 0.05, 30.0])), count)
        if dtype == "bfloat16":
            words = (numbers.astype("<f4").view("<u4") >> 16).astype("<u2")
        else:
            words = numbers.astype(kind).view(f"<u{width}")
        if special and count:
            places = random.integers(0, count, min(count, 12))
            words[places] = random.choice(np.array(SPECIALS[width], dtype=f"<u{width}"), len(places))
        return words
    if dtype == "bool":
        return random.integers(0, 2, count, dtype=np.uint8)
    spread = int(random.choice([3, 40, 120]))
    codes = random.integers(-spread, spread, packed(dtype, count))
    return codes.astype(kind).view(f"<u{np.dtype(kind).itemsize}")


def changed(words: Array, share: float, random: np.random.Generator, step: int) -> Array:
    """Words of which some moved by up to `step`."""
    out = words.copy()
    places = random.random(len(words)) < share
    out[places] += random.integers(0, step + 1, int(places.sum())).astype(words.dtype)
    return out


def related(name: str, relation: str, dtype: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """An old tensor and a new one that follows from it."""
    random = np.random.default_rng(seed)
    old = values(dtype, shape, random, special=bool(seed & 1))
    before = Tensor(name, dtype, shape, old.tobytes())
    rows = shape[0] if shape else 1
    weights = old.view("<f4").reshape(shape) if dtype == "float32" else None
    if not old.size:
        new = old
    elif relation == "sparse":
        new = changed(old, 0.03, random, 3)
    elif relation == "dense":
        new = changed(old, 1.0, random, 9)
    elif relation == "other":
        new = values(dtype, shape, random, special=True)
    elif relation == "transposed" and dtype != "int4":
        new = np.ascontiguousarray(old.reshape(shape).T).reshape(-1)
        shape = shape[::-1]
    elif weights is not None and relation == "cast":
        half = bool(seed & 2)
        new = weights.astype("<f2") if half else ((weights.view("<u4") + 0x8000) >> 16).astype("<u2")
        return before, Tensor(name, "float16" if half else "bfloat16", shape, new.tobytes())
    elif weights is not None and relation == "quantised":
        finite = np.nan_to_num(np.where(np.abs(weights) < 1e6, weights, 0)).reshape(rows, -1)
        axis = 0 if seed & 2 and finite.size else None
        peak = np.abs(finite).max(axis=1) if axis == 0 else np.abs(finite).max(initial=0.0, keepdims=True)
        scales = np.maximum(np.asarray(peak, dtype=np.float32).reshape(-1), np.float32(1e-9)) / np.float32(
            127
        )
        codes = np.clip(np.rint(finite / scales[:, None]), -127, 127).astype(np.int8)
        meaning = Quantisation(tuple(scales.tolist()), (0,) * len(scales), axis)
        return before, Tensor(name, "int8", shape, codes.tobytes(), meaning)
    elif weights is not None and relation == "pruned":
        new = np.where(np.abs(weights) < np.float32(0.03), np.float32(0), weights).reshape(-1)
    elif weights is not None and relation == "scaled":
        gains = random.uniform(0.5, 2, (rows, 1)).astype(np.float32)
        new = (weights.reshape(rows, -1) * gains).astype("<f4").reshape(-1)
    else:
        new = old
    return before, Tensor(name if relation != "moved" else f"{name}.moved", dtype, shape, new.tobytes())


@st.composite
def pairs(draw: st.DrawFn, types: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of two files; the new file's may come in another order."""
    old, new = [], []
    for index in range(draw(st.integers(1, 4))):
        shape = (*draw(st.lists(st.integers(0, 13), max_size=2)), draw(st.sampled_from([1, 7, 16, 33])))
        relation, dtype = draw(st.sampled_from(RELATIONS)), draw(st.sampled_from(types))
        if relation in ("cast", "quantised", "pruned", "scaled"):
            dtype = "float32"
        with np.errstate(all="ignore"):
            one, other = related(f"t{index}", relation, dtype, shape, draw(st.integers(0, 1 << 32)))
        old.append(one)
        new.append(other)
    return old, draw(st.permutations(new))


def laid_out(tensors: list[Tensor], gap: bytes) -> tuple[bytes, list[TensorSpan]]:
    """A file of tensors with a few bytes before each, and its spans."""
    data, spans = b"", []
    for tensor in tensors:
        data += gap
        spans.append(
            TensorSpan(
                tensor.name, tensor.dtype, tensor.shape, len(data), len(tensor.data), tensor.quantisation
            )
        )
        data += tensor.data
    return data, spans


def there_and_back(directory: Path, **options: Any) -> None:
    """The target of the delta between `old` and `new` in a directory is `new`."""
    delta.create(directory / "old", directory / "new", directory / "made", **options)
    assert delta.apply(directory / "old", directory / "made", directory / "out") == digest_file(
        directory / "new"
    )
    assert (directory / "out").read_bytes() == (directory / "new").read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=pairs(tuple(TYPES)),
    gaps=st.tuples(st.binary(max_size=9), st.binary(max_size=9)),
    block_size=st.sampled_from([300, 1 << 20]),
    effort=st.sampled_from(delta.EFFORTS),
)
def test_related_tensors(
    tmp_path: Path,
    files: tuple[list[Tensor], list[Tensor]],
    gaps: tuple[bytes, bytes],
    block_size: int,
    effort: str,
) -> None:
    spans = []
    for name, tensors, gap in zip(("old", "new"), files, gaps, strict=True):
        data, found = laid_out(tensors, gap)
        (tmp_path / name).write_bytes(data)
        spans.append(found)
    options = delta.EncodeOptions(level=3, block_size=block_size, threads=1, effort=effort)
    there_and_back(tmp_path, options=options, base_spans=spans[0], target_spans=spans[1])


def model(tensors: list[Tensor]) -> bytes:
    """An ONNX model that holds tensors as initialisers; quantised ones with scale and zero point."""
    initialisers, nodes = [], []
    for tensor in tensors:
        kind = TYPES[tensor.dtype][1]
        initialisers.append(helper.make_tensor(tensor.name, kind, tensor.shape, tensor.data, raw=True))
        if tensor.quantisation is not None:
            scales = np.array(tensor.quantisation.scales, dtype="<f4")
            one = tensor.quantisation.axis is None
            names = [f"{tensor.name}.scale", f"{tensor.name}.zero"]
            shape = () if one else scales.shape
            initialisers.append(
                helper.make_tensor(names[0], TensorProto.FLOAT, shape, scales.tobytes(), raw=True)
            )
            initialisers.append(
                helper.make_tensor(names[1], TensorProto.INT8, shape, bytes(len(scales)), raw=True)
            )
            axis = {} if one else {"axis": 0}
            nodes.append(
                helper.make_node("DequantizeLinear", [tensor.name, *names], [f"{tensor.name}.float"], **axis)
            )
    graph = helper.make_graph(nodes, "g", [], [], initialisers)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=pairs(tuple(TYPES)))
def test_related_onnx_models(tmp_path: Path, files: tuple[list[Tensor], list[Tensor]]) -> None:
    for name, tensors in zip(("old", "new"), files, strict=True):
        (tmp_path / name).write_bytes(model(tensors))
    there_and_back(tmp_path, options=delta.EncodeOptions(level=3, threads=1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("relation", ["sparse", "dense", "transposed"])
def test_every_type_in_an_onnx_model(tmp_path: Path, dtype: str, relation: str) -> None:
    """Shapes large enough for programs; the models load, so that the tensors are where the spans say."""
    old, new = related("w", relation, dtype, (24, 50), 4)
    for name, tensor in (("old", old), ("new", new)):
        (tmp_path / name).write_bytes(model([tensor]))
        (found,) = onnx.load_from_string((tmp_path / name).read_bytes()).graph.initializer
        assert found.raw_data == tensor.data
    there_and_back(tmp_path, options=delta.EncodeOptions(level=3, threads=1))
    size, whole = (tmp_path / "made").stat().st_size, (tmp_path / "new").stat().st_size
    assert relation != "sparse" or size < 0.5 * whole
