"""A real agent for tests and the demo: `sluice-agent run` as a process, asked through its own socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.admin import AdminClient
from edge_tests.harness import trust
from edge_tests.harness.signing import pinned_root
from sluice.api.v1 import admin_pb2, sync_pb2
from updater.errors import SluiceError

ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0
STOP_S = 30.0
UPDATE_S = 60.0
MAX_SOCKET_PATH = 100


class AgentProcess:
    """One agent with a state directory of its own. It is ready when the constructor returns.

    Args:
        directory: for configuration, state and log.
        control_address: host:port of a control plane, which need not be there.
        device_id: in the fleet.
        runtimes: the runtimes it may use; empty for all.
        settings: more keys of the configuration: {"update.soak_s": 1}.
        state_dir: elsewhere than in `directory`, e.g. on a small file system.
        wrapper: a command line to put before the agent's, e.g. a tracer.
        environment: more variables of its environment.
        enrolled: whether it has credentials already.
    """

    def __init__(
        self,
        directory: Path,
        control_address: str,
        device_id: str,
        *,
        runtimes: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        state_dir: Path | None = None,
        wrapper: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        enrolled: bool = True,
        start: bool = True,
    ) -> None:
        self.directory = directory
        self.device_id = device_id
        directory.mkdir(parents=True, exist_ok=True)
        self.state_dir = state_dir or directory / "state"
        self.socket = directory / "agent.sock"
        if len(str(self.socket)) > MAX_SOCKET_PATH:
            self.socket = Path(tempfile.mkdtemp(prefix="sluice-")) / "agent.sock"
        self.config = directory / "agent.toml"
        self.log = directory / "agent.log"
        self.wrapper = list(wrapper)
        self._environment = environment or {}
        values: dict[str, Any] = {
            "device_id": device_id,
            "state_dir": str(self.state_dir),
            "control.address": control_address,
            "control.reconnect_max_s": 1,
            "inference.address": "127.0.0.1:0",
            "admin.socket": str(self.socket),
            "telemetry.interval_s": 1,
            "update.soak_s": 1,
            "update.reserve_bytes": 0,
            "update.load_deadline_s": 30,
        }
        if (root := pinned_root()) is not None:
            values["trust.root"] = str(root)
        if control_address in trust.ENROLMENT:
            values["control.enrolment_address"] = trust.ENROLMENT[control_address]
        if runtimes:
            values["inference.runtimes"] = list(runtimes)
        values.update(settings or {})
        self.config.write_text(_toml(values), encoding="utf-8")
        if enrolled:
            trust.enrol_box(self.state_dir, device_id)
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""  # where inference is served, as "host:port"; known once started
        if start:
            self.start()

    def start(self) -> None:
        """Starts the process and waits until its socket answers. Raises AssertionError with its log."""
        command = [*self.wrapper, sys.executable, "-m", "agent.cli", "run", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"} | self._environment,
                start_new_session=True,  # Ctrl-C reaches whoever runs the harness, and that stops this
            )
        # From the socket and not from the file in the state directory, which may be a killed process's.
        self.address = self.wait_for(lambda status: bool(status.inference_address), START_S).inference_address

    def status(self) -> admin_pb2.GetStatusResponse:
        client = AdminClient(self.socket)
        try:
            return client.status()
        finally:
            client.close()

    def model(self, name: str) -> sync_pb2.ReportedModel:
        """What the agent reports of one model; an empty report when it knows nothing of it."""
        for model in self.status().reported.models:
            if model.model == name:
                return model
        return sync_pb2.ReportedModel(model=name)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs another `sluice-agent` command against this agent."""
        return subprocess.run(
            [sys.executable, "-m", "agent.cli", arguments[0], "--config", str(self.config), *arguments[1:]],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"} | self._environment,
            capture_output=True,
            text=True,
            timeout=START_S * 2,
            check=False,
        )

    def wait_for(
        self, condition: Callable[[admin_pb2.GetStatusResponse], bool], timeout_s: float = UPDATE_S
    ) -> admin_pb2.GetStatusResponse:
        """Waits until the status fulfils a condition; fails with the last status and the log."""
        until = time.monotonic() + timeout_s
        last: object = "no status yet"
        while time.monotonic() < until:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the agent ended with {self.process.returncode}\n{self.tail()}")
            try:
                status = self.status()
            except SluiceError as error:
                last = error
            else:
                last = status
                if condition(status):
                    return status
            time.sleep(0.05)
        raise AssertionError(f"the agent did not get there within {timeout_s:g} s: {last}\n{self.tail()}")

    def wait_for_version(
        self, model: str, version: int, timeout_s: float = UPDATE_S
    ) -> sync_pb2.ReportedModel:
        """Waits until a version is loaded and healthy."""
        return self.wait_for_model(
            model, lambda item: item.active_version == version and item.healthy, timeout_s
        )

    def wait_for_model(
        self, model: str, condition: Callable[[sync_pb2.ReportedModel], bool], timeout_s: float = UPDATE_S
    ) -> sync_pb2.ReportedModel:
        """Waits until the report about one model fulfils a condition."""
        status = self.wait_for(
            lambda status: any(item.model == model and condition(item) for item in status.reported.models),
            timeout_s,
        )
        return next(item for item in status.reported.models if item.model == model)

    def wait_for_failure(self, model: str, timeout_s: float = UPDATE_S) -> sync_pb2.UpdateFailure:
        """Waits until an update of the model was given up."""
        return self.wait_for_model(model, lambda item: item.failure.final, timeout_s).failure

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text("utf-8", "replace")[-6000:] if self.log.exists() else ""

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        return [worker.process_id for worker in self.status().workers]

    def stop(self) -> int:
        """Ends it as systemd would; returns its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a power cut would, as far as a process can tell."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait(STOP_S)
            raise AssertionError(f"the agent did not stop within {STOP_S:g} s\n{self.tail()}") from error

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _toml(values: dict[str, Any]) -> str:
    """The configuration file for flat keys; tables come after the keys without one."""
    plain = [f"{name} = {_literal(value)}" for name, value in values.items() if "." not in name]
    tables: dict[str, list[str]] = {}
    for name, value in values.items():
        table, dot, key = name.partition(".")
        if dot:
            tables.setdefault(table, []).append(f"{key} = {_literal(value)}")
    return "\n".join(plain + [line for name, rows in tables.items() for line in (f"[{name}]", *rows)]) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return str(value)
