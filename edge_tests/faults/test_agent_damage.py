"""Damaged bytes and full disks: found, named, mended; the box serves throughout."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.link import Link
from edge_tests.harness.models import samples
from edge_tests.harness.serving import TritonCommands
from edge_tests.harness.world import MODEL, World
from sluice.api.v1 import diff_pb2, diff_pb2_grpc, errors_pb2, rollouts_pb2, sync_pb2
from updater.delta import FEATURES
from updater.digests import PREFIX, digest_file

pytestmark = pytest.mark.e2e


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as made:
        yield made


def answers(agent: AgentProcess, version: int) -> None:
    data = {name: {"datatype": "FP32", "data": array.tolist()} for name, array in samples(1).items()}
    with TritonCommands(agent.address) as client:
        answer = client.ask(call="infer", model=MODEL, inputs=data)
    assert answer["ok"], answer
    assert answer["version"] == str(version)


def flip(path: Path, offset: int) -> None:
    """Turns one bit of a file, whoever may write it."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    path.chmod(mode)


def offered_delta(world: World, version: int, base: str, target: str, variant: str) -> diff_pb2.Offer:
    """Has the control plane build the delta between two files."""
    with world.control.channel() as channel:
        request = diff_pb2.PlanRequest(
            model=MODEL,
            version=version,
            variant=variant,
            base_digests=[base],
            wait_ms=20_000,
            features=FEATURES,
        )
        plan = diff_pb2_grpc.DiffModelStub(channel).Plan(request, timeout=30)
    offer = next(item.delta for item in plan.files if item.digest == target)
    assert offer.base_digest == base, plan
    return offer


def tamper_delta(world: World, base: str, target: str, variant: str) -> str:
    """Damages the delta between two files in the control plane's cache; returns its digest."""
    offer = offered_delta(world, 2, base, target, variant)
    digits = offer.digest[len(PREFIX) :]
    found = [path for path in world.control.data.rglob("*") if path.is_file() and digits[2:] in path.name]
    assert found, f"no file for {offer.digest} below {world.control.data}"
    flip(found[0], offer.size // 2)
    return str(offer.digest)


def test_delta_damaged_on_the_server_is_found_and_replaced_by_a_full_copy(
    world: World, tmp_path: Path
) -> None:
    with AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        first = world.publish_tiny(with_golden=False).manifest.variants[0]
        world.wait_for_end(world.roll_out(1))
        second = world.publish_tiny(change=0.001, with_golden=False).manifest.variants[0]
        tamper_delta(world, first.model_file.digest, second.model_file.digest, second.name)
        world.roll_out(2)
        agent.wait_for_version(MODEL, 2)
        log = agent.tail()
        assert "DELTA_" in log
        assert "next attempt" in log
        assert not agent.model(MODEL).HasField("failure")
        answers(agent, 2)


def test_delta_made_for_another_base_is_refused_and_replaced_by_a_full_copy(
    world: World, tmp_path: Path
) -> None:
    """The control plane confuses two deltas: the one from version 2 is offered to a box on version 1."""
    with AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        first, second, third = (
            world.publish_tiny(change=change, with_golden=False).manifest.variants[0]
            for change in (0.0, 0.001, 0.002)
        )
        world.wait_for_end(world.roll_out(1))
        target = third.model_file.digest
        right, wrong = (
            offered_delta(world, 3, variant.model_file.digest, target, third.name)
            for variant in (first, second)
        )
        assert right.digest != wrong.digest
        world.control.stop()
        with contextlib.closing(sqlite3.connect(world.control.data / "control.db")) as database, database:
            changed = database.execute(
                "UPDATE deltas SET digest = ?, size = ? WHERE base = ? AND target = ?",
                (wrong.digest, wrong.size, first.model_file.digest, target),
            ).rowcount
        assert changed == 1
        world.control.start()
        rollout = world.roll_out(3)
        agent.wait_for_version(MODEL, 3)
        log = agent.tail()
        assert "DELTA_WRONG_BASE" in log
        assert first.model_file.digest in log
        assert digest_file(agent.state_dir / "slots" / MODEL / "3" / "model.onnx") == target
        assert not agent.model(MODEL).HasField("failure")
        answers(agent, 3)
        assert world.wait_for_end(rollout).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED
        assert not list((agent.state_dir / "store" / "staging").iterdir())


def test_damaged_active_version_falls_back_and_is_mended(world: World, tmp_path: Path) -> None:
    with AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        for version, change in ((1, 0.0), (2, 0.001)):
            world.publish_tiny(change=change)
            world.wait_for_end(world.roll_out(version))
        agent.stop()
        world.control.stop()
        flip(agent.state_dir / "slots" / MODEL / "2" / "model.onnx", 4000)
        agent.start()
        report = agent.wait_for_version(MODEL, 1)
        assert report.failure.reason == errors_pb2.STORE_CORRUPT
        assert report.failure.version == 2
        assert not report.failure.final
        answers(agent, 1)
        world.control.start()
        agent.wait_for_version(MODEL, 2)
        answers(agent, 2)


def test_lost_database_is_rebuilt_from_the_directories_while_offline(world: World, tmp_path: Path) -> None:
    with AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out(1))
        agent.stop()
        world.control.stop()
        for path in agent.state_dir.glob("state.db*"):
            path.write_bytes(b"not a database " * 300)
        agent.start()
        agent.wait_for_version(MODEL, 1)
        answers(agent, 1)
        assert (agent.state_dir / "state.db.damaged").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mount.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], timeout=10, check=True)


@pytest.mark.parametrize("during_apply", [False, True])
def test_full_disk_waits_and_goes_on_once_there_is_room(
    world: World, tmp_path: Path, small_disk: Path, during_apply: bool
) -> None:
    ballast = small_disk / "ballast"
    with (
        Link(world.address) as link,
        AgentProcess(tmp_path / "a", link.address, "box", state_dir=small_disk / "state") as agent,
    ):
        world.wait_for_devices("box")
        world.publish_tiny(with_golden=False)
        world.wait_for_end(world.roll_out(1))
        world.publish_tiny(change=0.001, hidden=100_000, with_golden=False)
        if during_apply:
            link.slow(1e6)
            world.roll_out(2)
            agent.wait_for_model(MODEL, lambda item: item.step == sync_pb2.UPDATE_STEP_FETCHING)
            fill(ballast)
        else:
            fill(ballast)
            world.roll_out(2)
        report = agent.wait_for_model(MODEL, lambda item: item.failure.reason == errors_pb2.DISK_FULL)
        assert not report.failure.final
        assert report.active_version == 1
        assert "free space" in report.failure.message
        answers(agent, 1)
        link.slow(0)
        ballast.unlink()
        agent.wait_for_version(MODEL, 2)
        answers(agent, 2)


def fill(path: Path) -> None:
    """Fills the file system to the last block but a few, which databases need to note that it is full."""
    spare = 256 << 10
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(64 << 10))
        except OSError:
            file.truncate(max(0, file.tell() - spare))
