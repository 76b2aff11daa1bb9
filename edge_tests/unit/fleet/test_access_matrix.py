"""Every method called by everybody: let in exactly as the contract's table says, and turned away with a
reason.

The table is read from the descriptors, the callers hold real certificates, the server is a real one behind
TLS. Each method has a request here that succeeds when its caller may make it, so that "let in" means that
it worked.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import sluice.api.v1 as contract
from edge_tests.harness.applicant import Applicant
from edge_tests.harness.operator import failing, onnx_model
from edge_tests.harness.secure import DOMAIN, Caller, SecureControl
from sluice.api.v1 import (
    access_pb2,
    audit_pb2,
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
from updater.delta import FEATURES
from updater.digests import digest_bytes
from updater.identity import Identity, Kind
from updater.manifest import Manifest
from updater.wire import from_rpc_error

CALL_S = 30.0
OWN, OTHER = "box-1", "box-2"
EPOCH = "0123456789abcdef" * 2
ROLES = {
    "viewer": access_pb2.ROLE_VIEWER,
    "publisher": access_pb2.ROLE_PUBLISHER,
    "operator": access_pb2.ROLE_OPERATOR,
    "admin": access_pb2.ROLE_ADMIN,
}
FOR_EVERY_DEVICE = {"/sluice.api.v1.Trust/GetMetadata"}  # the rest is for the device that it is about
# Callers by name: the URIs of their certificate, and the reason with which they are turned away.
CALLERS = {
    **{role: ((f"spiffe://{DOMAIN}/operator/{role}-1/{role}",), "PERMISSION_DENIED") for role in ROLES},
    "device": ((f"spiffe://{DOMAIN}/device/{OWN}",), "PERMISSION_DENIED"),
    "another device": ((f"spiffe://{DOMAIN}/device/{OTHER}",), "PERMISSION_DENIED"),
    "operator without a role": ((f"spiffe://{DOMAIN}/operator/nobody",), "PERMISSION_DENIED"),
    "control plane": ((f"spiffe://{DOMAIN}/control/two",), "PERMISSION_DENIED"),
    "unauthenticated": ((), "UNAUTHENTICATED"),
    "admin of another domain": (("spiffe://elsewhere/operator/admin-1/admin",), "CERTIFICATE_INVALID"),
    "two identities": (
        (f"spiffe://{DOMAIN}/operator/a/admin", f"spiffe://{DOMAIN}/device/{OWN}"),
        "CERTIFICATE_INVALID",
    ),
    "no identity": (("https://example.org/",), "CERTIFICATE_INVALID"),
}


def table() -> dict[str, access_pb2.Access | None]:
    """Every method of the contract with its entry, from the descriptors."""
    found: dict[str, access_pb2.Access | None] = {}
    for module in pkgutil.iter_modules(contract.__path__):
        if not module.name.endswith("_pb2"):
            continue
        for service in importlib.import_module(
            f"sluice.api.v1.{module.name}"
        ).DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                options = method.GetOptions()
                entry = (
                    options.Extensions[access_pb2.access] if options.HasExtension(access_pb2.access) else None
                )
                found[f"/{service.full_name}/{method.name}"] = entry
    return found


TABLE = table()
SERVED = {method: entry for method, entry in TABLE.items() if entry is not None and not entry.local}


class World:
    """One model with two versions, of which one device was given one; a rollout that may be ended or not."""

    def __init__(self, control: SecureControl) -> None:
        self.control = control
        self.admin = control.operator("root", "admin")
        self.model = onnx_model(1)
        self.pushed: Manifest = self.admin.push("digits", 1, self.model)
        self.later = self.admin.push("digits", 2, onnx_model(1, drift=0.01))
        self._numbers = itertools.count(1)
        for name in (OWN, OTHER):
            control.device(name).sync.Poll(sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id=name)))
        self.rollout = self.running()
        own = control.device(OWN)
        plan = own.plan("digits", 1, accept_full=True)
        self.delta = plan.files[0].full.digest
        assert self.delta

    def running(self) -> str:
        """The id of a rollout that runs."""
        self.ended()
        selector = devices_pb2.Selector(device_ids=[OWN])
        request = rollouts_pb2.CreateRolloutRequest(
            model="digits", version=1, phases=[rollouts_pb2.Phase(selector=selector)]
        )
        self.rollout = self.admin.rollouts.CreateRollout(request, timeout=CALL_S).id
        return self.rollout

    def ended(self) -> str:
        """The id of the newest rollout, which does not run any more."""
        for found in self.admin.rollouts.ListRollouts(rollouts_pb2.ListRolloutsRequest()).rollouts:
            if found.state == rollouts_pb2.ROLLOUT_STATE_RUNNING:
                self.admin.rollouts.AbortRollout(rollouts_pb2.AbortRolloutRequest(id=found.id))
        return getattr(self, "rollout", "")

    def number(self) -> int:
        return next(self._numbers)


def upload(world: World, caller: Caller) -> Any:
    return caller.upload(f"file {world.number()}".encode())


def connect(world: World, caller: Caller) -> Any:
    hello = sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id=OWN))
    return next(caller.sync.Connect(iter([hello]), timeout=CALL_S)).welcome


def create_rollout(world: World, caller: Caller) -> Any:
    world.ended()
    selector = devices_pb2.Selector(device_ids=[OWN])
    phases = [rollouts_pb2.Phase(selector=selector)]
    request = rollouts_pb2.CreateRolloutRequest(model="digits", version=1, phases=phases)
    return caller.rollouts.CreateRollout(request, timeout=CALL_S)


def abort_rollout(world: World, caller: Caller) -> Any:
    request = rollouts_pb2.AbortRolloutRequest(id=world.running(), why="as the table says")
    return caller.rollouts.AbortRollout(request, timeout=CALL_S)


def watch_rollout(world: World, caller: Caller) -> Any:
    call = caller.rollouts.WatchRollout(rollouts_pb2.WatchRolloutRequest(id=world.rollout), timeout=CALL_S)
    try:
        return next(call)
    finally:
        call.cancel()


def plan(world: World, caller: Caller) -> Any:
    request = diff_pb2.PlanRequest(
        model="digits", version=1, variant="default", accept_full=True, wait_ms=20_000, features=FEATURES
    )
    return caller.diff.Plan(request, timeout=CALL_S)


def describe(world: World, caller: Caller) -> Any:
    request = diff_pb2.DescribeRequest(target_digest=digest_bytes(world.model))
    return caller.diff.Describe(request, timeout=CALL_S)


def report(world: World, caller: Caller) -> Any:
    batch = telemetry_pb2.Batch(sequence=world.number(), metrics=[telemetry_pb2.Metric(name="m", value=1)])
    request = telemetry_pb2.ReportRequest(device_id=OWN, epoch=EPOCH, batches=[batch])
    return caller.telemetry.Report(request, timeout=CALL_S)


def applicant(world: World, caller: Caller) -> Applicant:
    """A box that nobody knows, which asks over the caller's connection."""
    identity = Identity(DOMAIN, Kind.DEVICE, f"new-{world.number()}")
    found = Applicant(world.control.enrolment_address, identity)
    found.stub = caller.enrolment
    return found


def enrol(world: World, caller: Caller) -> Any:
    request = identity_pb2.CreateTokenRequest(kind="device")
    return applicant(world, caller).enrol(token=world.admin.identities.CreateToken(request).token)


def renew(world: World, caller: Caller) -> Any:
    request = identity_pb2.CreateTokenRequest(kind="device")
    box = applicant(world, caller)
    box.enrol(token=world.admin.identities.CreateToken(request).token)
    return box.renew()


def waiting(world: World) -> Applicant:
    """A box that waits for an operator."""
    box = applicant(world, world.control.caller())
    assert failing(box.enrol).code == "ENROLMENT_PENDING"
    return box


def approve(world: World, caller: Caller) -> Any:
    box = waiting(world)
    request = identity_pb2.ApproveRequest(kind="device", name=box.identity.name, fingerprint=box.fingerprint)
    return caller.identities.Approve(request, timeout=CALL_S)


def reject(world: World, caller: Caller) -> Any:
    request = identity_pb2.RejectRequest(kind="device", name=waiting(world).identity.name)
    return caller.identities.Reject(request, timeout=CALL_S)


def publish_metadata(_: World, caller: Caller) -> Any:
    """Let in means looked at, and refused as metadata: with real ones every push would need a key."""
    request = trust_pb2.PublishMetadataRequest(
        metadata=[trust_pb2.RoleMetadata(role="targets", metadata=b"none")]
    )
    try:
        return caller.trust.PublishMetadata(request, timeout=CALL_S)
    except grpc.RpcError as error:
        if from_rpc_error(error, "publishing", "").code != "METADATA_INVALID":
            raise
        return request


def once(service: str, name: str, request: Any) -> Callable[[World, Caller], Any]:
    """A unary call with a request that is always the same."""

    def call(_: World, caller: Caller) -> Any:
        return getattr(getattr(caller, service), name)(request, timeout=CALL_S)

    return call


CALLS: dict[str, Callable[[World, Caller], Any]] = {
    "Registry/UploadFile": upload,
    "Registry/GetUpload": once(
        "registry", "GetUpload", registry_pb2.GetUploadRequest(digest="sha256:" + "0" * 64)
    ),
    "Registry/PublishVersion": lambda world, caller: caller.publish(world.later),
    "Registry/GetVersion": once(
        "registry", "GetVersion", registry_pb2.GetVersionRequest(model="digits", version=1)
    ),
    "Registry/ListVersions": once(
        "registry", "ListVersions", registry_pb2.ListVersionsRequest(model="digits")
    ),
    "Registry/GetModel": once("registry", "GetModel", registry_pb2.GetModelRequest(name="digits")),
    "Registry/ListModels": once("registry", "ListModels", registry_pb2.ListModelsRequest()),
    "Registry/SetAlias": once(
        "registry", "SetAlias", registry_pb2.SetAliasRequest(model="digits", alias="stable", version=1)
    ),
    "Registry/RetireVersion": once(
        "registry", "RetireVersion", registry_pb2.RetireVersionRequest(model="digits", version=2)
    ),
    "DiffModel/Plan": plan,
    "DiffModel/Fetch": lambda world, caller: list(
        caller.diff.Fetch(diff_pb2.FetchRequest(digest=world.delta), timeout=CALL_S)
    ),
    "DiffModel/Describe": describe,
    "Devices/GetDevice": once("devices", "GetDevice", devices_pb2.GetDeviceRequest(id=OWN)),
    "Devices/ListDevices": once("devices", "ListDevices", devices_pb2.ListDevicesRequest()),
    "Devices/LabelDevice": once(
        "devices", "LabelDevice", devices_pb2.LabelDeviceRequest(id=OWN, set={"site": "mill"})
    ),
    "Rollouts/CreateRollout": create_rollout,
    "Rollouts/GetRollout": lambda world, caller: caller.rollouts.GetRollout(
        rollouts_pb2.GetRolloutRequest(id=world.rollout), timeout=CALL_S
    ),
    "Rollouts/ListRollouts": once("rollouts", "ListRollouts", rollouts_pb2.ListRolloutsRequest()),
    "Rollouts/WatchRollout": watch_rollout,
    "Rollouts/AbortRollout": abort_rollout,
    "Sync/Connect": connect,
    "Sync/Poll": once("sync", "Poll", sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id=OWN))),
    "Telemetry/Report": report,
    "Telemetry/QueryMetrics": once(
        "telemetry", "QueryMetrics", telemetry_pb2.QueryMetricsRequest(device_id=OWN, name="m")
    ),
    "Operators/SetRole": once(
        "operators", "SetRole", operators_pb2.SetRoleRequest(name="eve", role=access_pb2.ROLE_VIEWER)
    ),
    "Operators/ListRoles": once("operators", "ListRoles", operators_pb2.ListRolesRequest()),
    "Identities/CreateToken": once(
        "identities", "CreateToken", identity_pb2.CreateTokenRequest(kind="device", name="box-7")
    ),
    "Identities/ListIdentities": once(
        "identities", "ListIdentities", identity_pb2.ListIdentitiesRequest(kind="device")
    ),
    "Identities/Approve": approve,
    "Identities/Reject": reject,
    "Identities/Revoke": once("identities", "Revoke", identity_pb2.RevokeRequest(kind="device", name="gone")),
    "Enrolment/Challenge": once("enrolment", "Challenge", identity_pb2.ChallengeRequest()),
    "Enrolment/Enrol": enrol,
    "Enrolment/Renew": renew,
    "Enrolment/GetBundle": once("enrolment", "GetBundle", identity_pb2.GetBundleRequest()),
    "Trust/GetTrust": once("trust", "GetTrust", trust_pb2.GetTrustRequest()),
    "Trust/GetMetadata": once("trust", "GetMetadata", trust_pb2.GetMetadataRequest(role="root")),
    "Trust/PublishMetadata": publish_metadata,
    "Audit/ReadRecords": lambda _, caller: list(
        caller.audit.ReadRecords(audit_pb2.ReadRecordsRequest(newest=3), timeout=CALL_S)
    ),
}


def is_let_in(name: str, method: str, entry: access_pb2.Access) -> bool:
    """What the table says of one caller."""
    if entry.anonymous:
        return True
    if name == "another device" and method in FOR_EVERY_DEVICE:
        return True
    if name == "device":
        return entry.device
    return bool(entry.role) and name in ROLES and ROLES[name] >= entry.role


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with SecureControl(tmp_path_factory.mktemp("matrix") / "control") as control:
        yield World(control)


def test_every_method_of_the_contract_has_an_entry() -> None:
    assert TABLE
    missing = [method for method, entry in TABLE.items() if entry is None]
    assert not missing, f"who may call these? give them the option access: {missing}"
    unsaid = [
        method
        for method, entry in TABLE.items()
        if entry is not None and not (entry.anonymous or entry.device or entry.role or entry.local)
    ]
    assert not unsaid, f"nobody may call these: {unsaid}"


def test_every_method_is_called_here() -> None:
    assert {f"/sluice.api.v1.{name}" for name in CALLS} == set(SERVED)


@pytest.mark.parametrize("name", CALLERS)
def test_a_caller_is_let_in_as_the_table_says(world: World, name: str) -> None:
    uris, reason = CALLERS[name]
    caller = world.control.caller(*uris)
    wrong = []
    for method, entry in SERVED.items():
        call = CALLS[method.removeprefix("/sluice.api.v1.")]
        if is_let_in(name, method, entry):
            assert call(world, caller) is not None, method
        else:
            error = failing(lambda call=call: call(world, caller))  # type: ignore[misc]
            if error.code != reason:
                wrong.append(f"{method}: {error}")
    caller.channel.close()
    assert not wrong, wrong


def test_a_box_own_methods_are_not_served_here(world: World) -> None:
    for method, entry in TABLE.items():
        if entry is not None and entry.local:
            call = world.admin.channel.unary_unary(method)
            assert failing(lambda call=call: call(b"")).code == "REQUEST_INVALID"  # type: ignore[misc]
