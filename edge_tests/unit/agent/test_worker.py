"""Workers: real processes that load real models."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent.limits import MAX_FRAME_PAYLOAD_BYTES, OOM_SCORE_ADJUST
from agent.worker import Worker
from agent.worker_spec import WorkerDied, WorkerSpec
from edge_tests.harness import models, serving
from runtimes import registry
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

WORDS = Path(__file__).parents[2] / "conformance" / "fixtures" / "words.onnx"


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Worker]:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    yield worker
    worker.close(1)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Worker]:
    worker = serving.start_worker(serving.slow_onnx(tmp_path / "slow.onnx"))
    yield worker
    worker.close(0)


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_answers_are_those_of_the_runtime_in_this_process(tmp_path: Path, form: str) -> None:
    write = models.tiny_onnx if form == "onnx" else models.tiny_tflite
    path = write(tmp_path / f"tiny.{form}", seed=3)
    inputs = models.samples(5)
    with registry.load(path) as model:
        expected, specs = model.run(inputs), (model.inputs, model.outputs)
    worker = serving.start_worker(path, loaded_digests=("sha256:00",))
    try:
        answered = worker.infer(inputs, 10)
        assert (worker.inputs, worker.outputs) == specs
        assert worker.spec.loaded_digests == ("sha256:00",)
    finally:
        worker.close(1)
    assert answered.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(answered[name], array)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.tiny_onnx(tmp_path / "tiny.onnx")
    monkeypatch.chdir(tmp_path)
    worker = serving.start_worker(Path("tiny.onnx"))
    worker.close(1)


def test_threads_get_their_own_answers(tiny: Worker) -> None:
    batch = models.samples(64)
    expected = tiny.infer(batch, 10)[models.OUTPUT]

    def ask(row: int) -> bool:
        one = {models.INPUT: batch[models.INPUT][row % 64 : row % 64 + 1]}
        return np.allclose(tiny.infer(one, 10)[models.OUTPUT], expected[row % 64], rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))
    assert (tiny.requests, tiny.failures) == (401, 0)


def test_byte_strings_travel(tmp_path: Path) -> None:
    worker = serving.start_worker(WORDS)
    try:
        texts = np.array([b"one", b"", "zw\u00f6lf".encode(), b"x" * 70_000], np.object_)
        answer = worker.infer({"texts": texts, "index": np.array([2, 1, 3], np.int32)}, 10)
        assert answer["picked"].tolist() == ["zw\u00f6lf".encode(), b"", b"x" * 70_000]
        with pytest.raises(SluiceError, match="the model failed on these inputs") as caught:
            worker.infer({"texts": texts, "index": np.array([99], np.int32)}, 10)
        assert caught.value.reason == errors_pb2.INPUT_INVALID
        assert worker.alive
        assert (worker.requests, worker.failures) == (2, 1)
    finally:
        worker.close(1)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "'x' is missing"),
        ({"x": np.zeros((1, 8), np.float64)}, "must be FP32"),
        ({"x": np.zeros((1, 9), np.float32)}, r"shape \[1, 9\]"),
        ({"x": np.zeros((8,), np.float32)}, "rank 1"),
        ({"x": np.zeros((1, 8), np.float32), "z": np.zeros(1, np.float32)}, "no input 'z'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_they_are_sent(
    tiny: Worker, inputs: dict[str, np.ndarray], says: str
) -> None:
    with pytest.raises(SluiceError, match=says) as caught:
        tiny.infer(inputs, 10)
    assert caught.value.reason == errors_pb2.INPUT_INVALID
    assert caught.value.obj == "tiny@1"
    assert tiny.requests == 0


def test_inputs_over_the_limit_are_refused(tiny: Worker) -> None:
    rows = MAX_FRAME_PAYLOAD_BYTES // (models.FEATURES * 4) + 1
    with pytest.raises(SluiceError, match="at most") as caught:
        tiny.infer({"x": np.zeros((rows, models.FEATURES), np.float32)}, 10)
    assert caught.value.reason == errors_pb2.LIMIT_EXCEEDED
    assert tiny.infer(models.samples(1), 10)


def test_the_process_is_light_named_and_expendable(tmp_path: Path) -> None:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), threads=2)
    try:
        process = Path(f"/proc/{worker.pid}")
        assert (process / "comm").read_text().strip() == "sluice-worker"
        assert worker.spec.model + "@1" in (process / "cmdline").read_text()
        assert int((process / "oom_score_adj").read_text()) == OOM_SCORE_ADJUST
        assert "OMP_NUM_THREADS=2" in (process / "environ").read_text().split("\0")
        assert os.getpgid(worker.pid) == worker.pid
        assert os.getsid(worker.pid) == os.getsid(0)  # see child.py
        loaded = (process / "maps").read_text()
        assert "onnxruntime" in loaded
        assert not re.search(r"cygrpc|_upb|google/protobuf", loaded)
        assert worker.resident_bytes() > 1 << 20
    finally:
        worker.close(1)
    assert worker.resident_bytes() == 0


def test_systemd_variables_are_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    try:
        environment = Path(f"/proc/{worker.pid}/environ").read_text()
        assert "NOTIFY_SOCKET" not in environment
        assert "WATCHDOG_USEC" not in environment
    finally:
        worker.close(1)


@pytest.mark.parametrize(
    ("case", "reason", "says"),
    [
        ("unknown.onnx", errors_pb2.MODEL_LOAD_FAILED, "Frobnicate"),
        ("unknown.tflite", errors_pb2.MODEL_LOAD_FAILED, "Frobnicate"),
        ("truncated.onnx", errors_pb2.MODEL_LOAD_FAILED, "truncated.onnx"),
        ("truncated.tflite", errors_pb2.MODEL_LOAD_FAILED, "truncated.tflite"),
        ("text.onnx", errors_pb2.MODEL_LOAD_FAILED, "neither an ONNX nor"),
        ("missing.onnx", errors_pb2.MODEL_LOAD_FAILED, "missing.onnx"),
        ("other.onnx", errors_pb2.MODEL_LOAD_FAILED, "its content is tflite"),
    ],
)
def test_a_model_that_cannot_be_loaded(
    tmp_path: Path, case: str, reason: errors_pb2.ErrorReason.ValueType, says: str
) -> None:
    path = tmp_path / case
    if case == "unknown.onnx":
        models.unknown_operator_onnx(path)
    elif case == "unknown.tflite":
        models.unknown_operator_tflite(path)
    elif case == "truncated.onnx":
        models.truncated(path, models.tiny_onnx(tmp_path / "whole.onnx"))
    elif case == "truncated.tflite":
        models.truncated(path, models.tiny_tflite(tmp_path / "whole.tflite"))
    elif case == "text.onnx":
        path.write_text("this is no model\n" * 100)
    elif case == "other.onnx":
        models.tiny_tflite(path)
    before = children()
    with pytest.raises(SluiceError, match=says) as caught:
        serving.start_worker(path)
    assert caught.value.reason == reason
    assert caught.value.obj == "tiny@1"
    assert children() == before


def test_a_runtime_that_is_not_there(tmp_path: Path) -> None:
    path = models.tiny_onnx(tmp_path / "tiny.onnx")
    with pytest.raises(SluiceError, match="nonsuch") as caught:
        serving.start_worker(path, runtime_preference="nonsuch")
    assert caught.value.reason == errors_pb2.RUNTIME_UNAVAILABLE


def test_loading_has_a_deadline(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)  # opening it waits for a writer that never comes
    before = children()
    with pytest.raises(SluiceError, match="did not load it within 1 s") as caught:
        Worker.start(WorkerSpec("tiny", 1, pipe, "onnx"), 1)
    assert caught.value.reason == errors_pb2.WORKER_TIMEOUT
    assert children() == before


def test_a_short_deadline_neither_kills_nor_confuses(slow: Worker) -> None:
    steps = serving.steps_for(slow, 0.6)
    with pytest.raises(SluiceError, match="no answer within") as caught:
        slow.infer(serving.slow_inputs(1, steps), 0.1)
    assert caught.value.reason == errors_pb2.WORKER_TIMEOUT
    assert slow.infer(serving.slow_inputs(2, 1), 20)["y"].tolist() == [[2, 2]]
    assert slow.alive
    assert (slow.requests, slow.failures) == (3, 1)


def test_waiting_behind_a_slow_request_ends_at_the_deadline(slow: Worker) -> None:
    steps = serving.steps_for(slow, 1.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.infer, serving.slow_inputs(1, steps), 20)
        serving.eventually(lambda: slow.requests == 2, "the slow request was sent")
        with pytest.raises(SluiceError, match="waited for its turn") as caught:
            slow.infer(serving.slow_inputs(2, 1), 0.05)
        assert caught.value.reason == errors_pb2.WORKER_TIMEOUT
        assert first.result()["y"].tolist() == [[1, 1]]


def test_close_drains_first(slow: Worker) -> None:
    steps = serving.steps_for(slow, 0.5)
    deaths: list[Worker] = []
    slow.on_death(deaths.append)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(slow.infer, serving.slow_inputs(7, steps), 20)
        serving.eventually(lambda: slow.requests == 2, "the slow request was sent")
        slow.close(20)
        assert running.result()["y"].tolist() == [[7, 7]]
    assert not slow.alive
    assert not psutil.pid_exists(slow.pid)
    with pytest.raises(WorkerDied) as caught:
        slow.infer(serving.slow_inputs(1, 1), 1)
    assert not caught.value.delivered
    assert deaths == []
    slow.close(0)


def test_close_does_not_wait_longer_than_its_deadline(tmp_path: Path) -> None:
    worker = serving.start_worker(models.hanging_onnx(tmp_path / "hanging.onnx"))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(worker.infer, models.samples(1), 60)
        serving.eventually(lambda: worker.requests == 1, "the request was sent")
        worker.close(0.2)
        with pytest.raises(WorkerDied) as caught:
            running.result(20)
    assert caught.value.delivered
    assert not psutil.pid_exists(worker.pid)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    path = models.tiny_onnx(tmp_path / "tiny.onnx")
    serving.start_worker(path).close(1)
    before, threads = open_descriptors(), threading.active_count()
    for _ in range(3):
        worker = serving.start_worker(path)
        worker.infer(models.samples(1), 10)
        worker.close(1)
        with pytest.raises(SluiceError):
            serving.start_worker(tmp_path / "missing.onnx")
    serving.eventually(lambda: threading.active_count() <= threads, "the watching threads ended")
    assert open_descriptors() <= before  # fewer: something else in this process closed one meanwhile


def test_death_is_told_once_also_to_late_listeners(tiny: Worker) -> None:
    told: list[tuple[str, Worker]] = []

    def listen(worker: Worker) -> None:
        told.append(("early", worker))

    tiny.on_death(listen)
    tiny.on_death(listen)
    os.kill(tiny.pid, 9)
    serving.eventually(lambda: told == [("early", tiny)], "the death was told")
    tiny.on_death(lambda worker: told.append(("late", worker)))
    assert told == [("early", tiny), ("late", tiny)]
    time.sleep(0.05)
    assert len(told) == 2
    with pytest.raises(WorkerDied, match="SIGKILL"):
        tiny.infer(models.samples(1), 1)
