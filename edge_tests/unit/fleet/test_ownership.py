"""What devices see over a real connection: their own twin, the versions they were given, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from edge_tests.harness import trust
from edge_tests.harness.operator import eventually, failing, onnx_model
from edge_tests.harness.secure import DOMAIN, Caller, SecureControl, issue
from fleet import authorisation, ca, ownership
from fleet.limits import ASSIGNED_VERSIONS
from sluice.api.v1 import (
    access_pb2,
    devices_pb2,
    diff_pb2,
    identity_pb2,
    operators_pb2,
    registry_pb2,
    rollouts_pb2,
    sync_pb2,
    telemetry_pb2,
    trust_pb2,
)
from updater.digests import digest_bytes
from updater.identity import parse

MODEL, SECRET = onnx_model(1), onnx_model(2)
LATER = onnx_model(1, drift=0.01)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureControl]:
    """Two models; box-1 was given digits@1, box-2 secret@1."""
    with SecureControl(tmp_path_factory.mktemp("ownership") / "control") as running:
        admin = running.operator("root", "admin")
        admin.push("digits", 1, MODEL)
        admin.push("digits", 2, LATER)
        admin.push("secret", 1, SECRET)
        for name, model in (("box-1", "digits"), ("box-2", "secret")):
            poll(running.device(name), name)
            give(admin, name, model, 1)
        yield running


def poll(caller: Caller, device_id: str, *models: sync_pb2.ReportedModel) -> sync_pb2.PollResponse:
    hello = sync_pb2.Hello(device_id=device_id)
    return caller.sync.Poll(
        sync_pb2.PollRequest(hello=hello, reported=sync_pb2.ReportedState(models=models)), timeout=30
    )


def give(admin: Caller, device: str, model: str, version: int) -> None:
    """Gives a device a version, by a rollout that is ended at once, so that others may follow."""
    phases = [rollouts_pb2.Phase(selector=devices_pb2.Selector(device_ids=[device]))]
    request = rollouts_pb2.CreateRolloutRequest(model=model, version=version, phases=phases)
    rollout = admin.rollouts.CreateRollout(request, timeout=30)
    admin.rollouts.AbortRollout(rollouts_pb2.AbortRolloutRequest(id=rollout.id), timeout=30)


def refused(call: object) -> str:
    error = failing(call)  # type: ignore[arg-type]
    assert error.code == "PERMISSION_DENIED", error
    return error.message


def test_every_method_that_lets_devices_in_has_a_rule() -> None:
    for method, rule in ownership.RULES.items():
        access = authorisation.access_of(method)
        assert access is not None
        assert access.device, method
        assert callable(rule)


def test_a_device_speaks_for_itself_only(control: SecureControl) -> None:
    one = control.device("box-1")
    assert poll(one, "box-1").welcome.poll_interval_ms
    assert "may not speak for 'box-2'" in refused(lambda: poll(one, "box-2"))
    hello = sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id="box-2"))
    refused(lambda: list(one.sync.Connect(iter([hello]), timeout=30)))
    report = telemetry_pb2.ReportRequest(device_id="box-2", epoch="0" * 32)
    refused(lambda: one.telemetry.Report(report, timeout=30))
    assert one.devices.GetDevice(devices_pb2.GetDeviceRequest(id="box-1"), timeout=30).id == "box-1"
    refused(lambda: one.devices.GetDevice(devices_pb2.GetDeviceRequest(id="box-2"), timeout=30))
    assert failing(lambda: poll(one, "a/b")).code == "DEVICE_ID_INVALID"
    # Nor does it make another one known.
    refused(lambda: poll(one, "box-9"))
    admin = control.operator("root", "admin")
    unknown = devices_pb2.GetDeviceRequest(id="box-9")
    assert failing(lambda: admin.devices.GetDevice(unknown, timeout=30)).code == "DEVICE_UNKNOWN"


def test_a_stream_of_its_own_stands(control: SecureControl) -> None:
    one = control.device("box-1")
    told = threading.Event()

    def said() -> Iterator[sync_pb2.ConnectRequest]:
        yield sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id="box-1"))
        told.wait(30)

    call = one.sync.Connect(said(), timeout=30)
    assert [next(call).WhichOneof("message") for _ in range(2)] == ["welcome", "desired"]
    told.set()
    assert list(call) == []


def test_a_device_sees_the_versions_it_was_given(control: SecureControl) -> None:
    one = control.device("box-1")
    get = registry_pb2.GetVersionRequest
    assert one.registry.GetVersion(get(model="digits", version=1), timeout=30).manifest
    for request in (
        get(model="secret", version=1),
        get(model="digits", version=2),
        get(model="digits"),  # the latest
        get(model="digits", alias="stable"),
        get(model="digits", version=1 << 63),
        get(model="nothing", version=1),  # whether a model is there is none of its business either
    ):
        refused(lambda request=request: one.registry.GetVersion(request, timeout=30))
        refused(lambda request=request: one.plan(request.model, request.version))


def test_what_a_device_reports_opens_nothing(control: SecureControl) -> None:
    one = control.device("box-1")
    claimed = sync_pb2.ReportedModel(model="secret", active_version=1, previous_version=1, target_version=1)
    poll(one, "box-1", claimed)
    get = registry_pb2.GetVersionRequest(model="secret", version=1)
    refused(lambda: one.registry.GetVersion(get, timeout=30))
    refused(lambda: one.plan("secret", 1))


def test_deltas_lead_from_and_to_what_it_was_given(control: SecureControl) -> None:
    one, two = control.device("box-1"), control.device("box-2")
    admin = control.operator("root", "admin")
    full = one.plan("digits", 1).files[0].full
    secret = two.plan("secret", 1).files[0].full
    fetch = diff_pb2.FetchRequest

    def bytes_of(caller: Caller, digest: str) -> int:
        return sum(len(part.data) for part in caller.diff.Fetch(fetch(digest=digest), timeout=30))

    assert bytes_of(one, full.digest) == full.size
    refused(lambda: bytes_of(one, secret.digest))
    unknown = "sha256:" + "0" * 64
    assert failing(lambda: bytes_of(one, unknown)).code == "FILE_UNKNOWN"
    named = fetch(digest=full.digest, device_id="box-2")
    refused(lambda: list(one.diff.Fetch(named, timeout=30)))
    # A file of a version that it was not given is no base: the delta would tell what is in it.
    plan = one.plan("digits", 1, bases=[digest_bytes(SECRET)])
    assert plan.files[0].WhichOneof("how") == "full"
    crossing = admin.plan("digits", 1, bases=[digest_bytes(SECRET)]).files[0]
    described = admin.diff.Describe(
        diff_pb2.DescribeRequest(base_digest=digest_bytes(SECRET), target_digest=digest_bytes(MODEL)),
        timeout=60,
    )
    assert crossing.WhichOneof("how") in ("full", "delta")
    refused(lambda: bytes_of(one, described.delta_digest))
    assert bytes_of(admin, described.delta_digest) == described.delta_size


def test_former_versions_stay_bases_until_there_are_too_many(control: SecureControl) -> None:
    admin, three = control.operator("root", "admin"), control.device("box-3")
    poll(three, "box-3")
    count = ASSIGNED_VERSIONS + 1
    for version in range(1, count + 1):
        admin.push("many", version, onnx_model(3, drift=0.001 * version))
        give(admin, "box-3", "many", version)
    get = registry_pb2.GetVersionRequest
    refused(lambda: three.registry.GetVersion(get(model="many", version=1), timeout=30))
    for version in (2, count):
        assert three.registry.GetVersion(get(model="many", version=version), timeout=30).version == version


def test_a_role_given_by_policy_counts_at_once_and_is_bounded_by_the_certificate(
    control: SecureControl,
) -> None:
    admin, nora = control.operator("root", "admin"), control.operator("nora")
    models = registry_pb2.ListModelsRequest()

    def set_role(name: str, role: access_pb2.Role.ValueType) -> None:
        admin.operators.SetRole(operators_pb2.SetRoleRequest(name=name, role=role), timeout=30)

    assert "nora has no role" in refused(lambda: nora.registry.ListModels(models, timeout=30))
    set_role("nora", access_pb2.ROLE_VIEWER)
    assert nora.registry.ListModels(models, timeout=30).models
    label = devices_pb2.LabelDeviceRequest(id="box-1", set={"a": "b"})
    assert "needs the role operator" in refused(lambda: nora.devices.LabelDevice(label, timeout=30))
    # The lower one of certificate and entry.
    olga = control.operator("olga", "operator")
    assert olga.devices.LabelDevice(label, timeout=30).labels["a"] == "b"
    set_role("olga", access_pb2.ROLE_VIEWER)
    refused(lambda: olga.devices.LabelDevice(label, timeout=30))
    set_role("olga", access_pb2.ROLE_ADMIN)
    assert olga.devices.LabelDevice(label, timeout=30).labels["a"] == "b"
    refused(lambda: olga.operators.ListRoles(operators_pb2.ListRolesRequest(), timeout=30))
    set_role("nora", access_pb2.ROLE_UNSPECIFIED)
    refused(lambda: nora.registry.ListModels(models, timeout=30))
    found = admin.operators.ListRoles(operators_pb2.ListRolesRequest(), timeout=30).operators
    assert [(entry.name, entry.role) for entry in found] == [("olga", access_pb2.ROLE_ADMIN)]


def test_no_admin_locks_everybody_out(control: SecureControl) -> None:
    admin = control.operator("root", "admin")
    own = operators_pb2.SetRoleRequest(name="root", role=access_pb2.ROLE_VIEWER)
    assert "their own role" in refused(lambda: admin.operators.SetRole(own, timeout=30))
    for request, code in (
        (operators_pb2.SetRoleRequest(name="a/b", role=access_pb2.ROLE_VIEWER), "REQUEST_INVALID"),
        (operators_pb2.SetRoleRequest(name="a", role=17), "REQUEST_INVALID"),  # type: ignore[arg-type]
    ):
        assert failing(lambda request=request: admin.operators.SetRole(request, timeout=30)).code == code  # type: ignore[misc]


def test_roles_last_over_a_restart(tmp_path: Path) -> None:
    request = operators_pb2.SetRoleRequest(name="nora", role=access_pb2.ROLE_OPERATOR)
    with SecureControl(tmp_path / "control") as first:
        first.operator("root", "admin").operators.SetRole(request, timeout=30)
    with SecureControl(tmp_path / "control") as second:
        assert second.operator("nora").registry.ListModels(registry_pb2.ListModelsRequest(), timeout=30)
        granted = second.control.operators.granted(parse(f"spiffe://{DOMAIN}/operator/nora"))
        assert granted is not None
        assert granted.value == "operator"


def test_nobody_gets_in_with_a_certificate_of_another_authority_or_without_one(
    control: SecureControl, tmp_path: Path
) -> None:
    request = registry_pb2.ListModelsRequest()
    other = ca.create(tmp_path / "ca", DOMAIN, trust.now())
    forged = issue(f"spiffe://{DOMAIN}/operator/root/admin", by=other)
    for shown in (forged, forged.anonymous()):
        caller = control.showing(shown)
        with pytest.raises(grpc.RpcError) as caught:
            caller.registry.ListModels(request, timeout=5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        caller.channel.close()
    assert eventually(
        lambda: control.operator("root", "admin").registry.ListModels(request, timeout=30).models, "an answer"
    )


def test_only_an_admin_lets_operators_in(control: SecureControl) -> None:
    """Or an operator would give themselves a token for an admin's certificate."""
    admin, olga = control.operator("root", "admin"), control.operator("olga-2", "operator")
    for kind, role in (("operator", "admin"), ("operator", ""), ("operator", "viewer")):
        token = identity_pb2.CreateTokenRequest(kind=kind, name="eve", role=role)
        assert "needs the role admin" in refused(
            lambda token=token: olga.identities.CreateToken(token, timeout=30)
        )
        assert admin.identities.CreateToken(token, timeout=30).token
    assert olga.identities.CreateToken(identity_pb2.CreateTokenRequest(kind="device"), timeout=30).token
    named = {"kind": "operator", "name": "root"}
    refused(lambda: olga.identities.Revoke(identity_pb2.RevokeRequest(**named), timeout=30))
    refused(lambda: olga.identities.Reject(identity_pb2.RejectRequest(**named), timeout=30))
    refused(lambda: olga.identities.Approve(identity_pb2.ApproveRequest(**named), timeout=30))
    # A kind that is none of both is not a way round.
    odd = identity_pb2.CreateTokenRequest(kind="Operator", name="eve")
    refused(lambda: olga.identities.CreateToken(odd, timeout=30))


def test_only_an_admin_publishes_a_root(control: SecureControl) -> None:
    """Who sets the first root decides what every box believes."""
    root = trust_pb2.PublishMetadataRequest(metadata=[trust_pb2.RoleMetadata(role="root", metadata=b"{}")])
    anew = trust_pb2.PublishMetadataRequest(replace_root=True)
    hidden = registry_pb2.PublishVersionRequest(manifest=b"{}", metadata=root.metadata)
    error = failing(lambda: control.operator("ann", "operator").registry.PublishVersion(hidden, timeout=30))
    assert (error.code, error.obj) == ("PERMISSION_DENIED", "root")
    admin = control.operator("root", "admin")
    for request in (root, anew):
        for role in ("publisher", "operator"):
            caller = control.operator("ann", role)
            error = failing(lambda caller=caller, r=request: caller.trust.PublishMetadata(r, timeout=30))
            assert (error.code, error.obj) == ("PERMISSION_DENIED", "root")
        error = failing(lambda r=request: admin.trust.PublishMetadata(r, timeout=30))
        assert error.code != "PERMISSION_DENIED"
