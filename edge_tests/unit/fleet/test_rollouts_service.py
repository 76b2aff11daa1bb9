"""Rollouts over gRPC, with devices whose streams the test drives."""

from __future__ import annotations

from typing import Any

import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import (
    Device,
    Operator,
    devices,
    eventually,
    failing,
    onnx_model,
    running,
)
from sluice.api.v1 import devices_pb2, errors_pb2, registry_pb2, rollouts_pb2, sync_pb2
from sluice.api.v1.rollouts_pb2 import RolloutDeviceState, RolloutState
from updater.manifest import Manifest


@pytest.fixture
def versions(operator: Operator) -> tuple[Manifest, Manifest]:
    return operator.push("digits", 1, onnx_model(1)), operator.push("digits", 2, onnx_model(2))


def create(operator: Operator, version: int = 0, *ids: str, **phase: Any) -> rollouts_pb2.Rollout:
    wanted = rollouts_pb2.Phase(selector=devices_pb2.Selector(device_ids=ids), **phase)
    return operator.rollouts.CreateRollout(
        rollouts_pb2.CreateRolloutRequest(model="digits", version=version, phases=[wanted])
    )


def get(operator: Operator, rollout: rollouts_pb2.Rollout) -> rollouts_pb2.Rollout:
    return operator.rollouts.GetRollout(rollouts_pb2.GetRolloutRequest(id=rollout.id))


def states(rollout: rollouts_pb2.Rollout) -> list[str]:
    names = [RolloutDeviceState.Name(device.state) for device in rollout.devices]
    return [name.removeprefix("ROLLOUT_DEVICE_STATE_") for name in names]


def ended(operator: Operator, rollout: rollouts_pb2.Rollout) -> rollouts_pb2.Rollout:
    return eventually(
        lambda: (now := get(operator, rollout)).state != rollouts_pb2.ROLLOUT_STATE_RUNNING and now,
        "the rollout's end",
    )


def test_a_rollout_reaches_online_devices_at_once_and_ends_when_all_report(
    control: ControlPlane, operator: Operator, versions: tuple[Manifest, Manifest]
) -> None:
    with devices(control.address, "box-1", "box-2") as boxes:
        boxes[0].report(running(versions[0]))
        eventually(
            lambda: operator.devices.GetDevice(devices_pb2.GetDeviceRequest(id="box-1")).reported.models,
            "the first report",
        )
        rollout = create(operator)
        assert (rollout.version, states(rollout)) == (2, ["WAITING", "WAITING"])
        assert [device.from_version for device in rollout.devices] == [1, 0]
        for box in boxes:
            wanted = box.next_desired()
            assert wanted.generation == 1
            assert list(wanted.models) == [
                sync_pb2.DesiredModel(
                    model="digits", version=2, manifest_digest=versions[1].digest, rollout_id=rollout.id
                )
            ]
        watch = operator.rollouts.WatchRollout(rollouts_pb2.WatchRolloutRequest(id=rollout.id), timeout=60)
        assert states(next(watch)) == ["WAITING", "WAITING"]
        boxes[0].report(
            running(
                versions[0],
                target_version=2,
                step=sync_pb2.UPDATE_STEP_FETCHING,
                fetched_bytes=100,
                fetch_total_bytes=200,
            )
        )
        seen = next(watch)
        assert states(seen) == ["UPDATING", "WAITING"]
        assert (seen.devices[0].fetched_bytes, seen.devices[0].fetch_total_bytes) == (100, 200)
        boxes[0].report(running(versions[1]))
        boxes[1].report(running(versions[1]))
        last = list(watch)[-1]
        assert (states(last), last.state) == (["DONE", "DONE"], rollouts_pb2.ROLLOUT_STATE_SUCCEEDED)
        assert last == get(operator, rollout)
    with Device(control.address, "box-1") as box:  # what is desired stays desired
        assert [model.version for model in box.desired.models] == [2]


def test_a_final_failure_fails_the_rollout_and_devices_go_back(
    control: ControlPlane, operator: Operator, versions: tuple[Manifest, Manifest]
) -> None:
    with devices(control.address, "box-1", "box-2") as boxes:
        for box in boxes:
            box.report(running(versions[0]))
        first = create(operator, 1)
        for box in boxes:
            box.next_desired()
            box.report(running(versions[0]))
        assert ended(operator, first).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED
        second = create(operator, 2)
        for box in boxes:
            assert box.next_desired().models[0].version == 2
        boxes[0].report(
            running(
                versions[0],
                step=sync_pb2.UPDATE_STEP_REVERTED,
                failure=sync_pb2.UpdateFailure(
                    version=2, reason=errors_pb2.GOLDEN_MISMATCH, message="cosine 0.2", attempts=1, final=True
                ),
            )
        )
        result = ended(operator, second)
        assert result.state == rollouts_pb2.ROLLOUT_STATE_FAILED
        assert states(result) == ["FAILED", "ABORTED"]
        assert result.devices[0].reason == errors_pb2.GOLDEN_MISMATCH
        assert result.devices[0].message == "cosine 0.2"
        for box in boxes:
            wanted = box.next_desired()
            assert [(model.version, model.rollout_id) for model in wanted.models] == [(1, "")]
            assert wanted.generation == 3


def test_a_silent_device_fails_the_rollout(
    control: ControlPlane, operator: Operator, versions: tuple[Manifest, Manifest]
) -> None:
    operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id="box-1")))
    result = ended(operator, create(operator, 2, deadline_s=1))
    assert result.state == rollouts_pb2.ROLLOUT_STATE_FAILED
    assert result.devices[0].reason == errors_pb2.DEVICE_SILENT
    answer = operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id="box-1")))
    assert not answer.desired.models


def test_an_abort_with_revert_sends_finished_devices_back_too(
    control: ControlPlane, operator: Operator, versions: tuple[Manifest, Manifest]
) -> None:
    with devices(control.address, "box-1", "box-2") as boxes:
        boxes[0].report(running(versions[0]))
        eventually(
            lambda: operator.devices.GetDevice(devices_pb2.GetDeviceRequest(id="box-1")).reported.models,
            "the first report",
        )
        rollout = create(operator, 2)
        for box in boxes:
            box.next_desired()
        boxes[0].report(running(versions[1]))
        eventually(lambda: "DONE" in states(get(operator, rollout)), "the first device")
        request = rollouts_pb2.AbortRolloutRequest(id=rollout.id, revert=True, why="a hunch")
        result = operator.rollouts.AbortRollout(request)
        assert (result.state, states(result)) == (rollouts_pb2.ROLLOUT_STATE_ABORTED, ["DONE", "ABORTED"])
        assert "a hunch" in result.verdict
        assert [model.version for model in boxes[0].next_desired().models] == [1]
        assert not boxes[1].next_desired().models  # it ran nothing before, and is left as it is
        assert failing(lambda: operator.rollouts.AbortRollout(request)).code == "ROLLOUT_STATE"


def test_a_restart_resumes_a_running_rollout(control: ControlPlane) -> None:
    with Operator(control.address) as operator:
        wanted = operator.push("digits", 1, onnx_model(1))
        operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id="box-1")))
        rollout = create(operator)
    control.kill()
    control.start()
    with Operator(control.address) as operator, Device(control.address, "box-1") as box:
        assert box.desired.models[0].rollout_id == rollout.id
        box.report(running(wanted))
        assert ended(operator, rollout).state == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED


def test_devices_that_register_later_belong_to_the_next_rollout(
    control: ControlPlane, operator: Operator, versions: tuple[Manifest, Manifest]
) -> None:
    operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id="box-1")))
    rollout = create(operator)
    with Device(control.address, "box-2") as late:
        assert not late.desired.models
        late.report(running(versions[1]))
    assert [device.device_id for device in get(operator, rollout).devices] == ["box-1"]


def test_what_cannot_be_rolled_out_has_its_code(
    control: ControlPlane, operator: Operator, versions: tuple[Manifest, Manifest]
) -> None:
    assert failing(lambda: create(operator)).code == "ROLLOUT_EMPTY"
    operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id="box-1")))
    assert failing(lambda: create(operator, 3)).code == "VERSION_UNKNOWN"
    assert failing(lambda: create(operator, 2, "box-9")).code == "REQUEST_INVALID"
    assert failing(lambda: create(operator, 2, max_failed_percent=101)).code == "REQUEST_INVALID"
    unknown = rollouts_pb2.CreateRolloutRequest(model="letters")
    assert failing(lambda: operator.rollouts.CreateRollout(unknown)).code == "MODEL_UNKNOWN"
    two = rollouts_pb2.CreateRolloutRequest(model="digits", phases=[rollouts_pb2.Phase()] * 2)
    error = failing(lambda: operator.rollouts.CreateRollout(two))
    assert (error.code, "exactly one" in error.message) == ("REQUEST_INVALID", True)
    operator.registry.RetireVersion(registry_pb2.RetireVersionRequest(model="digits", version=2))
    assert failing(lambda: create(operator, 2)).code == "VERSION_RETIRED"
    rollout = create(operator, 1)
    assert failing(lambda: create(operator, 1)).code == "ROLLOUT_STATE"
    nobody = rollouts_pb2.GetRolloutRequest(id="nobody")
    assert failing(lambda: operator.rollouts.GetRollout(nobody)).code == "ROLLOUT_UNKNOWN"
    watch = rollouts_pb2.WatchRolloutRequest(id="nobody")
    assert failing(lambda: list(operator.rollouts.WatchRollout(watch))).code == "ROLLOUT_UNKNOWN"
    listed = operator.rollouts.ListRollouts(rollouts_pb2.ListRolloutsRequest())
    assert [(entry.id, len(entry.devices)) for entry in listed.rollouts] == [(rollout.id, 0)]
    assert RolloutState.Name(listed.rollouts[0].state) == "ROLLOUT_STATE_RUNNING"
