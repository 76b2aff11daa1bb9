"""`sluice device list` shows drift at a glance: what a device runs beside what it should run, and why not."""

from __future__ import annotations

import pytest

from fleet.cli.device import _link, _models
from sluice.api.v1 import devices_pb2, errors_pb2, sync_pb2


def device(active: int, wanted: int, **reported: object) -> devices_pb2.Device:
    entry = sync_pb2.ReportedModel(model="m", active_version=active, healthy=True, **reported)  # type: ignore[arg-type]
    desired = [sync_pb2.DesiredModel(model="m", version=wanted)] if wanted else []
    return devices_pb2.Device(
        desired=sync_pb2.DesiredState(models=desired), reported=sync_pb2.ReportedState(models=[entry])
    )


GIVEN_UP = sync_pb2.UpdateFailure(version=2, reason=errors_pb2.GOLDEN_MISMATCH, final=True)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (device(2, 2), "m@2"),
        (device(2, 0), "m@2"),
        (device(1, 3, pinned_version=1), "m@1 (pinned, wants 3)"),
        (device(1, 2, failure=GIVEN_UP), "m@1 (wants 2: GOLDEN_MISMATCH)"),
        (device(1, 3, failure=GIVEN_UP), "m@1 (wants 3)"),
        (device(1, 2, target_version=2, step=sync_pb2.UPDATE_STEP_FETCHING), "m@1>2 fetching"),
        (device(0, 1), "m@- (wants 1)"),
        # A rollout that failed sends a device back to what it ran, or to nothing: why stays to be seen.
        (device(1, 1, failure=GIVEN_UP), "m@1 (not 2: GOLDEN_MISMATCH)"),
        (device(0, 0, failure=GIVEN_UP), "m@- (not 2: GOLDEN_MISMATCH)"),
        (device(2, 2, failure=GIVEN_UP), "m@2"),
    ],
)
def test_drift_is_shown_with_its_reason(found: devices_pb2.Device, text: str) -> None:
    assert _models(found) == [text]


def test_one_that_was_put_out_says_so() -> None:
    assert _link(devices_pb2.Device(online=True)) == "online"
    assert _link(devices_pb2.Device(state=devices_pb2.DEVICE_STATE_ACCEPTED)) == "offline"
    assert _link(devices_pb2.Device(state=devices_pb2.DEVICE_STATE_REVOKED)) == "revoked"


def test_an_unhealthy_and_a_missing_model_are_shown() -> None:
    found = device(1, 1)
    found.reported.models[0].healthy = False
    found.desired.models.add(model="other", version=4)
    assert _models(found) == ["m@1 (unhealthy)", "other@- (wants 4)"]
