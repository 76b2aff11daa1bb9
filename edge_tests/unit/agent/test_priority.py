from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from agent import priority
from agent.limits import STARTING_NICE

# Two threads, the second started when a line comes; prints the nice value of each at the second line.
SLEEPER = """
import os, sys, threading
def tell():
    for task in sorted(map(int, os.listdir("/proc/self/task"))):
        print(os.getpriority(os.PRIO_PROCESS, task), flush=True)
sys.stdin.readline()
threading.Thread(target=threading.Event().wait, daemon=True).start()
sys.stdin.readline()
tell()
"""


def test_lowered_before_it_has_threads_and_restored_in_all_of_them() -> None:
    if not priority.may_restore():
        pytest.skip("needs CAP_SYS_NICE or RLIMIT_NICE to restore a nice value")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        priority.lower(child.pid)
        assert group_nice(child.pid) in (STARTING_NICE, None)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == min(19, own + STARTING_NICE)
        child.stdin.write("\n")
        child.stdin.flush()
        while len(list(Path(f"/proc/{child.pid}/task").iterdir())) < 2:
            assert child.poll() is None
        priority.restore(child.pid)
        assert group_nice(child.pid) in (0, None)
        child.stdin.write("\n")
        child.stdin.flush()
        assert [int(child.stdout.readline()) for _ in range(2)] == [own, own]
        child.stdin.close()
    priority.restore(child.pid)  # it is gone: no effect
    priority.lower(child.pid)


def test_a_process_of_our_own_session_keeps_our_groups_value() -> None:
    before = group_nice(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        priority.lower(child.pid)
        assert group_nice(os.getpid()) == before
        child.communicate(b"\n")


def group_nice(pid: int) -> int | None:
    """An autogroup's value; None where the kernel has none."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text("ascii").split()[-1])
    except OSError:
        return None


@pytest.mark.parametrize(("capabilities", "may"), [("0000000000800000", True), ("0000000000000000", False)])
def test_it_is_asked_first_whether_the_way_back_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, may: bool
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tsluice\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (0, 0))
    assert priority.may_restore(status) is may
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (40, 40))
    assert priority.may_restore(tmp_path / "none")
