"""The model files in the repository are what their writer writes."""

from __future__ import annotations

import pytest

from edge_tests.harness.fixtures import CONFORMANCE, write_all
from runtimes import probing
from runtimes.detect import ONNX, TFLITE


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fixtures")
    (directory / "probe").mkdir()
    return write_all(directory, directory / "probe" / "affine.onnx", directory / "probe" / "affine.tflite")


def test_the_files_match_their_source(written):
    for path in written:
        probe = path.parent.name == "probe"
        kept = probing.MODELS[ONNX].parent / path.name if probe else CONFORMANCE / path.name
        assert kept.read_bytes() == path.read_bytes(), (
            f"{kept} differs: run `python -m edge_tests.harness.fixtures`"
        )


def test_no_file_is_left_over(written):
    names = {path.name for path in written if path.parent.name != "probe"}
    assert {path.name for path in CONFORMANCE.iterdir()} == names
    assert set(probing.MODELS) == {ONNX, TFLITE}
    assert {path.name for path in probing.MODELS[ONNX].parent.iterdir()} == {"affine.onnx", "affine.tflite"}
