"""A worker's share of the processor while it starts beside one that serves.

Loading a model and its libraries takes a processor for as long as it lasts, and requests to the version that
serves would wait for it. So the new process is made to give way until it has proven itself, where that can be
undone: the kernel lets a process be raised again only with RLIMIT_NICE (LimitNICE= of the unit) or
CAP_SYS_NICE. A priority is each thread's own on Linux; threads begin with that of the one that starts them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from pathlib import Path

from agent.limits import STARTING_NICENESS

log = logging.getLogger(__name__)

_CAP_SYS_NICE = 23  # its bit, see capabilities(7)
_NICENESS_OF_LIMIT = 20  # getrlimit(2): a process may go down to this less the limit


def give_way(pid: int) -> bool:
    """Lowers a process that has just started; false where that could not be undone: it stays as it is."""
    if not _may_return():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, min(_niceness() + STARTING_NICENESS, 19))
    return True


def restore(pid: int) -> None:
    """Gives every thread of a process the priority that this process has; no effect when it has ended."""
    niceness = _niceness()
    for _ in range(2):  # the second finds those that were started during the first
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # a thread may end meanwhile
                    os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
        except FileNotFoundError:
            return
        except PermissionError as error:  # it serves all the same, only later than others on a busy box
            log.warning("process %d keeps its low priority: %s", pid, error)
            return


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, os.getpid())  # of the main thread


def _may_return() -> bool:
    """Whether what is lowered may be raised again to this process's own priority."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or _NICENESS_OF_LIMIT - soft <= _niceness():
        return True
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_SYS_NICE & 1)
