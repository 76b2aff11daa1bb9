"""The ONNX reader against the onnx package and ONNX Runtime's own quantiser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from updater.errors import SluiceError
from updater.formats import ModelFile, TensorSpan, external_spans, read_model
from updater.formats.limits import MAX_GRAPH_DEPTH

Array = NDArray[Any]


def random(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def graph_of(initializers: list[TensorProto], nodes: list[Any] | None = None) -> Any:
    return helper.make_graph(
        nodes or [helper.make_node("Identity", [initializers[0].name], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", initializers[0].data_type, initializers[0].dims)],
        initializers,
    )


def save(path: Path, graph: Any, **options: Any) -> Path:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, **options)
    path.write_bytes(model.SerializeToString())
    return path


def tensors_of(graph: Any, prefix: str = "") -> Iterator[tuple[str, TensorProto]]:
    """Every tensor of a model as the onnx package sees it, named as the reader names spans."""
    for tensor in graph.initializer:
        yield prefix + tensor.name, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield (
                    prefix + (node.output[0] if node.op_type == "Constant" else attribute.t.name),
                    attribute.t,
                )
            if attribute.HasField("g"):
                yield from tensors_of(attribute.g, f"{prefix}{node.name or node.output[0]}.{attribute.name}/")


def check_against_onnx(path: Path) -> ModelFile:
    """Every span's bytes are the bytes of onnx's array; what has no span is not a fixed-width array."""
    found = read_model(path)
    assert found.format == "onnx"
    data = path.read_bytes()
    assert found.size == len(data)
    spans = {span.name: span for span in found.spans}
    end = 0
    for span in found.spans:
        assert end <= span.offset
        end = span.offset + span.length
    assert end <= len(data)
    for name, tensor in tensors_of(onnx.load_from_string(data).graph):
        span = spans.pop(name, None)
        array = numpy_helper.to_array(tensor)
        if span is None:
            assert not tensor.raw_data or array.size == 0
            assert not tensor.float_data
            continue
        assert span.shape == array.shape
        if not tensor.int32_data:
            assert span.dtype == array.dtype.name
        assert data[span.offset : span.offset + span.length] == array.astype(span.dtype).tobytes()
    assert not spans
    return found


def by_name(found: ModelFile) -> dict[str, TensorSpan]:
    return {span.name: span for span in found.spans}


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution and two dense layers, one behind a MatMul."""
    nodes = [
        helper.make_node("Conv", ["x", "W1", "B1"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "W2", "B2"], ["g"], transB=1),
        helper.make_node("MatMul", ["g", "W3"], ["y"]),
    ]
    weights = {
        "W1": random((8, 3, 3, 3)),
        "B1": random((8,)),
        "W2": random((10, 8 * 36)),
        "B2": random((10,)),
        "W3": random((10, 6)),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def quantise(source: Path, out: Path, kind: str, per_channel: bool) -> Path:
    from onnxruntime import quantization

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": random((1, 3, 8, 8), seed)} for seed in range(3)]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    if kind == "dynamic":
        quantization.quantize_dynamic(source, out, per_channel=per_channel)
    else:
        quantization.quantize_static(
            source,
            out,
            Samples(),
            quant_format=quantization.QuantFormat[kind],
            per_channel=per_channel,
            weight_type=quantization.QuantType.QInt8,
        )
    return out


def scale_of(model: Any, name: str) -> Array:
    return next(np.atleast_1d(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name == name)


def test_raw_data_spans_are_the_arrays(float_model: Path) -> None:
    found = check_against_onnx(float_model)
    assert set(by_name(found)) == {"W1", "B1", "W2", "B2", "W3"}
    assert sum(span.length for span in found.spans) > 0.9 * found.size


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "QDQ", "QOperator"])
@pytest.mark.parametrize("renamed", [False, True])
def test_quantised_weights_carry_their_scales(
    float_model: Path, tmp_path: Path, kind: str, per_channel: bool, renamed: bool
) -> None:
    path = quantise(float_model, tmp_path / "q.onnx", kind, per_channel)
    model = onnx.load(path)
    weights = {name: f"{name}_quantized" for name in ("W1", "W2", "W3")}
    if renamed:  # so that only the wiring tells which scale belongs to which weight
        weights = {name: f"{name}_codes" for name in weights}
        constants = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in constants:
                    node.input[index] = name.replace("_quantized", "_codes")
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("_quantized", "_codes")
        onnx.save(model, path)
    spans = by_name(check_against_onnx(path))
    for name, codes in weights.items():
        found = spans[codes].quantisation
        assert found is not None, codes
        scales = scale_of(model, f"{name}_scale")
        assert np.array_equal(np.float32(found.scales), scales.reshape(-1))
        assert all(scale == np.float32(scale) for scale in found.scales)
        assert found.zero_points == tuple(scale_of(model, f"{name}_zero_point").reshape(-1).tolist())
        if len(found.scales) > 1:
            assert found.axis is not None
            assert spans[codes].shape[found.axis] == len(found.scales)
    if per_channel:
        conv, product = spans[weights["W1"]].quantisation, spans[weights["W3"]].quantisation
        assert product is not None
        assert (len(product.scales), product.axis) == (6, 1)
        assert conv is not None
        if kind != "dynamic":  # ONNX Runtime makes one scale for a ConvInteger
            assert (len(conv.scales), conv.axis) == (8, 0)


def dequantise(path: Path, scale: Array, shape: tuple[int, ...] = (4, 6), **attributes: Any) -> TensorSpan:
    codes = numpy_helper.from_array(np.arange(np.prod(shape)).astype(np.int8).reshape(shape), "W")
    nodes = [helper.make_node("DequantizeLinear", ["W", "s"], ["y"], **attributes)]
    return by_name(read_model(save(path, graph_of([codes, numpy_helper.from_array(scale, "s")], nodes))))["W"]


def test_dequantize_linear_axis(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    along_default = dequantise(path, np.float32([0.5] * 6)).quantisation
    assert along_default is not None
    assert (along_default.axis, along_default.zero_points) == (1, (0,) * 6)
    along_first = dequantise(path, np.float32([1, 2, 3, 4]), axis=-2).quantisation
    assert along_first is not None
    assert (along_first.axis, along_first.scales) == (0, (1.0, 2.0, 3.0, 4.0))
    whole = dequantise(path, np.array(0.25, np.float16)).quantisation
    assert whole is not None
    assert (whole.axis, whole.scales) == (None, (0.25,))


def test_scales_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    scales = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])
    found = dequantise(path, scales, axis=1, block_size=3).quantisation
    assert found is not None
    assert (found.axis, found.block, found.scales) == (1, 3, tuple(range(1, 9)))
    found = dequantise(
        path, scales.reshape(2, 4)[:, :3].repeat(2, axis=1), axis=-2, block_size=2
    ).quantisation
    assert found is not None
    assert (found.axis, found.block, found.groups((4, 6))) == (0, 2, 12)
    packed = helper.make_tensor("W", TensorProto.UINT4, (4, 6), bytes(range(12)), raw=True)
    zeros = helper.make_tensor("z", TensorProto.UINT4, (4, 2), bytes([0x21, 0x43, 0x65, 0x87]), raw=True)
    nodes = [helper.make_node("DequantizeLinear", ["W", "s", "z"], ["y"], axis=1, block_size=3)]
    graph = graph_of([packed, numpy_helper.from_array(scales, "s"), zeros], nodes)
    span = by_name(read_model(save(path, graph)))["W"]
    assert (span.dtype, span.length) == ("uint4", 12)
    assert span.quantisation is not None
    assert span.quantisation.zero_points == tuple(range(1, 9))


def test_blocked_or_unfit_scales_give_no_quantisation(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert dequantise(path, np.ones((4, 2), np.float32), axis=1, block_size=4).quantisation is None
    assert dequantise(path, np.ones((4, 2), np.float32), axis=1, block_size=2).quantisation is None
    assert dequantise(path, np.ones((4, 2), np.float32), axis=0, block_size=3).quantisation is None
    assert dequantise(path, np.ones((4, 2), np.float32), axis=2, block_size=3).quantisation is None
    assert dequantise(path, np.ones((4, 2), np.float32), axis=1, block_size=-3).quantisation is None
    assert dequantise(path, np.ones((4, 2), np.float32)).quantisation is None
    assert dequantise(path, np.ones(5, np.float32)).quantisation is None
    assert dequantise(path, np.float32([np.nan] * 6)).quantisation is None


def test_quantised_embedding_behind_gather(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.arange(40, dtype=np.uint8).reshape(10, 4), "table")
    constants = [
        numpy_helper.from_array(np.array(0.125, np.float32), "s"),
        numpy_helper.from_array(np.array(7, np.uint8), "z"),
        numpy_helper.from_array(np.array([1, 2]), "i"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["g"]),
        helper.make_node("DequantizeLinear", ["g", "s", "z"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", graph_of([table, *constants], nodes))
    found = by_name(check_against_onnx(path))["table"].quantisation
    assert found is not None
    assert (found.scales, found.zero_points, found.axis) == ((0.125,), (7,), None)


def test_float_data_is_a_span_when_packed(tmp_path: Path) -> None:
    values = random((3, 5))
    packed = helper.make_tensor("W", TensorProto.FLOAT, (3, 5), values.reshape(-1).tolist())
    assert packed.float_data
    assert not packed.raw_data
    path = save(tmp_path / "m.onnx", graph_of([packed]))
    assert check_against_onnx(path).spans[0].name == "W"

    # The same tensor with a tag before each number, which protobuf allows: no array, no span, no error.
    loose = b"".join(b"\x25" + value.tobytes() for value in values.reshape(-1))
    tensor = b"\x08\x03\x08\x05\x10\x01" + loose + b"\x42\x01W"
    graph = b"\x12\x01g\x2a" + bytes([len(tensor)]) + tensor
    path.write_bytes(b"\x08\x0a\x3a" + bytes([len(graph)]) + graph + b"\x42\x04\x0a\x00\x10\x15")
    array = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    assert np.array_equal(array, values)
    assert read_model(path) == ModelFile("onnx", path.stat().st_size, ())


def test_int32_data_gives_parameters_and_small_codes(tmp_path: Path) -> None:
    small = helper.make_tensor("small", TensorProto.INT8, (2, 3), [0, 1, 2, 3, 4, 127])
    negative = helper.make_tensor("negative", TensorProto.INT8, (2, 3), [-1, 1, 2, 3, 4, 127])
    scale = helper.make_tensor("s", TensorProto.FLOAT, (), [0.5])
    zero = helper.make_tensor("z", TensorProto.INT8, (), [-3])
    half = helper.make_tensor("h", TensorProto.FLOAT16, (1,), [2.0])
    assert small.int32_data
    assert half.int32_data
    nodes = [
        helper.make_node("DequantizeLinear", ["small", "s", "z"], ["y"]),
        helper.make_node("DequantizeLinear", ["negative", "h"], ["n"]),
    ]
    spans = by_name(
        check_against_onnx(save(tmp_path / "m.onnx", graph_of([small, negative, scale, zero, half], nodes)))
    )
    assert spans["small"].dtype == "uint8"
    found = spans["small"].quantisation
    assert found is not None
    assert (found.scales, found.zero_points) == ((0.5,), (-3,))
    assert "negative" not in spans  # its varints have one byte and ten bytes


def test_every_fixed_width_type(tmp_path: Path) -> None:
    import ml_dtypes

    names = ["float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
    arrays = {name: np.arange(6).reshape(2, 3).astype(name) for name in [*names, "bool", "complex64"]}
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        arrays[name] = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, name))
    path = save(
        tmp_path / "m.onnx",
        graph_of([numpy_helper.from_array(array, name) for name, array in arrays.items()]),
    )
    data = path.read_bytes()
    spans = by_name(read_model(path))
    for name, array in arrays.items():
        span = spans[name]
        assert (span.dtype, span.shape) == (name, (2, 3))
        assert data[span.offset : span.offset + span.length] == array.tobytes()


def test_packed_int4(tmp_path: Path) -> None:
    codes = np.array([1, 2, 3, 4, 5], np.uint8)  # the helper packs them: 21 43 05
    tensor = helper.make_tensor("W", TensorProto.UINT4, (5,), codes, raw=True)
    scale = numpy_helper.from_array(np.float32(0.5), "s")
    zero = TensorProto(name="z", data_type=TensorProto.UINT4, dims=[1], raw_data=b"\x08")
    nodes = [helper.make_node("DequantizeLinear", ["W", "s", "z"], ["y"])]
    path = save(tmp_path / "m.onnx", graph_of([tensor, scale, zero], nodes))
    span = by_name(read_model(path))["W"]
    assert (span.dtype, span.shape, span.length) == ("uint4", (5,), 3)
    assert path.read_bytes()[span.offset :][:3] == b"\x21\x43\x05"
    assert span.quantisation is not None
    assert span.quantisation.zero_points == (8,)


def test_strings_and_empty_tensors_have_no_span(tmp_path: Path) -> None:
    text = helper.make_tensor("t", TensorProto.STRING, (2,), [b"a", b"b"])
    empty = numpy_helper.from_array(np.zeros((0, 3), np.float32), "e")
    assert read_model(save(tmp_path / "m.onnx", graph_of([text, empty]))).spans == ()


def branch(seed: int) -> Any:
    return helper.make_graph(
        [
            helper.make_node(
                "Constant", [], ["k"], value=numpy_helper.from_array(random((4,), seed), "inner")
            ),
            helper.make_node("Add", ["W", "k"], [f"out{seed}"]),
        ],
        f"branch{seed}",
        [],
        [helper.make_tensor_value_info(f"out{seed}", TensorProto.FLOAT, [4])],
    )


def test_constants_in_subgraphs_and_functions(tmp_path: Path) -> None:
    choose = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch(1), else_branch=branch(2))
    initializers = [numpy_helper.from_array(random((4,)), "W"), numpy_helper.from_array(np.array(True), "c")]
    path = save(tmp_path / "m.onnx", graph_of(initializers, [choose]))
    onnx.checker.check_model(path)
    found = check_against_onnx(path)
    assert set(by_name(found)) == {"W", "c", "choice.then_branch/k", "choice.else_branch/k"}

    inside = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(random((4,), 3)))
    function = helper.make_function("own", "Shift", [], ["k"], [inside], [helper.make_opsetid("", 21)])
    graph = graph_of(initializers, [helper.make_node("Shift", [], ["y"], domain="own")])
    path = save(tmp_path / "f.onnx", graph, functions=[function])
    span = by_name(read_model(path))["Shift/k"]
    assert path.read_bytes()[span.offset : span.offset + span.length] == random((4,), 3).tobytes()


def test_scale_of_an_outer_graph(tmp_path: Path) -> None:
    codes = numpy_helper.from_array(np.arange(4, dtype=np.int8), "codes")
    inner = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["codes", "s"], ["o"])],
        "b",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [4])],
    )
    constants = [
        codes,
        numpy_helper.from_array(np.float32(3), "s"),
        numpy_helper.from_array(np.array(True), "c"),
    ]
    choose = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    found = by_name(read_model(save(tmp_path / "m.onnx", graph_of(constants, [choose]))))[
        "codes"
    ].quantisation
    assert found is not None
    assert found.scales == (3.0,)


def test_graphs_nested_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    graph = b"\x12\x01g"
    for _ in range(MAX_GRAPH_DEPTH + 2):
        attribute = b"\x32" + varint(len(graph)) + graph
        node = b"\x22\x02If\x2a" + varint(len(attribute)) + attribute
        graph = b"\x0a" + varint(len(node)) + node
    path = tmp_path / "deep.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + varint(len(graph)) + graph + b"\x42\x02\x10\x15")
    with pytest.raises(SluiceError, match="levels allowed") as caught:
        read_model(path)
    assert caught.value.code == "MODEL_FILE_INVALID"


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def save_external(path: Path) -> dict[str, Array]:
    arrays = {"A": random((64, 32)), "B": random((32, 32), 1)}
    graph = graph_of([numpy_helper.from_array(array, name) for name, array in arrays.items()])
    onnx.save(
        helper.make_model(graph),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="weights.bin",
        size_threshold=0,
    )
    return arrays


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    arrays = save_external(path)
    model = read_model(path)
    assert (model.spans, model.external) == ((), ("weights.bin",))
    found = external_spans(path)
    assert set(found) == {"weights.bin"}
    data = (tmp_path / "weights.bin").read_bytes()
    for span in found["weights.bin"]:
        assert span.shape == arrays[span.name].shape
        assert data[span.offset : span.offset + span.length] == arrays[span.name].tobytes()
    assert len(found["weights.bin"]) == 2

    os.truncate(tmp_path / "weights.bin", len(data) - 1)
    with pytest.raises(SluiceError, match=r"weights\.bin") as caught:
        external_spans(path)
    assert caught.value.code == "MODEL_FILE_TRUNCATED"
    (tmp_path / "weights.bin").unlink()
    assert external_spans(path) == found


@pytest.mark.parametrize(
    "location",
    ["../weights.bin", "/etc/passwd", "a/../../b", "", ".", "c:\\w", "a\\b", "w\0", "*/_ORT_MEM_ADDR_/*"],
)
def test_external_data_outside_the_directory_is_refused(tmp_path: Path, location: str) -> None:
    tensor = TensorProto(name="W", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value=location)
    path = save(tmp_path / "m.onnx", graph_of([tensor]))
    for read in (read_model, external_spans):
        with pytest.raises(SluiceError, match="external data of tensor 'W'") as caught:
            read(path)
        assert caught.value.code == "MODEL_FILE_INVALID"


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-1"), ("offset", "x"), ("length", "15"), ("length", "²")]
)
def test_external_data_with_impossible_numbers_is_refused(tmp_path: Path, key: str, value: str) -> None:
    tensor = TensorProto(name="W", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="w")
    tensor.external_data.add(key=key, value=value)
    with pytest.raises(SluiceError) as caught:
        read_model(save(tmp_path / "m.onnx", graph_of([tensor])))
    assert caught.value.code == "MODEL_FILE_INVALID"


def test_length_that_contradicts_the_shape_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="W", data_type=1, dims=[4], raw_data=b"\0" * 15)
    with pytest.raises(SluiceError, match=r"15 bytes .* needs 16") as caught:
        read_model(save(tmp_path / "m.onnx", graph_of([tensor])))
    assert caught.value.code == "MODEL_FILE_INVALID"


def test_shapes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for dims in ([-1], [1 << 40, 2], [1] * 65):
        tensor = TensorProto(name="W", data_type=1, dims=dims, raw_data=b"\0" * 4)
        with pytest.raises(SluiceError, match=r"dimension|elements|shape") as caught:
            read_model(save(tmp_path / "m.onnx", graph_of([tensor])))
        assert caught.value.code == "MODEL_FILE_INVALID"
