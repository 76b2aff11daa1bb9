"""Processes that hold too much are renewed: real ones, under a limit that is below what they need."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from agent.golden import warm_up
from agent.inference import InferenceServer
from agent.limits import RENEWAL_LOOP_TIMES
from agent.metrics import render
from agent.renewing import Renewer
from agent.router import Router
from agent.supervisor import Supervisor
from agent.worker import Worker
from agent.worker_spec import WorkerDied
from edge_tests.harness import models, serving

MB = 1 << 20


class Box:
    """A router whose workers are supervised, and renewed when `look` is called."""

    def __init__(self) -> None:
        self.router = Router()
        self.crash_loops: list[str] = []
        self.loops: list[str] = []
        self.free = 1 << 40
        self.supervisor = Supervisor(self.router, self.crash_loops.append)
        self.renewer = Renewer(self.router, self.loops.append, available=lambda: self.free)

    def serve(self, path: Path, model: str = "tiny", instances: int = 1) -> Worker:
        worker = serving.start_worker(path, model, instances=instances)
        warm_up(worker)
        worker.checked()
        self.router.activate(model, 1, worker)
        return worker

    @property
    def active(self) -> Worker:
        return self.router.models()[0].active

    def close(self) -> None:
        self.renewer.stop(10)
        self.supervisor.stop(10)
        for serving_ in self.router.models():
            for worker in self.router.remove(serving_.model):
                worker.close(0)


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.close()


def test_what_it_holds_is_its_own_memory(box: Box, tmp_path: Path) -> None:
    worker = box.serve(models.tiny_onnx(tmp_path / "tiny.onnx"))
    shown = psutil.Process(worker.pid).memory_info()
    assert 0 < worker.base_bytes <= shown.rss
    assert worker.instances[0].private_bytes() == pytest.approx(shown.rss - shown.shared, rel=0.1)
    large = models.samples(500_000)
    worker.infer(large, 30)  # it lies in shared memory, which is no growth of the process
    assert worker.resident_bytes() - worker.instances[0].private_bytes() > shown.shared + 16 * MB


def test_one_that_grew_is_renewed_and_no_request_notices(box: Box, tmp_path: Path) -> None:
    worker = box.serve(models.tiny_onnx(tmp_path / "tiny.onnx"))
    server = InferenceServer(box.router, "127.0.0.1:0")
    server.start()
    try:
        with serving.TritonLoad(
            server.addresses[0], "tiny", models.samples(8), tmp_path, "--clients", "4"
        ) as load:
            serving.eventually(lambda: load.succeeded() > 100, "predictions came")
            box.renewer.look()
            assert (worker.memory_limit, worker.renewals) == (0, 0)  # nobody looks at it yet
            worker.memory_limit = worker.base_bytes // 2
            old, before = worker.instances[0], load.succeeded()
            box.renewer.look()
            worker.memory_limit = 1 << 40
            assert old not in worker.instances
            assert not psutil.pid_exists(old.pid)
            serving.eventually(lambda: load.succeeded() > before + 100, "the fresh one answers")
            box.renewer.look()
            summary = load.stop()
        assert summary["failed"] == 0, summary
        assert box.active is worker
        assert (worker.renewals, worker.deaths, worker.failures) == (1, 0, 0)
        assert worker.requests == pytest.approx(summary["requests"], abs=0)
        assert (box.loops, box.crash_loops) == ([], [])
        text = render(box.router.models())
        assert 'sluice_worker_renewals_total{model="tiny",version="1",slot="active"} 1' in text
        assert f'private_limit_bytes{{model="tiny",version="1",slot="active"}} {1 << 40}' in text
    finally:
        server.stop(1)


def test_a_request_that_runs_is_answered_by_the_old_process(box: Box, tmp_path: Path) -> None:
    worker = box.serve(serving.slow_onnx(tmp_path / "slow.onnx"), "slow")
    steps = serving.steps_for(worker, 4.0)
    worker.memory_limit = 1
    old = worker.instances[0]
    with box.router.acquire("slow"), ThreadPoolExecutor(1) as pool:
        inputs = worker.check(serving.slow_inputs(3.0, steps))
        running = pool.submit(worker.queue.infer, inputs, time.monotonic() + 60)
        serving.eventually(lambda: old.busy_s() > 0, "it runs")
        box.renewer.look()
        assert running.result(0)[0]["y"].tolist() == [[3.0, 3.0]]
    assert old.ended
    assert not worker.instances[0].ended


def test_without_memory_for_two_it_is_ended_and_started_again(box: Box, tmp_path: Path) -> None:
    worker = box.serve(serving.slow_onnx(tmp_path / "slow.onnx"), "slow")
    steps = serving.steps_for(worker, 20.0)
    worker.memory_limit, box.free = 1, 0
    with ThreadPoolExecutor(1) as pool:
        inputs = worker.check(serving.slow_inputs(3.0, steps))
        running = pool.submit(worker.queue.infer, inputs, time.monotonic() + 60)
        serving.eventually(lambda: worker.instances[0].busy_s() > 0, "it runs")
        box.renewer.look()
        error = running.exception(30)
    assert isinstance(error, WorkerDied)
    assert "SIGKILL of the agent: it held" in error.message
    assert "it was running this request" in error.message
    with box.router.acquire("slow", wait_s=30) as fresh:
        assert fresh is not worker
        assert fresh.infer(serving.slow_inputs(3.0, 1), 30)["y"].tolist() == [[3.0, 3.0]]
    assert (fresh.renewals, fresh.memory_limit, fresh.base_bytes) == (1, 1, worker.base_bytes)
    assert (worker.deaths, box.crash_loops) == (0, [])
    assert not box.supervisor._histories


def test_of_several_processes_the_others_serve_on(box: Box, tmp_path: Path) -> None:
    worker = box.serve(models.tiny_onnx(tmp_path / "tiny.onnx"), instances=2)
    before = worker.instances
    worker.memory_limit, box.free = 1, 0
    box.renewer.look()
    worker.memory_limit = 0
    assert worker.infer(models.samples(1), 10)
    serving.eventually(lambda: worker.instances != before, "another has its place")
    assert len(set(before) & set(worker.instances)) == 1
    assert (box.active, worker.renewals, worker.deaths) == (worker, 1, 0)


def test_a_version_that_needs_it_over_and_over_is_told_once(box: Box, tmp_path: Path) -> None:
    worker = box.serve(models.tiny_onnx(tmp_path / "tiny.onnx"))
    worker.memory_limit = 1
    told = []

    def renewed() -> bool:
        box.renewer.look()
        return worker.renewals > len(told)

    for _ in range(RENEWAL_LOOP_TIMES - 1):
        serving.eventually(renewed, "it was renewed")
        told.append(list(box.loops))
    assert told == [[], []]
    for _ in range(3):
        box.renewer.look()
    assert box.loops == ["tiny"]
    assert worker.infer(models.samples(1), 10)
    assert box.crash_loops == []


def test_a_fresh_one_that_does_not_start_leaves_the_old_one(box: Box, tmp_path: Path) -> None:
    path = models.tiny_onnx(tmp_path / "tiny.onnx")
    worker = box.serve(path)
    path.write_bytes(b"damaged")
    worker.memory_limit, before = 1, worker.instances
    box.renewer.look()
    assert worker.instances == before
    assert worker.renewals == 0
    assert worker.infer(models.samples(1), 10)
