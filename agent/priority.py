"""A worker that starts beside one that serves takes what processor time is left over, until it is to serve.

Importing a runtime and loading a model keep a core busy; on a box with few cores that is what callers of the
version that serves would notice of a change. Linux shares time between sessions first (autogroups, where they
are on and no control group does it), and by nice values only within one; a worker has a session of its own,
so both are set. An autogroup's value may always be set back. A nice value may only with CAP_SYS_NICE, or with
a RLIMIT_NICE that reaches our own (systemd: LimitNICE=+0); without, it is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import time
from pathlib import Path

from agent.limits import AUTOGROUP_TRIES, AUTOGROUP_WAIT_S, STARTING_NICE

log = logging.getLogger(__name__)

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


def lower(pid: int) -> None:
    """Lowers the priority of a process that has just started; no effect when it has ended.

    Threads inherit it, so that it must have none yet.
    """
    if autogroup(pid) != autogroup(os.getpid()):
        _set_autogroup(pid, STARTING_NICE)
    if may_restore():
        own = os.getpriority(os.PRIO_PROCESS, 0)
        with contextlib.suppress(OSError):  # it has ended, or a filter of system calls forbids it
            os.setpriority(os.PRIO_PROCESS, pid, min(_MOST_NICE, own + STARTING_NICE))


def restore(pid: int) -> None:
    """Gives the process and all its threads our own priority; no effect when it has ended."""
    if autogroup(pid) != autogroup(os.getpid()):
        _set_autogroup(pid, 0)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # this thread has ended, or was never lowered
                os.setpriority(os.PRIO_PROCESS, int(task.name), own)


def autogroup(pid: int) -> str:
    """The name of a process's autogroup; empty where the kernel has none."""
    try:
        return Path(f"/proc/{pid}/autogroup").read_text("ascii").partition(" ")[0].strip()
    except OSError:
        return ""


def _set_autogroup(pid: int, nice: int) -> None:
    """Writes the value; the kernel takes few in a second from those without privileges."""
    for _ in range(AUTOGROUP_TRIES):
        try:
            Path(f"/proc/{pid}/autogroup").write_text(f"{nice}\n", "ascii")
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return  # it has ended, or /proc may not be written
            time.sleep(AUTOGROUP_WAIT_S)
        else:
            return
    log.warning("the priority of process %d could not be set to %d", pid, nice)
