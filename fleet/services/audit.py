"""Audit: reading the log of who changed what (proto/sluice/api/v1/audit.proto)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from fleet.control import Control
from sluice.api.v1 import audit_pb2, errors_pb2
from sluice.api.v1.audit_pb2_grpc import AuditServicer
from updater.errors import SluiceError

_Context = aio.ServicerContext[Any, Any]


class AuditService(AuditServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def ReadRecords(
        self, request: audit_pb2.ReadRecordsRequest, context: _Context
    ) -> AsyncIterator[audit_pb2.ReadRecordsResponse]:
        if request.from_sequence and request.newest:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID, "either a first record or the newest ones, not both", obj="newest"
            )
        portions = self._control.audit.read(request.from_sequence or 1, request.newest)
        while (portion := await self._control.files(next, portions, None)) is not None:
            yield audit_pb2.ReadRecordsResponse(records=portion)
