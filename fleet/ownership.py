"""What callers see of what they may call.

Devices: their own twin, the versions they were given, deltas between those. Operators: what is about other
operators needs an admin, so that nobody lets in somebody above themselves.

A rule for each method that lets devices in; a method without one lets none in. A rule gets the device's id
and the request and gives the request that the handler shall see: the same, or one that asks for less. On a
stream it gets each message. Raises SluiceError(PERMISSION_DENIED).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fleet import assignments
from fleet.database import Database
from fleet.devices import check_device_id
from fleet.limits import MAX_BASES
from sluice.api.v1 import devices_pb2, diff_pb2, errors_pb2, registry_pb2, sync_pb2, telemetry_pb2, trust_pb2
from updater.digests import is_digest
from updater.errors import SluiceError
from updater.identity import Kind, Role

Rule = Callable[[Database, str, Any], Awaitable[Any]]


async def _connect(_: Database, device: str, request: sync_pb2.ConnectRequest) -> sync_pb2.ConnectRequest:
    if request.HasField("hello"):
        _check_own(device, request.hello.device_id)
    return request


async def _poll(_: Database, device: str, request: sync_pb2.PollRequest) -> sync_pb2.PollRequest:
    _check_own(device, request.hello.device_id)
    return request


async def _report(
    _: Database, device: str, request: telemetry_pb2.ReportRequest
) -> telemetry_pb2.ReportRequest:
    _check_own(device, request.device_id)
    return request


async def _get_device(
    _: Database, device: str, request: devices_pb2.GetDeviceRequest
) -> devices_pb2.GetDeviceRequest:
    _check_own(device, request.id)
    return request


async def _get_version(
    database: Database, device: str, request: registry_pb2.GetVersionRequest
) -> registry_pb2.GetVersionRequest:
    await _check_given(database, device, request.model, request.version)  # 0 for an alias and the latest
    return request


async def _plan(database: Database, device: str, request: diff_pb2.PlanRequest) -> diff_pb2.PlanRequest:
    """Bases of versions that the device was not given are left out: a delta tells what is in its base."""
    if request.device_id:
        _check_own(device, request.device_id)
    await _check_given(database, device, request.model, request.version)
    digests = [digest for digest in request.base_digests[:MAX_BASES] if is_digest(digest)]
    foreign = await database.read(lambda c: assignments.not_assigned(c, device, digests))
    if foreign:
        kept = [digest for digest in request.base_digests if digest not in foreign]
        del request.base_digests[:]
        request.base_digests.extend(kept)
    return request


async def _fetch(database: Database, device: str, request: diff_pb2.FetchRequest) -> diff_pb2.FetchRequest:
    if request.device_id:
        _check_own(device, request.device_id)
    allowed = await database.read(lambda c: assignments.may_fetch(c, device, request.digest))
    if allowed is None:
        raise SluiceError(
            errors_pb2.FILE_UNKNOWN,
            f"no delta {request.digest[:80]} is held; it may have been evicted",
            hint="ask Plan again",
            obj=request.digest[:80],
        )
    if not allowed:
        raise _denied(
            f"the delta {request.digest} is not between versions that {device} was given", request.digest
        )
    return request


async def _get_metadata(
    _: Database, __: str, request: trust_pb2.GetMetadataRequest
) -> trust_pb2.GetMetadataRequest:
    """Every device: it verifies the whole chain, which names versions and digests but holds no content."""
    return request


RULES: dict[str, Rule] = {
    "/sluice.api.v1.Devices/GetDevice": _get_device,
    "/sluice.api.v1.DiffModel/Fetch": _fetch,
    "/sluice.api.v1.DiffModel/Plan": _plan,
    "/sluice.api.v1.Registry/GetVersion": _get_version,
    "/sluice.api.v1.Sync/Connect": _connect,
    "/sluice.api.v1.Sync/Poll": _poll,
    "/sluice.api.v1.Telemetry/Report": _report,
    "/sluice.api.v1.Trust/GetMetadata": _get_metadata,
}


# Methods whose entry is for both kinds of identity, with a field `kind`.
_BY_KIND = frozenset(
    f"/sluice.api.v1.Identities/{name}" for name in ("CreateToken", "Approve", "Reject", "Revoke")
)


_PUBLISH = ("/sluice.api.v1.Trust/PublishMetadata", "/sluice.api.v1.Registry/PublishVersion")
_ROOT = "root"


def check_operator(method: str, role: Role | None, request: Any) -> None:
    """Raises SluiceError(PERMISSION_DENIED) when an operator asks for what their role does not reach."""
    if method in _BY_KIND and request.kind != Kind.DEVICE.value and role is not Role.ADMIN:
        raise SluiceError(
            errors_pb2.PERMISSION_DENIED,
            f"what is about operators needs the role admin, not {role.value if role else 'none'}",
            hint="ask an admin",
            obj=request.name[:80],
        )
    if method in _PUBLISH and role is not Role.ADMIN and _is_about_root(request):
        raise SluiceError(
            errors_pb2.PERMISSION_DENIED,
            f"publishing a root needs the role admin, not {role.value if role else 'none'}",
            hint="ask an admin to run `sluice trust publish`",
            obj="root",
        )


def _is_about_root(request: trust_pb2.PublishMetadataRequest | registry_pb2.PublishVersionRequest) -> bool:
    anew = isinstance(request, trust_pb2.PublishMetadataRequest) and request.replace_root
    return anew or any(part.role == _ROOT for part in request.metadata)


def rule_of(method: str) -> Rule:
    """The rule for devices that call a method."""
    found = RULES.get(method)
    if found is None:
        raise _denied("nothing says what devices may see of this call", method)
    return found


def _check_own(device: str, named: str) -> None:
    check_device_id(named)
    if named != device:
        raise _denied(f"{device} may not speak for {named[:80]!r}", named[:80])


async def _check_given(database: Database, device: str, model: str, version: int) -> None:
    if not await database.read(lambda c: assignments.is_assigned(c, device, model, version)):
        named = f"{model[:80]}@{version}"
        raise _denied(f"{device} was not given {named}", named)


def _denied(message: str, obj: str) -> SluiceError:
    return SluiceError(
        errors_pb2.PERMISSION_DENIED,
        message,
        hint="a device sees its own twin and the versions that rollouts gave it",
        obj=obj,
    )
