"""Changes of version with real workers: shadow, memory, gates, aborts, and what they leave behind."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper

from agent.control import CancelledError
from agent.figures import Timing
from agent.judging import Outcomes
from agent.slots import Installed, Slots
from agent.state import Update
from agent.status_table import render
from agent.swap import Phase
from agent.swap_status import swap_status
from agent.turning import Turner
from agent.worker import Worker
from edge_tests.harness import models, serving
from edge_tests.harness.box import LocalBox
from edge_tests.harness.serving import TritonLoad, eventually
from sluice.api.v1 import admin_pb2, errors_pb2
from updater.errors import SluiceError

SHADOW = {"shadow_percent": "100", "shadow_requests": "60", "shadow_s": "30"}


@pytest.fixture
def box(tmp_path: Path) -> Iterator[LocalBox]:
    """A box that serves version 1."""
    with LocalBox(tmp_path / "box") as made:
        made.serve(1, models.tiny_onnx(tmp_path / "1.onnx"))
        yield made


@pytest.fixture
def load(box: LocalBox, tmp_path: Path) -> Iterator[TritonLoad]:
    """Clients that predict throughout; none of their requests may fail."""
    with TritonLoad(box.address, "tiny", models.samples(8), tmp_path, "--interval-s", "0.005") as running:
        eventually(lambda: running.succeeded() > 20, "predictions came")
        yield running
    assert running.summary["failed"] == 0, running.summary


def one_operator(path: Path, operator: str) -> Path:
    """The tiny network's shapes with y = operator(x)."""
    shape = (TensorProto.FLOAT, ["batch", models.FEATURES])
    node = helper.make_node(operator, ["x"], ["y"])
    return models.write_onnx(path, [node], inputs={"x": shape}, outputs={"y": shape}, constants=[])


def rows_of(value: float) -> dict[str, models.Array]:
    return {"x": np.full((4, models.FEATURES), value, np.float32)}


def children() -> int:
    return len([child for child in psutil.Process().children() if child.name() == "sluice-worker"])


def test_a_shadow_that_agrees_is_activated(box: LocalBox, load: TritonLoad, tmp_path: Path) -> None:
    alike = box.install(2, models.tiny_onnx(tmp_path / "2.onnx", change=0.0001), options=SHADOW)
    assert not box.activate(alike)
    assert box.steps == ["verifying", "warming_up", "shadowing"]
    assert box.state.slots("tiny").active.version == 1  # type: ignore[union-attr]
    seen = box.swap()
    assert (seen.swap.phase, seen.swap.plan.old, seen.swap.plan.version) == (Phase.SHADOWING, 1, 2)
    eventually(lambda: box.ended.get("tiny", "not yet") is None, "the shadow ended")
    eventually(lambda: load.succeeded("2") > 20, "the new version answers")
    assert not box.state.slots("tiny").soaking or box.swap().swap.phase is Phase.SOAKING


def test_a_version_in_shadow_beside_one_that_still_soaks(
    box: LocalBox, load: TritonLoad, tmp_path: Path
) -> None:
    """The soak's comparison gives way to the shadow's, and then to the next soak's."""
    options = {**SHADOW, "soak_s": "60"}
    for version in (2, 3):
        path = models.tiny_onnx(tmp_path / f"{version}.onnx", change=0.0001 * version)
        box.ended.clear()
        assert not box.activate(box.install(version, path, options=options))
        eventually(lambda: box.ended.get("tiny", "not yet") is None, "the shadow ended")
        assert (box.swap().swap.plan.version, box.swap().swap.phase) == (version, Phase.SOAKING)

    def compared() -> int:
        likeness = box.swap().likeness
        return 0 if likeness is None else likeness.compared

    eventually(lambda: compared() > 20, "the last soak compares")
    assert box.state.slots("tiny").previous.version == 2  # type: ignore[union-attr]
    eventually(lambda: children() == 2, "only two workers are left")


def test_a_soak_after_a_shadow_goes_back_when_answers_begin_to_differ(box: LocalBox, tmp_path: Path) -> None:
    """In shadow the clients ask what both versions answer alike; later they ask something else."""
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    calm.mkdir()
    wild.mkdir()
    options = {**SHADOW, "soak_s": "60"}
    box.serve(3, one_operator(tmp_path / "3.onnx", "Identity"))
    second = box.install(2, one_operator(tmp_path / "2.onnx", "Abs"), options=options)
    with TritonLoad(box.address, "tiny", rows_of(1.0), calm, "--interval-s", "0.005") as load:
        assert not box.activate(second)
        eventually(lambda: load.succeeded("2") > 70, "the new version answers")
    assert box.swap().swap.mirroring
    with TritonLoad(box.address, "tiny", rows_of(-1.0), wild, "--interval-s", "0.005") as load:
        eventually(lambda: box.answers() == 3, "the box went back")
    assert load.summary["failed"] == 0
    record = box.state.updates()["tiny"]
    assert (record.reason, record.reverted) == (errors_pb2.SOAK_FAILED, True)
    assert "live requests got another answer than from the version before" in record.message
    eventually(lambda: children() == 1, "the version that was left ended")


def test_a_shadow_that_differs_is_given_up(box: LocalBox, load: TritonLoad, tmp_path: Path) -> None:
    other = box.install(2, models.tiny_onnx(tmp_path / "2.onnx", seed=9), options=SHADOW)
    assert not box.activate(other)
    eventually(lambda: "tiny" in box.ended, "the shadow ended")
    error = box.ended["tiny"]
    assert isinstance(error, SluiceError)
    assert error.reason == errors_pb2.SHADOW_MISMATCH
    assert "got another answer than from the version before (y: cosine" in error.message
    assert (box.answers(), children()) == (1, 1)
    assert load.succeeded("2") == 0


def test_a_shadow_whose_worker_dies_is_given_up(box: LocalBox, tmp_path: Path) -> None:
    prepared = box.install(2, models.tiny_onnx(tmp_path / "2.onnx"), options=SHADOW)
    assert not box.activate(prepared)
    (victim,) = [
        child.pid
        for child in psutil.Process().children()
        if child.pid != box.router.models()[0].active.pid and child.name() == "sluice-worker"
    ]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: "tiny" in box.ended, "the shadow ended")
    assert isinstance(error := box.ended["tiny"], SluiceError)
    assert error.reason == errors_pb2.WORKER_DIED
    assert box.answers() == 1


def test_a_shadow_that_hangs_holds_up_nobody(box: LocalBox, load: TritonLoad, tmp_path: Path) -> None:
    """Its queue fills and copies are dropped; callers notice nothing."""
    prepared = box.install(2, models.tiny_onnx(tmp_path / "2.onnx"), options=SHADOW)
    assert not box.activate(prepared)
    (victim,) = [
        child.pid
        for child in psutil.Process().children()
        if child.pid != box.router.models()[0].active.pid and child.name() == "sluice-worker"
    ]
    os.kill(victim, signal.SIGSTOP)
    answered = load.succeeded()

    def dropped() -> bool:
        likeness = box.swap().likeness
        return likeness is not None and likeness.dropped > 20

    eventually(dropped, "copies were dropped")
    assert load.succeeded() >= answered + 20
    os.kill(victim, signal.SIGCONT)
    eventually(lambda: box.ended.get("tiny", "not yet") is None, "the shadow went on and ended")


def test_memory_that_does_not_suffice_is_refused(box: LocalBox, load: TritonLoad, tmp_path: Path) -> None:
    box.activator._swaps._actions._available = lambda: 1 << 20
    prepared = box.install(2, models.tiny_onnx(tmp_path / "2.onnx"))
    with pytest.raises(SluiceError, match=r"needs about [0-9]+ MiB beside version 1; 1 MiB are") as caught:
        box.activate(prepared)
    assert caught.value.reason == errors_pb2.MEMORY_SHORT
    assert (box.answers(), children()) == (1, 1)


def test_stop_then_start_makes_requests_wait_and_measures_the_gap(
    box: LocalBox, load: TritonLoad, tmp_path: Path
) -> None:
    box.activator._swaps._actions._available = lambda: 1 << 20
    options = {"memory_short": "stop-then-start"}
    assert box.activate(box.install(2, models.tiny_onnx(tmp_path / "2.onnx", seed=2), options=options))
    eventually(lambda: load.succeeded("2") > 5, "the new version answers")
    assert 0.05 < box.activator.loaded()["tiny"].gap_s < 5
    assert children() == 1


def test_stop_then_start_of_a_version_that_fails_starts_the_old_one_again(
    box: LocalBox, load: TritonLoad, tmp_path: Path
) -> None:
    box.activator._swaps._actions._available = lambda: 1 << 20
    options = {"memory_short": "stop-then-start"}
    bad = box.install(2, models.unknown_operator_onnx(tmp_path / "2.onnx"), options=options)
    before = load.succeeded()
    with pytest.raises(SluiceError) as caught:
        box.activate(bad)
    assert caught.value.reason == errors_pb2.MODEL_LOAD_FAILED
    assert box.answers() == 1
    eventually(lambda: load.succeeded() > before + 20, "the old version answers again")
    assert box.activator.loaded()["tiny"].gap_s > 0.05
    assert children() == 1


def test_an_old_version_that_cannot_be_started_again_is_left_to_the_supervisor(
    box: LocalBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Turner, model: str, _installed: Installed) -> Worker:
        raise SluiceError(errors_pb2.IO_FAILED, f"{model} cannot be read just now")

    box.activator._swaps._actions._available = lambda: 1 << 20
    options = {"memory_short": "stop-then-start"}
    bad = box.install(2, models.unknown_operator_onnx(tmp_path / "2.onnx"), options=options)
    monkeypatch.setattr(Turner, "bring_up", refuse)
    with pytest.raises(SluiceError) as caught:
        box.activate(bad)
    assert caught.value.reason == errors_pb2.MODEL_LOAD_FAILED
    (ended,) = box.activator.swaps()
    assert ended.swap.phase is Phase.STRANDED
    eventually(lambda: box.answers() == 1, "the supervisor started it")
    assert box.state.slots("tiny").active.version == 1  # type: ignore[union-attr]


def test_a_worker_that_dies_between_commit_and_turn_undoes_the_commit(
    box: LocalBox, load: TritonLoad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = box.state.save

    def save_and_kill(slots: Slots, update: Update | None = None) -> None:
        save(slots, update)
        if update is not None and slots.active is not None and slots.active.version == 2:
            (victim,) = [
                child
                for child in psutil.Process().children()
                if child.pid != box.router.models()[0].active.pid and child.name() == "sluice-worker"
            ]
            victim.kill()
            eventually(lambda: not victim.is_running(), "it died, and was reaped")

    monkeypatch.setattr(box.state, "save", save_and_kill)
    with pytest.raises(SluiceError) as caught:
        box.activate(box.install(2, models.tiny_onnx(tmp_path / "2.onnx", seed=2)))
    assert caught.value.reason == errors_pb2.WORKER_DIED
    assert box.answers() == 1
    assert box.state.slots("tiny").active.version == 1  # type: ignore[union-attr]
    assert [phase.value for phase, _ in box.activator.swaps()[0].passed][-3:] == [
        *("committing", "turning", "undoing")
    ]


def test_a_soak_that_fails_requests_goes_back(tmp_path: Path) -> None:
    """Version 2 wants other inputs than the clients send: it loads, and fails every request."""
    with LocalBox(tmp_path / "box", soak_s=30.0, soak_requests=20) as box:
        first = box.install(1, models.tiny_onnx(tmp_path / "1.onnx"), options={"soak_s": "0"})
        assert box.activate(first)
        eventually(lambda: not box.state.slots("tiny").soaking, "the first version settled")
        other = serving.slow_onnx(tmp_path / "2.onnx")  # inputs x [-1, 2] and steps
        with TritonLoad(box.address, "tiny", models.samples(8), tmp_path, "--interval-s", "0.005") as load:
            eventually(lambda: load.succeeded("1") > 50, "the old version has figures")
            assert box.activate(box.install(2, other))
            eventually(lambda: box.answers() == 1, "the box went back")
            answered = load.succeeded()
            eventually(lambda: load.succeeded() > answered + 20, "the old version answers")
        record = box.state.updates()["tiny"]
        assert (record.version, record.reverted, record.final) == (2, True, True)
        assert record.reason == errors_pb2.SOAK_FAILED
        assert "requests failed; of those before it 0.0% did" in record.message
        assert 20 <= len(load.failed()) < 500
        assert box.under_way() == []


def test_a_soak_that_is_slower_goes_back_and_one_worker_is_left(tmp_path: Path) -> None:
    with LocalBox(tmp_path / "box", soak_s=30.0, soak_requests=5, keep_previous="disk") as box:
        path = serving.slow_onnx(tmp_path / "1.onnx")
        assert box.activate(box.install(1, path))
        first = box.router.models()[0].active
        steps = serving.steps_for(first, 0.03)
        for _ in range(20):
            first.figures.answered(1, Timing(infer_s=0.001))
        assert box.activate(box.install(2, path, options={"threads": "1"}))
        eventually(lambda: children() == 1, "the old worker ended at once")
        second = box.router.models()[0].active
        for _ in range(20):
            _, timing = second.run([second.check(serving.slow_inputs(0, steps))], 10)
            second.figures.answered(1, timing)
        eventually(lambda: box.answers() == 1, "the box went back, from disk")
        assert "of the version before up to 1.0 ms" in box.state.updates()["tiny"].message
        eventually(lambda: children() == 1, "the slower one ended")


@pytest.mark.parametrize("slow", [True, False], ids=["loading", "shadowing"])
def test_an_activation_that_is_no_longer_wanted_ends(box: LocalBox, tmp_path: Path, slow: bool) -> None:
    if slow:
        pipe = tmp_path / "2.onnx"
        prepared = box.install(2, models.tiny_onnx(pipe))
        path = prepared.directory / "2.onnx"
        path.unlink()
        os.mkfifo(path)  # hashing it waits for a writer, then loading it waits for ever
        attempt = box.in_thread(prepared)
        writer = threading.Thread(target=lambda: path.write_bytes(pipe.read_bytes()))
        writer.start()
        eventually(lambda: children() == 2, "the new worker loads")
        writer.join()
        box.activator.abort("tiny", unless=prepared.installed.manifest_digest)
        assert children() == 2
        box.activator.abort("tiny")
        assert isinstance(attempt.join().error, CancelledError)
    else:
        assert not box.activate(box.install(2, models.tiny_onnx(tmp_path / "2.onnx"), options=SHADOW))
        box.activator.abort("tiny")
        eventually(lambda: isinstance(box.ended.get("tiny"), CancelledError), "the shadow ended")
    eventually(lambda: children() == 1, "the new worker ended")
    assert box.answers() == 1
    assert box.state.slots("tiny").active.version == 1  # type: ignore[union-attr]
    assert box.activate(box.install(3, models.tiny_onnx(tmp_path / "3.onnx", seed=3)))


def test_an_administrator_ends_a_shadow_and_goes_back(box: LocalBox, tmp_path: Path) -> None:
    box.serve(2, models.tiny_onnx(tmp_path / "2.onnx", seed=2))
    assert not box.activate(box.install(3, models.tiny_onnx(tmp_path / "3.onnx"), options=SHADOW))
    assert box.activator.revert("tiny", pin=True) == (2, 1)
    assert isinstance(box.ended["tiny"], CancelledError)
    assert (box.answers(), box.state.slots("tiny").pinned) == (1, True)
    eventually(lambda: children() == 1, "the others ended")


def test_the_status_says_that_a_version_was_left_after_its_soak(box: LocalBox, tmp_path: Path) -> None:
    def shown() -> str:
        swaps = [swap_status(seen) for seen in box.activator.swaps()]
        return render(admin_pb2.GetStatusResponse(swaps=swaps))

    box.serve(2, models.tiny_onnx(tmp_path / "2.onnx", seed=2))
    eventually(lambda: "tiny 1 -> 2: committed" in shown(), "it has proven itself")
    assert box.activator.revert("tiny", pin=True) == (2, 1)
    assert "tiny 1 -> 2: reverted, " in shown()
    assert "committed" not in shown().replace("committing", "")
    assert "proving" in shown()  # what it had been through is told still
    box.serve(3, models.tiny_onnx(tmp_path / "3.onnx", seed=3))
    eventually(lambda: "tiny 1 -> 3: committed" in shown(), "so has the next")
    box.activator._swaps._last.clear()  # as after a start of the agent
    box.activator.crash_looped("tiny")
    assert "tiny 1 -> 3: reverted, " in shown()
    assert "the worker of tiny@3 kept dying" in shown()
    assert box.answers() == 1


def test_a_revert_in_the_soak_uses_the_warm_worker(tmp_path: Path) -> None:
    with LocalBox(tmp_path / "box", serve=False, soak_s=30.0) as box:
        assert box.activate(box.install(1, models.tiny_onnx(tmp_path / "1.onnx")))
        warm = box.router.models()[0].active.pid
        assert box.activate(box.install(2, models.tiny_onnx(tmp_path / "2.onnx", seed=2)))
        assert box.swap().swap.phase is Phase.SOAKING
        assert box.activator.revert("tiny", pin=True) == (2, 1)
        assert box.router.models()[0].active.pid == warm
        assert box.under_way() == []
        with pytest.raises(SluiceError) as caught:
            box.activator.revert("tiny", pin=True)
        assert caught.value.reason == errors_pb2.NO_PREVIOUS_VERSION


def test_a_commit_that_the_disk_refuses_leaves_the_old_version(
    box: LocalBox, load: TritonLoad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = box.install(2, models.tiny_onnx(tmp_path / "2.onnx", seed=2))
    box.activator.stage(prepared, "tiny")
    blocker = sqlite3.connect(box.state.path, isolation_level=None)
    monkeypatch.setattr("agent.state._BUSY_TIMEOUT_S", 0.1)
    box.state._db.execute("PRAGMA busy_timeout = 100")
    blocker.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(SluiceError) as caught:
            box.activate(prepared)
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    assert caught.value.reason == errors_pb2.IO_FAILED
    assert (box.answers(), children()) == (1, 1)
    box.state._db.execute("PRAGMA busy_timeout = 10000")
    assert box.activate(prepared)
    assert box.answers() == 2


def test_outcomes_are_those_of_the_latest_requests(box: LocalBox, load: TritonLoad) -> None:
    worker = box.router.models()[0].active
    eventually(lambda: worker.figures.latest().requests > 30, "requests were counted")
    seen = worker.figures.latest()
    assert seen.failures == 0
    assert 0 < seen.times.median_s <= seen.times.p95_s < 1
    worker.figures.failed(0.1)
    worker.figures.failed(0.1, judged=False)
    assert worker.figures.latest().failures == 1
    assert np.isclose(Outcomes(10, 1).error_share, 0.1)
