"""A content-addressed store of immutable files.

Layout below the root: `objects/ab/cdef…` (the digest's hex digits, split after two) and `staging/` for
unfinished work on the same file system. A file enters by `add_file` or `add_bytes` only when its digest was
computed from the bytes stored; it is fsynced before its name appears and read-only afterwards. Adding what
is there already does nothing. Damage is found by `verify`, which moves the file aside, so that it is never
served and can be fetched again.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.atomic import replace_atomic, sync_directory, write_atomic
from updater.digests import PREFIX, check_digest, digest_bytes, digest_file
from updater.errors import SluiceError, os_errors

_READ_ONLY = 0o444


class Store:
    """Files by digest below one directory.

    Several threads and processes may read and add at once: adding is a rename, so the last of two equal
    writers wins and both are right. Removing is for the owner alone.

    Args:
        root: created when absent. Raises SluiceError(IO_FAILED | DISK_FULL).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._objects = root / "objects"
        self._staging = root / "staging"
        with os_errors("creating the store", root):
            for directory in (self._objects, self._staging):
                directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the file with this digest lies, or would lie."""
        name = check_digest(digest, "store key")[len(PREFIX) :]
        return self._objects / name[:2] / name[2:]

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def require(self, digest: str) -> Path:
        """The path of a file that must be there; raises SluiceError(FILE_UNKNOWN)."""
        path = self.path(digest)
        if not path.is_file():
            raise SluiceError(errors_pb2.FILE_UNKNOWN, f"the store has no file {digest}", obj=digest)
        return path

    def digests(self) -> Iterator[str]:
        """Every digest held, in no particular order."""
        with os_errors("listing the store", self.root):
            for prefix in self._objects.iterdir():
                for entry in prefix.iterdir():
                    digest = PREFIX + prefix.name + entry.name
                    if not entry.name.endswith(".tmp") and not entry.name.endswith(".damaged"):
                        yield digest

    def add_file(self, source: Path, *, digest: str | None = None, move: bool = False) -> str:
        """Takes a file into the store and returns its digest.

        Args:
            source: the file. With `move` it must lie on the store's file system, and is gone afterwards.
            digest: what the content must have; computed either way.
            move: rename instead of copying.

        Raises SluiceError(FILE_DIGEST_MISMATCH | DISK_FULL | IO_FAILED); the store is then unchanged.
        """
        if move:
            return self._adopt(source, digest)
        copy = self.staging(f"add-{secrets.token_hex(8)}")
        try:
            with os_errors("copying into the store", source):
                shutil.copyfile(source, copy)
            return self._adopt(copy, digest)
        finally:
            copy.unlink(missing_ok=True)

    def _adopt(self, source: Path, expected: str | None) -> str:
        """Renames a file on this file system to its digest, after computing it from what is on disk."""
        actual = digest_file(source)
        if expected is not None and actual != expected:
            raise SluiceError(
                errors_pb2.FILE_DIGEST_MISMATCH,
                f"{source.name} has digest {actual}, not {expected}",
                hint="send the file again",
                obj=expected,
            )
        target = self.path(actual)
        if target.is_file():
            source.unlink(missing_ok=True)
            return actual
        self._make_parent(target)
        replace_atomic(source, target, mode=_READ_ONLY)
        return actual

    def add_bytes(self, data: bytes) -> str:
        """Stores small content (a manifest, say) and returns its digest."""
        digest = digest_bytes(data)
        target = self.path(digest)
        if not target.is_file():
            self._make_parent(target)
            write_atomic(target, data, mode=_READ_ONLY)
        return digest

    def _make_parent(self, target: Path) -> None:
        with os_errors("creating", target.parent):
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                sync_directory(self._objects)

    def verify(self, digest: str) -> Path:
        """Re-hashes a file and returns its path.

        Raises SluiceError(FILE_UNKNOWN), or SluiceError(STORE_CORRUPT) after moving the file aside as
        `<name>.damaged`: it counts as absent from then on.
        """
        path = self.require(digest)
        if digest_file(path) != digest:
            damaged = path.with_name(path.name + ".damaged")
            with os_errors("setting aside", path):
                path.replace(damaged)
                sync_directory(path.parent)
            raise SluiceError(
                errors_pb2.STORE_CORRUPT,
                f"the stored file {digest} no longer has its digest; it was set aside as {damaged.name}",
                hint="it is fetched again with the next update; check the disk",
                obj=digest,
            )
        return path

    def staging(self, name: str) -> Path:
        """A path for unfinished work on the store's file system; the same name gives the same path."""
        if not name or "/" in name or name.startswith("."):
            raise SluiceError(errors_pb2.REQUEST_INVALID, f"not a plain staging name: {name!r}")
        return self._staging / name

    def staged(self) -> list[Path]:
        """Everything in staging, for clean-up."""
        with os_errors("listing", self._staging):
            return sorted(self._staging.iterdir())

    def remove(self, digest: str) -> None:
        """Deletes a file; absent ones are no error."""
        path = self.path(digest)
        with os_errors("removing", path):
            path.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """Bytes of all files held."""
        with os_errors("measuring", self.root):
            return sum(
                entry.stat().st_size for prefix in self._objects.iterdir() for entry in prefix.iterdir()
            )
