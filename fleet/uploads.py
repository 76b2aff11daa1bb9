"""Uploads: files on their way into the store, resumable, one stream a file at a time.

Bytes gather in the store's staging directory under the announced digest. A stream goes on where the bytes
end; when all have come they are fsynced, hashed and, if the digest is the announced one, renamed into the
store. Bytes that turn out wrong are deleted; bytes of a broken stream stay for the next one, until they have
lain untouched for ABANDONED_UPLOAD_S. Every step keeps the disk reserve free.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

from fleet.disk import check_room
from fleet.limits import ABANDONED_UPLOAD_S, MAX_CHUNK_BYTES, MAX_UPLOAD_BYTES, UPLOAD_SYNC_BYTES
from sluice.api.v1 import errors_pb2
from updater.digests import PREFIX, check_digest
from updater.errors import SluiceError, os_errors
from updater.store import Store

_NAME = "upload-"


class Uploads:
    """Unfinished files of one store. All methods block: call them off the event loop.

    Args:
        store: where files end up.
        reserve: bytes kept free on its file system.
    """

    def __init__(self, store: Store, reserve: int) -> None:
        self._store = store
        self._reserve = reserve
        self._running: set[str] = set()

    def committed(self, digest: str) -> tuple[int, bool]:
        """Bytes held of a file, and whether it is whole and in the store."""
        check_digest(digest, "the file's digest")
        final = self._store.path(digest)
        partial = self._partial(digest)
        with os_errors("looking at the upload", digest):
            if final.is_file():
                return final.stat().st_size, True
            return (partial.stat().st_size if partial.is_file() else 0), False

    def claim(self, digest: str) -> None:
        """Marks a digest as being uploaded. Not blocking: call it on the event loop."""
        if digest in self._running:
            raise SluiceError(
                errors_pb2.STATE_LOCKED,
                f"another upload of {digest} is running",
                hint="wait for it, then ask GetUpload what is held",
                obj=digest,
            )
        self._running.add(digest)

    def release(self, digest: str) -> None:
        """The counterpart of `claim`."""
        self._running.discard(digest)

    def open(self, digest: str, size: int, offset: int) -> Upload:
        """Opens the partial file at `offset`.

        Raises SluiceError(REQUEST_INVALID | LIMIT_EXCEEDED | DISK_FULL | IO_FAILED).
        """
        if size > MAX_UPLOAD_BYTES:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"the file has {size} bytes; at most {MAX_UPLOAD_BYTES} are taken",
                obj=digest,
            )
        held, _ = self.committed(digest)
        if offset != held:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"the upload of {digest} starts at {offset}, but {held} bytes are held",
                hint=f"send from offset {held}",
                obj=digest,
            )
        if offset > size:
            self._partial(digest).unlink(missing_ok=True)
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"{offset} bytes of {digest} were held, more than the announced {size}; they were dropped",
                hint="check the size, then send from offset 0",
                obj=digest,
            )
        check_room(self._store.root, size - offset, self._reserve)
        return Upload(self._store, self._partial(digest), digest, size, offset, self._reserve)

    def prune(self) -> int:
        """Deletes unfinished files that nobody touched for ABANDONED_UPLOAD_S; returns how many."""
        pruned = 0
        for path in self._store.staged():
            digest = PREFIX + path.name.removeprefix(_NAME)
            if not path.name.startswith(_NAME) or digest in self._running:
                continue
            with os_errors("pruning the upload", path):
                if time.time() - path.stat().st_mtime > ABANDONED_UPLOAD_S:
                    path.unlink(missing_ok=True)
                    pruned += 1
        return pruned

    def _partial(self, digest: str) -> Path:
        return self._store.staging(_NAME + digest[len(PREFIX) :])


class Upload:
    """One open partial file."""

    def __init__(
        self, store: Store, partial: Path, digest: str, size: int, offset: int, reserve: int
    ) -> None:
        self._store = store
        self._path = partial
        self._digest = digest
        self._size = size
        self._reserve = reserve
        self.committed = offset
        self._unsynced = 0
        # A cancelled call closes the file while its last write may still run on another thread.
        self._lock = threading.Lock()
        with os_errors("opening the upload", partial):
            self._descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.lseek(self._descriptor, offset, os.SEEK_SET)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, chunk: bytes) -> None:
        """Appends a chunk. Raises SluiceError(LIMIT_EXCEEDED | REQUEST_INVALID | DISK_FULL | IO_FAILED)."""
        if len(chunk) > MAX_CHUNK_BYTES:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"a chunk has {len(chunk)} bytes; at most {MAX_CHUNK_BYTES} are taken",
                obj=self._digest,
            )
        if self.committed + len(chunk) > self._size:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"more bytes came for {self._digest} than the announced {self._size}",
                obj=self._digest,
            )
        check_room(self._path.parent, len(chunk), self._reserve)
        with self._lock, os_errors("writing the upload", self._path):
            if self._descriptor < 0:
                return
            view = memoryview(chunk)
            while view:
                written = os.write(self._descriptor, view)
                view = view[written:]
                self.committed += written
            self._unsynced += len(chunk)
            if self._unsynced >= UPLOAD_SYNC_BYTES:
                os.fsync(self._descriptor)
                self._unsynced = 0

    def finish(self) -> None:
        """Puts a file whose bytes have all come into the store; does nothing while some are missing.

        Raises SluiceError(FILE_DIGEST_MISMATCH | DISK_FULL | IO_FAILED). After a mismatch the bytes are gone.
        """
        with self._lock, os_errors("writing the upload", self._path):
            if self._descriptor < 0:
                return
            os.fsync(self._descriptor)
        if self.committed < self._size:
            return
        try:
            self._store.add_file(self._path, digest=self._digest, move=True)
        except SluiceError as error:
            if error.reason != errors_pb2.FILE_DIGEST_MISMATCH:
                raise
            self._path.unlink(missing_ok=True)
            raise SluiceError(
                errors_pb2.FILE_DIGEST_MISMATCH,
                f"the {self._size} bytes received do not have the announced digest {self._digest}; "
                "they were dropped",
                hint="check that the file did not change while it was sent, then send it from offset 0",
                obj=self._digest,
            ) from error

    def close(self) -> None:
        """Keeps what came on disk, for a later stream."""
        with self._lock, os_errors("writing the upload", self._path):
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor < 0:
                return
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
