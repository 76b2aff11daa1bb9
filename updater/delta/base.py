"""The base of a delta as the decoder reads it: checked once by digest, then read by ranges.

Reads go through pread rather than a mapping: a base that shrinks under a mapping kills the process with
SIGBUS, while a short read is an error that can be handled.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from updater.delta import faults
from updater.delta.container import Header
from updater.digests import PREFIX
from updater.errors import os_errors

_HASH_BYTES = 256 << 10  # hashed at a time: what fits a core's cache


class Base:
    """A base file, open for reading. `path` None stands for no base: every read is then refused."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = -1
        self._size = 0

    def open(self, header: Header) -> None:
        """Opens the base and proves that it is the one the header names.

        Raises SluiceError(DELTA_WRONG_BASE | IO_FAILED).
        """
        if header.base_digest is None:
            return
        if self._path is None:
            raise faults.wrong_base(f"the delta needs the base {header.base_digest}; none was given", "")
        with os_errors("reading the base", self._path):
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._file).st_size
        if size != header.base_size:
            raise faults.wrong_base(
                f"the base {self._path} has {size} bytes; the delta was made from {header.base_size}",
                str(self._path),
            )
        self._size = size
        digest = self._digest()
        if digest != header.base_digest:
            raise faults.wrong_base(
                f"the base {self._path} is {digest}; the delta was made from {header.base_digest}",
                str(self._path),
            )

    def _digest(self) -> str:
        """Hashes what was opened, not what the name may mean by now."""
        sha = hashlib.sha256()
        for offset in range(0, self._size, _HASH_BYTES):
            sha.update(self.read(offset, min(_HASH_BYTES, self._size - offset)))
        return PREFIX + sha.hexdigest()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises SluiceError(DELTA_INVALID | DELTA_WRONG_BASE | IO_FAILED)."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise faults.invalid(f"{length} bytes at {offset} of a base that has {self._size}")
        parts = []
        while length:
            with os_errors("reading the base", self._path):
                part = os.pread(self._file, length, offset)
            if not part:
                raise faults.wrong_base(f"the base {self._path} shrank while it was read", str(self._path))
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
