"""The tiny models do what tests expect of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edge_tests.harness.models import (
    golden,
    hanging_onnx,
    layers,
    samples,
    tiny_onnx,
    tiny_tflite,
    truncated,
)
from runtimes import registry
from runtimes.interface import ModelRejected


@pytest.mark.parametrize("write", [tiny_onnx, tiny_tflite])
def test_the_network_is_computed(tmp_path, write):
    inputs = samples(6)
    (first, first_bias), (last, last_bias) = layers(5, hidden=32, change=0.01)
    expected = np.maximum(inputs["x"] @ first + first_bias, 0) @ last + last_bias
    with registry.load(write(tmp_path / "model", seed=5, hidden=32, change=0.01)) as model:
        np.testing.assert_allclose(model.run(inputs)["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", [tiny_onnx, tiny_tflite])
def test_files_depend_on_their_seed_alone(tmp_path, write):
    first = write(tmp_path / "a", seed=1).read_bytes()
    assert write(tmp_path / "b", seed=1).read_bytes() == first
    assert write(tmp_path / "c", seed=2).read_bytes() != first
    changed = write(tmp_path / "d", seed=1, change=0.01).read_bytes()
    assert changed != first
    assert len(changed) == len(first)


@pytest.mark.parametrize("write", [tiny_onnx, tiny_tflite])
def test_a_truncated_model_is_rejected(tmp_path, write):
    with pytest.raises(ModelRejected):
        registry.load(truncated(tmp_path / "cut", write(tmp_path / "model")))


def test_a_golden_file_holds_what_the_runtime_answers(tmp_path):
    model = tiny_onnx(tmp_path / "model")
    inputs = samples(4)
    with np.load(golden(tmp_path / "golden", model, inputs)) as arrays:
        assert sorted(arrays) == ["input.x", "output.y"]
        with registry.load(model) as loaded:
            np.testing.assert_array_equal(arrays["output.y"], loaded.run(inputs)["y"])


def test_the_hanging_model_loads_and_never_answers(tmp_path):
    path = hanging_onnx(tmp_path / "model")
    code = (
        "import sys; from pathlib import Path; import numpy as np; from runtimes import registry;"
        "model = registry.load(Path(sys.argv[1])); print('loaded', flush=True);"
        "model.run({'x': np.ones((1, 8), np.float32)}); print('answered', flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "loaded\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1)
    finally:
        child.kill()
        assert child.communicate(timeout=30)[0] == ""
