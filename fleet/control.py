"""One control plane's parts, put together: what the services work with.

The parts know one another only through what they are given here; nothing is global. `start` brings up
background work and resumes what an earlier process left running; `stop` ends it and keeps what it knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from fleet import audit_record, authority, catalog, devices, identities, log, telemetry, trust
from fleet.audit_log import FORMAT as AUDIT_FORMAT
from fleet.audit_log import AuditLog
from fleet.authentication import Callers
from fleet.authority import Authority
from fleet.builds import Builds
from fleet.caller import Caller
from fleet.clock import now_us
from fleet.conductor import Conductor
from fleet.config import ControlConfig
from fleet.database import Database
from fleet.deltas import DeltaCache
from fleet.enrolment import Enrolments
from fleet.limits import AUTHORITY_REFRESH_S, FILE_THREADS, PROVEN_TOGETHER, UPKEEP_S
from fleet.operators import Operators
from fleet.planner import Planner
from fleet.sessions import Sessions
from fleet.trust import Trust
from fleet.twins import Twins
from fleet.uploads import Uploads
from sluice.api.v1 import errors_pb2
from updater.delta import FEATURES
from updater.errors import SluiceError
from updater.store import Store

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class Control:
    """Everything behind the services. The caller holds the lock on `config.data`.

    Raises SluiceError(CONFIG_INVALID | KEY_UNAVAILABLE | IO_FAILED | DISK_FULL | STORE_CORRUPT).
    """

    def __init__(self, config: ControlConfig) -> None:
        self.config = config
        self.authority = Authority(config.data / authority.DIRECTORY, config.certificate_life_s)
        self.store = Store(config.data / "files")
        self.delta_store = Store(config.data / "deltas")
        self.uploads = Uploads(self.store, config.disk_reserve_bytes)
        self.database = Database(config.data / "control.db")
        with self.database.engine.connect() as connection:
            void = identities.void(connection, now_us())
        self.callers = Callers(self.authority.trust_domain, void, self.authority.bundle)
        self.enrolments = Enrolments(self.database, self.authority, self.callers)
        self.trust = Trust(config.data / trust.DIRECTORY)
        self._builds = Builds(
            self.store, self.delta_store, config.encoder, config.builders, config.disk_reserve_bytes
        )
        self.deltas = DeltaCache(
            self.database,
            self.delta_store,
            self._builds,
            encoder=f"{config.encoder} {','.join(FEATURES)}",
            limit=config.delta_cache_bytes,
        )
        self.operators = Operators(self.database)
        self.audit = AuditLog(config.data / "audit")
        self.planner = Planner(self.database, self.deltas)
        self.sessions = Sessions()
        self.conductor = Conductor(self.database, self.sessions)
        self.twins = Twins(self.database, self.conductor.device_reported)
        self._threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="files")
        self._tasks: set[asyncio.Task[None]] = set()

    async def files(
        self, work: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> _Result:
        """Runs file work (hashing, parsing, writing) on one of a few threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))

    async def start(self) -> None:
        """Resumes rollouts and starts background work."""
        await self.files(self._builds.clean)
        await self.operators.load()
        await self._open_audit()
        await self._resign()
        await self.conductor.start()
        self._spawn("twins", self.twins.run())
        self._spawn("upkeep", self._upkeep())
        self._spawn("authority", self._refresh_authority())
        for name, number in (await self.database.read(catalog.latest_numbers)).items():
            self.published(name, number)

    async def _open_audit(self) -> None:
        """Opens the audit log. One that cannot be opened stops changes, not the control plane."""
        try:
            await self.audit.start()
            await self.audit.append(audit_record.started(AUDIT_FORMAT, now_us()))
        except SluiceError as error:
            log.warning("audit_log_unusable", reason=error.code, why=error.message)

    def end_streams(self) -> None:
        """Ends the calls that would stand for ever, so that stopping need not wait for them."""
        why = SluiceError(
            errors_pb2.CONTROL_UNREACHABLE, "the control plane is stopping", hint="connect again in a while"
        )
        self.sessions.end_all(why)
        self.conductor.end_watches(why)

    async def stop(self) -> None:
        """Ends background work and closes the database."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.twins.stop()
        await self.conductor.stop()
        await self.deltas.stop()
        await self.audit.stop()
        self._threads.shutdown(wait=True)
        self.database.close()

    def published(self, name: str, number: int) -> None:
        """A version appeared: its full copies and the deltas to it are computed ahead, in the background."""
        self._spawn("ahead", self._schedule_ahead(name, number))

    async def _schedule_ahead(self, name: str, number: int) -> None:
        active = await self.database.read(lambda c: devices.active_versions(c, name))
        active.pop(number, None)
        if number > 1:
            active[number - 1] = set()  # the previous version, in all its variants
        started = await self.planner.schedule_ahead(name, number, active)
        if started:
            log.event("deltas_ahead", model=name, version=number, builds=started)

    async def _upkeep(self) -> None:
        """Every UPKEEP_S: abandoned uploads, old telemetry, the delta cache."""
        chores: tuple[tuple[str, Callable[[], Awaitable[int]]], ...] = (
            ("uploads", lambda: self.files(self.uploads.prune)),
            ("telemetry", lambda: telemetry.prune(self.database)),
            ("deltas", self.deltas.evict),
            ("identities", lambda: self.database.write(lambda c: identities.prune(c, now_us()))),
            ("metadata", lambda: self.database.write(self.trust.resign)),
        )
        while True:
            for name, chore in chores:
                try:
                    gone = await chore()
                except SluiceError as error:
                    log.warning("upkeep_failed", error, chore=name)
                else:
                    if gone:
                        log.event("upkeep", chore=name, deleted=gone)
            await asyncio.sleep(UPKEEP_S)

    async def _refresh_authority(self) -> None:
        """Every AUTHORITY_REFRESH_S: rotated files, and the control plane's own certificate."""
        told = ""
        while True:
            await asyncio.sleep(AUTHORITY_REFRESH_S)
            try:
                before = self.authority.bundle
                await self.files(self.authority.refresh)
                if self.authority.bundle != before:
                    await self._look_again(self.authority.bundle)
                told = ""
            except SluiceError as error:
                if str(error) != told:
                    log.warning("authority_not_refreshed", error)
                told = str(error)

    async def _look_again(self, bundle: bytes) -> None:
        """The trusted roots changed: calls under way that lead to none of them end."""
        under_way, ended = self.callers.trust(bundle), 0
        for first in range(0, len(under_way), PROVEN_TOGETHER):
            some = under_way[first : first + PROVEN_TOGETHER]
            ended += self.callers.end(await self.files(self._misled, some))
        if ended:
            log.event("authority_dropped", ended=ended)

    def _misled(self, callers: Sequence[Caller]) -> list[Caller]:
        now = authority.now()
        return [caller for caller in callers if not self.callers.leads(caller, now)]

    async def _resign(self) -> None:
        """Snapshot and timestamp are fresh before the first device asks; without that the rest goes on."""
        try:
            await self.database.write(self.trust.resign)
        except SluiceError as error:
            log.warning("metadata_not_signed", error)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("background_work_failed", error, task=task.get_name())
