"""Sync: desired state down, reported state up (proto/sluice/api/v1/sync.proto).

A stream costs one task that reads and one that writes; nothing of it waits in memory but the newest desired
state. It ends when the device leaves, when a newer stream of the same device takes over, or when the device
says nothing for SILENT_INTERVALS heartbeats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio
from sqlalchemy import Connection

from fleet import devices, log
from fleet.clock import now_us, to_timestamp
from fleet.control import Control
from fleet.limits import DESIRED_RESEND_S, HELLO_TIMEOUT_S, SILENT_INTERVALS
from fleet.sessions import Session
from fleet.twins import check_reported
from sluice.api.v1 import errors_pb2, sync_pb2
from sluice.api.v1.sync_pb2_grpc import SyncServicer
from updater.errors import SluiceError

_Context = aio.ServicerContext[Any, Any]
_Requests = AsyncIterator[sync_pb2.ConnectRequest]


class SyncService(SyncServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._config = control.config
        self._database = control.database
        self._sessions = control.sessions
        self._twins = control.twins
        self._trust = control.trust
        self._silence_s = SILENT_INTERVALS * control.config.heartbeat_interval_ms / 1000

    async def Connect(
        self, request_iterator: _Requests, context: _Context
    ) -> AsyncIterator[sync_pb2.ConnectResponse]:
        hello = await _hello(request_iterator)
        await self._register(hello)
        session = self._sessions.open(hello.device_id)
        reader = asyncio.create_task(self._read(request_iterator, session))
        log.event("device_connected", device=hello.device_id, agent=hello.agent_version, peer=context.peer())
        try:
            yield sync_pb2.ConnectResponse(welcome=self._welcome())
            # The session stands already, so a change between this reading and now is not lost.
            states = await self._database.read(lambda c: devices.desired_states(c, [hello.device_id]))
            session.offer(states[hello.device_id])
            while (desired := await _next_desired(session, reader)) is not None:
                yield sync_pb2.ConnectResponse(desired=await self._proven(hello.device_id, desired))
        finally:
            reader.cancel()
            self._sessions.close(session)
            log.event("device_disconnected", device=hello.device_id)

    async def Poll(self, request: sync_pb2.PollRequest, context: _Context) -> sync_pb2.PollResponse:
        hello = request.hello
        devices.check_hello(hello)
        check_reported(request.reported)
        await self._register(hello)
        if request.HasField("reported"):
            self._twins.report(hello.device_id, request.reported)
            await self._twins.flush()
        states = await self._database.read(lambda c: devices.desired_states(c, [hello.device_id]))
        desired = await self._proven(hello.device_id, states[hello.device_id])
        return sync_pb2.PollResponse(welcome=self._welcome(), desired=desired)

    async def _proven(self, device_id: str, desired: sync_pb2.DesiredState) -> sync_pb2.DesiredState:
        """The desired state with the online key's signature, where trust is set up."""
        if self._trust.is_stale:
            await self._database.read(self._trust.look)
        return self._trust.prove(device_id, desired)

    async def _register(self, hello: sync_pb2.Hello) -> None:
        def register(connection: Connection) -> bool:
            return devices.register(connection, hello)

        if await self._database.write(register):
            log.event("device_registered", device=hello.device_id, agent=hello.agent_version)

    async def _read(self, requests: _Requests, session: Session) -> None:
        """Takes reports until the device leaves. Raises SluiceError when it is silent or talks nonsense."""
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await anext(requests, None)
            except TimeoutError:
                raise SluiceError(
                    errors_pb2.DEVICE_SILENT,
                    f"{session.device_id} said nothing for {self._silence_s:g} s",
                    hint="connect again",
                    obj=session.device_id,
                ) from None
            if message is None or session.ended:
                return
            if message.WhichOneof("message") != "reported":
                raise SluiceError(
                    errors_pb2.REQUEST_INVALID,
                    "after Hello, only reported states may come",
                    obj="message",
                )
            self._twins.report(session.device_id, message.reported)

    def _welcome(self) -> sync_pb2.Welcome:
        return sync_pb2.Welcome(
            heartbeat_interval_ms=self._config.heartbeat_interval_ms,
            poll_interval_ms=self._config.poll_interval_ms,
            server_time=to_timestamp(now_us()),
        )


async def _hello(requests: _Requests) -> sync_pb2.Hello:
    """The first message. Raises SluiceError(REQUEST_INVALID | DEVICE_ID_INVALID | LIMIT_EXCEEDED)."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(requests, None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("message") != "hello":
        raise SluiceError(errors_pb2.REQUEST_INVALID, "a stream must begin with Hello", obj="hello")
    devices.check_hello(first.hello)
    return first.hello


async def _next_desired(session: Session, reader: asyncio.Task[None]) -> sync_pb2.DesiredState | None:
    """The next desired state to send; None when the device left. Raises what ended the stream otherwise."""
    waiting = asyncio.ensure_future(session.next())
    try:
        while not (waiting.done() or reader.done()):
            await asyncio.wait(
                {waiting, reader}, timeout=DESIRED_RESEND_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not (waiting.done() or reader.done()):
                session.resend()
        if reader.done():
            reader.result()
            return None
        return waiting.result()
    finally:
        waiting.cancel()
