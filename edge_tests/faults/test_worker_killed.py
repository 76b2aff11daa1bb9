"""Workers killed, stopped or orphaned at the worst moment; real processes, real clients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from agent.inference import InferenceServer
from agent.limits import CRASH_LOOP_DEATHS
from agent.router import Router
from agent.supervisor import Supervisor
from agent.worker import Worker
from agent.worker_spec import WorkerDied, WorkerSpec
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


def new_children(before: set[int]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.pid not in before]


def test_killed_under_load_only_what_it_was_running_fails(tmp_path: Path) -> None:
    router, loops = Router(), []
    supervisor = Supervisor(router, loops.append)
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    clients = 3
    router.activate("tiny", 1, serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx")))
    try:
        with serving.TritonLoad(
            server.addresses[0], "tiny", models.samples(8), tmp_path, "--clients", str(clients)
        ) as load:
            serving.eventually(lambda: load.succeeded() > 100, "predictions came")
            for _ in range(2):  # three within a minute would be a crash loop
                before = load.succeeded()
                victim = router.models()[0].active
                os.kill(victim.pid, signal.SIGKILL)
                serving.eventually(
                    lambda victim=victim: router.models()[0].active is not victim,
                    "the worker was started again",
                )
                serving.eventually(
                    lambda before=before: load.succeeded() > before + 100, "predictions came again"
                )
            summary = load.stop()
        # The process runs one request at a time; those that waited were given to the next process.
        assert summary["failed"] <= 2, summary
        for text in summary["errors"]:
            assert "UNAVAILABLE" in text
            assert "SIGKILL" in text
            assert "it was running this request" in text
        assert loops == []
    finally:
        supervisor.stop(10)
        server.stop(1)
        for worker in router.remove("tiny"):
            worker.close(1)


def test_a_crash_loop_is_left_by_going_back(tmp_path: Path) -> None:
    router = Router()
    good, bad = (
        serving.start_worker(models.tiny_onnx(tmp_path / f"{n}.onnx", seed=n), version=n) for n in (1, 2)
    )
    supervisor = Supervisor(router, lambda model: router.activate(model, 1, good) and None)
    router.activate("tiny", 1, good)
    router.activate("tiny", 2, bad)
    try:
        seen = set()
        for _ in range(CRASH_LOOP_DEATHS):
            with router.acquire("tiny", wait_s=20) as worker:
                assert worker.version == 2
                seen.add(worker.pid)
            serving.kill(worker)
        serving.eventually(lambda: router.models()[0].active is good, "the box went back")
        with router.acquire("tiny") as worker:
            assert worker.infer(models.samples(1), 10)
        supervisor.stop(20)
        assert router.models()[0].active is good
        assert len(seen) == CRASH_LOOP_DEATHS  # each death but the last was answered by a restart
    finally:
        for worker in router.remove("tiny"):
            worker.close(0)


def test_swaps_under_load_drop_nothing(tmp_path: Path) -> None:
    router = Router()
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    samples = models.samples(8)
    paths = {version: models.tiny_onnx(tmp_path / f"{version}.onnx", seed=version) for version in range(1, 6)}
    expected = {}
    router.activate("tiny", 1, serving.start_worker(paths[1], version=1))
    try:
        with serving.TritonLoad(server.addresses[0], "tiny", samples, tmp_path, "--clients", "4") as load:
            for version in paths:
                if version > 1:
                    worker = serving.start_worker(paths[version], version=version)
                    displaced = router.activate("tiny", version, worker)
                    assert displaced is router.drop_previous("tiny")
                    assert displaced is not None
                    displaced.close(20)
                    assert displaced.failures == 0
                expected[str(version)] = router.models()[0].active.infer(samples, 10)["y"]
                serving.eventually(
                    lambda version=version: load.succeeded(str(version)) > 50, "the version answered"
                )
            summary = load.stop()
        assert summary["failed"] == 0, summary
        assert set(summary["versions"]) == set(expected)
        last = dict.fromkeys(range(4), 0)
        for line in load.lines:  # each answer is the stated version's, and none goes back
            answer, right = line["outputs"]["y"][0], expected[line["version"]][line["row"]]
            assert answer == pytest.approx(right.tolist(), rel=1e-5, abs=1e-6)
            assert int(line["version"]) >= last[line["client"]]
            last[line["client"]] = int(line["version"])
    finally:
        server.stop(1)
        for worker in router.remove("tiny"):
            worker.close(1)


def test_killed_while_loading(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)  # reading it waits, so that the worker stays in loading
    before = {child.pid for child in psutil.Process().children()}
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(Worker.start, WorkerSpec("tiny", 1, pipe, "onnx"), 30)

        def loads() -> bool:
            names = [child.name() for child in new_children(before) if child.is_running()]
            return names == ["sluice-worker"] and new_children(before)[0].status() == psutil.STATUS_SLEEPING

        serving.eventually(loads, "the worker is loading")
        # The pipe gets a reader once the load message has arrived.
        writer = os.open(pipe, os.O_WRONLY)
        os.kill(new_children(before)[0].pid, signal.SIGSEGV)
        with pytest.raises(
            SluiceError, match=r"loading tiny@1 ended its worker: it was ended by SIGSEGV"
        ) as caught:
            starting.result(30)
        os.close(writer)
    assert caught.value.reason == errors_pb2.MODEL_LOAD_FAILED
    assert "Segmentation fault" in caught.value.message  # the trace that it left on stderr
    assert new_children(before) == []


def test_a_worker_that_cannot_even_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # no standard library there
    with pytest.raises(
        WorkerDied, match=r"did not start: it exited with code 1; its last output: .*encodings"
    ):
        serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))


def test_stopped_in_the_middle_is_killed_at_the_hang_limit(tmp_path: Path) -> None:
    router, loops = Router(), []
    supervisor = Supervisor(router, loops.append)
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), hang_s=0.5)
    router.activate("tiny", 1, worker)
    try:
        worker.infer(models.samples(1), 10)
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(SluiceError, match=r"no answer within 0.2 s") as caught:
            worker.infer(models.samples(1), 0.2)
        assert caught.value.reason == errors_pb2.WORKER_TIMEOUT
        assert worker.alive
        serving.eventually(lambda: not psutil.pid_exists(worker.pid), "the hanging process was killed")
        serving.eventually(
            lambda: (now := router.serving("tiny")) is not None and now.active is not worker, "a new worker"
        )
        with router.acquire("tiny", wait_s=20) as fresh:
            assert fresh.infer(models.samples(1), 10)
        assert (worker.requests, worker.failures) == (2, 1)
    finally:
        supervisor.stop(10)
        for left in router.remove("tiny"):
            left.close(0)


def test_stopped_while_a_large_request_is_sent(tmp_path: Path) -> None:
    """Its memory takes the request without its help: it counts as running, and as hung in the end."""
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), hang_s=1.0)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(SluiceError) as caught:
        worker.infer(models.samples(1_000_000), 0.5)
    assert caught.value.reason == errors_pb2.WORKER_TIMEOUT
    serving.eventually(lambda: not psutil.pid_exists(worker.pid), "the stopped process was ended")
    worker.close(0)


def test_a_stopped_worker_can_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.child.EXIT_S", 0.3)
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    os.kill(worker.pid, signal.SIGSTOP)
    worker.close(0)
    assert not psutil.pid_exists(worker.pid)


def test_killed_during_a_request_says_so_and_the_waiting_ones_may_go_elsewhere(tmp_path: Path) -> None:
    worker = serving.start_worker(serving.slow_onnx(tmp_path / "slow.onnx"))
    steps = serving.steps_for(worker, 20)
    outcomes: list[bool] = []

    def ask(number: int) -> None:
        with pytest.raises(WorkerDied) as caught:
            worker.infer(serving.slow_inputs(number, steps), 30)
        outcomes.append(caught.value.delivered)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    serving.eventually(lambda: worker.requests == 2, "one request runs")
    serving.kill(worker)
    for thread in threads:
        thread.join(20)
    assert sorted(outcomes) == [False, False, True]
    worker.close(0)


def test_closing_and_dying_at_once(tmp_path: Path) -> None:
    path = models.tiny_onnx(tmp_path / "tiny.onnx")
    for _ in range(5):
        worker = serving.start_worker(path)
        closers = [threading.Thread(target=worker.close, args=(1,)) for _ in range(3)]
        for thread in closers:
            thread.start()
        os.kill(worker.pid, signal.SIGKILL)
        for thread in closers:
            thread.join(20)
            assert not thread.is_alive()
        assert not psutil.pid_exists(worker.pid)


PARENT = """
import sys, threading
from pathlib import Path
from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from edge_tests.harness import models, serving
workers = [Worker.start(WorkerSpec("m", n, Path(path), "onnx"), 30) for n, path in enumerate(sys.argv[1:], 1)]
def ask():
    workers[0].infer(models.samples(1), 60)
threading.Thread(target=ask, daemon=True).start()  # the hanging model: it never answers
serving.eventually(lambda: workers[0].requests == 1, "one hangs")
print(*[worker.pid for worker in workers], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_worker_outlives_its_agent(tmp_path: Path, how: signal.Signals | None) -> None:
    """Also one in the middle of an endless inference, and whether the agent is killed or just leaves."""
    paths = [models.hanging_onnx(tmp_path / "hanging.onnx"), models.tiny_onnx(tmp_path / "tiny.onnx")]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *map(str, paths)],
        cwd=serving.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(text) for text in parent.stdout.readline().split()]
    assert len(pids) == 2
    if how is not None:
        parent.send_signal(how)
    parent.communicate(timeout=30)

    def gone(pid: int) -> bool:
        try:
            return (
                psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            )  # this machine's init may be slow to reap
        except psutil.NoSuchProcess:
            return True

    serving.eventually(lambda: all(gone(pid) for pid in pids), "the workers followed their agent")


def test_ctrl_c_in_the_terminal_leaves_workers_to_the_agent(tmp_path: Path) -> None:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    try:
        assert os.getpgid(worker.pid) != os.getpgid(0)
        os.kill(worker.pid, signal.SIGINT)
        assert worker.infer(models.samples(1), 10)
    finally:
        worker.close(1)
