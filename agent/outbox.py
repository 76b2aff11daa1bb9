"""Telemetry kept on disk until the control plane has it: numbered batches in one SQLite file.

Batches are numbered from 1 within an epoch, a random id made when the file is created. A batch leaves only
when it is acknowledged, or when the outbox is over its size: then the oldest go, and are counted. Together
with the control plane, which stores a batch and its number in one transaction, each counts exactly once.
Measurements may be lost in a power cut (synchronous=NORMAL, to spare flash), never repeated under a new
number: the last number used is in the file itself and an epoch is never reused.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sluice.api.v1 import errors_pb2, telemetry_pb2
from updater.errors import SluiceError

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (sequence INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
"""


class Outbox:
    """The queue. Methods may be called from any thread; each is one transaction.

    Args:
        path: of the file, created when absent. One that SQLite cannot read is deleted: measurements are not
            worth a box that does not start.
        max_bytes: of all batches together.

    Raises SluiceError(IO_FAILED | DISK_FULL) here and in every method.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self.replaced = False  # the file was damaged and begun anew
        try:
            self._db = self._open()
        except sqlite3.OperationalError as error:
            raise self._failed(error) from error
        except sqlite3.DatabaseError:
            self.replaced = True
            for name in (path.name, path.name + "-wal", path.name + "-shm"):
                path.with_name(name).unlink(missing_ok=True)
            self._db = self._open()
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (secrets.token_hex(16),))
            db.execute("INSERT OR IGNORE INTO meta VALUES ('dropped', '0')")
            self.epoch: str = db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_TABLES)
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> SluiceError:
        reason = errors_pb2.DISK_FULL if "full" in str(error) else errors_pb2.IO_FAILED
        return SluiceError(
            reason, f"the telemetry outbox {self._path} cannot be used: {error}", obj=str(self._path)
        )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, batch: telemetry_pb2.Batch) -> int:
        """Numbers a batch and keeps it; the oldest make room. Returns its number."""
        body = batch.SerializeToString()
        with self._transaction() as db:
            sequence = db.execute("INSERT INTO batches (body) VALUES (?)", (body,)).lastrowid
            held = db.execute("SELECT COALESCE(SUM(LENGTH(body)), 0) FROM batches").fetchone()[0]
            dropped = 0
            while held > self._max_bytes:
                oldest = db.execute(
                    "SELECT sequence, LENGTH(body) FROM batches ORDER BY sequence LIMIT 1"
                ).fetchone()
                if oldest is None or oldest[0] == sequence:
                    break
                db.execute("DELETE FROM batches WHERE sequence = ?", (oldest[0],))
                held -= oldest[1]
                dropped += 1
            if dropped:
                db.execute(
                    "UPDATE meta SET value = CAST(value AS INTEGER) + ? WHERE key = 'dropped'", (dropped,)
                )
        assert sequence is not None
        return sequence

    def pending(self, most: int) -> list[telemetry_pb2.Batch]:
        """The oldest batches, in order, with their numbers."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT sequence, body FROM batches ORDER BY sequence LIMIT ?", (most,)
            ).fetchall()
        batches = []
        for sequence, body in rows:
            batch = telemetry_pb2.Batch.FromString(body)
            batch.sequence = sequence
            batches.append(batch)
        return batches

    def acknowledge(self, sequence: int) -> None:
        """The control plane has everything up to this number."""
        with self._transaction() as db:
            db.execute("DELETE FROM batches WHERE sequence <= ?", (sequence,))

    def count(self) -> int:
        """Batches waiting."""
        with self._transaction() as db:
            found: int = db.execute("SELECT COUNT(*) FROM batches").fetchone()[0]
        return found

    def dropped(self) -> int:
        """Batches lost to the size limit since the outbox was created."""
        with self._transaction() as db:
            return int(db.execute("SELECT value FROM meta WHERE key = 'dropped'").fetchone()[0])
