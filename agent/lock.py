"""One agent a state directory: a lock that the kernel drops when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors


class StateLock:
    """Holds `<state_dir>/lock` until closed.

    Args:
        state_dir: exists already.

    Raises SluiceError(STATE_LOCKED) naming the process that holds it, or SluiceError(IO_FAILED).
    """

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / "lock"
        with os_errors("opening the lock", path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise SluiceError(
                errors_pb2.STATE_LOCKED,
                f"another agent (process {holder}) uses {state_dir}",
                hint="stop it first, or give this one a state_dir of its own",
                obj=str(state_dir),
            ) from error
        with os_errors("writing the lock", path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> StateLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
