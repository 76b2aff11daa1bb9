"""A control plane as tests see it: a real process on a free port, with a data directory of its own.

    with ControlPlane(tmp_path / "control") as control:
        channel = control.channel()

It can be stopped, killed and started again on the same port and data. Its log gathers in `control.log`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import grpc

from edge_tests.harness import trust
from fleet.client import ControlClient

ROOT = Path(__file__).parents[2]
START_S = 30.0
STOP_S = 20.0


class ControlPlane:
    """One control-plane process.

    Args:
        data: its data directory; created when absent.
        options: further arguments of `python -m fleet.server`, e.g. "--heartbeat-interval-ms", "500".
        env: further environment variables.
    """

    def __init__(self, data: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.data = data
        self.address = ""
        self.enrolment_address = ""
        self.log_path = data.with_name(data.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self._options = options
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")]),
            **(env or {}),
        }

    def __enter__(self) -> ControlPlane:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop(check=kind is None)

    @property
    def log(self) -> str:
        """What all its processes logged so far."""
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def start(self) -> None:
        """Starts the process and waits until it listens; on a second start, on the same port."""
        self.data.mkdir(parents=True, exist_ok=True)
        trust.install(self.data)
        address_file = self.data / "address"
        address_file.unlink(missing_ok=True)  # of a process that was killed
        command = [
            sys.executable,
            "-m",
            "fleet.server",
            "--data",
            str(self.data),
            "--listen",
            self.address or "127.0.0.1:0",
            "--enrol-listen",
            self.enrolment_address or "127.0.0.1:0",
            *self._options,
        ]
        with self.log_path.open("ab") as log:
            # A session of its own: Ctrl-C reaches whoever runs the harness, and that stops this.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._env, cwd=self.data, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not address_file.exists():
            if self.process.poll() is not None:
                raise AssertionError(f"the control plane ended with {self.process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the control plane did not listen within {START_S} s:\n{self.log}")
            time.sleep(0.02)
        self.address = address_file.read_text()
        self.enrolment_address = (self.data / "enrolment-address").read_text()
        trust.ENROLMENT[self.address] = self.enrolment_address

    def stop(self, *, check: bool = True) -> None:
        """Ends it as systemd does, and checks that it ended well."""
        process = self.process
        if process is None:
            return
        self.process = None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the control plane did not stop within {STOP_S} s:\n{self.log}") from None
        if check and code != 0:
            raise AssertionError(f"the control plane ended with {code}:\n{self.log}")

    def kill(self) -> None:
        """Ends it as a power cut does."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def restart(self) -> None:
        """Stops it well and starts it again on the same port."""
        self.stop()
        self.start()

    def enrolling(self, device_id: str) -> dict[str, str]:
        """Settings of an agent without credentials: the bundle, and a token from whose profile it is."""
        with ControlClient(self.address) as client:
            token = client.identities.token("device", device_id).token
        return {
            "control.bundle": str(self.data / "ca" / "bundle.pem"),
            "control.token": token,
            "control.enrolment_address": self.enrolment_address,
        }

    def channel(self) -> grpc.Channel:
        """A new channel to it, as an admin; the caller closes it."""
        return trust.channel(self.address)
