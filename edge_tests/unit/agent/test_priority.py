"""A starting worker gives way to what serves, and only where it can be raised again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.limits import STARTING_NICENESS
from agent.priority import give_way, restore
from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from edge_tests.harness.models import tiny_onnx

START_S = 60.0
THREADED = """
import sys, threading
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
UNPRIVILEGED = """
import codecs, ctypes, os, resource
from agent.priority import give_way, restore
restore(os.getpid()), codecs.lookup("ascii")  # what they import, another user may not be able to read
resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc of who changed its user is root's
before = os.getpriority(os.PRIO_PROCESS, 0)
print(give_way(os.getpid()), os.getpriority(os.PRIO_PROCESS, 0) - before)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="raising a priority wants root or LimitNICE")


def niceness(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


@pytest.fixture
def threaded() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", THREADED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_threads_started_later_are_restored_too(threaded: subprocess.Popen[str]) -> None:
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert give_way(threaded.pid)
    assert threaded.stdout is not None
    assert threaded.stdout.readline() == "ready\n"
    assert len(niceness(threaded.pid)) == 1  # all are lowered, or none was there yet when it was
    assert niceness(threaded.pid) == {min(own + STARTING_NICENESS, 19)}
    restore(threaded.pid)
    assert niceness(threaded.pid) == {own}


def test_a_process_that_has_ended_is_no_error(threaded: subprocess.Popen[str]) -> None:
    threaded.kill()
    threaded.wait()
    restore(threaded.pid)


def test_a_worker_beside_another_gives_way_until_it_is_checked(tmp_path: Path) -> None:
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())
    spec = WorkerSpec("tiny", 2, tiny_onnx(tmp_path / "tiny.onnx"), "onnx", beside=True)
    worker = Worker.start(spec, START_S)
    try:
        assert niceness(worker.pid) == {min(own + STARTING_NICENESS, 19)}
        worker.checked()
        assert niceness(worker.pid) == {own}
    finally:
        worker.close(0)


def test_a_worker_that_nobody_waits_beside_does_not(tmp_path: Path) -> None:
    worker = Worker.start(WorkerSpec("tiny", 1, tiny_onnx(tmp_path / "tiny.onnx"), "onnx"), START_S)
    try:
        assert niceness(worker.pid) == {os.getpriority(os.PRIO_PROCESS, os.getpid())}
    finally:
        worker.close(0)


def test_without_a_right_to_return_nothing_is_lowered() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True, check=False, timeout=START_S
    )
    assert ended.stdout.split() == ["False", "0"], ended.stderr
