"""The demo's models are really trained, exported and quantised."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tests.demo import digits
from runtimes import registry

VARIANTS = [(version, variant) for version in digits.VERSIONS for variant in (digits.ONNX, digits.TFLITE)]
FORMATS = {digits.ONNX: "onnx", digits.TFLITE: "tflite"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return digits.build(tmp_path_factory.mktemp("digits"))


def test_the_second_version_is_better(models):
    assert models.float_accuracy[1] > 0.9
    assert models.float_accuracy[2] > models.float_accuracy[1]
    for variant in models.variant_names:
        assert models.accuracy(2, variant) > models.accuracy(1, variant)


@pytest.mark.parametrize(("version", "variant"), VARIANTS)
def test_quantisation_costs_little(models, version, variant):
    assert abs(models.accuracy(version, variant) - models.float_accuracy[version]) <= 0.01


@pytest.mark.parametrize(("version", "variant"), VARIANTS)
def test_weights_are_int8(models, version, variant):
    """73,280 weights: a float file would be four times as large."""
    assert 73_280 < models.model_path(version, variant).stat().st_size < 90_000


@pytest.mark.parametrize(("version", "variant"), VARIANTS)
def test_both_formats_look_the_same(models, version, variant):
    with registry.load(models.model_path(version, variant), format=FORMATS[variant]) as model:
        assert [str(spec) for spec in model.inputs] == ["'image' FP32[-1, 64]"]
        assert [str(spec) for spec in model.outputs] == ["'probabilities' FP32[-1, 10]"]
        probabilities = model.run({"image": models.images})["probabilities"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=0.03)


@pytest.mark.parametrize(("version", "variant"), VARIANTS)
def test_golden_files_hold_what_the_runtime_answers(models, version, variant):
    with np.load(models.golden_path(version, variant)) as golden:
        inputs, outputs = golden["input.image"], golden["output.probabilities"]
    assert inputs.shape == (16, 64)
    assert outputs.shape == (16, 10)
    assert inputs.dtype == outputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, models.images[:16])
    with registry.load(models.model_path(version, variant)) as model:
        np.testing.assert_allclose(model.run({"image": inputs})["probabilities"], outputs, atol=1e-6)


def test_held_out_images_are_in_no_training_data():
    """Also not as a duplicate: the data set itself has none that would leak."""
    data = digits.load_data()
    assert len(data.held_out_images) == 360
    seen = {image.tobytes() for image in data.train_images}
    assert not [image for image in data.held_out_images if image.tobytes() in seen]


def test_training_gives_the_same_again():
    data = digits.load_data()
    for first, second in zip(digits.train(data), digits.train(data), strict=True):
        for one, other in zip(first.layers, second.layers, strict=True):
            np.testing.assert_array_equal(one.weights, other.weights)
