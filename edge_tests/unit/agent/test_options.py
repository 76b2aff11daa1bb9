"""How a variant wants to be loaded, and a worker that gets there. Queue options: test_batch_proof.py."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent import options, placement, swap_options
from agent.worker import Worker
from agent.worker_spec import LoadCrashed, WorkerSpec
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


@pytest.mark.parametrize(
    ("given", "accelerator", "expected"),
    [
        ({}, "cpu", ("cpu",)),
        ({}, "cuda", ("cuda", "cpu")),
        ({"providers": "tensorrt, CUDA ,cpu"}, "cpu", ("tensorrt", "cuda", "cpu")),
        ({"providers": "cuda"}, "cuda", ("cuda",)),
        ({"providers": "cpu,cpu"}, "cuda", ("cpu",)),
    ],
)
def test_accelerators(given: dict[str, str], accelerator: str, expected: tuple[str, ...]) -> None:
    found = options.read(given, 1, accelerator)
    assert (found.accelerators, found.faults) == (expected, ())


def test_runtime_options() -> None:
    found = options.read({"graph_optimization": "basic", "xnnpack": "off", "threads": "3"}, 1)
    assert (found.optimization, found.xnnpack, found.threads, found.faults) == ("basic", False, 3, ())
    found = options.read({}, 1)
    assert (found.optimization, found.xnnpack) == ("all", True)


def test_the_variants_bound_of_memory_goes_before_the_agents() -> None:
    assert options.read({}, 1).process_bytes == 0
    assert options.read({}, 1, process_bytes=7).process_bytes == 7
    assert (
        options.read({"process_memory_bytes": "300000000"}, 1, process_bytes=7).process_bytes == 300_000_000
    )


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("providers", "", "providers is ''"),
        ("providers", "cuda,,cpu", "providers is 'cuda,,cpu'"),
        ("providers", "a b", "names such as"),
        ("providers", ",".join(["cpu"] * 9), "not 1 to 8 names"),
        ("graph_optimization", "99", "not one of off, basic, extended, all"),
        ("xnnpack", "yes", "not one of on, off"),
        ("process_memory_bytes", "300MB", "not a number from 1 to 1099511627776"),
    ],
)
def test_what_is_not_understood_is_reported_and_left_at_its_default(name: str, text: str, says: str) -> None:
    found = options.read({name: text}, 1)
    (fault,) = found.faults
    assert says in fault
    assert replace(found, faults=()) == options.read({}, 1)


def test_a_worker_says_where_it_runs_and_logs_why_not_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = models.tiny_onnx(tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING, "agent.worker"):
        worker = serving.start_worker(path, accelerators=("cuda", "cpu"), optimization="off")
    plain = serving.start_worker(path)
    try:
        assert worker.accelerator == "cpu"
        assert "tiny@1 runs on cpu: cuda is not used" in caplog.text
        x = models.samples(2)
        np.testing.assert_allclose(worker.infer(x, 20)["y"], plain.infer(x, 20)["y"], rtol=1e-5, atol=1e-6)
    finally:
        worker.close(0)
        plain.close(0)
    with pytest.raises(SluiceError) as caught:
        serving.start_worker(path, accelerators=("cuda",))
    assert caught.value.reason == errors_pb2.RUNTIME_UNAVAILABLE


def test_tflite_without_xnnpack(tmp_path: Path) -> None:
    path = models.tiny_tflite(tmp_path / "m.tflite")
    workers = [serving.start_worker(path, xnnpack=xnnpack) for xnnpack in (True, False)]
    try:
        answers = [worker.infer(models.samples(3), 20)["y"] for worker in workers]
        np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)
    finally:
        for worker in workers:
            worker.close(0)


def test_a_library_that_crashes_is_left_out_the_next_time() -> None:
    """No library here crashes on an accelerator, so starting is made up."""
    spec = WorkerSpec("m", 1, Path("m.onnx"), "onnx", accelerators=("tensorrt", "cuda", "cpu"))
    tried = []

    def start(spec: WorkerSpec, deadline_s: float, _started: object) -> Worker:
        tried.append((spec.accelerators, 0 < deadline_s <= 5))
        if len(spec.accelerators) > 1:
            raise LoadCrashed(errors_pb2.MODEL_LOAD_FAILED, "it was ended by SIGILL")
        return started

    started = object.__new__(Worker)
    assert placement.start(spec, 5, start_one=start) is started
    assert tried == [(spec.accelerators[index:], True) for index in range(3)]


def test_a_model_that_crashes_everywhere_fails() -> None:
    spec = WorkerSpec("m", 1, Path("m.onnx"), "onnx", accelerators=("cuda", "cpu"))

    def start(spec: WorkerSpec, _deadline_s: float, _started: object) -> Worker:
        raise LoadCrashed(errors_pb2.MODEL_LOAD_FAILED, f"crashed on {spec.accelerators[0]}")

    with pytest.raises(SluiceError, match="crashed on cpu"):
        placement.start(spec, 5, start_one=start)


def test_names_that_are_no_option_are_reported() -> None:
    assert options.unknown({"threads": "1", "soak_s": "3"}, swap_options.NAMES) == []
    found = options.unknown({"cascade_treshold": "0.5", "x": "y"}, swap_options.NAMES)
    assert found == [
        "there is no option 'cascade_treshold'; is 'cascade_threshold' meant?",
        "there is no option 'x'",
    ]


def test_the_names_are_those_of_the_tables() -> None:
    for module in (options, swap_options):
        assert set(re.findall(r"^\| (\w+) \|", module.__doc__ or "", re.MULTILINE)) == {
            "option",
            *module.NAMES,
        }
    page = (Path(__file__).parents[3] / "docs" / "agent-serving.md").read_text("utf-8")
    table = page.partition("## Options of a variant")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named == options.NAMES | swap_options.NAMES
