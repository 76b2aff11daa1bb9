"""Power cuts: an agent that is killed at any moment of an update serves the old version or the new one."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples
from edge_tests.harness.serving import TritonCommands, eventually
from edge_tests.harness.world import MODEL, World

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two versions; every test brings its own box."""
    with World(tmp_path_factory.mktemp("kill")) as made:
        yield made


def answering_version(agent: AgentProcess) -> int:
    """The version that answers a request."""
    data = {name: {"datatype": "FP32", "data": array.tolist()} for name, array in samples(1).items()}
    with TritonCommands(agent.address) as client:
        answer = client.ask(call="infer", model=MODEL, inputs=data)
    assert answer["ok"], answer
    return int(answer["version"])


@contextlib.contextmanager
def box_on_version_1(world: World, directory: Path, name: str) -> Iterator[AgentProcess]:
    with AgentProcess(directory, world.address, name, settings={"update.soak_s": 0.2}) as agent:
        world.wait_for_devices(name)
        if not world.models:
            world.publish_tiny()
            world.publish_tiny(change=0.001)
        world.wait_for_end(world.roll_out(1, [name]))
        agent.wait_for_version(MODEL, 1)
        yield agent


def test_killed_at_many_moments_of_an_update(world: World, tmp_path: Path) -> None:
    with box_on_version_1(world, tmp_path / "a", "box-k") as agent:
        rollout = world.roll_out(2, ["box-k"])
        for delay_s in (0.05, 0.1, 0.15, 0.25, 0.35):
            time.sleep(delay_s)
            agent.kill()
            agent.start()
            assert answering_version(agent) in (1, 2)
        agent.wait_for_version(MODEL, 2)
        assert answering_version(agent) == 2
        world.wait_for_end(rollout)


@pytest.mark.parametrize(
    ("call", "when"),
    [
        ("fsync", 2),
        ("fsync", 6),
        ("fsync", 10),
        ("fdatasync", 2),
        ("rename,renameat2", 4),
        ("linkat,link", 2),
    ],
)
def test_killed_at_a_system_call(world: World, tmp_path: Path, call: str, when: int) -> None:
    """The tracer kills the agent at the n-th such call after start, amid what it does to the disk."""
    if shutil.which("strace") is None:
        pytest.skip("needs the Debian package strace")
    name = f"box-{call.split(',')[0]}-{when}"
    with box_on_version_1(world, tmp_path / "a", name) as agent:
        agent.stop()
        rollout = world.roll_out(2, [name])
        inject = f"inject={call}:signal=SIGKILL:when={when}"
        tracer = ["strace", "-f", "-qq", "-e", f"trace={call}", "-e", inject, "-o", str(tmp_path / "trace")]
        killed = run_until_killed(agent, tracer)
        agent.start()
        assert answering_version(agent) in (1, 2)
        agent.wait_for_version(MODEL, 2)
        assert answering_version(agent) == 2
        world.wait_for_end(rollout)
        assert killed, f"the agent made fewer than {when} calls of {call}"


def run_until_killed(agent: AgentProcess, tracer: list[str]) -> bool:
    """Starts the agent under the tracer; true when it died of it, false when the update went through."""
    agent.wrapper[:] = tracer
    try:
        agent.start()
        agent.wait_for_version(MODEL, 2, timeout_s=20)
    except AssertionError:
        assert agent.process is None or agent.process.poll() is not None, agent.tail()
        agent.process = None
        return True
    finally:
        agent.wrapper.clear()
    agent.stop()
    return False


def test_no_worker_outlives_the_agent(world: World, tmp_path: Path) -> None:
    with box_on_version_1(world, tmp_path / "a", "box-w") as agent:
        for end in (agent.kill, agent.stop):
            workers = agent.workers()
            assert workers
            end()
            eventually(
                lambda workers=workers: not any(psutil.pid_exists(pid) for pid in workers), "workers ended"
            )
            agent.start()
            agent.wait_for_version(MODEL, 1)


def test_two_agents_never_share_a_state_directory(world: World, tmp_path: Path) -> None:
    with AgentProcess(tmp_path / "a", world.address, "box-l") as agent:
        assert agent.process is not None
        second = agent.command("run")
        assert second.returncode == 5
        assert "STATE_LOCKED" in second.stderr
        assert str(agent.process.pid) in second.stderr
        assert agent.status().process_id == agent.process.pid


def test_administrator_reverts_and_it_stays(world: World, tmp_path: Path) -> None:
    with box_on_version_1(world, tmp_path / "a", "box-r") as agent:
        refused = agent.command("revert", MODEL)
        assert refused.returncode == 5
        assert "NO_PREVIOUS_VERSION" in refused.stderr
        world.wait_for_end(world.roll_out(2, ["box-r"]))
        done = agent.command("revert", MODEL)
        assert done.returncode == 0, done.stderr
        assert "from version 2 to 1" in done.stdout
        assert answering_version(agent) == 1
        agent.restart()
        agent.wait_for(lambda status: status.control_connected)
        report = agent.model(MODEL)
        assert (report.active_version, report.pinned_version) == (1, 1)
        assert "pinned" in agent.command("status").stdout
        world.wait_for_end(world.roll_out(2, ["box-r"]))
        report = agent.wait_for_version(MODEL, 2)
        assert report.pinned_version == 0
        assert not report.HasField("failure")
