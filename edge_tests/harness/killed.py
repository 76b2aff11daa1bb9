"""Runs `sluice` in a process of its own that is killed at its n-th file: before it has its name, or after.

Every file that matters is written aside and renamed (updater.atomic), so these are all the moments at which a
power cut makes a difference. The processes are forked from one that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["edge_tests.harness.command", "fleet.cli.app", "fleet.local_trust"])
WAIT_S = 60.0


def sluice_killed(number: int, arguments: list[str], env: Mapping[str, str], *, named: bool) -> bool:
    """Runs it, to be killed at the `number`-th rename; `named`: after it. Whether it came so far.

    Raises AssertionError when it came to its end, and that was none.
    """
    process = _context.Process(target=_run, args=(number, arguments, dict(env), named))
    process.start()
    process.join(WAIT_S)
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL), f"{arguments} ended with {code}"
    return code != 0


def _run(number: int, arguments: list[str], env: dict[str, str], named: bool) -> None:
    from fleet.cli.app import cli
    from updater.trust import keys

    os.environ.update(env)
    keys.SCRYPT_COST = 2
    replace, count = Path.replace, 0

    def cut(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number and not named:
            os.kill(os.getpid(), signal.SIGKILL)
        found = replace(self, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Path.replace = cut  # type: ignore[method-assign]
    cli(arguments)
