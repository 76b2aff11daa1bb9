"""The TFLite reader against LiteRT's own interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from edge_tests.harness.tflite import Graph, Quantisation
from updater.errors import SluiceError
from updater.formats import TensorSpan, read_model, tflite_metadata
from updater.formats.source import Source

Array = NDArray[Any]


def random_codes(shape: tuple[int, ...], dtype: str = "int8") -> Array:
    return np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)


def dense_layer(per_channel: bool = False) -> Graph:
    """An int8 fully connected layer of 6 inputs and 4 outputs."""
    graph = Graph()
    x = graph.tensor("x", (1, 6), "int8", quantisation=Quantisation(0.5, 3))
    weights = graph.tensor("w", (4, 6), "int8", data=random_codes((4, 6)), quantisation=Quantisation(0.1))
    bias = graph.tensor("b", (4,), "int32", data=random_codes((4,), "int32"), quantisation=Quantisation(0.05))
    y = graph.tensor("y", (1, 4), "int8", quantisation=Quantisation(2.0, -1))
    if per_channel:
        quantised = graph.tensors[weights].quantization
        quantised.scale = np.float32([0.1, 0.2, 0.3, 0.4])
        quantised.zeroPoint = np.zeros(4, np.int64)
        quantised.quantizedDimension = 0
    graph.fully_connected([x, weights, bias], y, version=4)
    return graph


def write(path: Path, graph: Graph) -> Path:
    return graph.write(path, {"x": 0}, {"y": len(graph.tensors) - 1})


def by_name(path: Path) -> dict[str, TensorSpan]:
    return {span.name: span for span in read_model(path).spans}


@pytest.mark.parametrize("per_channel", [False, True])
def test_spans_are_what_the_interpreter_reads(tmp_path: Path, per_channel: bool) -> None:
    path = write(tmp_path / "m.tflite", dense_layer(per_channel))
    data = path.read_bytes()
    model = read_model(path)
    assert (model.format, model.size, model.external) == ("tflite", len(data), ())
    spans = {span.name: span for span in model.spans}
    interpreter = Interpreter(model_path=str(path))
    details = {detail["name"]: detail for detail in interpreter.get_tensor_details()}
    interpreter.allocate_tensors()  # after the details: kernels write one scale several times
    assert set(spans) == {"w", "b"}
    for name, span in spans.items():
        array = interpreter.get_tensor(details[name]["index"])
        assert (span.dtype, span.shape) == (array.dtype.name, array.shape)
        assert data[span.offset : span.offset + span.length] == array.tobytes()
        theirs = details[name]["quantization_parameters"]
        assert span.quantisation is not None
        assert np.array_equal(np.float32(span.quantisation.scales), theirs["scales"])
        assert list(span.quantisation.zero_points) == theirs["zero_points"].tolist()
    assert spans["w"].quantisation is not None
    assert spans["w"].quantisation.axis == (0 if per_channel else None)


def test_shared_buffers_give_one_span(tmp_path: Path) -> None:
    graph = dense_layer()
    twin = graph.tensor("twin", (4, 6), "int8")
    graph.tensors[twin].buffer = graph.tensors[1].buffer
    assert set(by_name(write(tmp_path / "m.tflite", graph))) == {"w", "b"}


def test_strings_sparse_and_unknown_types_have_no_span(tmp_path: Path) -> None:
    graph = dense_layer()
    graph.tensor("text", (1,), "string", data=b"\1\0\0\0\x0c\0\0\0\x0c\0\0\0")
    sparse = graph.tensor("sparse", (100,), "int8", data=random_codes((4,)))
    graph.tensors[sparse].sparsity = schema.SparsityParametersT()
    later = graph.tensor("later", (4,), "int8", data=random_codes((4,)))
    graph.tensors[later].type = 100
    assert set(by_name(write(tmp_path / "m.tflite", graph))) == {"w", "b"}


def test_int4_is_packed(tmp_path: Path) -> None:
    graph = dense_layer()
    packed = graph.tensor("p", (5,), "int8", data=b"\x21\x43\x05", quantisation=Quantisation(0.5))
    graph.tensors[packed].type = schema.TensorType.INT4
    span = by_name(write(tmp_path / "m.tflite", graph))["p"]
    assert (span.dtype, span.shape, span.length) == ("int4", (5,), 3)


def test_blockwise_quantisation_is_left_alone(tmp_path: Path) -> None:
    graph = dense_layer()
    quantised = graph.tensors[1].quantization
    quantised.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    quantised.details = schema.BlockwiseQuantizationT()
    assert by_name(write(tmp_path / "m.tflite", graph))["w"].quantisation is None


def test_buffers_behind_the_flatbuffer(tmp_path: Path) -> None:
    codes = random_codes((4, 6))
    graph = dense_layer()
    buffer = graph.buffers[graph.tensors[1].buffer]
    buffer.data, buffer.offset, buffer.size = None, 1 << 20, codes.nbytes
    # The writer of buffers in the harness leaves offset and size out; the generated one packs them.
    graph.buffers[graph.tensors[1].buffer] = plain = schema.BufferT()
    plain.offset, plain.size = 1 << 20, codes.nbytes
    path = write(tmp_path / "m.tflite", graph)
    path.write_bytes(path.read_bytes().ljust(1 << 20, b"\0") + codes.tobytes())
    span = by_name(path)["w"]
    assert (span.offset, span.length) == (1 << 20, codes.nbytes)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SluiceError) as caught:
        read_model(path)
    assert caught.value.code == "MODEL_FILE_TRUNCATED"


def test_tensors_of_a_second_subgraph_are_named_by_it(tmp_path: Path) -> None:
    first = schema.ModelT.InitFromPackedBuf(dense_layer().finish({"x": 0}, {"y": 3}))
    first.subgraphs.append(
        schema.ModelT.InitFromPackedBuf(dense_layer().finish({"x": 0}, {"y": 3})).subgraphs[0]
    )
    extra = schema.BufferT()
    extra.data = np.arange(24, dtype=np.uint8)
    first.buffers.append(extra)
    first.subgraphs[1].tensors[1].buffer = len(first.buffers) - 1
    import flatbuffers

    builder = flatbuffers.Builder()
    builder.Finish(first.Pack(builder), file_identifier=b"TFL3")
    path = tmp_path / "m.tflite"
    path.write_bytes(bytes(builder.Output()))
    spans = by_name(path)
    assert set(spans) == {"w", "b", "1/w"}
    assert path.read_bytes()[spans["1/w"].offset :][:24] == bytes(range(24))
    tensors, operators = tflite_metadata.read(Source(path.read_bytes(), path))
    assert [tensor.index for tensor in tensors] == list(range(len(tensors)))
    weight = next(tensor for tensor in tensors if tensor.name == "1/w")
    assert weight.data.offset == spans["1/w"].offset
    assert any(weight.index in operator.inputs for operator in operators)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda graph: setattr(graph.tensors[1], "shape", [4, 7]), "24 bytes of data .* needs 28"),
        (lambda graph: setattr(graph.tensors[1], "shape", [-4, -6]), "negative dimension"),
        (lambda graph: setattr(graph.tensors[1], "shape", [1 << 30, 1 << 30]), "more elements"),
        (lambda graph: setattr(graph.tensors[1], "shape", [1] * 100), "more dimensions"),
        (lambda graph: setattr(graph.tensors[1], "buffer", 77), "names buffer 77"),
        (lambda graph: setattr(graph.tensors[1], "name", "n" * 100_000), "100000 bytes, more than"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, spoil: Any, problem: str) -> None:
    graph = dense_layer()
    spoil(graph)
    with pytest.raises(SluiceError, match=problem) as caught:
        read_model(write(tmp_path / "m.tflite", graph))
    assert caught.value.code == "MODEL_FILE_INVALID"
