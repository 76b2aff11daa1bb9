"""Digests: "sha256:" and 64 lower-case hex digits, the name of every file, delta and manifest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors

PREFIX = "sha256:"
_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
READ_BYTES = 1 << 20  # how much of a file is hashed at a time


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """The digest of bytes in memory."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's content, read in pieces. Raises SluiceError(IO_FAILED)."""
    sha = hashlib.sha256()
    with os_errors("reading", path), path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            sha.update(piece)
    return PREFIX + sha.hexdigest()


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest."""
    return _PATTERN.fullmatch(text) is not None


def check_digest(text: str, what: str) -> str:
    """`text` if it is a digest; raises SluiceError(REQUEST_INVALID) naming `what` otherwise."""
    if not is_digest(text):
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f'{what} is not a digest: expected "sha256:" and 64 lower-case hex digits, got {text[:80]!r}',
            obj=text[:80],
        )
    return text


def raw(digest: str) -> bytes:
    """The 32 bytes of a digest."""
    return bytes.fromhex(digest[len(PREFIX) :])


def from_raw(value: bytes) -> str:
    """The digest for 32 raw bytes."""
    return PREFIX + value.hex()
