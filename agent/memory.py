"""Memory: whether a second worker fits beside the one that serves.

What is available is the least that the kernel grants: of the machine, and of every control group above this
process that has a limit (v1 or v2; a service's MemoryMax, a container). Page cache that a group could give up
does not count as used. What a worker needs is estimated from the worker before it and the sizes of both model
files; without such a worker from the file alone.

An estimate can be wrong. A worker is the first that the kernel takes when memory runs out (OOM_SCORE_ADJUST),
so that a wrong one costs the new version its start and not the box its service.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.limits import LOADED_BYTES_PER_FILE_BYTE, WORKER_BASE_BYTES

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # what v1 gives as the limit where there is none lies above


@dataclass(frozen=True)
class Memory:
    """What was found before a swap, bytes.

    Attributes:
        needed: estimate for the new worker.
        available: to it, now.
    """

    needed: int
    available: int


def estimate(new_file: int, old_file: int, old_resident: int) -> int:
    """What a worker of a new version will hold, bytes.

    Args:
        new_file: size of its model file with its external data, bytes.
        old_file: the same of the version that serves; 0 when unknown.
        old_resident: of its worker, bytes; 0 when none runs.
    """
    if not old_resident or not old_file:
        return WORKER_BASE_BYTES + LOADED_BYTES_PER_FILE_BYTE * new_file
    return old_resident + LOADED_BYTES_PER_FILE_BYTE * max(0, new_file - old_file)


def available_bytes(groups: Path = _CGROUPS, own: Path = _OWN_GROUPS) -> int:
    """What may still be taken: the least of the machine's and every control group's, bytes."""
    return min([psutil.virtual_memory().available, *(left for _, left in _limits(groups, own))])


def box_bytes(groups: Path = _CGROUPS, own: Path = _OWN_GROUPS) -> int:
    """What there is at all: the least of the machine's memory and every control group's limit, bytes."""
    return min([psutil.virtual_memory().total, *(most for most, _ in _limits(groups, own))])


def _limits(groups: Path, own: Path) -> list[tuple[int, int]]:
    """The limit of every group above this process that has one, and what is left of it, bytes."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:  # no control groups
        lines = []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _each(groups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _each(groups / "memory", path, *names)
    return found


def _each(root: Path, path: str, limit: str, usage: str, cache: str) -> list[tuple[int, int]]:
    """The limits from this group up to the root, and what each leaves."""
    found = []
    group = root / path.strip("/")
    while True:
        try:
            most = int((group / limit).read_text("ascii"))
            used = int((group / usage).read_text("ascii"))
            lines = (group / "memory.stat").read_text("ascii").splitlines()
            statistics = dict(line.split() for line in lines)
            if most < _UNLIMITED:
                found.append((most, max(0, most - used + int(statistics.get(cache, 0)))))
        except (OSError, ValueError):  # no limit ("max"), or the group is not shown to us
            pass
        if group == root:
            return found
        group = group.parent
