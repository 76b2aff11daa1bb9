"""The database: SQLite in WAL mode, opened, migrated and used off the event loop.

Work is a function that takes a connection; `read` runs it on one of a few threads, `write` on the only
writing thread, so writers never meet SQLITE_BUSY. Writes that queue up while the disk syncs share the next
transaction, each within a savepoint of its own: one that raises undoes itself alone. What `write` returned is
on disk (synchronous=FULL). Both have a bounded queue. Migrations run once at start-up; the caller holds the
lock on the data directory.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DatabaseError, OperationalError

from fleet.limits import MAX_WAITING_CALLS, READER_THREADS, WRITES_TOGETHER
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_Result = TypeVar("_Result")
_BUSY_TIMEOUT_MS = 10_000  # only a backup tool could hold the database for so long
_MIGRATIONS = Path(__file__).parent / "migrations"
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_TIMEOUT_MS}")


class Database:
    """The control plane's tables in one SQLite file.

    Args:
        path: the file; created when absent, migrated to this release's tables.

    Raises SluiceError(STORE_CORRUPT | IO_FAILED | DISK_FULL).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = _open(path)
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="db-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="db-write")
        self._waiting = 0
        self._queued: list[_Write] = []
        self._draining: asyncio.Task[None] | None = None
        try:
            with _database_errors(path), self.engine.begin() as connection:
                migrate(connection)
        except BaseException:
            self.close()
            raise

    async def read(self, work: Callable[[Connection], _Result]) -> _Result:
        """Runs `work` on a consistent snapshot."""
        self._check_room()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._run, work)
        finally:
            self._waiting -= 1

    async def write(self, work: Callable[[Connection], _Result]) -> _Result:
        """Runs `work` in a transaction: committed, durably, when it returns; undone when it raises."""
        self._check_room()
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queued.append(_Write(work, done))
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        result: _Result = await done
        return result

    async def _drain(self) -> None:
        """Commits what is queued, a group at a time, until nothing is left."""
        try:
            while self._queued:
                group, self._queued = self._queued[:WRITES_TOGETHER], self._queued[WRITES_TOGETHER:]
                loop = asyncio.get_running_loop()
                try:
                    outcomes = await loop.run_in_executor(self._writer, self._run_group, group)
                except Exception as error:  # noqa: BLE001 - given to every caller of the group
                    outcomes = [error] * len(group)
                for write, outcome in zip(group, outcomes, strict=True):
                    if write.done.cancelled():
                        continue
                    if isinstance(outcome, _Value):
                        write.done.set_result(outcome.value)
                    else:
                        write.done.set_exception(outcome)
        finally:
            self._draining = None

    def _check_room(self) -> None:
        waiting = self._waiting + len(self._queued)
        if waiting >= MAX_WAITING_CALLS:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{waiting} calls already wait for the database",
                hint="try again in a few seconds",
            )

    def _run(self, work: Callable[[Connection], _Result]) -> _Result:
        with _database_errors(self.path), self.engine.begin() as connection:
            return work(connection)

    def _run_group(self, group: list[_Write]) -> list[_Value | Exception]:
        outcomes: list[_Value | Exception] = []
        with _database_errors(self.path), self.engine.begin() as connection:
            for write in group:
                try:
                    with _database_errors(self.path), connection.begin_nested():
                        outcomes.append(_Value(write.work(connection)))
                except Exception as error:  # noqa: BLE001 - given to the caller of this write
                    outcomes.append(error)
        return outcomes

    def close(self) -> None:
        """Waits for running work and closes the file."""
        self._readers.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self.engine.dispose()


@dataclass(frozen=True)
class _Write:
    work: Callable[[Connection], Any]
    done: asyncio.Future[Any]


@dataclass(frozen=True)
class _Value:
    value: Any


def migrate(connection: Connection) -> None:
    """Brings the tables to this release's revision; all of it or nothing."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _open(path: Path) -> Engine:
    engine = sqlalchemy.create_engine(
        sqlalchemy.URL.create("sqlite", database=str(path)),
        pool_size=READER_THREADS + 1,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's BEGIN below decides, not the driver
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


class _database_errors:  # noqa: N801 - used as a verb, like os_errors
    """Turns the driver's errors into sluice's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, DatabaseError):
            return
        text = str(error.orig)
        name = getattr(error.orig, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            raise SluiceError(
                errors_pb2.DISK_FULL, f"no space left for the database: {text}", obj=str(self._path)
            ) from error
        if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            raise SluiceError(
                errors_pb2.STORE_CORRUPT,
                f"the database is damaged: {text}",
                hint="stop the control plane and restore the data directory from a backup",
                obj=str(self._path),
            ) from error
        if isinstance(error, OperationalError) and name.startswith(
            ("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_BUSY", "SQLITE_PERM")
        ):
            raise SluiceError(
                errors_pb2.IO_FAILED, f"the database cannot be used: {text}", obj=str(self._path)
            ) from error
