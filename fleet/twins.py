"""Twins: what devices report, checked, made durable, then handed on.

A report that changes what the device runs is written at once; heartbeats and progress gather for
TWIN_FLUSH_S. Everything that waits is written in one transaction, the newest report of each device. Only
after that is it handed on, so that no decision rests on a report that a crash could forget.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from google.protobuf.message import Message

from fleet import devices, log
from fleet.clock import now_us
from fleet.database import Database
from fleet.limits import (
    MAX_FAILURE_CHARACTERS,
    MAX_LOADED_DIGESTS,
    MAX_MODEL_REPORT_BYTES,
    MAX_REPORTED_MODELS,
    MAX_STORED_INTEGER,
    TWIN_FLUSH_S,
)
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError

Listener = Callable[[str, sync_pb2.ReportedState], None]


class Twins:
    """Reported states on their way into the database.

    Args:
        listener: called on the event loop with each report that was made durable; it must not block.
    """

    def __init__(self, database: Database, listener: Listener) -> None:
        self._database = database
        self._listener = listener
        self._waiting: dict[str, tuple[sync_pb2.ReportedState, int]] = {}  # one for each device at most
        self._essence: dict[str, bytes] = {}
        self._urgent = asyncio.Event()
        self._saved = asyncio.Event()  # set and replaced after each transaction

    def report(self, device_id: str, reported: sync_pb2.ReportedState) -> None:
        """Takes a registered device's report. Raises SluiceError(LIMIT_EXCEEDED | REQUEST_INVALID)."""
        check_reported(reported)
        essence = _essence(reported)
        if self._essence.get(device_id) != essence:
            self._essence[device_id] = essence
            self._urgent.set()
        self._waiting[device_id] = (reported, now_us())

    async def flush(self) -> None:
        """Waits until everything reported so far is durable."""
        while self._waiting:
            saved = self._saved
            self._urgent.set()
            await saved.wait()

    async def run(self) -> None:
        """Writes what waits, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(TWIN_FLUSH_S):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            self._urgent.clear()
            try:
                await self._save()
            except SluiceError as error:
                log.warning("twins_not_saved", error, devices=len(self._waiting))
                await asyncio.sleep(TWIN_FLUSH_S)

    async def stop(self) -> None:
        """Writes what still waits."""
        await self._save()

    async def _save(self) -> None:
        taken = dict(self._waiting)
        if not taken:
            return
        rows = {
            device_id: (reported.SerializeToString(), seen) for device_id, (reported, seen) in taken.items()
        }
        await self._database.write(lambda c: devices.save_reports(c, rows))
        for device_id, entry in taken.items():
            if self._waiting.get(device_id) is entry:
                del self._waiting[device_id]
            self._listener(device_id, entry[0])
        saved, self._saved = self._saved, asyncio.Event()
        saved.set()


def check_reported(reported: sync_pb2.ReportedState) -> None:
    """Raises SluiceError(LIMIT_EXCEEDED | REQUEST_INVALID)."""
    if len(reported.models) > MAX_REPORTED_MODELS:
        raise _over("reported models", len(reported.models), MAX_REPORTED_MODELS)
    if reported.ByteSize() > MAX_MODEL_REPORT_BYTES:
        raise _over("bytes of reported state", reported.ByteSize(), MAX_MODEL_REPORT_BYTES)
    names = set()
    _check_integers(reported)
    for entry in reported.models:
        _check_integers(entry)
        _check_integers(entry.failure)
        if entry.model in names:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID, f"{entry.model[:80]!r} is reported twice", obj=entry.model[:80]
            )
        names.add(entry.model)
        if len(entry.loaded_digests) > MAX_LOADED_DIGESTS:
            raise _over("loaded digests of one model", len(entry.loaded_digests), MAX_LOADED_DIGESTS)
        if len(entry.failure.message) > MAX_FAILURE_CHARACTERS:
            raise _over("characters in a failure", len(entry.failure.message), MAX_FAILURE_CHARACTERS)


def _check_integers(message: Message) -> None:
    """The wire's integers reach further than the database's."""
    for field, value in message.ListFields():
        if isinstance(value, int) and value > MAX_STORED_INTEGER:
            raise _over(f"is reported as {field.name}", value, MAX_STORED_INTEGER)


def _essence(reported: sync_pb2.ReportedState) -> bytes:
    """A hash of everything but clocks and progress."""
    copy = sync_pb2.ReportedState()
    copy.CopyFrom(reported)
    copy.ClearField("time")
    for entry in copy.models:
        entry.ClearField("fetched_bytes")
        entry.ClearField("fetch_total_bytes")
    return hashlib.blake2b(copy.SerializeToString(deterministic=True), digest_size=16).digest()


def _over(what: str, count: int, limit: int) -> SluiceError:
    return SluiceError(errors_pb2.LIMIT_EXCEEDED, f"{count} {what}; at most {limit} are taken", obj=what)
