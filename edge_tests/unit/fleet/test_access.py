"""What is written down of calls, what one caller may take, and what happens when nothing can be written."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_tests.harness import trust
from edge_tests.harness.applicant import Applicant
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, eventually, failing, onnx_model
from edge_tests.harness.secure import DOMAIN, Caller, SecureControl
from fleet.access import Access, Policy
from fleet.audit_chain import verify
from fleet.audit_log import AuditLog
from fleet.authentication import Callers
from fleet.caller import PEM_CERTIFICATE
from fleet.database import Database
from fleet.operators import Operators
from fleet.quotas import Quota, Quotas
from sluice.api.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    devices_pb2,
    diff_pb2,
    identity_pb2,
    registry_pb2,
    rollouts_pb2,
    sync_pb2,
)

ROOMY = Quota(1000, 1000, 1 << 30, 1 << 30, 8, 1 << 30, 1 << 30)


def read(caller: Caller, **how: int) -> list[bytes]:
    request = audit_pb2.ReadRecordsRequest(**how)
    return [record for part in caller.audit.ReadRecords(request, timeout=30) for record in part.records]


def told(caller: Caller, **how: int) -> list[dict[str, Any]]:
    return [json.loads(record) for record in read(caller, **how)]


@pytest.fixture
def control(tmp_path: Path) -> Iterator[SecureControl]:
    with SecureControl(tmp_path / "control") as running:
        yield running


def test_a_change_is_recorded_before_and_after(control: SecureControl) -> None:
    admin, ann = control.operator("root", "admin"), control.operator("ann", "operator")
    label = devices_pb2.LabelDeviceRequest(id="box-1", set={"site": "mill"})
    assert failing(lambda: ann.devices.LabelDevice(label, timeout=30)).code == "DEVICE_UNKNOWN"
    ann.upload(b"some file")
    ann.registry.ListModels(registry_pb2.ListModelsRequest(), timeout=30)  # a read leaves nothing
    started, call, outcome, upload, uploaded = told(admin)
    assert (started["event"], started["format"], started["sequence"]) == ("started", 1, 1)
    assert call == call | {
        "event": "call",
        "method": "Devices.LabelDevice",
        "caller": f"spiffe://{DOMAIN}/operator/ann/operator",
        "role": "operator",
        "address": "127.0.0.1",
        "request": {"id": "box-1", "set": ["site=mill"]},
    }
    assert outcome == outcome | {
        "event": "outcome",
        "call": call["sequence"],
        "outcome": "DEVICE_UNKNOWN",
        "message": "there is no device 'box-1'",
    }
    assert (upload["method"], upload["request"]["header"]["size"]) == ("Registry.UploadFile", 9)
    assert (uploaded["call"], uploaded["outcome"]) == (upload["sequence"], "OK")
    assert verify(read(admin)).head == control.control.audit.head


def test_who_is_turned_away_is_recorded(control: SecureControl) -> None:
    admin = control.operator("root", "admin")
    label = devices_pb2.LabelDeviceRequest(id="box-1")
    for uris in (
        (),
        (f"spiffe://{DOMAIN}/operator/vic/viewer",),
        (f"spiffe://{DOMAIN}/device/box-1",),
        ("spiffe://elsewhere/operator/eve/admin",),
        ("https://example.org",),
    ):
        failing(lambda uris=uris: control.caller(*uris).devices.LabelDevice(label, timeout=30))  # type: ignore[misc]
    poll = sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id="box-2"))
    failing(lambda: control.device("box-1").sync.Poll(poll, timeout=30))
    records = [record for record in told(admin) if record["event"] != "started"]
    assert {record["event"] for record in records} == {"denied"}
    assert [(record.get("caller", ""), record["outcome"]) for record in records] == [
        ("", "UNAUTHENTICATED"),
        (f"spiffe://{DOMAIN}/operator/vic/viewer", "PERMISSION_DENIED"),
        (f"spiffe://{DOMAIN}/device/box-1", "PERMISSION_DENIED"),
        ("spiffe://elsewhere/operator/eve/admin", "CERTIFICATE_INVALID"),
        ("", "CERTIFICATE_INVALID"),
        (f"spiffe://{DOMAIN}/device/box-1", "PERMISSION_DENIED"),
    ]
    assert records[-1]["object"] == "box-2"


def test_a_flood_of_denials_is_counted(control: SecureControl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.denials.FLUSH_S", 0.5)
    admin, vic = control.operator("root", "admin"), control.operator("vic", "viewer")
    label = devices_pb2.LabelDeviceRequest(id="box-1")
    for _ in range(100):
        assert failing(lambda: vic.devices.LabelDevice(label, timeout=30)).code == "PERMISSION_DENIED"
    eventually(lambda: any("count" in record for record in told(admin)), "the count", 10)
    denied = [record for record in told(admin) if record["event"] == "denied"]
    assert len(denied) < 90
    assert sum(record.get("count", 1) for record in denied) == 100
    assert all(record["caller"].endswith("/vic/viewer") for record in denied)


def test_a_call_that_its_caller_leaves_has_an_outcome(control: SecureControl) -> None:
    admin = control.operator("root", "admin")
    header = registry_pb2.UploadHeader(digest="sha256:" + "0" * 64, size=1000)

    def said() -> Iterator[registry_pb2.UploadFileRequest]:
        yield registry_pb2.UploadFileRequest(header=header)
        eventually(lambda: told(admin)[-1]["event"] == "call", "the record")
        call.cancel()

    call = admin.registry.UploadFile.future(said(), timeout=30)
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    eventually(lambda: told(admin)[-1].get("outcome") == "CANCELLED", "the outcome")


def test_nothing_is_changed_while_nothing_can_be_recorded(tmp_path: Path) -> None:
    """A real process, whose files may grow no more for a while."""
    label = devices_pb2.LabelDeviceRequest(id="box-1")
    with (
        ControlPlane(tmp_path / "control", "--disk-reserve-bytes", "0") as control,
        Operator(control.address) as operator,
    ):
        operator.push("digits", 1, onnx_model(1))
        assert failing(lambda: operator.devices.LabelDevice(label)).code == "DEVICE_UNKNOWN"
        audit = audit_pb2_grpc.AuditStub(operator.channel)

        def records() -> list[bytes]:
            request = audit_pb2.ReadRecordsRequest()
            return [record for part in audit.ReadRecords(request, timeout=30) for record in part.records]

        last = json.loads(records()[-2])
        assert (last["method"], last["address"]) == ("Devices.LabelDevice", "127.0.0.1")
        assert last["caller"].endswith("/admin")
        assert control.process is not None
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(control.process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        rollout = rollouts_pb2.CreateRolloutRequest(model="digits")
        for call in (
            lambda: operator.devices.LabelDevice(label),
            lambda: operator.upload(b"another file"),
            lambda: operator.rollouts.CreateRollout(rollout),
        ):
            error = failing(call)
            assert error.code == "IO_FAILED"
            assert error.message.startswith("nothing is changed while the audit log cannot be written")
        # Reads go on.
        assert operator.registry.GetModel(registry_pb2.GetModelRequest(name="digits")).latest_version == 1
        resource.prlimit(control.process.pid, resource.RLIMIT_FSIZE, unlimited)
        operator.upload(b"another file")
        control.kill()
        control.start()
        with Operator(control.address) as again:
            audit = audit_pb2_grpc.AuditStub(again.channel)
            found = records()
        assert verify(found).first == 1
        assert [json.loads(record)["event"] for record in found].count("started") == 2


def test_a_broken_log_stops_changes_and_nothing_else(tmp_path: Path) -> None:
    with SecureControl(tmp_path / "control") as control:
        control.operator("root", "admin").upload(b"some file")
    (segment,) = (tmp_path / "control" / "audit").iterdir()
    segment.chmod(0o600)
    segment.write_bytes(segment.read_bytes().replace(b"UploadFile", b"UploadFyle"))
    with SecureControl(tmp_path / "control") as control:
        admin = control.operator("root", "admin")
        error = failing(lambda: admin.upload(b"another"))
        assert error.code == "AUDIT_BROKEN"
        assert "nothing is changed" in error.message
        assert not admin.registry.ListModels(registry_pb2.ListModelsRequest(), timeout=30).models
        # A denial stays one.
        label = devices_pb2.LabelDeviceRequest(id="box-1")
        vic = control.operator("vic", "viewer")
        assert failing(lambda: vic.devices.LabelDevice(label, timeout=30)).code == "PERMISSION_DENIED"
    # Moved aside for whoever looks into it, another log begins.
    (tmp_path / "control" / "audit").rename(tmp_path / "broken")
    with SecureControl(tmp_path / "control") as control:
        admin = control.operator("root", "admin")
        admin.upload(b"another")
        assert [record["sequence"] for record in told(admin)] == [1, 2, 3]


def test_one_caller_cannot_take_what_others_need(tmp_path: Path) -> None:
    device = replace(
        ROOMY, requests_per_s=0.5, requests_burst=3, bytes_per_s=1000, bytes_burst=20_000, diffs=0
    )
    operator = replace(ROOMY, bytes_per_s=100, bytes_burst=50_000)
    with SecureControl(tmp_path / "control", Quotas(device, operator, ROOMY)) as control:
        one, two = control.device("box-1"), control.device("box-2")

        def poll(caller: Caller, name: str, models: int = 0) -> Any:
            reported = [sync_pb2.ReportedModel(model=f"m{n}", variant="v" * 200) for n in range(models)]
            state = sync_pb2.ReportedState(models=reported)
            hello = sync_pb2.Hello(device_id=name)
            return caller.sync.Poll(sync_pb2.PollRequest(hello=hello, reported=state), timeout=30)

        for _ in range(3):
            poll(one, "box-1")
        again = control.device("box-1")  # another connection of the same device
        error = failing(lambda: poll(again, "box-1"))
        assert (error.code, error.obj) == ("LIMIT_EXCEEDED", "device box-1")
        assert 0 < error.retry_s <= 2
        # Others are not held up, but by their own bytes.
        poll(two, "box-2", models=80)
        error = failing(lambda: poll(two, "box-2", models=80))
        assert "bytes a second" in error.message
        plan = diff_pb2.PlanRequest(model="m", version=1, variant="v")
        error = failing(lambda: two.diff.Plan(plan, timeout=30))
        assert "plans at once" in error.message
        # An upload ends where its caller's bytes do; what came is kept.
        ann = control.operator("ann", "publisher")
        data = os.urandom(200_000)
        error = failing(lambda: ann.upload(data))
        assert "operator ann" in error.message
        assert error.retry_s > 0


def test_a_certificate_that_counts_no_longer_is_turned_away_at_the_next_call(tmp_path: Path) -> None:
    with SecureControl(tmp_path / "control") as control:
        admin, ann = control.operator("root", "admin"), control.operator("ann", "viewer")
        request = registry_pb2.ListModelsRequest()
        ann.registry.ListModels(request, timeout=30)
        revoked = identity_pb2.RevokeRequest(kind="operator", name="ann")
        admin.identities.Revoke(revoked, timeout=30)
        assert failing(lambda: ann.registry.ListModels(request, timeout=30)).code == "CERTIFICATE_REVOKED"
        assert told(admin)[-1]["outcome"] == "CERTIFICATE_REVOKED"


def test_reading_asks_for_one_thing(control: SecureControl) -> None:
    admin = control.operator("root", "admin")
    for _ in range(5):
        admin.upload(b"some file")
    assert [record["sequence"] for record in told(admin, newest=2)] == [10, 11]
    assert told(admin, from_sequence=10) == told(admin, newest=2)
    assert failing(lambda: read(admin, newest=1, from_sequence=1)).code == "REQUEST_INVALID"


def test_a_caller_that_leaves_while_the_record_is_written_leaves_an_outcome(tmp_path: Path) -> None:
    async def run() -> None:
        log = AuditLog(tmp_path / "audit")
        await log.start()
        database = Database(tmp_path / "control.db")
        policy = Policy(Callers(DOMAIN))
        access = Access(policy, database, Operators(database), log)

        async def one() -> None:
            async with access.call("/sluice.api.v1.Devices/LabelDevice", Peer()) as call:  # type: ignore[arg-type]
                await call.message(devices_pb2.LabelDeviceRequest(id="box-1"))
                raise AssertionError("it went on")

        task = asyncio.create_task(one())
        while log._draining is None:  # until the record is on its way to the disk
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        records = [json.loads(record) for portion in log.read() for record in portion]
        assert [record["event"] for record in records] == ["call", "outcome"]
        assert records[1]["outcome"] == "CANCELLED"
        await log.stop()
        database.close()

    asyncio.run(run())


class Peer:
    """As much of a call's context as letting it in needs."""

    def peer(self) -> str:
        return "ipv6:%5B::1%5D:40000"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {PEM_CERTIFICATE: [trust.operator().chain]}


def test_a_box_that_enrols_is_recorded_without_its_token(control: SecureControl) -> None:
    admin = control.operator("root", "admin")
    token = admin.identities.CreateToken(identity_pb2.CreateTokenRequest(kind="device"), timeout=30).token
    with Applicant(control.enrolment_address) as box:
        assert failing(lambda: box.enrol(token="slt_wrong")).code == "TOKEN_INVALID"
        box.enrol(token=token)
    denied, enrolled = told(admin, newest=2)
    assert (denied["event"], denied["outcome"]) == ("denied", "TOKEN_INVALID")
    assert (enrolled["event"], enrolled["method"], enrolled["outcome"]) == ("call", "Enrolment.Enrol", "OK")
    assert enrolled["object"] == f"spiffe://{trust.TRUST_DOMAIN}/device/box"
    assert token not in str(enrolled)
    assert "slt_" not in str(told(admin))
