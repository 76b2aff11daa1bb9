"""Telemetry: batches in, points out (proto/sluice/api/v1/telemetry.proto)."""

from __future__ import annotations

from typing import Any

from grpc import aio

from fleet import telemetry
from fleet.control import Control
from fleet.devices import check_device_id
from sluice.api.v1 import telemetry_pb2
from sluice.api.v1.telemetry_pb2_grpc import TelemetryServicer

_Context = aio.ServicerContext[Any, Any]


class TelemetryService(TelemetryServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._database = control.database

    async def Report(
        self, request: telemetry_pb2.ReportRequest, context: _Context
    ) -> telemetry_pb2.ReportResponse:
        check_device_id(request.device_id)
        telemetry.check_report(request)
        acked = await self._database.write(lambda c: telemetry.store(c, request))
        return telemetry_pb2.ReportResponse(acked_sequence=acked)

    async def QueryMetrics(
        self, request: telemetry_pb2.QueryMetricsRequest, context: _Context
    ) -> telemetry_pb2.QueryMetricsResponse:
        return await self._database.read(lambda c: telemetry.query(c, request))
