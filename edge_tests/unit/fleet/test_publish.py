"""Local files become a manifest: formats, external data, precision, golden files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_tests.harness.models import samples, tiny_onnx, tiny_tflite, truncated, write_golden
from fleet.golden import MAX_GOLDEN_ARRAYS, MAX_GOLDEN_BYTES, check_golden
from fleet.publish import guess_precision, prepare
from fleet.recipe import ExtraFile, Recipe, VariantRecipe
from sluice.api.v1 import errors_pb2
from updater.digests import digest_file
from updater.errors import SluiceError
from updater.formats import TensorSpan
from updater.manifest import Manifest


def recipe(*files: Path, **keywords: object) -> Recipe:
    return Recipe("tiny", tuple(VariantRecipe(file=file) for file in files), **keywords)  # type: ignore[arg-type]


def external_onnx(directory: Path, data_name: str = "weights.bin") -> Path:
    """The tiny network with its large tensors in a file of their own."""
    plain = tiny_onnx(directory / "plain.onnx")
    model = onnx.load(plain)
    path = directory / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location=data_name, size_threshold=0)
    return path


def golden(path: Path, **arrays: np.ndarray) -> Path:
    with path.open("wb") as file:
        np.savez(file, **{name.replace("__", "."): array for name, array in arrays.items()})
    return path


def test_a_file_becomes_a_variant_named_after_what_it_is(tmp_path: Path) -> None:
    path = tiny_onnx(tmp_path / "any name.onnx")
    draft = prepare(recipe(path))
    (variant,) = draft.manifest.variants
    assert (variant.name, variant.format, variant.precision) == ("onnx-float32", "onnx", "float32")
    assert [(file.path, file.role) for file in variant.files] == [("model.onnx", "model")]
    assert variant.model_file.digest == digest_file(path)
    assert variant.model_file.size == path.stat().st_size
    assert draft.sources == {digest_file(path): path}
    assert Manifest.parse(draft.manifest.to_bytes()) == draft.manifest


def test_content_does_not_depend_on_the_names_of_local_files(tmp_path: Path) -> None:
    one = prepare(recipe(tiny_onnx(tmp_path / "a.onnx")))
    two = prepare(recipe(tiny_onnx(tmp_path / "b.onnx")))
    assert one.manifest.content_digest == two.manifest.content_digest
    other = prepare(recipe(tiny_onnx(tmp_path / "c.onnx", seed=1)))
    assert other.manifest.content_digest != one.manifest.content_digest


def test_the_format_is_found_by_content(tmp_path: Path) -> None:
    path = tiny_tflite(tmp_path / "model.bin")
    (variant,) = prepare(recipe(path)).manifest.variants
    assert variant.format == "tflite"
    assert variant.model_file.path == "model.tflite"


def test_variants_without_names_get_different_ones(tmp_path: Path) -> None:
    first, second = tiny_onnx(tmp_path / "a.onnx"), tiny_onnx(tmp_path / "b.onnx", seed=1)
    names = [variant.name for variant in prepare(recipe(first, second)).manifest.variants]
    assert names == ["onnx-float32", "onnx-float32-2"]


def test_external_data_comes_along(tmp_path: Path) -> None:
    path = external_onnx(tmp_path)
    draft = prepare(recipe(path))
    (variant,) = draft.manifest.variants
    assert [(file.path, file.role) for file in variant.files] == [
        ("model.onnx", "model"),
        ("weights.bin", "external"),
    ]
    assert variant.precision == "float32"
    assert draft.sources[digest_file(tmp_path / "weights.bin")] == tmp_path / "weights.bin"


def test_external_data_that_is_missing_is_named(tmp_path: Path) -> None:
    path = external_onnx(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(SluiceError, match=r"weights\.bin") as caught:
        prepare(recipe(path))
    assert caught.value.reason == errors_pb2.MODEL_FILE_INVALID
    assert "beside the model" in caught.value.hint


def test_external_data_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = external_onnx(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(SluiceError) as caught:
        prepare(recipe(path))
    assert caught.value.reason == errors_pb2.MODEL_FILE_TRUNCATED


def test_external_data_in_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = external_onnx(tmp_path, "deep/weights.bin")
    with pytest.raises(SluiceError, match="plain file name") as caught:
        prepare(recipe(path))
    assert caught.value.reason == errors_pb2.MODEL_FILE_INVALID


def test_a_foreign_file_is_told_which_formats_there_are(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(SluiceError, match="onnx and tflite") as caught:
        prepare(recipe(path))
    assert caught.value.reason == errors_pb2.MODEL_FILE_INVALID
    assert str(path) in caught.value.message


def test_a_format_that_boxes_do_not_run_is_named(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(SluiceError, match="is safetensors; boxes run onnx and tflite"):
        prepare(recipe(path))


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    path = truncated(tmp_path / "cut.onnx", tiny_onnx(tmp_path / "whole.onnx"))
    with pytest.raises(SluiceError) as caught:
        prepare(recipe(path))
    assert caught.value.reason == errors_pb2.MODEL_FILE_TRUNCATED


def test_golden_and_extra_files_are_part_of_the_variant(tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "m.onnx")
    checked = write_golden(tmp_path / "g.npz", samples(2), {"y": np.zeros((2, 4), np.float32)})
    labels = tmp_path / "labels.txt"
    labels.write_text("zero\none\n")
    entry = VariantRecipe(file=model, golden=checked, files=(ExtraFile("labels", labels),))
    (variant,) = prepare(Recipe("tiny", (entry,))).manifest.variants
    assert [(file.path, file.role) for file in variant.files] == [
        ("model.onnx", "model"),
        ("golden.npz", "golden"),
        ("labels.txt", "labels"),
    ]


def test_an_extra_file_needs_a_plain_name(tmp_path: Path) -> None:
    labels = tmp_path / "my labels.txt"
    labels.write_text("zero\n")
    entry = VariantRecipe(file=tiny_onnx(tmp_path / "m.onnx"), files=(ExtraFile("labels", labels),))
    with pytest.raises(SluiceError, match="not plain") as caught:
        prepare(Recipe("tiny", (entry,)))
    assert caught.value.reason == errors_pb2.MANIFEST_INVALID


def test_files_shared_by_variants_are_uploaded_once(tmp_path: Path) -> None:
    path = tiny_onnx(tmp_path / "m.onnx")
    entries = (VariantRecipe(path, name="one"), VariantRecipe(path, name="two", boards=("aarch64",)))
    draft = prepare(Recipe("tiny", entries))
    assert len(draft.manifest.variants) == 2
    assert len(draft.manifest.files()) == len(draft.sources) == 1


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"float32": 1000, "int64": 9000}, "float32"),
        ({"int8": 900, "int32": 5000, "float32": 100}, "int8"),
        ({"uint8": 400, "int8": 400}, "int8"),
        ({"float16": 1000, "float32": 10}, "float16"),
        ({"float32": 500, "int8": 500}, "mixed"),
        ({"int64": 8, "bool": 1}, ""),
        ({}, ""),
    ],
)
def test_precision_is_what_most_bytes_of_the_weights_are(counts: dict[str, int], expected: str) -> None:
    spans = [TensorSpan(dtype, dtype, (size,), 0, size) for dtype, size in counts.items()]
    assert guess_precision(spans) == expected


def test_a_good_golden_file_is_understood(tmp_path: Path) -> None:
    path = golden(tmp_path / "g.npz", input__x=np.ones((3, 8), np.float32), output__y=np.ones((3, 4)))
    found = check_golden(path)
    assert (found.inputs, found.outputs, found.batch) == ({"x": (3, 8)}, {"y": (3, 4)}, 3)


def write_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{"input.x": np.array([{"a": 1}], dtype=object), "output.y": np.ones((1, 4))})


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def write_bomb(path: Path) -> None:
    """An archive of a few kB that unpacks to more than the limit."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("input.x.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(MAX_GOLDEN_BYTES // (1 << 20) + 1):
            member.write(bytes(1 << 20))


def write_liar(path: Path) -> None:
    """An array whose header claims a terabyte."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38, 1)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input.x.npy", buffer.getvalue() + bytes(16))


def write_many(path: Path) -> None:
    golden(path, **{f"input__x{index}": np.ones((1, 1)) for index in range(MAX_GOLDEN_ARRAYS + 1)})


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda path: path.write_bytes(b"not an archive"), "not a readable .npz"),
        (write_npy, "not a readable .npz"),
        (lambda path: golden(path, output__y=np.ones((1, 4))), r"no 'input\.<name>' array"),
        (lambda path: golden(path, input__x=np.ones((1, 8))), r"no 'output\.<name>' array"),
        (lambda path: golden(path, x=np.ones((1, 8))), "has the key 'x'"),
        (
            lambda path: golden(path, input__x=np.ones((2, 8)), output__y=np.ones((1, 4))),
            "mixes batch sizes",
        ),
        (lambda path: golden(path, input__x=np.ones(()), output__y=np.ones((1, 4))), "first dimension"),
        (lambda path: golden(path, input__x=np.ones((0, 8)), output__y=np.ones((0, 4))), "first dimension"),
        (
            lambda path: golden(path, input__x=np.ones((1, 8)), output__y=np.full((1, 4), np.nan)),
            "NaN or infinity",
        ),
        (write_pickle, "not numbers or text"),
        (write_bomb, "unpacks to"),
        (write_liar, "size that its header states"),
        (write_many, f"at most {MAX_GOLDEN_ARRAYS}"),
    ],
)
def test_a_bad_golden_file_is_refused(tmp_path: Path, write: object, why: str) -> None:
    path = tmp_path / "g.npz"
    write(path)  # type: ignore[operator]
    with pytest.raises(SluiceError, match=why) as caught:
        check_golden(path)
    assert caught.value.reason == errors_pb2.MODEL_FILE_INVALID
    assert str(path) in caught.value.message


def test_a_damaged_golden_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = golden(tmp_path / "g.npz", input__x=np.ones((3, 8)), output__y=np.ones((3, 4))).read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(SluiceError) as caught:
            check_golden(path)
        assert caught.value.reason == errors_pb2.MODEL_FILE_INVALID
