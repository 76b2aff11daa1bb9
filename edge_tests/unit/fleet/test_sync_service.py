"""The Sync stream and Poll, devices and labels, over gRPC."""

from __future__ import annotations

import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Device, Operator, eventually, failing, manifest, onnx_model, running
from sluice.api.v1 import devices_pb2, errors_pb2, sync_pb2


def get(operator: Operator, device_id: str) -> devices_pb2.Device:
    return operator.devices.GetDevice(devices_pb2.GetDeviceRequest(id=device_id))


def test_a_device_registers_with_its_first_hello(control: ControlPlane, operator: Operator) -> None:
    assert failing(lambda: get(operator, "box-1")).code == "DEVICE_UNKNOWN"
    with Device(control.address, "box-1", labels={"site": "mill"}) as device:
        assert device.welcome.heartbeat_interval_ms == 30_000
        assert device.welcome.poll_interval_ms == 60_000
        assert device.welcome.server_time.seconds > 1_700_000_000
        assert device.desired == sync_pb2.DesiredState(generation=0)
        found = get(operator, "box-1")
        assert (found.state, found.online) == (devices_pb2.DEVICE_STATE_ACCEPTED, True)
        assert found.labels == {"site": "mill"}
    eventually(lambda: not get(operator, "box-1").online, "the device offline")


@pytest.mark.parametrize("device_id", ["", "-box", "a/b", "x" * 65, "büchse"])
def test_a_bad_device_id_is_refused(control: ControlPlane, device_id: str) -> None:
    device = Device(control.address, device_id)
    assert device.ended().code == "DEVICE_ID_INVALID"


def test_a_stream_must_begin_with_hello_and_say_it_once(control: ControlPlane) -> None:
    def silence():  # type: ignore[no-untyped-def]
        return iter([sync_pb2.ConnectRequest(reported=sync_pb2.ReportedState())])

    with Operator(control.address) as operator:
        assert failing(lambda: list(operator.sync.Connect(silence()))).code == "REQUEST_INVALID"
        assert failing(lambda: list(operator.sync.Connect(iter([])))).code == "REQUEST_INVALID"
    with Device(control.address, "box-1") as device:
        device.send(sync_pb2.ConnectRequest(hello=device.hello))
        assert device.ended().code == "REQUEST_INVALID"


def test_what_a_device_reports_can_be_read_and_survives_a_crash(
    control: ControlPlane, operator: Operator
) -> None:
    said = running(manifest("digits", 1, onnx_model(1)))
    with Device(control.address, "box-1") as device:
        device.report(said)
        eventually(lambda: list(get(operator, "box-1").reported.models) == [said], "the report")
    control.kill()
    control.start()
    with Operator(control.address) as again:
        assert list(get(again, "box-1").reported.models) == [said]


def test_a_newer_stream_of_the_same_device_takes_over(control: ControlPlane, operator: Operator) -> None:
    with Device(control.address, "box-1") as older:
        with Device(control.address, "box-1") as newer:
            assert "took over" in older.ended().message
            assert get(operator, "box-1").online
            newer.report(sync_pb2.ReportedModel(model="digits", active_version=3))
            eventually(lambda: get(operator, "box-1").reported.models, "the newer one's report")
        eventually(lambda: not get(operator, "box-1").online, "the device offline")


def test_a_silent_stream_is_ended(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with (
        ControlPlane(tmp_path / "control", "--heartbeat-interval-ms", "200") as control,
        Operator(control.address) as operator,
        Device(control.address, "box-1") as device,
    ):
        assert device.ended().code == "DEVICE_SILENT"
        assert not get(operator, "box-1").online


def test_a_poll_does_what_a_stream_does(operator: Operator) -> None:
    said = running(manifest("digits", 1, onnx_model(1)))
    request = sync_pb2.PollRequest(
        hello=sync_pb2.Hello(device_id="box-1", agent_version="0.1.0"),
        reported=sync_pb2.ReportedState(models=[said]),
    )
    answer = operator.sync.Poll(request)
    assert answer.welcome.poll_interval_ms == 60_000
    found = get(operator, "box-1")
    assert (list(found.reported.models), found.online) == ([said], False)
    assert failing(lambda: operator.sync.Poll(sync_pb2.PollRequest())).code == "DEVICE_ID_INVALID"


def test_oversized_and_doubled_reports_are_refused(operator: Operator) -> None:
    hello = sync_pb2.Hello(device_id="box-1")

    def code(*models: sync_pb2.ReportedModel) -> str:
        state = sync_pb2.ReportedState(models=models)
        return failing(lambda: operator.sync.Poll(sync_pb2.PollRequest(hello=hello, reported=state))).code

    assert code(*(sync_pb2.ReportedModel(model=f"m{index}") for index in range(257))) == "LIMIT_EXCEEDED"
    assert code(*[sync_pb2.ReportedModel(model="m")] * 2) == "REQUEST_INVALID"
    assert code(sync_pb2.ReportedModel(model="m", loaded_digests=["d"] * 257)) == "LIMIT_EXCEEDED"
    failure = sync_pb2.UpdateFailure(reason=errors_pb2.INTERNAL, message="x" * 2001)
    assert code(sync_pb2.ReportedModel(model="m", failure=failure)) == "LIMIT_EXCEEDED"
    many = sync_pb2.Hello(device_id="box-1", labels={f"l{index}": "" for index in range(33)})
    assert failing(lambda: operator.sync.Poll(sync_pb2.PollRequest(hello=many))).code == "LIMIT_EXCEEDED"


def test_the_operators_labels_win_and_select(operator: Operator) -> None:
    for name, site in (("box-1", "mill"), ("box-2", "mill"), ("box-3", "port")):
        operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id=name, labels={"site": site})))

    def label(remove: tuple[str, ...] = (), **to_set: str) -> dict[str, str]:
        request = devices_pb2.LabelDeviceRequest(id="box-2", set=to_set, remove=remove)
        return dict(operator.devices.LabelDevice(request).labels)

    def select(**fields: object) -> list[str]:
        selector = devices_pb2.Selector(**fields)  # type: ignore[arg-type]
        answer = operator.devices.ListDevices(devices_pb2.ListDevicesRequest(selector=selector))
        return [device.id for device in answer.devices]

    assert select(labels={"site": "mill"}) == ["box-1", "box-2"]
    assert label(site="port", canary="yes") == {"site": "port", "canary": "yes"}
    assert select(labels={"site": "port"}) == ["box-2", "box-3"]
    assert select(labels={"site": "port"}, device_ids=["box-1", "box-3"]) == ["box-3"]
    assert select(device_ids=["box-9"]) == []
    assert select() == ["box-1", "box-2", "box-3"]
    # The operator's label is taken away; the device's own shows again.
    assert label(remove=("site", "canary")) == {"site": "mill"}
    unknown = devices_pb2.LabelDeviceRequest(id="box-9")
    assert failing(lambda: operator.devices.LabelDevice(unknown)).code == "DEVICE_UNKNOWN"


def test_devices_come_in_pages(operator: Operator) -> None:
    for index in range(5):
        operator.sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id=f"box-{index}")))
    found, token = [], ""
    while True:
        page = operator.devices.ListDevices(devices_pb2.ListDevicesRequest(page_size=2, page_token=token))
        found += [device.id for device in page.devices]
        token = page.next_page_token
        if not token:
            break
    assert found == [f"box-{index}" for index in range(5)]


def test_generations_go_on_above_what_a_device_has_seen(operator: Operator) -> None:
    """A control plane whose data was lost must not send desired states that devices take for stale."""

    def generation(device_id: str, seen: int) -> int:
        hello = sync_pb2.Hello(device_id=device_id, desired_generation=seen)
        return operator.sync.Poll(sync_pb2.PollRequest(hello=hello)).desired.generation

    assert generation("box-1", 0) == 0
    assert generation("box-1", 41) == 42
    assert generation("box-1", 42) == 42
    assert generation("box-1", 7) == 42
    assert generation("box-2", 9) == 10
    hello = sync_pb2.Hello(device_id="box-3", desired_generation=1 << 63)
    assert failing(lambda: operator.sync.Poll(sync_pb2.PollRequest(hello=hello))).code == "LIMIT_EXCEEDED"


def test_integers_beyond_the_database_are_refused(operator: Operator) -> None:
    """The wire's uint64 reaches further than SQLite; one such report must not trouble anybody else."""
    hello = sync_pb2.Hello(device_id="box-1")
    for entry in (
        sync_pb2.ReportedModel(model="m", active_version=1 << 63),
        sync_pb2.ReportedModel(model="m", fetched_bytes=1 << 63),
        sync_pb2.ReportedModel(model="m", failure=sync_pb2.UpdateFailure(version=(1 << 64) - 1)),
    ):
        request = sync_pb2.PollRequest(hello=hello, reported=sync_pb2.ReportedState(models=[entry]))
        assert failing(lambda request=request: operator.sync.Poll(request)).code == "LIMIT_EXCEEDED"  # type: ignore[misc]
    most = sync_pb2.ReportedModel(model="m", active_version=(1 << 63) - 1)
    operator.sync.Poll(sync_pb2.PollRequest(hello=hello, reported=sync_pb2.ReportedState(models=[most])))
    assert get(operator, "box-1").reported.models[0].active_version == (1 << 63) - 1
