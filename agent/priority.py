"""A worker that starts beside one that serves takes what processor time is left over, until it is to serve.

Importing a runtime and loading a model keep a core busy; on a box with few cores that is what callers of the
version that serves would notice of a change. `lower` is done only where `restore` will be allowed: with
CAP_SYS_NICE, or a RLIMIT_NICE that reaches our own nice value (systemd: LimitNICE=+0). Else nothing is done.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from agent.limits import STARTING_NICE

_CAP_SYS_NICE = 23  # linux/capability.h
_RLIMIT_NICE_ZERO = 20  # a limit of 20 - n allows nice values from n on
_MOST_NICE = 19


def may_restore(status: Path = Path("/proc/self/status")) -> bool:
    """Whether a nice value that was raised may be set back to ours."""
    limit = resource.getrlimit(resource.RLIMIT_NICE)[0]
    own = os.getpriority(os.PRIO_PROCESS, 0)
    if limit == resource.RLIM_INFINITY or limit >= _RLIMIT_NICE_ZERO - own:
        return True
    try:
        lines = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
        return bool(int(lines["CapEff"], 16) >> _CAP_SYS_NICE & 1)
    except (OSError, KeyError, ValueError):
        return False


def lower(pid: int) -> bool:
    """Lowers the priority of a process that has just started; whether that was done.

    Threads inherit it, so that it must have none yet.
    """
    if not may_restore():
        return False
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):  # it has ended, or a filter of system calls forbids it
        os.setpriority(os.PRIO_PROCESS, pid, min(_MOST_NICE, own + STARTING_NICE))
        return True
    return False


def restore(pid: int) -> None:
    """Gives all threads of the process our own priority; no effect when it has ended."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # this thread has ended
                os.setpriority(os.PRIO_PROCESS, int(task.name), own)
