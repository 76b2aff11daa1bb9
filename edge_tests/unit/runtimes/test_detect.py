"""Formats are told by content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import load, save

from edge_tests.harness.models import tiny_onnx, tiny_tflite, truncated
from runtimes.detect import detect_format
from runtimes.interface import ModelRejected


def test_real_files(tmp_path):
    assert detect_format(tiny_onnx(tmp_path / "a")) == "onnx"
    assert detect_format(tiny_tflite(tmp_path / "b.onnx")) == "tflite"


def test_onnx_with_every_kind_of_field_before_the_graph(tmp_path):
    model = load(tiny_onnx(tmp_path / "a"))
    model.model_version = -1  # ten bytes as a varint
    model.doc_string = "x" * 100_000
    model.domain = "example"
    save(model, tmp_path / "b")
    assert detect_format(tmp_path / "b") == "onnx"


def test_a_cut_file_keeps_its_format(tmp_path):
    assert detect_format(truncated(tmp_path / "c", tiny_onnx(tmp_path / "a"))) == "onnx"
    assert detect_format(truncated(tmp_path / "d", tiny_tflite(tmp_path / "b"))) == "tflite"


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", b"\x08\x08", b"hello", b"\x7fELF" + bytes(60), b"{}\n", b"\x08\x08\x12" + b"\xff" * 20],
)
def test_other_files(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert detect_format(path) == ""


@given(content=st.binary(max_size=200))
def test_any_bytes_are_answered(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    assert detect_format(path) in ("", "onnx", "tflite")


def test_a_directory_is_no_model(tmp_path):
    with pytest.raises(ModelRejected, match="directory"):
        detect_format(tmp_path)
