"""Any file may be given to the readers: foreign, cut anywhere, flipped anywhere, hostile, or very large."""

from __future__ import annotations

import contextlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_tests.harness.tflite import Graph, Quantisation
from updater.errors import SluiceError
from updater.formats import ModelFile, detect_format, external_spans, read_model

REFUSALS = ("MODEL_FILE_TRUNCATED", "MODEL_FILE_INVALID")
MEMORY_BYTES = 16 << 20  # more than any small file may cost, less than one hostile length


def onnx_bytes() -> bytes:
    """A small model with all that the reader knows: wiring, a subgraph, typed data, external data."""
    codes = numpy_helper.from_array(np.arange(24, dtype=np.int8).reshape(4, 6), "W_codes")
    outside = TensorProto(name="outside", data_type=1, dims=[4], data_location=1)
    outside.external_data.add(key="location", value="weights.bin")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.float32([1, 2])))],
        "inner",
        [],
        [helper.make_tensor_value_info("k", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["W_codes", "s", "z"], ["w"], axis=0),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    initializers = [
        codes,
        helper.make_tensor("s", TensorProto.FLOAT, (4,), [1, 2, 3, 4]),
        helper.make_tensor("z", TensorProto.INT8, (4,), [0, -1, 1, 2]),
        numpy_helper.from_array(np.array(True), "c"),
        outside,
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, initializers),
        producer_name="sluice tests",
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def tflite_bytes() -> bytes:
    graph = Graph()
    x = graph.tensor("x", (1, 6), "int8", quantisation=Quantisation(0.5, 3))
    codes = np.arange(24, dtype=np.int8).reshape(4, 6)
    w = graph.tensor("w", (4, 6), "int8", data=codes, quantisation=Quantisation(0.1))
    y = graph.tensor("y", (1, 4), "int8", quantisation=Quantisation(2.0, -1))
    graph.fully_connected([x, w, -1], y, version=4)
    return graph.finish({"x": x}, {"y": y})


def safetensors_bytes() -> bytes:
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I8", "shape": [5], "data_offsets": [24, 29]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(29))


SAMPLES = {"onnx": onnx_bytes(), "tflite": tflite_bytes(), "safetensors": safetensors_bytes()}


def write(tmp_path: Path, data: bytes, suffix: str = ".bin") -> Path:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    return path


def check(found: ModelFile, size: int) -> None:
    """The rules that spans keep, whatever the file was."""
    assert found.size == size
    end = 0
    for span in found.spans:
        assert span.offset >= end
        assert span.length > 0
        end = span.offset + span.length
    assert end <= size


def read_anyhow(path: Path) -> str:
    """Reads a file in all ways; returns "read" or the code of the refusal."""
    try:
        check(read_model(path), path.stat().st_size)
        for location, spans in external_spans(path).items():
            assert (path.parent / location).resolve().is_relative_to(path.parent.resolve())
            assert all(span.length > 0 for span in spans)
    except SluiceError as error:
        assert error.code in REFUSALS
        assert str(path) in error.message
        assert "byte" in error.message
        assert error.hint
        return error.code
    return "read"


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_what_they_are_called(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, SAMPLES[name])
    assert detect_format(path) == name
    found = read_model(path, expected=name)
    check(found, len(SAMPLES[name]))
    assert found.spans


def last_useful_byte(name: str, data: bytes) -> int:
    """Bytes of a file that a runtime could load: a flatbuffer without the padding at its end."""
    return len(data.rstrip(b"\0")) if name == "tflite" else len(data)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_named_file_cut_anywhere_is_truncated(tmp_path: Path, name: str) -> None:
    data = SAMPLES[name]
    for length in range(last_useful_byte(name, data)):
        path = write(tmp_path, data[:length], f".{name}")
        with pytest.raises(SluiceError) as caught:
            read_model(path)
        assert caught.value.code == "MODEL_FILE_TRUNCATED", length
        assert f"the file ends at byte {length}" in caught.value.message


@pytest.mark.parametrize("name", SAMPLES)
def test_a_nameless_file_cut_anywhere_is_truncated_once_its_head_tells(tmp_path: Path, name: str) -> None:
    data = SAMPLES[name]
    codes = [read_anyhow(write(tmp_path, data[:length])) for length in range(last_useful_byte(name, data))]
    told = codes.index("MODEL_FILE_TRUNCATED")
    assert told < 32
    assert set(codes[:told]) == {"read"}  # as opaque
    assert set(codes[told:]) == {"MODEL_FILE_TRUNCATED"}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_byte_flipped(tmp_path: Path, name: str) -> None:
    data = SAMPLES[name]
    codes = set()
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            codes.add(read_anyhow(write(tmp_path, bytes(damaged), f".{name}")))
    assert codes == {"read", *REFUSALS}


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """A file with a few bytes replaced, some removed or put in, and perhaps cut."""
    edit = st.tuples(st.integers(0, len(data)), st.integers(0, 8), st.binary(max_size=12))

    def apply(edits: list[tuple[int, int, bytes]], cut: int | None) -> bytes:
        out = bytearray(data)
        for position, removed, added in edits:
            out[position : position + removed] = added
        return bytes(out[:cut])

    return st.builds(apply, st.lists(edit, min_size=1, max_size=4), st.none() | st.integers(0, len(data)))


@settings(
    max_examples=400,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=st.one_of(st.binary(max_size=200), *map(mutated, SAMPLES.values())),
    suffix=st.sampled_from(["", *SAMPLES]),
)
def test_any_bytes_are_read_or_refused_in_little_memory(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = write(tmp_path, data, f".{suffix}")
    tracemalloc.start()
    try:
        read_anyhow(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"hello, world\n" * 100,
        b"\x7fELF" + bytes(1000),
        b"PK\x03\x04" + bytes(1000),
        b"GGUF" + bytes(1000),
        bytes(1000),
        b"\xff" * 1000,
        b"\x08\x01\x12\x90\x4e" + bytes(10_000),  # a TensorFlow SavedModel begins like this
        np.random.default_rng(0).bytes(1000),
    ],
)
def test_other_files_are_opaque(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data)
    assert detect_format(path) == "opaque"
    assert read_model(path) == ModelFile("opaque", len(data), (), ())
    assert external_spans(path) == {}
    for name in SAMPLES:
        with pytest.raises(SluiceError) as caught:
            read_model(path, expected=name)
        assert caught.value.code in REFUSALS


def test_random_bytes_are_never_taken_for_a_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        assert detect_format(write(tmp_path, rng.bytes(int(rng.integers(0, 100))))) == "opaque"


def test_a_file_of_another_format_than_expected_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES["tflite"], ".onnx")
    assert read_model(path).format == "tflite"  # the content counts, not the name
    with pytest.raises(
        SluiceError, match="should be in onnx format, but the file is in tflite format"
    ) as caught:
        read_model(path, expected="onnx")
    assert caught.value.code == "MODEL_FILE_INVALID"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, code in ((tmp_path, "MODEL_FILE_INVALID"), (tmp_path / "pipe", "MODEL_FILE_INVALID")):
        with pytest.raises(SluiceError) as caught:
            read_model(path)
        assert caught.value.code == code
    with pytest.raises(SluiceError) as caught:
        read_model(tmp_path / "missing.onnx")
    assert caught.value.code == "IO_FAILED"


def test_limits_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from updater.formats import limits

    for name, limit in {"onnx": "MAX_PROTOBUF_FIELDS", "tflite": "MAX_FLATBUFFER_TABLES"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(limits, limit, 8)
            with pytest.raises(SluiceError, match="than the 8 allowed") as caught:
                read_model(write(tmp_path, SAMPLES[name]))
            assert caught.value.code == "MODEL_FILE_INVALID"
    for name in SAMPLES:
        with monkeypatch.context() as patch:
            patch.setattr(limits, "MAX_TENSORS", 1)
            with pytest.raises(SluiceError, match="than the 1 allowed") as caught:
                read_model(write(tmp_path, SAMPLES[name]))
            assert caught.value.code == "MODEL_FILE_INVALID"


def test_names_shared_by_many_tensors_are_bounded(tmp_path: Path) -> None:
    """Thousands of tensors refer to one long name: a little file, a lot of text."""
    graph = Graph()
    x = graph.tensor("x", (1, 6), "int8")
    twins = 6000
    for _ in range(twins):
        item = schema.TensorT()
        item.name = "n" * 16_000
        item.shape = [6]
        item.type = schema.TensorType.INT8
        graph.tensors.append(item)
    builder = SharingBuilder(1024)
    model = schema.ModelT.InitFromPackedBuf(graph.finish({"x": x}, {"x": x}))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    data = bytes(builder.Output())
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(SluiceError, match="the names have more than") as caught:
            read_model(write(tmp_path, data))
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()
    assert caught.value.code == "MODEL_FILE_INVALID"


class SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes equal strings once."""

    def CreateString(self, text: str, *rest: Any) -> int:  # noqa: N802 (overrides)
        shared = self.__dict__.setdefault("shared", {})
        if text not in shared:
            shared[text] = super().CreateString(text, *rest)
        return int(shared[text])


def test_a_large_file_is_not_copied(tmp_path: Path) -> None:
    rows, columns = 4096, 2048
    small = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["W"], ["y"])],
            "g",
            [],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
            [numpy_helper.from_array(np.zeros((rows, columns), np.float32), "W")],
        )
    ).SerializeToString()
    path = write(tmp_path, small)
    del small
    tracemalloc.start()
    try:
        spans = read_model(path).spans
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [span.length for span in spans] == [rows * columns * 4]
    assert peak < 1 << 20


def test_a_reader_leaves_no_file_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for data in (*SAMPLES.values(), SAMPLES["onnx"][:50], b""):
        with contextlib.suppress(SluiceError):
            read_model(write(tmp_path, data, ".onnx"))
    assert descriptors() == before
