"""The audit log on disk: segments of chained records, written and synced before what they tell of happens.

A segment is a file named after its first record, one record a line. Appending runs on a thread of its own:
records that wait share one write and one fsync, and the event loop never waits for the disk. When a segment
is full it is sealed (made read-only) and the next one goes on with the chain. Opening checks the newest
segment and cuts off a record that a crash left half written: nobody was told that it was there.

Rules: a record counts once it is synced; when it cannot be written the caller is told, and the file is cut
back to what was there; nothing here deletes a segment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet import limits
from fleet.audit_chain import START, Head, follow, verify
from sluice.api.v1 import errors_pb2
from updater.atomic import sync_directory
from updater.errors import SluiceError, os_errors

SUFFIX = ".jsonl"
FORMAT = 1  # of the records; the first one of each process says it
_DIGITS = 16
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class AuditLog:
    """The audit log of one control plane.

    Args:
        directory: of the segments; created when absent.
        clock: seconds that only move forward.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._queued: list[_Append] = []
        self._draining: asyncio.Task[None] | None = None
        self._segment: _Segment | None = None
        self._failed: tuple[SluiceError, float] | None = None
        self.head = START  # what is durable

    async def start(self) -> None:
        """Opens the log. Raises SluiceError(AUDIT_BROKEN | IO_FAILED | DISK_FULL); appending tries again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def stop(self) -> None:
        """Waits for what is under way and closes the file."""
        if self._draining is not None:
            await asyncio.gather(self._draining, return_exceptions=True)
        self._thread.shutdown(wait=True)
        if self._segment is not None:
            self._segment.close()

    async def append(self, fields: Mapping[str, Any]) -> Head:
        """Writes one record; it is on disk when this returns its head.

        Raises SluiceError(AUDIT_BROKEN | IO_FAILED | DISK_FULL | LIMIT_EXCEEDED).
        """
        if len(self._queued) >= limits.AUDIT_WAITING:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{len(self._queued)} records already wait for the audit log",
                hint="try again in a few seconds",
                retry_s=1.0,
            )
        append = _Append(fields, asyncio.get_running_loop().create_future())
        self._queued.append(append)
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await append.done

    async def _drain(self) -> None:
        """Writes what is queued, a group at a time, until nothing is left."""
        loop = asyncio.get_running_loop()
        try:
            while self._queued:
                group = self._queued[: limits.AUDIT_TOGETHER]
                del self._queued[: limits.AUDIT_TOGETHER]
                outcomes: list[Head | Exception]
                try:
                    outcomes = await loop.run_in_executor(
                        self._thread, self._write, [a.fields for a in group]
                    )
                except Exception as error:  # noqa: BLE001 - given to every caller of the group
                    outcomes = [error] * len(group)
                for append, outcome in zip(group, outcomes, strict=True):
                    if append.done.cancelled():
                        continue
                    if isinstance(outcome, Head):
                        append.done.set_result(outcome)
                    else:
                        append.done.set_exception(outcome)
        finally:
            self._draining = None

    def read(self, from_sequence: int = 1, newest: int = 0) -> Iterator[list[bytes]]:
        """Records in portions of about AUDIT_READ_BYTES, up to the newest when the reading began. Blocks.

        Args:
            from_sequence: the first wanted, or the first that is still there.
            newest: not 0: only so many, the newest.

        Raises SluiceError(IO_FAILED | STORE_CORRUPT).
        """
        last = self.head.sequence
        wanted = max(from_sequence, last - newest + 1 if newest else 1)
        segments = _segments(self._directory)
        portion: list[bytes] = []
        size = 0
        for index, (first, path) in enumerate(segments):
            following = segments[index + 1][0] if index + 1 < len(segments) else last + 1
            if following <= wanted or first > last:
                continue
            with os_errors("reading the audit log", path), path.open("rb") as file:
                for number, line in enumerate(file, first):
                    if number < wanted or number > last:
                        continue
                    portion.append(line.rstrip(b"\n"))
                    size += len(line)
                    if size >= limits.AUDIT_READ_BYTES - limits.AUDIT_RECORD_BYTES:
                        yield portion
                        portion, size = [], 0
        if portion:
            yield portion

    def _write(self, entries: list[Mapping[str, Any]]) -> list[Head | Exception]:
        """Appends records with one fsync; on the log's thread."""
        segment = self._opened()
        head, parts = self.head, []
        outcomes: list[Head | Exception] = []
        for fields in entries:
            try:
                data, head = follow(head, fields)
            except SluiceError as error:
                outcomes.append(error)
                continue
            parts.append(data + b"\n")
            outcomes.append(head)
        try:
            if segment.size >= limits.AUDIT_SEGMENT_BYTES:
                segment = self._segment = segment.next(self._directory, self.head.sequence + 1)
            segment.append(b"".join(parts))
        except SluiceError as error:
            if not segment.cut_back():
                segment.close()
                self._segment = None  # opened anew, and checked, before the next record
            raise _unwritable(error) from error
        self.head = head
        return outcomes

    def _opened(self) -> _Segment:
        if self._segment is None:
            if self._failed is not None and self._clock() - self._failed[1] < limits.AUDIT_RETRY_S:
                raise self._failed[0]
            self._open()
        assert self._segment is not None
        return self._segment

    def _open(self) -> None:
        try:
            self._segment, self.head = _recover(self._directory)
        except SluiceError as error:
            self._failed = (_unwritable(error), self._clock())
            raise self._failed[0] from error
        self._failed = None


@dataclass(frozen=True)
class _Append:
    fields: Mapping[str, Any]
    done: asyncio.Future[Head]


class _Segment:
    """The file that records are appended to."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.size = size

    def append(self, data: bytes) -> None:
        """Writes and syncs. Raises SluiceError; then `cut_back` is due."""
        with os_errors("writing the audit log", self._path):
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fdatasync(self._descriptor)
        self.size += len(data)

    def cut_back(self) -> bool:
        """Removes what a failed `append` left; False when that fails too."""
        try:
            os.ftruncate(self._descriptor, self.size)
            os.fdatasync(self._descriptor)
        except OSError:
            return False
        return True

    def next(self, directory: Path, first: int) -> _Segment:
        """Seals this segment and begins the next one."""
        following = _create(directory, first)
        with contextlib.suppress(OSError):  # the chain is what protects it
            os.fchmod(self._descriptor, 0o400)
        self.close()
        return following

    def close(self) -> None:
        os.close(self._descriptor)


def _recover(directory: Path) -> tuple[_Segment, Head]:
    """The segment to go on with, and the head of the log."""
    with os_errors("creating the audit log", directory):
        directory.mkdir(mode=0o700, exist_ok=True)
    segments = _segments(directory)
    if not segments:
        return _create(directory, 1), START
    first, path = segments[-1]
    with os_errors("reading the audit log", path):
        data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and len(segments) > 1:  # begun, and nothing written: the head stands in the one before
        head = _head_of(*segments[-2])
        if head.sequence + 1 != first:
            raise _misnamed(path)
    elif not whole:
        head = START
        if first != 1:
            raise _misnamed(path)
    else:
        head = _checked(whole, first, path)
    with os_errors("opening the audit log", path):
        descriptor = os.open(path, _APPEND)
    segment = _Segment(path, descriptor, len(whole))
    if len(whole) < len(data) and not segment.cut_back():
        segment.close()
        raise SluiceError(
            errors_pb2.IO_FAILED, f"{path} cannot be cut back to its last record", obj=str(path)
        )
    return segment, head


def _head_of(first: int, path: Path) -> Head:
    with os_errors("reading the audit log", path):
        return _checked(path.read_bytes(), first, path)


def _checked(data: bytes, first: int, path: Path) -> Head:
    """The head of a segment. Raises SluiceError(AUDIT_BROKEN)."""
    found = verify(data[:-1].split(b"\n"))
    if found.first != first:
        raise _misnamed(path)
    return found.head


def _create(directory: Path, first: int) -> _Segment:
    path = directory / f"{first:0{_DIGITS}d}{SUFFIX}"
    with os_errors("beginning a segment of the audit log", path):
        descriptor = os.open(path, _APPEND | os.O_CREAT, 0o600)
        sync_directory(directory)
        if os.fstat(descriptor).st_size:  # not of an attempt that failed before it wrote anything
            os.close(descriptor)
            raise _misnamed(path)
    return _Segment(path, descriptor, 0)


def _segments(directory: Path) -> list[tuple[int, Path]]:
    """The segments in order, with the sequence of their first record."""
    with os_errors("listing the audit log", directory):
        names = sorted(path for path in directory.iterdir() if path.suffix == SUFFIX)
    return [(int(path.stem), path) for path in names if path.stem.isdigit()]


def _misnamed(path: Path) -> SluiceError:
    return SluiceError(
        errors_pb2.AUDIT_BROKEN, f"{path} does not begin with the record that its name says", obj=str(path)
    )


def _unwritable(error: SluiceError) -> SluiceError:
    return SluiceError(
        error.reason,
        f"nothing is changed while the audit log cannot be written: {error.message}",
        hint=error.hint,
        obj=error.obj,
        retry_s=error.retry_s,
    )
