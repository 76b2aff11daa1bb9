"""A version with several processes: real ones, behind one queue."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent import describe
from agent.golden import warm_up
from agent.inference import InferenceServer
from agent.instance import Instance
from agent.limits import CRASH_LOOP_DEATHS
from agent.metrics import render
from agent.router import Router
from agent.scheduling import Policy
from agent.supervisor import Supervisor
from agent.worker import Worker
from agent.worker_spec import WorkerDied
from edge_tests.harness import models, serving
from updater.errors import SluiceError


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Worker]:
    worker = serving.start_worker(serving.slow_onnx(tmp_path / "slow.onnx"), "slow", instances=2)
    yield worker
    worker.close(0)


def kill(instance: Instance) -> None:
    os.kill(instance.pid, signal.SIGKILL)
    serving.eventually(lambda: instance.ended, "the death was noticed")


def test_each_process_runs_one_while_the_others_run_theirs(two: Worker) -> None:
    steps = serving.steps_for(two, 1.0)
    with ThreadPoolExecutor(3) as pool:

        def ask(value: float) -> list[list[float]]:
            outputs, _ = two.queue.infer(two.check(serving.slow_inputs(value, steps)), time.monotonic() + 60)
            found: list[list[float]] = outputs["y"].tolist()
            return found

        asked = [pool.submit(ask, value) for value in (1.0, 2.0, 3.0)]
        serving.eventually(lambda: all(each.busy_s() > 0 for each in two.instances), "both run")
        assert [each.result(60) for each in asked] == [[[value, value]] for value in (1.0, 2.0, 3.0)]
    assert sorted(each.requests > 0 for each in two.instances) == [True, True]


def test_both_load_are_warmed_up_counted_and_ended(two: Worker) -> None:
    router = Router()
    router.activate("slow", 1, two)
    before = [each.requests for each in two.instances]
    warm_up(two)
    assert [each.requests for each in two.instances] == [count + 1 for count in before]
    assert describe.config(two, [two]).instance_group[0].count == 2
    assert two.resident_bytes() == pytest.approx(
        sum(psutil.Process(each.pid).memory_info().rss for each in two.instances), rel=0.05
    )
    assert 'sluice_worker_processes{model="slow",version="1",slot="active"} 2' in render(router.models())
    pids = [each.pid for each in two.instances]
    two.close(1)
    assert not any(map(psutil.pid_exists, pids))


def test_a_model_that_cannot_be_loaded_leaves_no_process(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    (tmp_path / "bad.onnx").write_bytes(b"no model" * 10)
    with pytest.raises(SluiceError):
        serving.start_worker(tmp_path / "bad.onnx", instances=3)
    assert {child.pid for child in psutil.Process().children()} == before


def test_one_that_dies_costs_only_what_it_ran(two: Worker) -> None:
    lost: list[Instance] = []
    dead: list[Worker] = []
    two.on_loss(lambda _worker, instance: lost.append(instance))
    two.on_death(dead.append)
    steps = serving.steps_for(two, 1.5)
    with ThreadPoolExecutor(4) as pool:
        inputs = [two.check(serving.slow_inputs(value, steps)) for value in range(4)]
        asked = [pool.submit(two.queue.infer, each, time.monotonic() + 60) for each in inputs]
        serving.eventually(lambda: all(each.busy_s() > 0 for each in two.instances), "both run")
        kill(two.instances[0])
        failures = [future.exception(60) for future in asked]
    failed = [error for error in failures if error is not None]
    assert len(failed) == 1
    assert isinstance(failed[0], WorkerDied)
    assert failed[0].delivered
    assert two.alive
    assert (lost, dead) == ([two.instances[0]], [])
    assert two.refill(lost[0], 30)
    assert not two.refill(lost[0], 30)
    assert not any(each.ended for each in two.instances)
    for instance in two.instances:
        kill(instance)
    serving.eventually(lambda: dead == [two], "the death of the version was told")
    assert not two.alive
    assert two.deaths == 3
    late: list[Worker] = []
    two.on_death(late.append)
    assert late == [two]


def test_large_inputs_are_read_by_either_process(tmp_path: Path) -> None:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), instances=2)
    try:
        rows = 4096
        x = np.random.default_rng(1).standard_normal((rows, models.FEATURES), np.float32)
        expected = worker.infer({"x": x}, 10)["y"]
        for instance in worker.instances:
            made = worker.stage(x.nbytes, "rows")
            assert made is not None
            staged, room = made
            staged["x"] = room.view(np.float32).reshape(x.shape)
            staged["x"][:] = x
            outputs, _ = instance.run([staged], 10)
            np.testing.assert_array_equal(outputs["y"], expected)
            staged.drop()
    finally:
        worker.close(0)


def test_killed_under_load_the_others_serve_on(tmp_path: Path) -> None:
    """And another takes its place; the version stays the same."""
    router, loops = Router(), []
    supervisor = Supervisor(router, loops.append)
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), instances=2)
    router.activate("tiny", 1, worker)
    try:
        with serving.TritonLoad(
            server.addresses[0], "tiny", models.samples(8), tmp_path, "--clients", "4"
        ) as load:
            serving.eventually(lambda: load.succeeded() > 100, "predictions came")
            for _ in range(2):  # three within a minute would be a crash loop
                victim = worker.instances[0]
                os.kill(victim.pid, signal.SIGKILL)
                serving.eventually(lambda victim=victim: victim not in worker.instances, "it was replaced")
                assert worker.alive
            before = load.succeeded()
            serving.eventually(lambda: load.succeeded() > before + 100, "predictions came again")
            summary = load.stop()
        assert summary["failed"] <= 2, summary
        assert all("it was running this request" in text for text in summary["errors"])
        assert router.models()[0].active is worker
        assert (loops, worker.deaths) == ([], 2)
    finally:
        supervisor.stop(10)
        server.stop(1)
        for left in router.remove("tiny"):
            left.close(1)


def test_deaths_of_all_processes_are_one_crash_loop(tmp_path: Path) -> None:
    router, loops = Router(), []
    supervisor = Supervisor(router, loops.append)
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), instances=CRASH_LOOP_DEATHS + 1)
    router.activate("tiny", 1, worker)
    try:
        for instance in worker.instances[1:]:
            assert loops == []
            kill(instance)
        serving.eventually(lambda: loops == ["tiny"], "the loop was told")
        assert worker.alive  # the one that is left answers still
        assert worker.infer(models.samples(1), 10)
    finally:
        supervisor.stop(10)
        worker.close(0)


def test_a_previous_version_is_made_up_when_it_becomes_active(tmp_path: Path) -> None:
    router, loops = Router(), []
    supervisor = Supervisor(router, loops.append)
    first, second = (
        serving.start_worker(models.tiny_onnx(tmp_path / f"{n}.onnx", seed=n), version=n, instances=2)
        for n in (1, 2)
    )
    router.activate("tiny", 1, first)
    router.activate("tiny", 2, second)
    try:
        lost = first.instances[0]
        kill(lost)
        serving.eventually(lambda: first.deaths == 1, "the loss was noticed")
        assert first.infer(models.samples(1), 10)
        assert lost in first.instances
        router.activate("tiny", 1, first)
        serving.eventually(lambda: lost not in first.instances, "another has its place")
        assert not any(instance.ended for instance in first.instances)
    finally:
        supervisor.stop(10)
        for worker in router.remove("tiny"):
            worker.close(0)


def test_swaps_of_versions_with_two_processes_drop_nothing(tmp_path: Path) -> None:
    router = Router()
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    paths = {version: models.tiny_onnx(tmp_path / f"{version}.onnx", seed=version) for version in (1, 2, 3)}
    router.activate("tiny", 1, serving.start_worker(paths[1], version=1, instances=2))
    try:
        with serving.TritonLoad(
            server.addresses[0], "tiny", models.samples(8), tmp_path, "--clients", "4"
        ) as load:
            for version in (2, 3):
                router.activate(
                    "tiny", version, serving.start_worker(paths[version], version=version, instances=2)
                )
                displaced = router.drop_previous("tiny")
                assert displaced is not None
                displaced.close(20)
                assert displaced.failures == 0
                serving.eventually(
                    lambda version=version: load.succeeded(str(version)) > 50, "the version answered"
                )
            summary = load.stop()
        assert summary["failed"] == 0, summary
        active = router.models()[0].active
        assert all(instance.requests > 0 for instance in active.instances)
    finally:
        server.stop(1)
        for worker in router.remove("tiny"):
            worker.close(1)


def test_the_learned_state_goes_on_in_the_next_worker(two: Worker) -> None:
    two.queue.policy = Policy(max_batch=4)
    done = threading.Event()
    two.on_death(lambda _worker: done.set())
    for instance in two.instances:
        kill(instance)
    assert done.wait(20)
    fresh = serving.start_worker(two.spec.path, "slow", instances=2)
    try:
        fresh.succeed(two)
        assert fresh.queue.policy.max_batch == 4
        assert all(instance.figures is two.figures for instance in fresh.instances)
    finally:
        fresh.close(0)
