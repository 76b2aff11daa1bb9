"""Time as an adversary: certificates that change under load, and clocks that are wrong by years."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.rotation import rotate_under_load
from edge_tests.harness.world import MODEL, World

ROTATIONS = 4  # the long run with 50 is `make soak`
# Preloaded and not by its command, which would not pass signals on.
_FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def test_rotation_under_load(tmp_path: Path) -> None:
    outcome = rotate_under_load(tmp_path, ROTATIONS)
    assert outcome.rotations >= ROTATIONS
    assert outcome.calls > 100
    assert outcome.failures == {}
    assert outcome.broken == []
    assert outcome.streams > ROTATIONS


def _wrong_by(offset: str) -> dict[str, str]:
    """The environment of a process whose wall clock is off; deadlines and heartbeats go on as they are."""
    return {"LD_PRELOAD": str(_FAKETIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.skipif(_FAKETIME is None, reason="faketime is not installed: apt-get install faketime")
def test_a_clock_that_is_wrong_by_years(tmp_path: Path) -> None:
    with World(tmp_path) as world, AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.publish_tiny()
        world.wait_for_devices("box")
        world.roll_out()
        agent.wait_for_version(MODEL, 1)
        for offset, says in (("+5y", "ahead"), ("-5y", "behind")):
            agent.stop()
            wrong = AgentProcess(
                agent.directory,
                world.address,
                "box",
                environment=_wrong_by(offset),
                start=False,
            )
            with wrong:
                wrong.start()
                wrong.wait_for_version(MODEL, 1)
                status = wrong.wait_for(lambda status: status.control_error != "not tried yet")
                assert not status.control_connected
                told = wrong.command("doctor")
                assert told.returncode != 0
                assert "its clock says" in told.stdout
                assert f"the clock is probably {says}" in told.stdout
        agent.start()
        agent.wait_for(lambda status: status.control_connected)
        agent.wait_for_version(MODEL, 1)
