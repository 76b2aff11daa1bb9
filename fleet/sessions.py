"""Live streams, one for each device. A newer stream of the same device replaces the older one.

What waits for a stream is one desired state, the newest: state is sent whole, so an older one that was not
sent yet is simply overwritten, and a slow device costs no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError


class Session:
    """One device's stream."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        self.ended: SluiceError | None = None
        self._desired: sync_pb2.DesiredState | None = None
        self._latest: sync_pb2.DesiredState | None = None
        self._generation = -1
        self._wake = asyncio.Event()

    def offer(self, desired: sync_pb2.DesiredState) -> None:
        """Puts a desired state up for sending, unless one as new was there before."""
        if desired.generation > self._generation:
            self._generation = desired.generation
            self._desired = self._latest = desired
            self._wake.set()

    def resend(self) -> None:
        """Puts the newest desired state up for sending once more: the device may have refused it."""
        self._desired = self._latest
        self._wake.set()

    def end(self, why: SluiceError) -> None:
        """Wakes the stream so that it ends."""
        self.ended = why
        self._wake.set()

    async def next(self) -> sync_pb2.DesiredState:
        """The next desired state to send. Raises what `end` was given."""
        while True:
            if self.ended is not None:
                raise self.ended
            if self._desired is not None:
                desired, self._desired = self._desired, None
                return desired
            await self._wake.wait()
            self._wake.clear()


class Sessions:
    """Sessions by device id."""

    def __init__(self) -> None:
        self._by_device: dict[str, Session] = {}

    def open(self, device_id: str) -> Session:
        session = Session(device_id)
        older = self._by_device.get(device_id)
        self._by_device[device_id] = session
        if older is not None:
            older.end(
                SluiceError(
                    errors_pb2.STATE_LOCKED,
                    f"another stream of {device_id} took over",
                    hint="if this is not a reconnect, two boxes have the same device id",
                    obj=device_id,
                )
            )
        return session

    def close(self, session: Session) -> None:
        """Forgets a session; one that was replaced leaves its successor alone."""
        if self._by_device.get(session.device_id) is session:
            del self._by_device[session.device_id]

    def end_all(self, why: SluiceError) -> None:
        """Ends every stream, because the control plane stops."""
        for session in self._by_device.values():
            session.end(why)

    def is_online(self, device_id: str) -> bool:
        return device_id in self._by_device

    def online(self) -> frozenset[str]:
        """Ids of the devices that have a stream now."""
        return frozenset(self._by_device)

    def resend_all(self) -> None:
        """Sends every device that is online its desired state once more: it may be believed now."""
        for session in self._by_device.values():
            session.resend()

    def offer(self, desired: Mapping[str, sync_pb2.DesiredState]) -> None:
        """Sends new desired states to those of the devices that are online."""
        for device_id, state in desired.items():
            session = self._by_device.get(device_id)
            if session is not None:
                session.offer(state)
