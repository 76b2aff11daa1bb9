"""A new version whose worker dies while it loads: the version before it serves on, the reason is reported.

A crash is the model's fault and final. A kill may be the kernel's for want of memory: it is tried again.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples, slow_to_load_onnx
from edge_tests.harness.serving import TritonLoad, eventually
from edge_tests.harness.world import MODEL, World
from fleet.recipe import VariantRecipe
from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2

pytestmark = pytest.mark.e2e
LOADING_S = 1.0  # of processor time: importing the libraries takes less than half of it


def test_worker_that_is_killed_while_it_loads_is_tried_again(tmp_path: Path) -> None:
    """As the kernel ends it for want of memory."""
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box", settings={"update.load_deadline_s": 100}) as agent,
    ):
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out())
        (serving,) = agent.workers()
        world.publish(VariantRecipe(slow_to_load_onnx(tmp_path / "slow.onnx", products=16)))
        world.roll_out(2)
        agent.wait_for_model(MODEL, lambda item: item.step == sync_pb2.UPDATE_STEP_WARMING_UP)
        os.kill(loading_worker(agent, serving).pid, signal.SIGKILL)
        failure = agent.wait_for_model(MODEL, lambda item: item.HasField("failure")).failure
        assert failure.reason == errors_pb2.OUT_OF_MEMORY
        assert not failure.final
        assert f"loading {MODEL}@2 ended its worker: it was ended by SIGKILL" in failure.message
        assert agent.model(MODEL).active_version == 1
        agent.wait_for_version(MODEL, 2)
        assert not agent.model(MODEL).HasField("failure")


def test_worker_that_crashes_while_it_loads_the_new_version(tmp_path: Path) -> None:
    """As a runtime ends that crashes on the model."""
    number = signal.SIGSEGV
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box", settings={"update.load_deadline_s": 100}) as agent,
    ):
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out())
        (serving,) = agent.workers()
        world.publish(VariantRecipe(slow_to_load_onnx(tmp_path / "slow.onnx")))
        with TritonLoad(agent.address, MODEL, samples(8), tmp_path, "--interval-s", "0.05") as load:
            rollout = world.roll_out(2)
            agent.wait_for_model(MODEL, lambda item: item.step == sync_pb2.UPDATE_STEP_WARMING_UP)
            victim = loading_worker(agent, serving)
            answered = load.succeeded()
            os.kill(victim.pid, number)
            failure = agent.wait_for_failure(MODEL)
            eventually(lambda: load.succeeded() > answered + 10, "the old version answered on")
        assert load.summary["failed"] == 0, load.summary
        assert set(load.summary["versions"]) == {"1"}

        assert failure.reason == errors_pb2.MODEL_LOAD_FAILED
        assert failure.version == 2
        assert failure.attempts == 1
        assert f"loading {MODEL}@2 ended its worker: it was ended by {number.name}" in failure.message
        assert failure.message.count("the model crashes its runtime") == 1
        assert not victim.is_running(), "it was reaped"
        report = agent.model(MODEL)
        assert (report.active_version, report.healthy) == (1, True)
        assert agent.workers() == [serving], "what served was not touched"
        ended = world.wait_for_end(rollout)
        assert ended.state == rollouts_pb2.ROLLOUT_STATE_FAILED
        assert ended.devices[0].reason == errors_pb2.MODEL_LOAD_FAILED


def loading_worker(agent: AgentProcess, serving: int) -> psutil.Process:
    """The agent's other worker, once it computes on its model."""
    assert agent.process is not None
    parent = psutil.Process(agent.process.pid)
    found: list[psutil.Process] = []

    def loads() -> bool:
        found[:] = [child for child in parent.children() if child.pid != serving]
        return len(found) == 1 and sum(found[0].cpu_times()[:2]) > LOADING_S

    eventually(loads, "a second worker loads its model")
    return found[0]
