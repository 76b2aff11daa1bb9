"""A stolen control plane ships nothing; a box that was off for a year serves, and then catches up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.world import MODEL, World
from fleet import catalog
from fleet.database import Database
from sluice.api.v1 import errors_pb2, rollouts_pb2

pytestmark = pytest.mark.e2e
# Preloaded, because the command `faketime` puts a process between ours and the agent.
FAKETIME = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]


def test_a_stolen_control_plane_ships_nothing_that_nobody_signed(tmp_path: Path) -> None:
    """Whoever owns its disk and its online key can publish and roll out; no box takes it."""
    with World(tmp_path) as world, AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        first = world.publish_tiny().manifest
        assert world.wait_for_end(world.roll_out(1)).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED
        world.control.stop()
        forged = replace(first, version=2, annotations={"by": "nobody"})
        database = Database(world.control.data / "control.db")
        with database.engine.begin() as connection:
            catalog.insert_version(connection, forged, forged.to_bytes())
        database.close()
        world.control.start()
        ended = world.wait_for_end(world.roll_out(2))
        assert ended.state == rollouts_pb2.ROLLOUT_STATE_FAILED
        assert ended.devices[0].reason == errors_pb2.VERSION_NOT_SIGNED
        model = agent.model(MODEL)
        assert (model.active_version, model.healthy) == (1, True)


@pytest.mark.skipif(not FAKETIME, reason="faketime is not installed")
def test_a_box_whose_metadata_expired_long_ago_boots_serves_and_catches_up(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        with AgentProcess(tmp_path / "a", world.address, "box"):
            world.wait_for_devices("box")
            world.publish_tiny()
            assert world.wait_for_end(world.roll_out(1)).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED
        world.publish_tiny(change=0.001)
        # Two years on by its own clock: certificates and signed metadata look expired.
        ahead = {"LD_PRELOAD": str(FAKETIME[0]), "FAKETIME": "+730d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with AgentProcess(tmp_path / "a", world.address, "box", environment=ahead) as late:
            late.wait_for_version(MODEL, 1)
            world.roll_out(2)
            late.wait_for(lambda status: "certificate has expired" in status.control_error)
            assert late.model(MODEL).active_version == 1
        with AgentProcess(tmp_path / "a", world.address, "box") as right:
            right.wait_for_version(MODEL, 2)
