"""Which versions a device was given, as rows: what it may ask for.

Every function takes a connection inside a transaction of fleet.database and blocks. A version counts from
when it becomes desired, and stays among the newest ASSIGNED_VERSIONS of its model for that device, so that
what the device runs, goes back to and keeps as a base is among them. What a device reports does not count:
it could report its way to any model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, and_, exists, select
from sqlalchemy.dialects.sqlite import insert as upsert

from fleet import catalog, tables
from fleet.clock import now_us
from fleet.deltas import FULL
from fleet.limits import ASSIGNED_VERSIONS, MAX_STORED_INTEGER


def assign(connection: Connection, ids: Sequence[str], model: str, version: int) -> None:
    """Notes that devices were given a version; the oldest of each beyond ASSIGNED_VERSIONS are forgotten."""
    if not ids:
        return
    now = now_us()
    statement = upsert(tables.assigned_versions)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["device", "model", "version"],
            set_={"assigned_us": statement.excluded.assigned_us},
        ),
        [{"device": name, "model": model, "version": version, "assigned_us": now} for name in ids],
    )
    newest = (
        "SELECT version FROM assigned_versions WHERE device = ? AND model = ? "
        "ORDER BY assigned_us DESC, version DESC LIMIT ?"
    )
    connection.exec_driver_sql(
        f"DELETE FROM assigned_versions WHERE device = ? AND model = ? AND version NOT IN ({newest})",  # noqa: S608
        [(name, model, name, model, ASSIGNED_VERSIONS) for name in ids],
    )


def is_assigned(connection: Connection, device: str, model: str, version: int) -> bool:
    """Whether a device was given this version."""
    if not 0 < version <= MAX_STORED_INTEGER:
        return False
    columns = tables.assigned_versions.c
    query = select(columns.version).where(
        columns.device == device, columns.model == model, columns.version == version
    )
    return connection.execute(query).first() is not None


def not_assigned(connection: Connection, device: str, digests: Sequence[str]) -> set[str]:
    """Those of some digests that are files of versions, but of none that the device was given."""
    if not digests:
        return set()
    found = catalog.held_files(connection, digests)
    given = {
        (row.model, row.version)
        for row in connection.execute(
            select(tables.assigned_versions).where(tables.assigned_versions.c.device == device)
        )
    }
    allowed = {file.digest for file in found if (file.model, file.version) in given}
    return {file.digest for file in found} - allowed


def may_fetch(connection: Connection, device: str, delta: str) -> bool | None:
    """Whether a delta is between files of versions that the device was given; None for an unknown delta."""
    columns = tables.deltas.c
    query = select(columns.base, columns.target).where(columns.digest == delta, columns.ready.is_(True))
    pairs = connection.execute(query).all()
    if not pairs:
        return None
    return any(_all_given(connection, device, {pair.base, pair.target} - {FULL}) for pair in pairs)


def _all_given(connection: Connection, device: str, digests: Collection[str]) -> bool:
    given, files = tables.assigned_versions.c, tables.version_files.c
    for digest in digests:
        query = select(
            exists().where(
                and_(
                    files.digest == digest,
                    given.device == device,
                    given.model == files.model,
                    given.version == files.version,
                )
            )
        )
        if not connection.execute(query).scalar():
            return False
    return True
