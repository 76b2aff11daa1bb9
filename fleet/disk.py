"""The disk reserve: room that stays free, so that the database can write and an operator log in."""

from __future__ import annotations

import shutil
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors


def check_room(directory: Path, wanted: int, reserve: int) -> None:
    """Raises SluiceError(DISK_FULL) unless `wanted` more bytes leave `reserve` bytes free."""
    with os_errors("measuring the free space of", directory):
        free = shutil.disk_usage(directory).free
    if free - wanted < reserve:
        raise SluiceError(
            errors_pb2.DISK_FULL,
            f"{wanted / 1e6:.1f} MB do not fit: {free / 1e6:.1f} MB are free and"
            f" {reserve / 1e6:.1f} MB are kept in reserve",
            hint="free space on the control plane's disk, or move its data directory to a larger one",
            obj=str(directory),
        )
