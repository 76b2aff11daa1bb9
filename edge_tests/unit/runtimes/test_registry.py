"""Which runtime loads a file."""

from __future__ import annotations

import pytest

from edge_tests.harness.models import tiny_onnx, tiny_tflite
from runtimes import registry
from runtimes.interface import ModelRejected, RuntimeUnavailable


def test_every_runtime_is_probed_once():
    probes = registry.probe_all()
    assert [probe.runtime for probe in probes] == ["onnxruntime", "litert", "tflite-runtime"]
    assert all(first is second for first, second in zip(probes, registry.probe_all(), strict=True))


def test_the_content_chooses(tmp_path):
    with registry.load(tiny_onnx(tmp_path / "a.tflite")) as model:
        assert model.runtime == "onnxruntime"
    with registry.load(tiny_tflite(tmp_path / "b.onnx"), format="tflite") as model:
        assert model.runtime == "litert"


def test_a_preferred_runtime_that_is_missing_leaves_the_others():
    if registry.probe("tflite-runtime").usable:
        pytest.skip("tflite-runtime is installed here")
    assert registry.select("tflite", "tflite-runtime").name == "litert"
    assert registry.select("tflite", "litert").name == "litert"


@pytest.mark.parametrize(
    ("format_name", "preferred", "words"),
    [
        ("onnx", "litert", ["litert", "onnx", "onnxruntime"]),
        ("onnx", "tensorrt", ["'tensorrt'", "onnxruntime, litert"]),
        ("safetensors", "", ["'safetensors'", "onnx, tflite"]),
        ("", "", ["''"]),
    ],
)
def test_what_cannot_be_selected(format_name, preferred, words):
    with pytest.raises(RuntimeUnavailable) as caught:
        registry.select(format_name, preferred)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_format_is_named(tmp_path):
    with pytest.raises(ModelRejected, match="said to be tflite, and its content is onnx"):
        registry.load(tiny_onnx(tmp_path / "model"), format="tflite")
