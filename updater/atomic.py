"""Writes that survive a power cut: temporary name, fsync the file, rename, fsync the directory.

After `write_atomic` or `replace_atomic` returns, the new content is on disk under its name. Whatever moment
the power is cut at, the name holds the old content or the new content whole, never a part.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors


def sync_file(path: Path) -> None:
    """Forces a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Forces a directory's entries to disk: without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(path: Path) -> None:
    """Raises SluiceError(IO_FAILED) when something other than a regular file has this name.

    A rename would put a file where a device, a pipe or a socket was: as root, `-o /dev/null` would take
    /dev/null from the whole machine.
    """
    with os_errors("looking at", path):
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "a device, pipe or socket"
            raise SluiceError(
                errors_pb2.IO_FAILED,
                f"{path} is {kind} and is not replaced by a file",
                hint="name a regular file",
                obj=str(path),
            )


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Puts `data` at `path`, replacing what is there.

    Raises SluiceError(DISK_FULL | IO_FAILED); `path` is then unchanged and nothing is left behind. IO_FAILED
    too when `path` is no regular file.
    """
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with os_errors("writing", path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def replace_atomic(source: Path, target: Path, *, mode: int | None = None) -> None:
    """Moves a finished file to its final name on the same file system, durably.

    Args:
        source: a file already written; it is fsynced here.
        target: its name from now on; an older file there is replaced.
        mode: permission bits to set first; None for those of the file that is replaced, if there is one.

    Raises SluiceError(DISK_FULL | IO_FAILED); IO_FAILED too when `target` is no regular file.
    """
    check_replaceable(target)
    with os_errors("moving into place", target):
        if mode is None and target.exists():
            mode = stat.S_IMODE(target.stat().st_mode)
        if mode is not None:
            source.chmod(mode)
        sync_file(source)
        source.replace(target)
        sync_directory(target.parent)
        if source.parent != target.parent:
            sync_directory(source.parent)
