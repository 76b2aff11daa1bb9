"""One update, end to end, with real processes: control plane, agents, clients that predict throughout."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples
from edge_tests.harness.serving import TritonLoad, eventually
from edge_tests.harness.world import MODEL, World
from sluice.api.v1 import rollouts_pb2, sync_pb2
from updater.digests import digest_file

pytestmark = pytest.mark.e2e
PACE = ("--interval-s", "0.02")  # between two requests: the machine has other work too


def test_full_then_delta_while_clients_predict(tmp_path: Path) -> None:
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box-onnx", runtimes=["onnxruntime"]) as onnx,
        AgentProcess(tmp_path / "b", world.address, "box-lite", runtimes=["litert"]) as lite,
    ):
        world.wait_for_devices("box-onnx", "box-lite")
        first = world.publish_tiny(tflite=True)
        rollout = world.wait_for_end(world.roll_out())
        assert rollout.state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED, rollout
        full = {}
        for agent, form in ((onnx, "onnx"), (lite, "tflite")):
            report = agent.wait_for_version(MODEL, 1)
            variant = first.manifest.variant(report.variant)
            assert variant.format == form
            assert report.active_manifest_digest == first.digest
            assert variant.model_file.digest in report.loaded_digests
            full[agent.device_id] = report.fetch_total_bytes
            assert report.fetched_bytes == report.fetch_total_bytes > variant.model_file.size / 2

        with (
            TritonLoad(onnx.address, MODEL, samples(16), onnx.directory, "--interval-s", "0.02") as to_onnx,
            TritonLoad(lite.address, MODEL, samples(16), lite.directory, "--interval-s", "0.02") as to_lite,
        ):
            world.publish_tiny(change=0.0005, tflite=True)
            rollout = world.wait_for_end(world.roll_out(2))
            assert rollout.state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED, rollout
            for agent, load in ((onnx, to_onnx), (lite, to_lite)):
                report = agent.wait_for_version(MODEL, 2)
                assert report.step == sync_pb2.UPDATE_STEP_COMMITTED
                assert report.previous_version == 1
                assert 0 < report.fetch_total_bytes < full[agent.device_id]
                answered = load.succeeded("2")
                agent.wait_for(lambda _, n=answered, load=load: load.succeeded("2") > n + 5)
        for load in (to_onnx, to_lite):
            assert load.summary["failed"] == 0, load.summary
            assert set(load.summary["versions"]) == {"1", "2"}

        for agent in (onnx, lite):
            status = agent.status()
            assert [worker.version for worker in status.workers] == [2]
            load = to_onnx if agent is onnx else to_lite
            assert status.workers[0].requests == load.summary["versions"]["2"], "checks are not counted"
            assert status.control_connected
            names = sorted(entry.name for entry in (agent.state_dir / "slots" / MODEL / "2").iterdir())
            assert names == sorted([".manifest", ".version", "golden.npz", _model_name(agent)])


def _model_name(agent: AgentProcess) -> str:
    return "model.onnx" if agent.device_id == "box-onnx" else "model.tflite"


def test_a_box_that_was_away_when_the_rollout_began_takes_the_version_when_it_returns(
    tmp_path: Path,
) -> None:
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "here") as here,
        AgentProcess(tmp_path / "b", world.address, "away") as away,
    ):
        world.wait_for_devices("here", "away")
        world.publish_tiny()
        world.wait_for_end(world.roll_out(1))
        away.stop()
        world.publish_tiny(change=0.001)
        rollout = world.roll_out(2)
        here.wait_for_version(MODEL, 2)

        def states() -> dict[str, int]:
            return {item.device_id: item.state for item in world.client.get_rollout(rollout).devices}

        eventually(lambda: states()["here"] == rollouts_pb2.ROLLOUT_DEVICE_STATE_DONE, "one is done")
        assert states()["away"] in (
            rollouts_pb2.ROLLOUT_DEVICE_STATE_WAITING,
            rollouts_pb2.ROLLOUT_DEVICE_STATE_UPDATING,
        )
        assert world.client.get_rollout(rollout).state == rollouts_pb2.ROLLOUT_STATE_RUNNING
        away.start()
        report = away.wait_for_version(MODEL, 2)
        assert report.previous_version == 1
        ended = world.wait_for_end(rollout)
        assert ended.state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED, ended
        assert states() == dict.fromkeys(("here", "away"), rollouts_pb2.ROLLOUT_DEVICE_STATE_DONE)
        held = away.state_dir / "slots" / MODEL / "2" / "model.onnx"
        assert digest_file(held) == digest_file(world.models[2])


def test_the_box_holds_the_published_bytes(tmp_path: Path) -> None:
    with World(tmp_path) as world, AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        for version, change in ((1, 0.0), (2, 0.001)):
            world.publish_tiny(change=change)
            world.roll_out(version)
            agent.wait_for_version(MODEL, version)
            held = agent.state_dir / "slots" / MODEL / str(version) / "model.onnx"
            assert digest_file(held) == digest_file(world.models[version])
            assert {worker.requests for worker in agent.status().workers} == {0}
            world.wait_for_end(world.client.list_rollouts(MODEL).__next__().id)
