"""Version policies: which versions are chosen, and real workers that come and go as a policy says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import describe, options
from agent.cascade import Cascade
from agent.held_versions import HeldVersions
from agent.limits import HELD_MEMORY_RESERVE_BYTES, MAX_VERSIONS_LOADED
from agent.retention import surplus
from agent.router import Router
from agent.slots import Installed, Slots
from agent.version_directory import installed_in
from agent.version_policy import VersionPolicy, chosen, parse, pinned
from agent.worker import Worker
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

# The policy, pure.


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("all", VersionPolicy(every=True)),
        ("latest:3", VersionPolicy(latest=3)),
        ("4, 1,4", VersionPolicy(specific=(1, 4))),
        ("7", VersionPolicy(specific=(7,))),
    ],
)
def test_policies_as_text(text: str, policy: VersionPolicy) -> None:
    assert parse(text) == policy
    found = options.read({"versions": f" {text} "}, 1)
    assert (found.versions, found.faults) == (policy, ())


@pytest.mark.parametrize(
    "text", ["", "none", "latest", "latest:0", "latest:-1", "1,", "0", "1;2", "1," * 9 + "1"]
)
def test_texts_that_are_no_policy(text: str) -> None:
    assert parse(text) is None
    found = options.read({"versions": text}, 1)
    assert found.versions is None
    assert "option versions is" in found.faults[0]


def test_what_is_chosen() -> None:
    held = [1, 2, 3, 5, 6]
    assert chosen(None, 5, held) == ()
    assert chosen(VersionPolicy(latest=1), 5, held) == ()
    assert chosen(VersionPolicy(latest=3), 5, held) == (3, 2)
    assert chosen(VersionPolicy(every=True), 5, held) == (3, 2, 1)
    assert chosen(VersionPolicy(specific=(1, 3, 4)), 5, held) == (3, 1)
    assert chosen(VersionPolicy(specific=(6,)), 5, held) == (), "one that was gone back from is not loaded"
    assert pinned(VersionPolicy(latest=3), 5, held) == (3, 2)
    assert pinned(VersionPolicy(every=True), 5, held) == ()


policies = st.none() | st.builds(
    VersionPolicy, st.integers(0, 12), st.booleans(), st.lists(st.integers(1, 30), max_size=8).map(tuple)
)


@given(policies, st.integers(1, 30), st.lists(st.integers(1, 30), max_size=30))
def test_rules_of_every_choice(policy: VersionPolicy | None, active: int, held: list[int]) -> None:
    found = chosen(policy, active, held)
    assert len(found) < MAX_VERSIONS_LOADED
    assert list(found) == sorted(set(found), reverse=True)
    assert set(found) <= {version for version in held if version < active}
    assert set(pinned(policy, active, held)) <= set(found)


def test_pinned_versions_stay_on_the_disk() -> None:
    slots = {"m": Slots("m", active=Installed(9, "d", "v", ""))}
    disk = {"m": range(1, 10)}
    assert surplus(slots, disk, 1) == [("m", version) for version in range(1, 8)]
    assert surplus(slots, disk, 1, {"m": (1, 8)}) == [("m", version) for version in range(2, 7)]


def test_a_directory_says_what_it_holds(tmp_path: Path) -> None:
    directory = tmp_path / "m" / "3"
    directory.mkdir(parents=True)
    for marker in ("", "{}", "[]", '{"manifest": "d"}'):
        (directory / ".version").write_text(marker)
        with pytest.raises(SluiceError, match="does not say what it holds"):
            installed_in(tmp_path, "m", 3)
    (directory / ".version").write_text('{"manifest": "d", "variant": "v", "runtime": "r"}')
    assert installed_in(tmp_path, "m", 3) == Installed(3, "d", "v", "r")


# Real workers.


class Disk:
    """Versions on a made-up disk, of a real model each; the bringing up may fail."""

    def __init__(self, directory: Path) -> None:
        self.paths = {n: models.tiny_onnx(directory / f"{n}.onnx", seed=n) for n in range(1, 6)}
        self.versions = [1, 2, 3]
        self.broken: set[int] = set()
        self.available = 1 << 40
        self.instances = 1
        self.started: list[int] = []
        self.router = Router()
        self.held = HeldVersions(
            self.router,
            on_disk=lambda: {"tiny": self.versions},
            installed=lambda _model, version: Installed(version, f"d{version}", "v", ""),
            bring_up=self.bring_up,
            instances=lambda _model, _installed: self.instances,
            available_bytes=lambda: self.available,
        )

    def bring_up(self, _model: str, installed: Installed) -> Worker:
        self.started.append(installed.version)
        if installed.version in self.broken:
            raise SluiceError(errors_pb2.STORE_CORRUPT, "its file is damaged")
        return serving.start_worker(self.paths[installed.version], version=installed.version)

    def activate(self, version: int, policy: str) -> Worker:
        worker = serving.start_worker(self.paths[version], version=version)
        worker.versions = parse(policy)
        self.router.activate("tiny", version, worker)
        return worker

    def loaded(self) -> dict[int, str]:
        serving = self.router.serving("tiny")
        assert serving is not None
        return {worker.version: serving.place(worker) for worker in serving.workers}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.held.stop(20)
    for worker in disk.router.remove("tiny"):
        worker.close(0)


def test_versions_are_loaded_and_addressed_as_the_policy_says(disk: Disk) -> None:
    disk.activate(3, "latest:3")
    disk.held.settle()
    assert disk.loaded() == {3: "active", 2: "held", 1: "held"}
    x = models.samples(1)
    answers = {}
    for version in ("", "1", "2", "3"):
        with disk.router.acquire("tiny", version) as worker:
            answers[version] = worker.infer(x, 20)["y"].tolist()
    assert answers[""] == answers["3"]
    assert len({str(answer) for answer in answers.values()}) == 3
    disk.versions = [2, 3]
    disk.held.settle()
    assert disk.loaded() == {3: "active", 2: "held"}
    with (
        pytest.raises(SluiceError, match="version '1' of tiny is not loaded"),
        disk.router.acquire("tiny", "1"),
    ):
        pass


def test_a_version_that_is_replaced_stays_addressable_without_a_gap(disk: Disk) -> None:
    """The previous one becomes a held one in the step in which it would have been let go."""
    disk.activate(2, "latest:2")
    two = disk.router.serving("tiny")
    disk.activate(3, "latest:2")
    assert disk.loaded() == {3: "active", 2: "previous"}
    assert disk.router.drop_previous("tiny") is None
    assert disk.loaded() == {3: "active", 2: "held"}
    disk.held.settle()
    assert disk.started == []
    after = disk.router.serving("tiny")
    assert two is not None
    assert after is not None
    assert after.held == (two.active,)
    disk.activate(4, "1")
    assert disk.loaded() == {4: "active", 3: "previous", 2: "held"}
    left = disk.router.drop_previous("tiny")
    assert left is not None
    left.close(0)
    disk.held.settle()
    serving.eventually(lambda: not two.active.alive, "version 2 was ended")
    assert disk.loaded() == {4: "active", 1: "held"}


def test_the_version_that_was_gone_back_from_is_not_held(disk: Disk) -> None:
    disk.activate(2, "all")
    disk.activate(3, "all")
    old = disk.router.serving("tiny")
    assert old is not None
    assert old.previous is not None
    disk.router.activate("tiny", 2, old.previous)
    left = disk.router.drop_previous("tiny")
    assert left is old.active
    left.close(0)
    disk.held.settle()
    assert disk.loaded() == {2: "active", 1: "held"}


def test_a_version_that_cannot_be_loaded_is_tried_again_with_backoff(disk: Disk) -> None:
    disk.broken = {2}
    disk.activate(3, "all")
    for _ in range(4):
        disk.held.settle()
    assert disk.started[:2] == [2, 1]
    assert disk.started.count(1) == 1
    assert 1 < disk.started.count(2) < 4, "the first repetition comes at once, the next ones wait"
    assert disk.loaded() == {3: "active", 1: "held"}


def test_nothing_is_loaded_for_which_there_is_no_memory(disk: Disk) -> None:
    disk.available = 1 << 20
    disk.activate(3, "all")
    disk.held.settle()
    assert disk.loaded() == {3: "active"}
    assert disk.started == []


def test_memory_is_needed_for_each_process_of_a_version(disk: Disk) -> None:
    disk.activate(3, "2")
    serving_now = disk.router.serving("tiny")
    assert serving_now is not None
    disk.available = 2 * serving_now.active.resident_bytes() + HELD_MEMORY_RESERVE_BYTES
    disk.instances = 3
    disk.held.settle()
    assert disk.loaded() == {3: "active"}
    disk.instances = 1
    serving.eventually(lambda: disk.held.settle() > 0 and len(disk.loaded()) > 1, "it was tried again")
    assert disk.loaded() == {3: "active", 2: "held"}


def test_the_thread_follows_what_changes_and_a_dead_worker_is_replaced(disk: Disk) -> None:
    disk.activate(3, "2")
    disk.held.start()
    serving.eventually(lambda: disk.loaded() == {3: "active", 2: "held"}, "version 2 was loaded")
    now = disk.router.serving("tiny")
    assert now is not None
    serving.kill(now.held[0])
    began = time.monotonic()

    def replaced() -> bool:
        found = disk.router.serving("tiny")
        return found is not None and bool(found.held) and found.held[0].alive

    serving.eventually(replaced, "it was started again")
    assert time.monotonic() - began < 10
    disk.activate(4, "latest:1")
    disk.held.changed()
    left = disk.router.drop_previous("tiny")
    assert left is not None
    left.close(0)
    serving.eventually(lambda: disk.loaded() == {4: "active"}, "the others were ended")


# What clients are told.


def test_the_configuration_tells_the_policy_and_how_the_model_runs(disk: Disk, tmp_path: Path) -> None:
    active = disk.activate(3, "latest:2")
    disk.held.settle()
    found = disk.router.serving("tiny")
    assert found is not None
    config = describe.config(found.held[0], found.workers)
    assert config.version_policy.latest.num_versions == 2
    active.versions = parse("all")
    assert describe.config(active, found.workers).version_policy.WhichOneof("policy_choice") == "all"
    active.versions = parse("1,2")
    assert describe.config(active, found.workers).version_policy.specific.versions == [1, 2]
    active.versions = None
    assert describe.config(active, found.workers).version_policy.specific.versions == [2, 3]
    active.cascade = Cascade("large", threshold=0.5)
    config = describe.config(active, found.workers)
    assert config.parameters["cascade_to"].string_value == "large"
    assert config.parameters["cascade_threshold"].string_value == "0.5"
    for settings, level, xnnpack in (
        ({"path": models.tiny_onnx(tmp_path / "m.onnx"), "optimization": "basic"}, -1, []),
        ({"path": models.tiny_tflite(tmp_path / "m.tflite")}, None, ["xnnpack"]),
        ({"path": models.tiny_tflite(tmp_path / "n.tflite"), "xnnpack": False}, None, []),
    ):
        worker = serving.start_worker(**settings)
        try:
            optimization = describe.config(worker, [worker]).optimization
            assert optimization.HasField("graph") == (level is not None)
            assert optimization.graph.level == (level or 0)
            accelerators = optimization.execution_accelerators.cpu_execution_accelerator
            assert [item.name for item in accelerators] == xnnpack
        finally:
            worker.close(0)
