"""Devices: the fleet as the control plane knows it (proto/sluice/api/v1/devices.proto)."""

from __future__ import annotations

from typing import Any

from grpc import aio
from sqlalchemy import Connection

from fleet import devices
from fleet.control import Control
from fleet.paging import cut_page, page_size, text_token
from sluice.api.v1 import devices_pb2
from sluice.api.v1.devices_pb2_grpc import DevicesServicer

_Context = aio.ServicerContext[Any, Any]


class DevicesService(DevicesServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._database = control.database
        self._sessions = control.sessions

    async def GetDevice(self, request: devices_pb2.GetDeviceRequest, context: _Context) -> devices_pb2.Device:
        online = self._sessions.is_online(request.id)
        return await self._database.read(lambda c: devices.device(c, request.id, online))

    async def ListDevices(
        self, request: devices_pb2.ListDevicesRequest, context: _Context
    ) -> devices_pb2.ListDevicesResponse:
        size, after = page_size(request.page_size), text_token(request.page_token)
        online = self._sessions.online()
        rows = await self._database.read(
            lambda c: devices.devices(c, request.selector, after, size + 1, online)
        )
        found, token = cut_page(rows, size, lambda device: device.id)
        return devices_pb2.ListDevicesResponse(devices=found, next_page_token=token)

    async def LabelDevice(
        self, request: devices_pb2.LabelDeviceRequest, context: _Context
    ) -> devices_pb2.Device:
        online = self._sessions.is_online(request.id)

        def change(connection: Connection) -> devices_pb2.Device:
            devices.label(connection, request.id, request.set, set(request.remove))
            return devices.device(connection, request.id, online)

        return await self._database.write(change)
