"""Measures the box and its workers, keeps the figures in the outbox, sends them when it can.

One thread: sample -> outbox -> send what waits -> sleep. Names follow OpenTelemetry's semantic conventions
(system.*, process.*, hw.*), values are in base units, the device id is an attribute of the resource and not
repeated here. A figure that the board cannot give is left out, never zero.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent import update_limits as limits
from agent.control import Control
from agent.outbox import Outbox
from agent.retry import Backoff
from sluice.api.v1 import errors_pb2, telemetry_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerFigures:
    """One worker process, as the serving half counts it."""

    model: str
    version: int
    role: str
    instance: int  # its number among the processes of its version, from 0
    process_id: int
    runtime: str
    resident_bytes: int
    requests: int
    failures: int
    private_bytes: int = 0  # of its own, neither shared nor of files
    memory_limit_bytes: int = 0  # that it may hold of that; 0: not looked at
    renewals: int = 0  # of its version's processes for that


def sample(state_dir: Path, workers: Sequence[WorkerFigures], outbox: Outbox) -> telemetry_pb2.Batch:
    """One measurement of everything.

    CPU figures cover the time since the last call in this process.
    """
    batch = telemetry_pb2.Batch()
    now_s = time.time()

    def add(name: str, value: float, unit: str, **attributes: str) -> None:
        metric = batch.metrics.add(name=name, value=value, unit=unit, attributes=attributes)
        metric.time.FromNanoseconds(int(now_s * 1e9))

    add("system.cpu.utilization", psutil.cpu_percent(interval=None) / 100, "1")
    memory = psutil.virtual_memory()
    add("system.memory.usage", memory.total - memory.available, "By", **{"system.memory.state": "used"})
    add("system.memory.utilization", memory.percent / 100, "1")
    disk = shutil.disk_usage(state_dir)
    add("system.filesystem.usage", disk.used, "By", **{"system.filesystem.state": "used"})
    add("system.filesystem.usage", disk.free, "By", **{"system.filesystem.state": "free"})
    add("system.filesystem.utilization", disk.used / disk.total if disk.total else 0.0, "1")
    add("system.uptime", now_s - psutil.boot_time(), "s")
    for sensor, celsius in _temperatures():
        add("hw.temperature", celsius, "Cel", **{"hw.id": sensor})
    agent = psutil.Process()
    add("process.memory.usage", agent.memory_info().rss, "By", **{"sluice.process": "agent"})
    add("process.cpu.time", sum(agent.cpu_times()[:2]), "s", **{"sluice.process": "agent"})
    for worker in workers:
        labels = {
            "sluice.process": "worker",
            "sluice.model": worker.model,
            "sluice.version": str(worker.version),
            "sluice.role": worker.role,
            "sluice.instance": str(worker.instance),
        }
        add("process.memory.usage", worker.resident_bytes, "By", **labels)
        add("sluice.inference.requests", worker.requests, "{request}", **labels)
        add("sluice.inference.failures", worker.failures, "{request}", **labels)
    add("sluice.telemetry.dropped", outbox.dropped(), "{batch}")
    del batch.metrics[limits.MAX_METRICS_PER_BATCH :]
    return batch


def _temperatures() -> list[tuple[str, float]]:
    """Sensor name and degrees Celsius for every sensor that the kernel shows."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # no such files on this board
        return []
    return [
        (f"{chip}.{reading.label or index}", reading.current)
        for chip, readings in sensors.items()
        for index, reading in enumerate(readings)
        if reading.current is not None
    ]


class Telemetry:
    """The sampling and sending thread.

    Args:
        control: of this thread alone.
        device_id: of this box.
        outbox: where batches wait.
        state_dir: whose file system is measured.
        workers: the workers now.
        interval_s: between samples.
    """

    def __init__(
        self,
        control: Control,
        device_id: str,
        outbox: Outbox,
        state_dir: Path,
        workers: Callable[[], Sequence[WorkerFigures]],
        interval_s: float,
    ) -> None:
        self._control = control
        self._device_id = device_id
        self._outbox = outbox
        self._state_dir = state_dir
        self._workers = workers
        self._interval_s = interval_s
        self._backoff = Backoff(limits.TELEMETRY_RETRY_FIRST_S, limits.TELEMETRY_RETRY_MOST_S)
        self._send_from_s = 0.0
        self._last_error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        psutil.cpu_percent(interval=None)  # the first call only sets the start
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def alive(self) -> bool:
        return self._thread.is_alive()

    def connected(self) -> None:
        """The control plane answers again: send at the next sample."""
        self._send_from_s = 0.0

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + self._interval_s, time.monotonic())
            try:
                self._outbox.add(sample(self._state_dir, self._workers(), self._outbox))
                if time.monotonic() >= self._send_from_s:
                    self._send()
                self._last_error = ""
            except SluiceError as error:
                self._send_from_s = time.monotonic() + self._backoff.next_wait_s()
                if str(error) != self._last_error:
                    # Without a certificate nothing can be sent: the threads of identity and sync say so.
                    quiet = error.reason == errors_pb2.UNAUTHENTICATED
                    log.log(logging.DEBUG if quiet else logging.WARNING, "telemetry: %s", error)
                self._last_error = str(error)
            except psutil.Error as error:
                log.warning("telemetry: this sample is lost: %s", error)
        self._control.close()

    def _send(self) -> None:
        """Sends until nothing waits. Raises SluiceError."""
        while not self._stop.is_set():
            batches = self._outbox.pending(limits.MAX_BATCHES_PER_REPORT)
            if not batches:
                break
            response = self._control.report(
                telemetry_pb2.ReportRequest(
                    device_id=self._device_id, epoch=self._outbox.epoch, batches=batches
                )
            )
            if response.acked_sequence < batches[0].sequence:
                log.warning("the control plane acknowledged nothing of %d batches", len(batches))
                break
            self._outbox.acknowledge(response.acked_sequence)
        self._backoff.reset()
