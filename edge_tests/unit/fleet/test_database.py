"""The database: migrations match the tables; writes group, and fail alone."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, insert, select

from fleet import tables
from fleet.database import Database
from updater.errors import SluiceError


def scenario(path: Path, work: Callable[[Database], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        database = Database(path)
        try:
            await work(database)
        finally:
            database.close()

    asyncio.run(run())


def add(name: str) -> Callable[[Connection], str]:
    def work(connection: Connection) -> str:
        connection.execute(insert(tables.models).values(name=name, created_us=1))
        return name

    return work


def names(connection: Connection) -> list[str]:
    return list(connection.execute(select(tables.models.c.name).order_by(tables.models.c.name)).scalars())


def test_migrations_make_the_tables_that_the_code_names(tmp_path: Path) -> None:
    database = Database(tmp_path / "control.db")
    with database.engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    database.close()
    Database(tmp_path / "control.db").close()  # a second time changes nothing


def test_a_write_that_raises_undoes_itself_alone(tmp_path: Path) -> None:
    def broken(connection: Connection) -> None:
        add("half")(connection)
        raise ValueError("no")

    async def work(database: Database) -> None:
        results = await asyncio.gather(
            *(database.write(add(f"m{index:03}")) for index in range(300)),
            database.write(broken),
            database.write(add("m000")),
            database.write(add("last")),
            return_exceptions=True,
        )
        assert results[:300] == [f"m{index:03}" for index in range(300)]
        assert isinstance(results[300], ValueError)
        assert isinstance(results[301], Exception)
        assert results[302] == "last"
        assert await database.read(names) == ["last", *(f"m{index:03}" for index in range(300))]

    scenario(tmp_path / "control.db", work)


def test_a_cancelled_caller_does_not_stop_the_others(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        first = asyncio.create_task(database.write(add("first")))
        second = asyncio.create_task(database.write(add("second")))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == "second"
        assert "second" in await database.read(names)

    scenario(tmp_path / "control.db", work)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(SluiceError) as caught:
        Database(path)
    assert caught.value.code == "STORE_CORRUPT"
    assert path.read_bytes().startswith(b"this is not")


def test_a_database_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(SluiceError) as caught:
        Database(tmp_path / "missing" / "control.db")
    assert caught.value.code == "IO_FAILED"


def test_a_reader_sees_only_whole_transactions(tmp_path: Path) -> None:
    path = tmp_path / "control.db"

    async def work(database: Database) -> None:
        await database.write(add("one"))
        other = sqlite3.connect(path)
        try:
            assert other.execute("SELECT name FROM models").fetchall() == [("one",)]
        finally:
            other.close()

    scenario(path, work)
