"""The operator's side of roles and of the audit log, over the connection of a ControlClient."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from fleet.client import ControlClient
from sluice.api.v1 import access_pb2, audit_pb2, audit_pb2_grpc, operators_pb2, operators_pb2_grpc
from updater.identity import Role
from updater.wire import from_rpc_error

_WIRE = {role: access_pb2.Role.Value(f"ROLE_{role.value.upper()}") for role in Role}


def set_role(client: ControlClient, name: str, role: Role | None) -> None:
    """Gives an operator a role; None takes the entry away.

    Raises SluiceError(REQUEST_INVALID | PERMISSION_DENIED | LIMIT_EXCEEDED).
    """
    stub = operators_pb2_grpc.OperatorsStub(client.channel)
    wanted = _WIRE[role] if role is not None else access_pb2.ROLE_UNSPECIFIED
    request = operators_pb2.SetRoleRequest(name=name, role=wanted)
    client.call(stub.SetRole, request, f"setting the role of {name}")


def list_roles(client: ControlClient) -> list[operators_pb2.OperatorRole]:
    """Every operator with an entry, by name."""
    stub = operators_pb2_grpc.OperatorsStub(client.channel)
    return list(client.call(stub.ListRoles, operators_pb2.ListRolesRequest(), "listing roles").operators)


def read_audit(client: ControlClient, *, newest: int = 0, stall_s: float = 3600.0) -> Iterator[bytes]:
    """Records of the audit log, oldest first, as they were written.

    Args:
        client: of the control plane.
        newest: not 0: only so many.
        stall_s: the longest that the whole reading may take.

    Raises SluiceError(PERMISSION_DENIED | STORE_CORRUPT | IO_FAILED | CONTROL_UNREACHABLE).
    """
    request = audit_pb2.ReadRecordsRequest(newest=newest)
    stream = audit_pb2_grpc.AuditStub(client.channel).ReadRecords(request, timeout=stall_s)
    try:
        for part in stream:
            yield from part.records
    except grpc.RpcError as error:
        raise from_rpc_error(error, "reading the audit log", client.address) from error
    finally:
        stream.cancel()
