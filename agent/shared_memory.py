"""System shared memory: regions that clients register, and the tensors in them.

A client makes a POSIX shared memory object, registers it (or a part) under a name, and then names the region
instead of sending an input's contents, or has an output written there. A region belongs to the user who
registered it: no other user's request reads, writes, sees or forgets it.

Rules: only names directly below /dev/shm are opened, without following links, and only objects that are the
caller's own; every offset and size is checked against the region. Contents are read and written by system
call, never through a mapping: a client that shrinks its object then gets an error, where a mapping would kill
the process that touches it.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.limits import MAX_KEY_CHARACTERS, MAX_NAME_CHARACTERS, MAX_REGIONS
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

DIRECTORY = Path("/dev/shm")  # noqa: S108 - where the kernel's POSIX shared memory lies
_READ_WRITE_FOR_ALL = stat.S_IROTH | stat.S_IWOTH
_ROOT = 0
_MOST = (1 << 63) - 1  # of an offset that the kernel takes


class Region:
    """A registered region; its descriptor is closed once nobody refers to it any more.

    Attributes:
        name: that it was registered under.
        key: of the shared memory object.
        offset: where it begins in the object, bytes.
        size: bytes.
        user: whose it is; None for callers over a unix socket.
    """

    def __init__(
        self, name: str, key: str, offset: int, size: int, *, user: int | None, descriptor: int
    ) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.size = size
        self.user = user
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes from `offset` of the region. Raises SluiceError(INPUT_INVALID)."""
        self.check(offset, size)
        data = np.empty(size, np.uint8)
        self.read_into(offset, data.data)
        return data

    def read_into(self, offset: int, target: memoryview) -> None:
        """As much as `target` takes, from `offset` of the region. Raises SluiceError(INPUT_INVALID)."""
        self.check(offset, target.nbytes)
        done = 0
        while done < target.nbytes:
            try:
                got = os.preadv(self._descriptor, [target[done:]], self.offset + offset + done)
            except OSError as error:
                raise _unusable(self.name, f"cannot be read: {error.strerror}") from error
            if not got:
                raise _unusable(self.name, "ends before the size it was registered with")
            done += got

    def write(self, offset: int, data: memoryview) -> None:
        """Writes `data` at `offset` of the region. Raises SluiceError(INPUT_INVALID)."""
        self.check(offset, data.nbytes)
        if os.fstat(self._descriptor).st_size < self.offset + offset + data.nbytes:
            raise _unusable(self.name, "ends before the size it was registered with")
        done = 0
        while done < data.nbytes:
            try:
                done += os.pwrite(self._descriptor, data[done:], self.offset + offset + done)
            except OSError as error:
                raise _unusable(self.name, f"cannot be written: {error.strerror}") from error

    def check(self, offset: int, size: int) -> None:
        """Raises SluiceError(INPUT_INVALID) unless that part lies in the region."""
        if not 0 <= offset <= self.size or not 0 <= size <= self.size - offset:
            raise _unusable(self.name, f"has {self.size} bytes, not {size} from byte {offset} on")


@dataclass(frozen=True)
class Status:
    """One region for the status call."""

    name: str
    key: str
    offset: int
    size: int


class Regions:
    """All registered regions; safe to use from any thread."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, size: int, user: int | None) -> None:
        """Registers a part of a shared memory object.

        Args:
            name: for requests to refer to.
            key: the object's name, with or without the leading slash.
            offset: where the region begins, bytes.
            size: of the region, bytes.
            user: the caller, see `peer.Peers`.

        Raises:
            SluiceError: REGION_EXISTS, REQUEST_INVALID, LIMIT_EXCEEDED.
        """
        if not 0 < len(name) <= MAX_NAME_CHARACTERS:
            raise _refused(name, f"a region's name has 1 to {MAX_NAME_CHARACTERS} characters")
        if not 0 < size <= _MOST - offset:
            raise _refused(name, f"{size} bytes from byte {offset} on are no region: take at least one byte")
        descriptor = self._open(name, key, user)
        try:
            there = os.fstat(descriptor).st_size
            if offset + size > there:
                raise _refused(name, f"{key!r} has {there} bytes, not {size} from byte {offset} on")
            with self._lock:
                self._make_room(name)
                self._regions[name] = Region(name, key, offset, size, user=user, descriptor=descriptor)
        except SluiceError:
            os.close(descriptor)
            raise

    def unregister(self, name: str, user: int | None) -> None:
        """Forgets one region of this user, or all of them if `name` is empty; unknown ones are no error."""
        with self._lock:
            for found in [region for region in self._regions.values() if region.user == user]:
                if name in ("", found.name):
                    del self._regions[found.name]

    def status(self, name: str, user: int | None) -> list[Status]:
        """A user's region of that name, or all of the user's. Raises SluiceError(REGION_UNKNOWN)."""
        with self._lock:
            mine = [region for region in self._regions.values() if region.user == user]
        found = [region for region in mine if name in ("", region.name)]
        if name and not found:
            raise _unknown(name)
        return [Status(region.name, region.key, region.offset, region.size) for region in found]

    def find(self, name: str, user: int | None) -> Region:
        """A user's region, for reading and writing. Raises SluiceError(REGION_UNKNOWN)."""
        with self._lock:
            region = self._regions.get(name)
        if region is None or region.user != user:
            raise _unknown(name)
        return region

    def _make_room(self, name: str) -> None:
        """Under the lock."""
        if name in self._regions:
            raise SluiceError(
                errors_pb2.REGION_EXISTS,
                f"shared memory region {_short(name)!r}: the name is in use",
                hint="unregister that region first",
                obj=_short(name),
            )
        if len(self._regions) >= MAX_REGIONS:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{MAX_REGIONS} shared memory regions are registered, which is the most",
                hint="unregister those no longer needed",
                obj=_short(name),
            )

    def _open(self, name: str, key: str, user: int | None) -> int:
        """A descriptor of the object, which is the caller's own."""
        file = key.removeprefix("/")
        if not 0 < len(file) <= MAX_KEY_CHARACTERS or file in (".", "..") or "/" in file or "\0" in file:
            raise _refused(name, f"the key {_short(key)!r} is no name of a shared memory object")
        try:
            # Not blocking: the name may be a pipe's.
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            descriptor = os.open(self._directory / file, flags)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise _refused(
                name,
                f"the object {_short(key)!r} cannot be opened: {why}",
                "the user that the agent runs as must be allowed to read and write it",
            ) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise _refused(name, f"{_short(key)!r} is no shared memory object")
        if not _may_use(found, user):
            os.close(descriptor)
            raise _refused(name, f"the shared memory object {_short(key)!r} belongs to another user")
        return descriptor


def _may_use(found: os.stat_result, user: int | None) -> bool:
    """Whether the object is this user's to show: the agent may be allowed more than its caller is."""
    if user is None:
        open_to_all = found.st_mode & _READ_WRITE_FOR_ALL == _READ_WRITE_FOR_ALL
        return open_to_all or found.st_uid == os.geteuid()
    return user in (_ROOT, found.st_uid)


def _refused(name: str, why: str, hint: str = "") -> SluiceError:
    return SluiceError(
        errors_pb2.REQUEST_INVALID,
        f"shared memory region {_short(name)!r}: {why}",
        hint=hint,
        obj=_short(name),
    )


def _unknown(name: str) -> SluiceError:
    return SluiceError(
        errors_pb2.REGION_UNKNOWN,
        f"shared memory region {_short(name)!r} is not registered",
        obj=_short(name),
    )


def _unusable(name: str, why: str) -> SluiceError:
    return SluiceError(
        errors_pb2.INPUT_INVALID, f"shared memory region {_short(name)!r} {why}", obj=_short(name)
    )


def _short(text: str) -> str:
    return text[:MAX_NAME_CHARACTERS]
