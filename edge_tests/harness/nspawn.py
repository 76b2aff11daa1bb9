"""A container with a real systemd, for tests of the units: boots a Debian tree, runs commands, powers off.

The tree stays as it is: what the container writes goes to an overlay, which lasts from one boot to the next
and is mounted for the container alone, so that nothing stays behind, however the tests end. The container has
a network of its own with nothing but loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from edge_tests.harness.debian_tree import CONFINED, ROOT, nspawn

BOOT_S = 60.0
STOP_S = 90.0
COMMAND_S = 120.0
CLIENT_MODULE = "edge_tests.harness.triton_client"
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LC_ALL=C.UTF-8",
)
_MOUNT_AND_RUN = 'mount -t overlay overlay -o "$1" "$2"; shift 2; exec "$@"'
_Result = TypeVar("_Result")
_POWER_OFF = signal.SIGRTMIN + 4  # as systemd(1) documents it


class Container:
    """One container; booted by `boot`, at the end of the block gone with all its processes.

    Args:
        tree: of `debian_tree.tree`.
        directory: for what the container writes, and for its console.
    """

    def __init__(self, tree: Path, directory: Path) -> None:
        self._place = directory / "root"
        self._layers = [directory / name for name in ("upper", "work")]
        self._console = directory / "console.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        for path in (self._place, *self._layers):
            path.mkdir(parents=True)
        upper, work = self._layers
        self._mount_options = f"lowerdir={tree},upperdir={upper},workdir={work}"

    @property
    def root(self) -> Path:
        """The container's files, while it runs; another path after each boot."""
        return Path(f"/proc/{self._leader}/root")

    def boot(self) -> None:
        """Returns once systemd has started everything. Raises AssertionError with the console's text."""
        with self._console.open("ab") as console:
            self._process = subprocess.Popen(
                [
                    *(*CONFINED, "sh", "-ec", _MOUNT_AND_RUN, "sh", self._mount_options, str(self._place)),
                    *(*nspawn(self._place), "-b", "--console=pipe"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._leader = self.wait(self._find_leader, "its first process started", BOOT_S)

        def booted() -> bool:
            state = self.run("systemctl is-system-running", check=False).stdout.strip()
            return state in ("running", "degraded")

        self.wait(booted, "systemd booted", BOOT_S)

    def power_off(self) -> None:
        """Stops the units and then the container. Raises AssertionError when that takes too long."""
        process, self._process = self._process, None
        leader, self._leader = self._leader, 0
        if process is None:
            return
        try:
            if leader:  # else it never came so far
                os.kill(leader, _POWER_OFF)
                process.wait(STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"the container did not power off: {error}\n{self.console()}") from error
        finally:
            process.kill()
            process.wait()

    def run(self, script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a shell script in the container, as root. With `check`, AssertionError when it fails."""
        done = subprocess.run(
            [*self._enter("-a"), "env", "-i", *_ENVIRONMENT, "bash", "-ec", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_S,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{script}\nended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def add_address(self, address: str) -> None:
        """Gives the container an address of its own."""
        subprocess.run([*self._enter("-n"), "ip", "address", "add", address, "dev", "lo"], check=True)

    def infer(self, address: str, model: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Asks for one inference from within the container's network; see triton_client.py for the answer."""
        command = {"call": "infer", "model": model, "inputs": inputs}
        done = subprocess.run(
            [*self._enter("-n"), sys.executable, "-m", CLIENT_MODULE, "--address", address, "--commands"],
            cwd=ROOT,
            input=json.dumps(command) + "\n",
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def processes(self, name: str) -> dict[int, str]:
        """Every process of the container whose command line holds `name`: number outside, command line."""
        ours = Path(f"/proc/{self._leader}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if (entry / "ns" / "pid").readlink() == ours:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    if name in command:
                        found[int(entry.name)] = command
        return found

    def wait(self, condition: Callable[[], _Result], what: str, within_s: float = COMMAND_S) -> _Result:
        """Waits until the condition gives something true, and returns that."""
        until = time.monotonic() + within_s
        while not (result := condition()):
            if self._process is not None and self._process.poll() is not None:
                raise AssertionError(f"the container ended, before {what}\n{self.console()}")
            assert time.monotonic() < until, (
                f"not within {within_s:g} s: {what}\n{self.journal()}\n{self.console()}"
            )
            time.sleep(0.1)
        return result

    def journal(self, unit: str = "sluice-*") -> str:
        """The last lines that systemd and a unit logged in this boot."""
        if not self._leader:
            return ""
        return self.run(
            f"journalctl -b -q --no-pager -o short-precise -n 200 -u '{unit}'", check=False
        ).stdout

    def console(self) -> str:
        return self._console.read_text("utf-8", "replace")[-4000:]

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "-t", str(self._leader), *namespaces, "--"]

    def _find_leader(self) -> int:
        """The process that is number 1 inside; 0 while there is none."""
        assert self._process is not None
        descendants = [self._process.pid]
        with contextlib.suppress(OSError):  # one of them ended meanwhile
            for process in descendants:  # grows
                entry = Path(f"/proc/{process}")
                if (entry / "comm").read_text().strip() == "systemd":
                    return process
                children = (entry / "task" / str(process) / "children").read_text()
                descendants += map(int, children.split())
        return 0

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.power_off()
        finally:
            for path in self._layers:
                shutil.rmtree(path)
