"""The lock on a control plane's data directory: one process works on it at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors


@contextmanager
def data_locked(data: Path) -> Iterator[None]:
    """Holds the lock on the data directory, which exists. Raises SluiceError(STATE_LOCKED)."""
    path = data / "lock"
    with os_errors("opening the lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SluiceError(
                errors_pb2.STATE_LOCKED,
                f"another control plane works on {data}",
                hint="stop it first, or choose another data directory",
                obj=str(data),
            ) from None
        yield
    finally:
        os.close(descriptor)
