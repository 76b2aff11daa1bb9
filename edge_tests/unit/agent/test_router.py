"""The router: turns, versions, drains and refusals, over real workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from agent.limits import MAX_WAITING_ON_RESTART
from agent.router import Router
from agent.worker import Worker
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


class Box:
    """A router and the workers started for it."""

    def __init__(self, directory: Path) -> None:
        self.router = Router()
        self._directory = directory
        self._workers: list[Worker] = []

    def start(self, version: int, model: str = "tiny") -> Worker:
        path = models.tiny_onnx(self._directory / f"{version}.onnx", seed=version)
        worker = serving.start_worker(path, model, version)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._workers:
            worker.close(0)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.close()


def test_versions_are_addressed_while_they_are_loaded(box: Box) -> None:
    router, first, second, third = box.router, box.start(1), box.start(2), box.start(3)
    assert router.activate("tiny", 1, first) is None
    assert router.activate("tiny", 2, second) is first
    for version, expected in (("", second), ("2", second), ("1", first)):
        with router.acquire("tiny", version) as worker:
            assert worker is expected
    for version in ("3", "02", "x" * 1000):
        with (
            pytest.raises(SluiceError, match="not loaded; loaded: 2, 1") as caught,
            router.acquire("tiny", version),
        ):
            pass
        assert caught.value.reason == errors_pb2.VERSION_UNKNOWN
        assert len(str(caught.value)) < 400
    assert router.activate("tiny", 3, third) is second
    serving.eventually(lambda: not psutil.pid_exists(first.pid), "the version pushed out was closed")
    serving_now = router.serving("tiny")
    assert serving_now is not None
    assert serving_now.workers == (third, second)
    assert router.drop_previous("tiny") is second
    assert router.drop_previous("tiny") is None
    assert second.alive


def test_going_back_swaps_the_two(box: Box) -> None:
    router, first, second = box.router, box.start(1), box.start(2)
    router.activate("tiny", 1, first)
    router.activate("tiny", 2, second)
    assert router.activate("tiny", 1, first) is second
    now = router.serving("tiny")
    assert now is not None
    assert (now.active, now.previous) == (first, second)
    assert router.activate("tiny", 1, first) is None  # again: nothing changes
    assert router.serving("tiny") == now
    assert first.alive
    assert second.alive


def test_what_is_not_served(box: Box) -> None:
    router, worker = box.router, box.start(1)
    with pytest.raises(SluiceError, match="serves no model 'tiny'; it serves none yet") as caught:
        router.acquire("tiny").__enter__()
    assert caught.value.reason == errors_pb2.MODEL_UNKNOWN
    router.activate("tiny", 1, worker)
    assert [item.model for item in router.models()] == ["tiny"]
    assert router.remove("tiny") == (worker,)
    assert router.remove("tiny") == ()
    assert router.models() == ()
    assert router.drop_previous("tiny") is None
    with pytest.raises(SluiceError, match="serves no model"):
        router.acquire("tiny").__enter__()


def test_dead_or_foreign_workers_are_not_activated(box: Box) -> None:
    router, first, second = box.router, box.start(1), box.start(2)
    router.activate("tiny", 1, first)
    serving.kill(second)
    with pytest.raises(SluiceError, match="not running") as caught:
        router.activate("tiny", 2, second)
    assert caught.value.reason == errors_pb2.WORKER_DIED
    with pytest.raises(ValueError, match="cannot serve other@1"):
        router.activate("other", 1, first)
    now = router.serving("tiny")
    assert now is not None
    assert now.active is first
    assert now.ready


def test_a_dead_worker_is_unavailable_at_once_when_nobody_restarts_it(box: Box) -> None:
    router, worker = box.router, box.start(1)
    router.activate("tiny", 1, worker)
    serving.kill(worker)
    began = time.monotonic()
    with pytest.raises(SluiceError, match="died") as caught:
        router.acquire("tiny", wait_s=30).__enter__()
    assert caught.value.reason == errors_pb2.MODEL_NOT_SERVING
    assert time.monotonic() - began < 15
    now = router.serving("tiny")
    assert now is not None
    assert not now.ready


def test_requests_wait_for_a_restart_but_not_many(box: Box) -> None:
    router, dead, fresh = box.router, box.start(1), box.start(1)
    deaths: list[Worker] = []
    router.watch(deaths.append)
    router.activate("tiny", 1, dead)
    serving.kill(dead)
    serving.eventually(lambda: deaths == [dead], "the watcher was told")
    outcomes: list[object] = []

    def ask() -> None:
        try:
            with router.acquire("tiny", wait_s=30) as worker:
                outcomes.append(worker)
        except SluiceError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(MAX_WAITING_ON_RESTART + 2)]
    for thread in threads:
        thread.start()
    serving.eventually(lambda: outcomes == ["MODEL_NOT_SERVING"] * 2, "those over the limit were refused")
    assert router.replace(dead, fresh)
    for thread in threads:
        thread.join(10)
    assert outcomes[2:] == [fresh] * MAX_WAITING_ON_RESTART
    assert not router.replace(dead, fresh)


def test_waiting_for_a_restart_ends(box: Box) -> None:
    router, worker = box.router, box.start(1)
    router.watch(lambda _: None)
    router.activate("tiny", 1, worker)
    serving.kill(worker)
    with pytest.raises(SluiceError, match="being started again"):
        router.acquire("tiny", wait_s=0.05).__enter__()
    assert router.expect_restart(worker, expected=False)
    with pytest.raises(SluiceError) as caught:
        router.acquire("tiny", wait_s=30).__enter__()
    assert "started again" not in caught.value.message


def test_a_worker_taken_out_answers_those_who_hold_it(box: Box) -> None:
    router, first, second = box.router, box.start(1), box.start(2)
    router.activate("tiny", 1, first)
    with ThreadPoolExecutor(1) as pool:
        with router.acquire("tiny") as worker:
            router.activate("tiny", 2, second)
            dropped = router.drop_previous("tiny")
            assert dropped is first
            closing = pool.submit(first.close, 20)
            serving.eventually(lambda: not first.alive, "closing began")
            assert worker.infer(models.samples(2), 10)[models.OUTPUT].shape == (2, models.CLASSES)
            assert not closing.done()
        closing.result(20)
    assert not psutil.pid_exists(first.pid)


def test_turns_under_acquire_from_many_threads(box: Box) -> None:
    router, workers = box.router, [box.start(1), box.start(2)]
    router.activate("tiny", 1, workers[0])
    stop = threading.Event()

    def ask() -> int:
        count = 0
        while not stop.is_set():
            with router.acquire("tiny") as worker:
                worker.infer(models.samples(1), 10)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for turn in range(100):
            target = workers[(turn + 1) % 2]
            assert router.activate("tiny", target.version, target) is workers[turn % 2]
        stop.set()
        assert sum(future.result() for future in asking) > 0
    assert all(worker.alive for worker in workers)
