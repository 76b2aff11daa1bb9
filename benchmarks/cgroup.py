"""A memory limit on a process, by a control group of its own: cgroup v1 `memory` or v2."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"
REMOVE_S = 5.0


def missing() -> str:
    """Why no limit can be set here; empty when it can."""
    if os.geteuid() != 0:
        return "a memory limit needs root"
    if (V1 / "memory.limit_in_bytes").is_file():
        return ""
    controllers = ROOT / "cgroup.subtree_control"
    if controllers.is_file() and "memory" in controllers.read_text("ascii").split():
        return ""
    return f"no memory controller: neither {V1}/memory.limit_in_bytes nor 'memory' in {controllers}"


class MemoryLimit:
    """A control group with a limit in bytes on memory, page cache included; gone at the end."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._v1 = (V1 / "memory.limit_in_bytes").is_file()
        self._group = (V1 if self._v1 else ROOT) / f"sluice-bench-{os.getpid()}"

    def __enter__(self) -> MemoryLimit:
        self._group.mkdir()
        name = "memory.limit_in_bytes" if self._v1 else "memory.max"
        (self._group / name).write_text(str(self.limit_bytes), "ascii")
        return self

    def enter(self) -> None:
        """Puts the calling process under the limit: for `preexec_fn`."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()), "ascii")

    def peak_bytes(self) -> int | None:
        """The most that was charged to the group; None where the kernel keeps no peak."""
        name = "memory.max_usage_in_bytes" if self._v1 else "memory.peak"
        try:
            return int((self._group / name).read_text("ascii"))
        except FileNotFoundError:
            return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until = time.monotonic() + REMOVE_S
        while True:  # a process that has just ended may still be counted
            with contextlib.suppress(OSError):
                self._group.rmdir()
                return
            if time.monotonic() > until:
                raise RuntimeError(f"{self._group} cannot be removed: a process is still in it")
            time.sleep(0.05)
