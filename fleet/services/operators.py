"""Operators: which role each has (proto/sluice/api/v1/operators.proto)."""

from __future__ import annotations

from typing import Any

from grpc import aio

from fleet.caller import caller_of
from fleet.control import Control
from sluice.api.v1 import operators_pb2
from sluice.api.v1.operators_pb2_grpc import OperatorsServicer

_Context = aio.ServicerContext[Any, Any]


class OperatorsService(OperatorsServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._operators = control.operators

    async def SetRole(
        self, request: operators_pb2.SetRoleRequest, context: _Context
    ) -> operators_pb2.SetRoleResponse:
        await self._operators.set_role(caller_of(context), request.name, request.role)
        return operators_pb2.SetRoleResponse()

    async def ListRoles(
        self, request: operators_pb2.ListRolesRequest, context: _Context
    ) -> operators_pb2.ListRolesResponse:
        return operators_pb2.ListRolesResponse(operators=await self._operators.entries())
