"""A whole agent with versions in shadow, and with too little memory: what the control plane sees of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples
from edge_tests.harness.serving import TritonLoad, eventually
from edge_tests.harness.world import MODEL, World
from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2

pytestmark = pytest.mark.e2e
SETTINGS = {"update.soak_s": 0.5, "update.shadow_percent": 100, "update.shadow_requests": 50}


@pytest.mark.timeout(300)
def test_shadow_and_memory_in_a_whole_agent(tmp_path: Path) -> None:
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box", settings=SETTINGS) as agent,
    ):
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out(1))
        with TritonLoad(agent.address, MODEL, samples(8), tmp_path, "--interval-s", "0.01") as load:
            world.publish_tiny(change=0.0001)
            rollout = world.roll_out(2)
            agent.wait_for_model(MODEL, at(sync_pb2.UPDATE_STEP_SHADOWING))
            assert world.wait_for_end(rollout).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED
            agent.wait_for_model(MODEL, at(sync_pb2.UPDATE_STEP_COMMITTED))
            (swap,) = agent.status().swaps
            assert (swap.from_version, swap.to_version, swap.phase) == (1, 2, "committed")
            assert swap.compared  # by now those of the soak, which goes on comparing
            assert [phase.phase for phase in swap.passed][-5:] == [
                *("shadowing", "committing", "turning", "soaking", "settling")
            ]
        assert load.summary["failed"] == 0, load.summary

        # Without traffic the next one waits in shadow; it is taken back, and the one after it is not held up.
        world.publish_tiny(change=0.0002)
        rollout = world.roll_out(3)
        agent.wait_for_model(MODEL, at(sync_pb2.UPDATE_STEP_SHADOWING))
        world.client.abort_rollout(rollout, revert=True)
        agent.wait_for(lambda status: not any(swap.phase == "shadowing" for swap in status.swaps))
        assert agent.status().swaps[0].phase == "abandoned"
        eventually(lambda: len(agent.workers()) == 1, "the worker in shadow ended")
        report = agent.wait_for_model(MODEL, lambda item: item.target_version == 0)
        assert (report.active_version, report.healthy) == (2, True)
        assert not report.HasField("failure")

        # No room for a second worker: told, and tried again until there is.
        agent.stop()
        text = agent.config.read_text("utf-8")
        changed = f"shadow_percent = 0\nmemory_reserve_bytes = {1 << 40}"
        agent.config.write_text(text.replace("shadow_percent = 100", changed), "utf-8")
        agent.start()
        agent.wait_for_version(MODEL, 2)
        rollout = world.roll_out(3)
        failed = agent.wait_for_model(
            MODEL, lambda item: item.failure.reason == errors_pb2.MEMORY_SHORT and item.failure.attempts > 0
        )
        assert not failed.failure.final
        assert (failed.active_version, failed.healthy) == (2, True)
        agent.stop()
        agent.config.write_text(text.replace("shadow_percent = 100", "shadow_percent = 0"), "utf-8")
        agent.start()
        agent.wait_for_version(MODEL, 3)
        assert world.wait_for_end(rollout).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED


def at(step: sync_pb2.UpdateStep.ValueType) -> Callable[[sync_pb2.ReportedModel], bool]:
    return lambda item: item.step == step
