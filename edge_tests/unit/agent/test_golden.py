"""The golden check and the warm-up."""

from __future__ import annotations

import math
import os
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent import golden
from agent.golden import blank_inputs, check_golden, compare, read_golden, warm_up
from agent.worker import Worker
from edge_tests.harness import models, serving
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.manifest import Bounds, Tolerance

FIXTURES = Path(__file__).parents[2] / "conformance" / "fixtures"
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def tiny(directory: Path) -> Iterator[Worker]:
    worker = serving.start_worker(models.tiny_onnx(directory / "tiny.onnx"))
    yield worker
    worker.close(1)


def refused(worker: Worker, path: Path, tolerance: Tolerance | None = None) -> str:
    with pytest.raises(SluiceError) as caught:
        check_golden(worker, path, tolerance or Tolerance())
    assert caught.value.reason == errors_pb2.GOLDEN_MISMATCH
    return caught.value.message


def test_the_same_model_passes(tiny: Worker, directory: Path) -> None:
    path = models.golden(directory / "own.npz", tiny.spec.path, models.samples(16))
    result = check_golden(tiny, path, Tolerance("0.999999", "0.00001"))
    assert result.passed
    assert [output.name for output in result.outputs] == [models.OUTPUT]
    assert result.cosine == pytest.approx(1, abs=1e-9)
    assert result.max_abs_error <= 1e-5


def test_another_runtime_is_within_a_tolerance(tiny: Worker, directory: Path) -> None:
    other = serving.start_worker(models.tiny_tflite(directory / "tiny.tflite"))
    try:
        path = models.golden(directory / "onnx.npz", tiny.spec.path, models.samples(16))
        assert check_golden(other, path, Tolerance("0.9999", "0.01", "0.001")).passed
    finally:
        other.close(1)


def test_another_model_does_not_pass(tiny: Worker, directory: Path) -> None:
    path = models.golden(
        directory / "foreign.npz", models.tiny_onnx(directory / "7.onnx", seed=7), models.samples(16)
    )
    says = refused(tiny, path)
    assert "outside the tolerance: y: cosine " in says
    assert "(wanted: cosine of at least 0.95, relative error of at most 0.35)" in says


def test_the_absolute_error_counts_too(tiny: Worker, directory: Path) -> None:
    samples = models.samples(4)
    answers = tiny.infer(samples, 10)
    answers[models.OUTPUT] = answers[models.OUTPUT] + np.float32(0.01)
    path = models.write_golden(directory / "shifted.npz", samples, answers)
    assert check_golden(tiny, path, Tolerance("0.99", "", "0.02")).passed
    says = refused(tiny, path, Tolerance("0.99", "", "0.005"))
    assert "error of at most 0.005" in says


def test_another_scale_does_not_pass_by_default(tiny: Worker, directory: Path) -> None:
    samples = models.samples(4)
    answers = tiny.infer(samples, 10)
    answers[models.OUTPUT] = answers[models.OUTPUT] * np.float32(2)
    path = models.write_golden(directory / "doubled.npz", samples, answers)
    assert "cosine 1.000000, relative error 0.5, " in refused(tiny, path)
    assert check_golden(tiny, path, Tolerance(max_relative_error="")).passed


def test_an_output_may_have_bounds_of_its_own(directory: Path) -> None:
    worker = serving.start_worker(FIXTURES / "pair.onnx")
    ones = np.ones((1, 2), np.float32)
    try:
        inputs = {"left": ones, "right": 2 * ones}
        path = models.write_golden(
            directory / "off.npz", inputs, {"sum": 3.5 * ones, "difference": -1 * ones}
        )
        strict = Bounds("0.999", "", "0")
        assert check_golden(worker, path, Tolerance(outputs={"difference": strict})).passed
        says = refused(worker, path, Tolerance(outputs={"sum": strict}))
        assert "sum: cosine 1.000000" in says
        assert "(wanted: cosine of at least 0.999, error of at most 0)" in says
        assert "bounds for outputs ['total']" in refused(worker, path, Tolerance(outputs={"total": strict}))
    finally:
        worker.close(1)


def test_a_single_name_may_differ(tiny: Worker, directory: Path) -> None:
    samples = models.samples(2)
    answers = tiny.infer(samples, 10)
    path = models.write_golden(
        directory / "renamed.npz",
        {"image": samples[models.INPUT].astype(np.float64)},
        {"Identity": answers[models.OUTPUT]},
    )
    assert check_golden(tiny, path, Tolerance()).passed


def test_names_of_several_must_match(directory: Path) -> None:
    worker = serving.start_worker(FIXTURES / "pair.onnx")
    ones = np.ones((1, 2), np.float32)
    try:
        inputs = {"left": ones, "right": 2 * ones}
        good = models.write_golden(directory / "pair.npz", inputs, {"sum": 3 * ones, "difference": -1 * ones})
        assert check_golden(worker, good, Tolerance("0.999", "0", "0")).passed
        part = models.write_golden(directory / "part.npz", inputs, {"sum": 3 * ones})
        assert [item.name for item in check_golden(worker, part, Tolerance()).outputs] == ["sum"]
        wrong = models.write_golden(
            directory / "wrong.npz", {"a": ones, "b": ones}, {"sum": 3 * ones, "difference": -1 * ones}
        )
        assert "the names must match" in refused(worker, wrong)
        one_bad = models.write_golden(
            directory / "one.npz", inputs, {"sum": 3 * ones, "difference": 5 * ones}
        )
        says = refused(worker, one_bad)
        assert "sum: cosine 1.0" in says
        assert "difference: cosine -1.0" in says
    finally:
        worker.close(1)


def test_byte_strings(directory: Path) -> None:
    worker = serving.start_worker(FIXTURES / "words.onnx")
    inputs = {"texts": np.array(["a", "bb"]), "index": np.array([1, 0])}
    try:
        path = models.write_golden(directory / "words.npz", inputs, {"picked": np.array([b"bb", b"a"])})
        assert check_golden(worker, path, Tolerance()).passed
        path = models.write_golden(directory / "words2.npz", inputs, {"picked": np.array([b"bb", b"b"])})
        assert "largest error inf" in refused(worker, path)
        inputs["index"] = np.array([1 << 40, 0])
        path = models.write_golden(directory / "words3.npz", inputs, {"picked": np.array([b"bb", b"b"])})
        assert "cannot be converted without loss" in refused(worker, path)
    finally:
        worker.close(1)


def test_inputs_that_do_not_fit(tiny: Worker, directory: Path) -> None:
    path = models.write_golden(
        directory / "shape.npz", {"x": np.zeros((1, 9), np.float32)}, {"y": np.zeros((1, 4), np.float32)}
    )
    assert "the golden inputs do not fit tiny@1" in refused(tiny, path)
    path = models.write_golden(directory / "rows.npz", models.samples(2), {"y": np.zeros((3, 4), np.float32)})
    assert "its shape is [2, 4], and [3, 4] was expected" in refused(tiny, path)


def npy(header: str, payload: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2, "little") + text + payload


def archive(path: Path, members: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "has no array output"),
        ({"input.x.npy": npy(HEADER % "(1,)", bytes(4))}, "has no array output"),
        ({"other.npy": npy(HEADER % "(1,)", bytes(4))}, "the key 'other'"),
        ({"output.y.npy": npy(HEADER % "(1 << 60,)", bytes(4))}, "damaged"),
        ({"output.y.npy": npy(HEADER % "(1000000000000,)", bytes(4))}, "does not fit the 4 bytes"),
        ({"output.y.npy": npy(HEADER % "(2,)", bytes(4))}, "does not fit the 4 bytes"),
        ({"output.y.npy": npy(HEADER % "(-1,)", bytes(4))}, "does not fit|damaged"),
        ({"output.y.npy": npy(HEADER % "(1,)", bytes(4), (9, 0))}, "damaged"),
        ({"output.y.npy": b"no array"}, "damaged"),
        ({"output.y.npy": b""}, "damaged"),
        ({"output.y.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80")}, "dtype"),
        ({"output.y.npy": npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", bytes(8))}, "dtype"),
        ({"output.y.npy": npy("__import__('os').getpid()", bytes(8))}, "damaged"),
        ({f"output.{n}.npy": b"" for n in range(100)}, "at most 64"),
    ],
)
def test_malformed_files(tmp_path: Path, members: dict[str, bytes], says: str) -> None:
    path = archive(tmp_path / "bad.npz", members)
    with pytest.raises(SluiceError, match=says) as caught:
        read_golden(path)
    assert caught.value.reason == errors_pb2.GOLDEN_MISMATCH
    assert caught.value.obj == str(path)


def test_files_that_are_no_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "golden.npz"
    with pytest.raises(SluiceError) as caught:
        read_golden(path)
    assert caught.value.reason == errors_pb2.IO_FAILED
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(SluiceError, match=r"no \.npz archive"):
        read_golden(path)
    whole = models.write_golden(path, models.samples(100), {"y": np.zeros((100, 4))}).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SluiceError, match=r"no \.npz archive"):
        read_golden(path)
    path.write_bytes(whole)
    monkeypatch.setattr(golden, "MAX_GOLDEN_FILE_BYTES", len(whole) - 1)
    with pytest.raises(SluiceError, match="more than the"):
        read_golden(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MAX_GOLDEN_BYTES", 1 << 20)
    path = archive(tmp_path / "bomb.npz", {"output.y.npy": bytes(8 << 20)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(SluiceError, match="at most 64 of 1048576"):
        read_golden(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_any_damaged_byte_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    data = bytearray(models.write_golden(path, models.samples(3), {"y": np.zeros((3, 4))}).read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    try:
        read_golden(path)
    except SluiceError as error:
        assert error.reason == errors_pb2.GOLDEN_MISMATCH


@pytest.mark.parametrize(
    ("answered", "expected", "cosine", "error"),
    [
        ([1, 2], [1, 2], 1, 0),
        ([2, 4], [1, 2], 1, 2),
        ([1, 0], [0, 1], 0, 1),
        ([-1, -2], [1, 2], -1, 4),
        ([0, 0], [0, 0], 1, 0),
        ([0, 0], [1, 0], 0, 1),
        ([NAN, 1], [NAN, 1], 1, 0),
        ([NAN, 1], [1, 1], 0, INF),
        ([1, 1], [NAN, 1], 0, INF),
        ([INF, 1], [INF, 1], 1, 0),
        ([INF, 1], [-INF, 1], 0, INF),
        ([INF, 1], [1, 1], 0, INF),
        ([NAN, NAN], [NAN, NAN], 1, 0),
        ([], [], 1, 0),
        ([1e300, 1e300], [1e300, 1e300], 1, 0),
        ([1e-300, 1e-300], [1e-300, 1e-300], 1, 0),
    ],
)
def test_compare(answered: list[float], expected: list[float], cosine: float, error: float) -> None:
    result = compare("y", np.array(answered, float), np.array(expected, float), 0.95, None)
    assert result.cosine == pytest.approx(cosine)
    assert result.max_abs_error == error
    assert result.passed == (cosine >= 0.95)


@pytest.mark.parametrize(
    ("answered", "expected", "relative"),
    [
        ([3, 4], [3, 4], 0),
        ([6, 8], [3, 4], 1),
        ([3, 0], [3, 4], 0.8),
        ([0, 0], [3, 4], 1),
        ([3, 4], [0, 0], INF),
        ([0, 0], [0, 0], 0),
        ([2e300, 0], [1e300, 0], 1),
        ([1e-300, 0], [2e-300, 0], 0.5),
        ([1e300, 0], [1e-300, 0], INF),
        ([1e-300, 0], [1e300, 0], 1),
        ([NAN, 1], [1, 1], INF),
    ],
)
def test_relative_error(answered: list[float], expected: list[float], relative: float) -> None:
    result = compare("y", np.array(answered, float), np.array(expected, float), -1, None, 0.35)
    assert result.relative_error == pytest.approx(relative)
    assert result.passed == (relative <= 0.35)


def test_compare_other_kinds() -> None:
    codes = np.array([[-128, 127]], np.int8)
    assert compare("y", codes, codes, 0.95, 0).passed
    assert compare("y", codes, -codes.astype(np.int16), 0.95, None).max_abs_error == 256
    flags = np.array([True, False])
    assert compare("y", flags, flags, 0.95, 0).passed
    assert not compare("y", flags, ~flags, -1, None).passed
    assert not compare("y", flags, np.array([0.5, 0.0], np.float32), -1, None).passed


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, 4, elements=st.floats(width=32)),
    hnp.arrays(np.float32, 4, elements=st.floats(width=32)),
)
def test_compare_is_total_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    one, other = compare("y", a, b, 0.95, 1e-3), compare("y", b, a, 0.95, 1e-3)
    assert -1 <= one.cosine <= 1
    assert one.max_abs_error >= 0
    assert (one.cosine, one.max_abs_error) == (other.cosine, other.max_abs_error)
    assert compare("y", a, a.copy(), 0.999999, 0).passed


@pytest.mark.parametrize("name", ["affine.onnx", "single.onnx", "pair.tflite", "codes.tflite"])
def test_warm_up(name: str) -> None:
    worker = serving.start_worker(FIXTURES / name)
    try:
        warm_up(worker, 10, (1, 4))
        assert (worker.requests, worker.failures) == (2, 0)
    finally:
        worker.close(1)


def test_warm_up_that_fails() -> None:
    worker = serving.start_worker(FIXTURES / "words.onnx")
    try:
        warm_up(worker, 10)
        assert worker.requests == 1
        serving.kill(worker)
        with pytest.raises(SluiceError, match="SIGKILL") as caught:
            warm_up(worker, 10)
        assert caught.value.reason == errors_pb2.OUT_OF_MEMORY
    finally:
        worker.close(0)


def test_warm_up_that_hangs(tmp_path: Path) -> None:
    worker = serving.start_worker(models.hanging_onnx(tmp_path / "hanging.onnx"), hang_s=0.2)
    try:
        with pytest.raises(SluiceError, match="no answer within 1 s") as caught:
            warm_up(worker, 1)
        assert caught.value.reason == errors_pb2.WARM_UP_FAILED
        serving.eventually(lambda: not worker.alive, "the hanging worker was killed")
    finally:
        worker.close(0)


def test_blank_inputs() -> None:
    specs = [
        TensorSpec("a", "FP16", (-1, 3, -1)),
        TensorSpec("b", "BYTES", (1, 2)),
        TensorSpec("c", "BOOL", ()),
    ]
    blank = blank_inputs(specs, 4)
    assert {name: (array.shape, str(array.dtype)) for name, array in blank.items()} == {
        "a": ((4, 3, 1), "float16"),
        "b": ((4, 2), "object"),
        "c": ((), "bool"),
    }
    assert set(blank["b"].reshape(-1)) == {b""}
    with pytest.raises(SluiceError) as caught:
        blank_inputs([TensorSpec("a", "FP64", (-1, 1 << 20, 1 << 20))], 1)
    assert caught.value.reason == errors_pb2.LIMIT_EXCEEDED


def test_a_worker_that_is_killed_in_its_warm_up_is_not_the_models_fault(tmp_path: Path) -> None:
    """As the kernel does for want of memory; one that we end because it hangs is, see above."""
    worker = serving.start_worker(models.hanging_onnx(tmp_path / "hanging.onnx"))
    try:
        killer = threading.Timer(1.0, os.kill, (worker.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(SluiceError, match="ended by SIGKILL") as caught:
            warm_up(worker, 20)
        assert caught.value.reason == errors_pb2.OUT_OF_MEMORY
    finally:
        worker.close(0)
