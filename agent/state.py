"""What the agent remembers across restarts, in one SQLite file.

Slots, the desired state and the record of each model's last update. The database is in WAL mode with
synchronous=FULL, so a transaction that returned has reached the disk. `save` writes a model's slots and its
update record together: one transaction, the commit point of an activation or a revert.

A file that SQLite cannot read is set aside and the state starts empty: the versions on disk are then found
again by recovery.py, so that a damaged database does not cost a visit to the box.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.slots import Installed, Slots
from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason
from updater.errors import SluiceError

SCHEMA = 1
MAX_FAILURE_CHARACTERS = 2000
_BUSY_TIMEOUT_S = 10.0
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE models (
  model TEXT PRIMARY KEY, soaking INTEGER NOT NULL, pinned INTEGER NOT NULL
);
CREATE TABLE slots (
  model TEXT NOT NULL, slot TEXT NOT NULL, version INTEGER NOT NULL, manifest_digest TEXT NOT NULL,
  variant TEXT NOT NULL, runtime TEXT NOT NULL, PRIMARY KEY (model, slot)
);
CREATE TABLE desired (
  model TEXT PRIMARY KEY, version INTEGER NOT NULL, manifest_digest TEXT NOT NULL, rollout_id TEXT NOT NULL
);
CREATE TABLE updates (
  model TEXT PRIMARY KEY, version INTEGER NOT NULL, manifest_digest TEXT NOT NULL,
  fetched_bytes INTEGER NOT NULL, total_bytes INTEGER NOT NULL, attempts INTEGER NOT NULL,
  failures INTEGER NOT NULL, reason INTEGER NOT NULL, message TEXT NOT NULL,
  final INTEGER NOT NULL, reverted INTEGER NOT NULL
);
"""
_SLOTS = ("active", "previous", "staged")


@dataclass(frozen=True)
class DesiredModel:
    """What the control plane wants of one model."""

    model: str
    version: int
    manifest_digest: str
    rollout_id: str = ""


@dataclass(frozen=True)
class Desired:
    """The desired state last taken up.

    Attributes:
        generation: of the control plane, for this device; 0 before the first.
        models: by name.
    """

    generation: int = 0
    models: Mapping[str, DesiredModel] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """The running or last update of one model.

    Attributes:
        model: its name.
        version: that it goes to.
        manifest_digest: of that version.
        fetched_bytes: delta bytes received.
        total_bytes: delta bytes in all.
        attempts: that failed, of any cause.
        failures: in a row of the cause of `reason`.
        reason: of the last failure; None when the last attempt did not fail.
        message: of the last failure, for people.
        final: given up until the desired state changes.
        reverted: the version was active and the box went back from it.
    """

    model: str
    version: int
    manifest_digest: str
    fetched_bytes: int = 0
    total_bytes: int = 0
    attempts: int = 0
    failures: int = 0
    reason: ErrorReason.ValueType | None = None
    message: str = ""
    final: bool = False
    reverted: bool = False


class State:
    """The database. Methods may be called from any thread; each is one transaction.

    Args:
        path: of the file, created when absent.

    Raises SluiceError(IO_FAILED | DISK_FULL) here and in every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set_aside: Path | None = None  # where a damaged database went at this start
        self._lock = threading.Lock()
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise _failed(path, error) from error
            self.set_aside = path.with_name(path.name + ".damaged")
            path.replace(self.set_aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            sound = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise SluiceError(
                    errors_pb2.IO_FAILED,
                    f"{self.path} has schema {version}; this agent knows {SCHEMA}",
                    hint="install the version of sluice that wrote it, or a newer one",
                    obj=str(self.path),
                )
            if version == 0:
                db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db_in_transaction():
                    self._db.execute("ROLLBACK")
                raise _failed(self.path, error) from error

    def _db_in_transaction(self) -> bool:
        try:
            return self._db.in_transaction
        except sqlite3.ProgrammingError:  # closed
            return False

    def models(self) -> dict[str, Slots]:
        """The slots of every model that the box knows."""
        with self._transaction() as db:
            found = {
                model: Slots(model, soaking=bool(soaking), pinned=bool(pinned))
                for model, soaking, pinned in db.execute(
                    "SELECT model, soaking, pinned FROM models ORDER BY model"
                )
            }
            rows = db.execute(
                "SELECT model, slot, version, manifest_digest, variant, runtime FROM slots"
            ).fetchall()
        held: dict[str, dict[str, Installed]] = {}
        for model, slot, version, digest, variant, runtime in rows:
            held.setdefault(model, {})[slot] = Installed(version, digest, variant, runtime)
        return {
            model: Slots(
                model,
                active=held.get(model, {}).get("active"),
                previous=held.get(model, {}).get("previous"),
                staged=held.get(model, {}).get("staged"),
                soaking=slots.soaking,
                pinned=slots.pinned,
            )
            for model, slots in found.items()
        }

    def slots(self, model: str) -> Slots:
        """The slots of one model; empty ones if the box does not know it."""
        return self.models().get(model, Slots(model))

    def save(self, slots: Slots, update: Update | None = None) -> None:
        """Writes a model's slots, and its update record if given, in one transaction."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?)",
                (slots.model, slots.soaking, slots.pinned),
            )
            db.execute("DELETE FROM slots WHERE model = ?", (slots.model,))
            for name in _SLOTS:
                item: Installed | None = getattr(slots, name)
                if item is not None:
                    db.execute(
                        "INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?)",
                        (slots.model, name, item.version, item.manifest_digest, item.variant, item.runtime),
                    )
            if update is not None:
                _write_update(db, update)

    def desired(self) -> Desired:
        """The desired state last taken up."""
        with self._transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
            rows = db.execute("SELECT model, version, manifest_digest, rollout_id FROM desired").fetchall()
        return Desired(int(row[0]) if row else 0, {row[0]: DesiredModel(*row) for row in rows})

    def save_desired(self, desired: Desired) -> None:
        """Writes the desired state whole."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('generation', ?)",
                (str(desired.generation),),
            )
            db.execute("DELETE FROM desired")
            db.executemany(
                "INSERT INTO desired VALUES (?, ?, ?, ?)",
                [
                    (item.model, item.version, item.manifest_digest, item.rollout_id)
                    for item in desired.models.values()
                ],
            )

    def accepted(self, model: str) -> str:
        """The desired entry that was last accepted for a model on fresh signed metadata; empty for none."""
        with self._transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (f"accepted/{model}",)).fetchone()
        return str(row[0]) if row else ""

    def save_accepted(self, model: str, entry: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"accepted/{model}", entry))

    def updates(self) -> dict[str, Update]:
        """The update record of every model that has one."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT model, version, manifest_digest, fetched_bytes, total_bytes, attempts, failures,"
                " reason, message, final, reverted FROM updates"
            ).fetchall()
        return {row[0]: _read_update(row) for row in rows}

    def save_update(self, update: Update) -> None:
        with self._transaction() as db:
            _write_update(db, update)

    def clear_update(self, model: str) -> None:
        """Forgets a model's update record: its desired version changed."""
        with self._transaction() as db:
            db.execute("DELETE FROM updates WHERE model = ?", (model,))


def _read_update(row: tuple[Any, ...]) -> Update:
    return Update(
        model=row[0],
        version=row[1],
        manifest_digest=row[2],
        fetched_bytes=row[3],
        total_bytes=row[4],
        attempts=row[5],
        failures=row[6],
        reason=row[7] or None,
        message=row[8],
        final=bool(row[9]),
        reverted=bool(row[10]),
    )


def _write_update(db: sqlite3.Connection, update: Update) -> None:
    db.execute(
        "INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            update.model,
            update.version,
            update.manifest_digest,
            update.fetched_bytes,
            update.total_bytes,
            update.attempts,
            update.failures,
            update.reason or 0,
            update.message[:MAX_FAILURE_CHARACTERS],
            update.final,
            update.reverted,
        ),
    )


def _failed(path: Path, error: sqlite3.Error) -> SluiceError:
    full = "full" in str(error)
    return SluiceError(
        errors_pb2.DISK_FULL if full else errors_pb2.IO_FAILED,
        f"the state database {path} cannot be used: {error}",
        hint="free space on this file system" if full else "check the disk and the directory's permissions",
        obj=str(path),
    )
