"""Versions that cannot work: the running one keeps serving, the reason is reported, nothing is retried."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import (
    golden,
    hanging_onnx,
    samples,
    tiny_onnx,
    tiny_tflite,
    unknown_operator_onnx,
)
from edge_tests.harness.serving import TritonLoad, eventually
from edge_tests.harness.world import MODEL, World
from fleet.recipe import VariantRecipe
from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2

pytestmark = pytest.mark.e2e


class Setting(NamedTuple):
    world: World
    agent: AgentProcess
    directory: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A box that serves a good version, and clients that predict throughout."""
    directory = tmp_path_factory.mktemp("bad")
    with (
        World(directory) as world,
        AgentProcess(
            directory / "a",
            world.address,
            "box",
            runtimes=["onnxruntime"],
            settings={"update.load_deadline_s": 4, "update.soak_s": 0.2},
        ) as agent,
    ):
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out())
        with TritonLoad(agent.address, MODEL, samples(8), directory, "--interval-s", "0.05") as load:
            yield Setting(world, agent, directory)
        assert load.summary["failed"] == 0, load.summary
        assert load.summary["requests"] > 20


def refused(setting: Setting, variant: VariantRecipe, reason: int) -> sync_pb2.UpdateFailure:
    """Rolls a version out and checks that it is refused for this reason while the old one serves."""
    before = setting.agent.model(MODEL).active_version
    published = setting.world.publish(variant)
    version = published.manifest.version
    rollout = setting.world.roll_out(version)
    report = setting.agent.wait_for_model(
        MODEL, lambda item: item.failure.final and item.failure.version == version
    )
    assert report.failure.reason == reason, report.failure
    assert report.active_version == before
    assert report.healthy
    ended = setting.world.wait_for_end(rollout)
    assert ended.state == rollouts_pb2.ROLLOUT_STATE_FAILED
    assert ended.devices[0].reason == reason
    # The control plane sends the box back to what it runs: nothing more happens; the reason stays on record.
    setting.agent.wait_for(lambda status: status.desired.models[0].version == before)
    assert setting.agent.model(MODEL).failure == report.failure
    assert [worker.version for worker in setting.agent.status().workers][:1] == [before]
    return report.failure


def test_model_that_the_runtime_refuses(setting: Setting, tmp_path: Path) -> None:
    failure = refused(
        setting, VariantRecipe(unknown_operator_onnx(tmp_path / "m.onnx")), errors_pb2.MODEL_LOAD_FAILED
    )
    assert "Frobnicate" in failure.message
    assert failure.attempts == 1


def test_model_that_never_answers(setting: Setting, tmp_path: Path) -> None:
    refused(setting, VariantRecipe(hanging_onnx(tmp_path / "m.onnx")), errors_pb2.WARM_UP_FAILED)


def test_golden_outputs_that_differ(setting: Setting, tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "m.onnx", seed=7)
    other = tiny_onnx(tmp_path / "other.onnx", seed=8)
    answers = golden(tmp_path / "golden.npz", other, samples(8))
    failure = refused(setting, VariantRecipe(model, golden=answers), errors_pb2.GOLDEN_MISMATCH)
    assert "cosine" in failure.message


def test_no_variant_for_this_box(setting: Setting, tmp_path: Path) -> None:
    model = tiny_tflite(tmp_path / "m.tflite")
    failure = refused(setting, VariantRecipe(model, name="lite"), errors_pb2.NO_COMPATIBLE_VARIANT)
    assert "lite: no runtime on this box reads tflite" in failure.message


def test_good_version_after_bad_ones(setting: Setting) -> None:
    version = setting.world.publish_tiny(change=0.001).manifest.version
    rollout = setting.world.wait_for_end(setting.world.roll_out(version))
    assert rollout.state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED
    assert not setting.agent.model(MODEL).HasField("failure")
    assert not list((setting.agent.state_dir / "store" / "staging").iterdir())


def test_crash_loop_goes_back(setting: Setting, tmp_path: Path) -> None:
    """On a box of its own: requests that run in a worker that is killed do fail."""
    before = setting.agent.model(MODEL)
    with AgentProcess(
        tmp_path / "b", setting.world.address, "other", settings={"update.soak_s": 0.2}
    ) as agent:
        setting.world.wait_for_devices("other")
        for version in (1, before.active_version):
            setting.world.wait_for_end(setting.world.roll_out(version, ["other"]))
        for _ in range(3):
            victim = agent.wait_for_version(MODEL, before.active_version) and agent.workers()[0]
            os.kill(victim, signal.SIGKILL)
            eventually(lambda victim=victim: victim not in agent.workers(), "the worker was replaced")
        report = agent.wait_for_model(MODEL, lambda item: item.step == sync_pb2.UPDATE_STEP_REVERTED)
        assert report.active_version == 1
        assert report.healthy
        assert report.failure.reason == errors_pb2.WORKER_DIED
        assert report.failure.final
        assert report.failure.version == before.active_version
        agent.restart()
        assert agent.wait_for_version(MODEL, 1).step == sync_pb2.UPDATE_STEP_REVERTED


def test_a_version_that_outgrows_its_memory_over_and_over_is_left(setting: Setting, tmp_path: Path) -> None:
    """No request fails for it: not in the renewals, nor when the box goes back."""
    good = setting.agent.model(MODEL).active_version
    settings = {"update.soak_s": 0.2}
    with AgentProcess(tmp_path / "b", setting.world.address, "small", settings=settings) as agent:
        setting.world.wait_for_devices("small")
        setting.world.wait_for_end(setting.world.roll_out(good, ["small"]))
        with TritonLoad(agent.address, MODEL, samples(8), tmp_path, "--interval-s", "0.05") as load:
            variant = VariantRecipe(
                tiny_onnx(tmp_path / "greedy.onnx", seed=9), options={"process_memory_bytes": "1000000"}
            )
            bad = setting.world.publish(variant).manifest.version
            setting.world.roll_out(bad, ["small"])
            agent.wait_for_version(MODEL, bad)
            renewed = agent.wait_for(lambda found: any(item.renewals for item in found.workers))
            agent.wait_for_model(MODEL, lambda item: item.step == sync_pb2.UPDATE_STEP_REVERTED)
        assert load.summary["failed"] == 0, load.summary
        assert {item.memory_limit_bytes for item in renewed.workers if item.renewals} == {1_000_000}
        report = agent.model(MODEL)
        assert (report.active_version, report.healthy) == (good, True)
        assert (report.failure.reason, report.failure.version) == (errors_pb2.WORKER_DIED, bad)
        assert "outgrew its memory over and over" in report.failure.message
