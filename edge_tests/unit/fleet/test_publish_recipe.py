"""model.yaml: what it may say, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_tests.harness.models import tiny_onnx
from fleet.publish import prepare
from fleet.recipe import MAX_RECIPE_BYTES, ExtraFile, load_recipe
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.manifest import Bounds, Tolerance

FULL = """
model: digits
floor: 1
annotations: {commit: abc}
variants:
  - name: onnx-int8
    file: digits.onnx
    golden: golden.npz
    runtime: onnxruntime
    accelerator: cpu
    boards: [aarch64]
    min_memory_bytes: 512000000
    precision: int8
    files: [{role: labels, path: labels.txt}]
    tolerance:
      cosine_min: "0.99"
      max_relative_error: ""
      outputs: {boxes: {max_abs_error: "0.5"}}
    options: {threads: "1"}
"""
LEAST = "model: digits\nvariants: [{file: digits.onnx}]\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny_onnx(tmp_path / "digits.onnx")
    (tmp_path / "golden.npz").write_bytes(b"checked elsewhere")
    (tmp_path / "labels.txt").write_text("zero\n")
    return tmp_path


def load(directory: Path, text: str) -> object:
    path = directory / "model.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_every_field_is_read(directory: Path) -> None:
    path = directory / "model.yaml"
    path.write_text(FULL)
    recipe = load_recipe(path)
    (variant,) = recipe.variants
    assert (recipe.model, recipe.floor, recipe.annotations) == ("digits", 1, {"commit": "abc"})
    assert variant.file == directory / "digits.onnx"
    assert variant.golden == directory / "golden.npz"
    assert variant.files == (ExtraFile("labels", directory / "labels.txt"),)
    assert variant.tolerance == Tolerance("0.99", "", "", {"boxes": Bounds("0.99", "", "0.5")})
    assert (variant.runtime, variant.boards, variant.precision) == ("onnxruntime", ("aarch64",), "int8")
    assert (variant.min_memory_bytes, variant.options) == (512000000, {"threads": "1"})


def test_the_least_is_a_model_and_a_file(directory: Path) -> None:
    path = directory / "model.yaml"
    path.write_text(LEAST)
    assert prepare(load_recipe(path)).manifest.variants[0].name == "onnx-float32"


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("", "", "must hold keys and values"),
        ("- a\n- b\n", "", "must hold keys and values"),
        ("model: [\n", "", "is not YAML"),
        ("a: &a [*a]\n", "a", "not a known key"),
        ("model: !!python/object:os.system {}\n", "", "is not YAML"),
        ("model: x\nmodel: y\nvariants: [{file: digits.onnx}]\n", "", "'model' is given twice"),
        ("\0", "", "is not YAML"),
        ("variants: [{file: digits.onnx}]\n", "model", "is missing"),
        (LEAST.replace("digits\n", "Digits!\n"), "model", "1 to 64 of a-z"),
        (LEAST.replace("digits\n", "7\n"), "model", 'put it in quotes: "7"'),
        ("model: digits\n", "variants", "at least one entry"),
        ("model: digits\nvariants: []\n", "variants", "at least one entry"),
        ("model: digits\nvariants: {file: x}\n", "variants", "must be a list"),
        ("model: digits\nvariants: [digits.onnx]\n", "variants[0]", "must hold keys and values"),
        (LEAST + "flor: 1\n", "flor", "did you mean 'floor'"),
        (LEAST + "floor: 0\n", "floor", "whole number from 1"),
        (LEAST + "floor: true\n", "floor", "whole number from 1"),
        (LEAST + "annotations: {commit: 1.0e+3}\n", "annotations.commit", "put it in quotes"),
        (LEAST + "annotations: {commit: 0123}\n", "annotations.commit", "put it in quotes"),
        (LEAST + "annotations: [a]\n", "annotations", "keys, each with a text"),
        ("model: digits\nvariants: [{name: a}]\n", "variants[0].file", "is missing"),
        ("model: digits\nvariants: [{file: gone.onnx}]\n", "variants[0].file", "there is no file"),
        (
            "model: digits\nvariants: [{file: digits.onnx, goldn: g}]\n",
            "variants[0].goldn",
            "did you mean 'golden'",
        ),
        (
            "model: digits\nvariants: [{file: digits.onnx, tolerance: {cosine_min: 0.9}}]\n",
            "variants[0].tolerance.cosine_min",
            'put it in quotes: "0.9"',
        ),
        (
            'model: digits\nvariants: [{file: digits.onnx, tolerance: {cosine_min: "nan"}}]\n',
            "variants[0].tolerance.cosine_min",
            "a decimal",
        ),
        (
            "model: digits\nvariants: [{file: digits.onnx, tolerance: {outputs: {y: {cosine: '0.9'}}}}]\n",
            "variants[0].tolerance.outputs.y.cosine",
            "did you mean 'cosine_min'",
        ),
        (
            "model: digits\nvariants: [{file: digits.onnx, options: {threads: 1}}]\n",
            "variants[0].options.threads",
            'put it in quotes: "1"',
        ),
        (
            "model: digits\nvariants: [{file: digits.onnx, files: [{role: model, path: labels.txt}]}]\n",
            "variants[0].files[0].role",
            "must be one of labels",
        ),
        (
            "model: digits\nvariants: [{file: digits.onnx, accelerator: tpu}]\n",
            "variants[0].accelerator",
            "must be one of cpu, cuda",
        ),
        (
            "model: digits\nvariants: [{file: digits.onnx, boards: aarch64}]\n",
            "variants[0].boards",
            "must be a list",
        ),
    ],
)
def test_what_is_wrong_is_named(directory: Path, text: str, where: str, why: str) -> None:
    with pytest.raises(SluiceError) as caught:
        load(directory, text)
    error = caught.value
    assert error.reason == errors_pb2.CONFIG_INVALID
    assert why in error.message
    assert "model.yaml" in error.message
    assert f"model.yaml: {where} " in error.message if where else True


def test_an_unknown_key_is_told_the_known_ones(directory: Path) -> None:
    with pytest.raises(SluiceError, match="model, floor, annotations, variants"):
        load(directory, LEAST + "zzz: 1\n")


def test_a_recipe_that_is_too_large_is_not_parsed(directory: Path) -> None:
    with pytest.raises(SluiceError, match="larger than 256 KiB"):
        load(directory, "#" * (MAX_RECIPE_BYTES + 1))


def test_shared_references_do_not_multiply(directory: Path) -> None:
    """The "billion laughs": nine levels of ten aliases each; refused at once, by its keys."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(SluiceError, match="not a known key"):
        load(directory, "\n".join(lines))


def test_deep_nesting_is_refused(directory: Path) -> None:
    with pytest.raises(SluiceError) as caught:
        load(directory, "model: " + "[" * 50_000)
    assert caught.value.reason == errors_pb2.CONFIG_INVALID


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SluiceError) as caught:
        load_recipe(tmp_path)
    assert caught.value.reason == errors_pb2.IO_FAILED
