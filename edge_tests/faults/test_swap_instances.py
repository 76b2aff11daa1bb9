"""Changes of version where versions have two processes: the whole way, under load."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.swap import Phase
from edge_tests.harness import models
from edge_tests.harness.box import LocalBox
from edge_tests.harness.serving import TritonLoad, eventually
from updater.errors import SluiceError

TWO = {"instances": "2"}


@pytest.fixture
def box(tmp_path: Path) -> Iterator[LocalBox]:
    """A box that serves version 1 with two processes."""
    with LocalBox(tmp_path / "box") as made:
        made.serve(1, models.tiny_onnx(tmp_path / "1.onnx"), options=TWO)
        yield made


@pytest.fixture
def load(box: LocalBox, tmp_path: Path) -> Iterator[TritonLoad]:
    """Clients that predict throughout; none of their requests may fail."""
    options = ("--interval-s", "0.005", "--clients", "3")
    with TritonLoad(box.address, "tiny", models.samples(8), tmp_path, *options) as running:
        eventually(lambda: running.succeeded() > 20, "predictions came")
        yield running
    assert running.summary["failed"] == 0, running.summary


def processes() -> int:
    return len([child for child in psutil.Process().children() if child.name() == "sluice-worker"])


def test_shadow_turn_soak_and_drain(box: LocalBox, load: TritonLoad, tmp_path: Path) -> None:
    shadow = {"shadow_percent": "100", "shadow_requests": "60", "shadow_s": "30", "keep_previous": "disk"}
    alike = box.install(2, models.tiny_onnx(tmp_path / "2.onnx", change=0.0001), options={**TWO, **shadow})
    assert not box.activate(alike)
    assert processes() == 4
    eventually(lambda: box.ended.get("tiny", "not yet") is None, "the shadow ended")
    eventually(lambda: load.succeeded("2") > 20, "the new version answers")
    eventually(lambda: not box.state.slots("tiny").soaking and processes() == 2, "only the new one is left")


def test_memory_is_looked_at_for_all_processes(box: LocalBox, load: TritonLoad, tmp_path: Path) -> None:
    path = models.tiny_onnx(tmp_path / "2.onnx", seed=2)
    needed = []
    for options in ({}, {"instances": "3"}):
        box.activator._swaps._actions._available = lambda: 1 << 20
        with pytest.raises(SluiceError) as caught:
            box.activate(box.install(2, path, options=options))
        (found,) = re.findall(r"needs about ([0-9]+) MiB", caught.value.message)
        needed.append(int(found))
    assert needed[1] == pytest.approx(3 * needed[0], rel=0.1)
    assert processes() == 2
    options = {"instances": "3", "memory_short": "stop-then-start"}
    assert box.activate(box.install(2, path, options=options))
    eventually(lambda: load.succeeded("2") > 5, "the new version answers")
    assert processes() == 3


def test_a_process_that_dies_in_the_soak_begins_it_anew(tmp_path: Path) -> None:
    with LocalBox(tmp_path / "box", soak_s=30.0) as box:
        assert box.activate(box.install(1, models.tiny_onnx(tmp_path / "1.onnx"), options=TWO))
        worker = box.router.models()[0].active
        before = box.swap().swap
        assert before.phase is Phase.SOAKING
        victim = worker.instances[1]
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: box.swap().swap.since > before.since, "the soak began anew")
        eventually(lambda: victim not in worker.instances, "it was replaced")
        assert box.router.models()[0].active is worker
        assert (worker.deaths, processes()) == (1, 2)


def test_a_process_that_dies_in_shadow_is_the_versions_fault(box: LocalBox, tmp_path: Path) -> None:
    options = {**TWO, "shadow_percent": "100", "shadow_s": "60"}
    assert not box.activate(box.install(2, models.tiny_onnx(tmp_path / "2.onnx"), options=options))
    new = box.activator._swaps._changing["tiny"].new
    assert new is not None
    os.kill(new.instances[1].pid, signal.SIGKILL)
    eventually(lambda: "tiny" in box.ended, "it was given up")
    assert "died in shadow" in str(box.ended["tiny"])
    eventually(lambda: processes() == 2, "its other process ended")
