"""The agent over links that break: resume, offline service, catching up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.link import Link
from edge_tests.harness.models import samples
from edge_tests.harness.serving import TritonCommands
from edge_tests.harness.world import MODEL, World
from sluice.api.v1 import errors_pb2, sync_pb2

pytestmark = pytest.mark.e2e
BIG_HIDDEN = 250_000  # some 13 MB: several blocks of a delta


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as made:
        yield made


def predicts(agent: AgentProcess, version: int) -> None:
    """The model answers, by this version."""
    with TritonCommands(agent.address) as client:
        answer = client.ask(call="infer", model=MODEL, inputs=inputs())
    assert answer["ok"], answer
    assert answer["version"] == str(version)


def inputs() -> dict[str, object]:
    return {name: {"datatype": "FP32", "data": array.tolist()} for name, array in samples(1).items()}


def test_cut_fetch_goes_on_where_it_stopped(world: World, tmp_path: Path) -> None:
    with Link(world.address) as link, AgentProcess(tmp_path / "a", link.address, "box") as agent:
        world.wait_for_devices("box")
        published = world.publish_tiny(hidden=BIG_HIDDEN, with_golden=False)
        size = published.manifest.variants[0].model_file.size
        before = link.down_bytes
        link.cut_after(int(size * 0.7))
        world.roll_out()
        report = agent.wait_for_version(MODEL, 1)
        assert link.cuts == 1
        total = report.fetch_total_bytes
        assert report.fetched_bytes == total
        fetched = link.down_bytes - before
        assert total < fetched < 1.6 * total, (fetched, total)
        assert "resuming model.onnx at byte" in agent.tail()
        predicts(agent, 1)


def test_without_control_plane_the_box_serves_and_restarts_then_catches_up(
    world: World, tmp_path: Path
) -> None:
    with AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out())
        world.control.stop()
        agent.wait_for(lambda status: not status.control_connected)
        predicts(agent, 1)
        agent.restart()
        predicts(agent, 1)
        report = agent.model(MODEL)
        assert report.healthy
        assert report.active_version == 1
        assert "CONTROL_UNREACHABLE" in agent.wait_for(lambda s: "CONTROL" in s.control_error).control_error
        agent.stop()

        # While the box is away a version is rolled out to it.
        world.control.start()
        world.publish_tiny(change=0.001)
        rollout = world.roll_out(2)
        time.sleep(0.5)
        agent.start()
        agent.wait_for_version(MODEL, 2)
        ended = world.wait_for_end(rollout)
        assert [device.fetched_bytes > 0 for device in ended.devices] == [True]
        predicts(agent, 2)


def test_link_lost_before_the_fetch_waits_and_goes_on(world: World, tmp_path: Path) -> None:
    with Link(world.address) as link, AgentProcess(tmp_path / "a", link.address, "box") as agent:
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out())
        world.publish_tiny(change=0.001, hidden=20_000, with_golden=False)
        link.slow(2e5)
        world.roll_out(2)
        agent.wait_for_model(MODEL, lambda item: item.step == sync_pb2.UPDATE_STEP_FETCHING)
        link.down()
        report = agent.wait_for_model(MODEL, lambda item: item.failure.attempts > 1)
        assert report.failure.reason == errors_pb2.CONTROL_UNREACHABLE
        assert not report.failure.final
        assert report.active_version == 1
        predicts(agent, 1)
        link.slow(0)
        link.up()
        agent.wait_for_version(MODEL, 2)
        assert not agent.model(MODEL).HasField("failure")


def test_kill_during_a_long_fetch_resumes_from_the_partial_file(world: World, tmp_path: Path) -> None:
    with Link(world.address) as link, AgentProcess(tmp_path / "a", link.address, "box") as agent:
        world.wait_for_devices("box")
        world.publish_tiny(hidden=BIG_HIDDEN, with_golden=False)
        link.slow(2e6)
        world.roll_out()
        # Four blocks of 2 MiB of the target's 13 MB are on disk by then.
        agent.wait_for_model(MODEL, lambda item: item.fetched_bytes > 0.7 * item.fetch_total_bytes > 0)
        agent.kill()
        link.slow(0)
        agent.start()
        agent.wait_for_version(MODEL, 1)
        assert "resuming model.onnx at byte" in agent.tail()
        assert not list((agent.state_dir / "store" / "staging").iterdir())
