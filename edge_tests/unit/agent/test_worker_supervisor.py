"""Restarts: the decisions as values, and the supervisor over real workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.limits import (
    CRASH_LOOP_DEATHS,
    CRASH_LOOP_WINDOW_S,
    RESTART_FIRST_S,
    RESTART_MOST_S,
)
from agent.router import Router
from agent.supervisor import CRASH_LOOP, History, LoopRule, Supervisor, after_death
from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


def test_the_first_restart_comes_at_once_later_ones_wait() -> None:
    first = after_death(History(), 100, CRASH_LOOP_WINDOW_S, 0.5, CRASH_LOOP)
    assert (first.wait_s, first.report) == (0, False)
    second = after_death(first.history, 101, 1, 1.0, CRASH_LOOP)
    assert 0 < second.wait_s <= RESTART_FIRST_S
    assert not second.report


def test_a_crash_loop_is_reported_once_and_restarts_go_on_slowly() -> None:
    history, reports = History(), 0
    for death in range(CRASH_LOOP_DEATHS + 5):
        decision = after_death(history, 100 + death, 1, 1.0, CRASH_LOOP)
        history, reports = decision.history, reports + decision.report
        if death >= CRASH_LOOP_DEATHS - 1:
            assert history.looping
            assert 0 < decision.wait_s <= RESTART_MOST_S
        assert len(history.deaths) <= CRASH_LOOP_DEATHS
    assert reports == 1


def test_deaths_far_apart_are_no_loop_and_a_long_life_ends_one() -> None:
    history = History()
    for death in range(10):
        decision = after_death(history, death * CRASH_LOOP_WINDOW_S, CRASH_LOOP_WINDOW_S / 2, 0.5, CRASH_LOOP)
        history = decision.history
        assert (decision.wait_s, decision.report) == (0, False)
    healed = after_death(History((1, 2, 3), looping=True), 500, CRASH_LOOP_WINDOW_S, 0.5, CRASH_LOOP)
    assert (healed.wait_s, healed.report, healed.history.looping) == (0, False, False)


def test_another_rule_counts_as_it_says() -> None:
    rule, history, reports = LoopRule(deaths=5, window_s=10), History(), []
    for now in (100, 102, 104, 106, 108):
        decision = after_death(history, now, 1, 0.5, rule)
        history = decision.history
        reports.append(decision.report)
    assert reports == [False] * 4 + [True]
    apart = History()
    for now in range(100, 160, 3):  # never five within ten seconds
        apart = after_death(apart, now, 1, 0.5, rule).history
        assert not apart.looping
    assert not after_death(history, 119, 10, 0.5, rule).history.looping


def test_jitter_spreads_the_waits() -> None:
    history = History((100,))
    waits = {after_death(history, 101, 0, value / 10, CRASH_LOOP).wait_s for value in range(10)}
    assert len(waits) == 10


class Box:
    def __init__(self, directory: Path) -> None:
        self.path = models.tiny_onnx(directory / "tiny.onnx")
        self.router = Router()
        self.loops: list[str] = []
        self.supervisor = Supervisor(self.router, self.loops.append)
        self.first = serving.start_worker(self.path)
        self.router.activate("tiny", 1, self.first)

    @property
    def active(self) -> Worker:
        now = self.router.serving("tiny")
        assert now is not None
        return now.active


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.supervisor.stop(10)
    for worker in (*box.router.remove("tiny"), box.first):
        worker.close(0)


def kill_active(box: Box) -> None:
    serving.kill(box.active)


def test_a_dead_worker_is_replaced_and_its_version_kept(box: Box) -> None:
    kill_active(box)
    with box.router.acquire("tiny", wait_s=20) as worker:
        assert worker is not box.first
        assert worker.spec == box.first.spec
        assert worker.infer(models.samples(1), 10)
        assert worker is box.active
    assert box.loops == []


def test_a_crash_loop_is_told_while_restarts_go_on(box: Box) -> None:
    for death in range(CRASH_LOOP_DEATHS):
        kill_active(box)
        if death < CRASH_LOOP_DEATHS - 1:
            serving.eventually(lambda: box.active.alive, "it was started again")
    serving.eventually(lambda: box.loops == ["tiny"], "the loop was told")
    with pytest.raises(SluiceError) as caught:  # at once: the next restart is far away
        box.router.acquire("tiny", wait_s=60).__enter__()
    assert caught.value.reason == errors_pb2.MODEL_NOT_SERVING


def test_the_configured_rule_holds_for_real_workers(tmp_path: Path) -> None:
    router, loops = Router(), []
    supervisor = Supervisor(router, loops.append, rule=LoopRule(deaths=2, window_s=300))
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    router.activate("tiny", 1, worker)
    try:
        serving.kill(worker)
        serving.eventually(lambda: router.models()[0].ready, "it was started again")
        assert loops == []
        serving.kill(router.models()[0].active)
        serving.eventually(lambda: loops == ["tiny"], "the second death was a loop")
    finally:
        supervisor.stop(10)
        for left in router.remove("tiny"):
            left.close(0)


def test_turning_to_another_worker_ends_the_restarts(box: Box, tmp_path: Path) -> None:
    other = serving.start_worker(models.tiny_onnx(tmp_path / "2.onnx", seed=2), version=2)
    box.path.unlink()  # a restart would fail from here on
    kill_active(box)
    box.router.activate("tiny", 2, other)
    box.supervisor.stop(20)
    assert box.active is other
    assert other.alive
    assert box.loops == []


def test_a_start_that_fails_counts_as_a_death(tmp_path: Path) -> None:
    router, loops, starts = Router(), [], []

    def start(spec: WorkerSpec, deadline_s: float) -> Worker:
        starts.append(spec.version)
        return Worker.start(spec, deadline_s)

    supervisor = Supervisor(router, loops.append, start=start)
    path = models.tiny_onnx(tmp_path / "tiny.onnx")
    worker = serving.start_worker(path)
    router.activate("tiny", 1, worker)
    path.write_bytes(b"damaged")
    serving.kill(worker)
    serving.eventually(lambda: loops == ["tiny"], "the loop was told")
    assert starts == [1] * (CRASH_LOOP_DEATHS - 1)
    supervisor.stop(10)


def test_a_listener_that_fails_does_not_end_the_restarts(tmp_path: Path) -> None:
    router, calls = Router(), []

    def listener(model: str) -> None:
        calls.append(model)
        raise RuntimeError("no previous version")

    supervisor = Supervisor(router, listener)
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    router.activate("tiny", 1, worker)
    for death in range(CRASH_LOOP_DEATHS):
        serving.kill(router.models()[0].active)
        if death < CRASH_LOOP_DEATHS - 1:
            serving.eventually(lambda: router.models()[0].ready, "it was started again")
    serving.eventually(lambda: calls == ["tiny"], "the loop was told")
    assert len(supervisor._threads) == 1
    supervisor.stop(10)
    assert not supervisor._threads


def test_nothing_is_started_after_stop(box: Box) -> None:
    before = {child.pid for child in psutil.Process().children()} - {box.first.pid}
    box.supervisor.stop(10)
    kill_active(box)
    assert not box.active.alive
    assert {child.pid for child in psutil.Process().children()} == before
