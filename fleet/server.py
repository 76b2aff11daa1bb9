"""The control plane's process: locks its data directory, brings up the parts, serves until told to stop.

In order: settings are checked; DATA is created and locked, so that no second process can work on it; the
database is migrated; rollouts resume; the port is bound and its address written to DATA/address; READY=1. On
SIGTERM or SIGINT: no new calls, running ones get STOP_GRACE_S, what is only in memory is written, exit 0.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpc import aio

from fleet import limits, log
from fleet.config import ControlConfig
from fleet.control import Control
from fleet.interceptor import ErrorInterceptor
from fleet.notify import notify, watchdog_interval_s
from fleet.services.devices import DevicesService
from fleet.services.diff import DiffModelService
from fleet.services.registry import RegistryService
from fleet.services.rollouts import RolloutsService
from fleet.services.sync import SyncService
from fleet.services.telemetry import TelemetryService
from fleet.services.trust import TrustService
from sluice.api.v1 import errors_pb2
from sluice.api.v1.devices_pb2_grpc import add_DevicesServicer_to_server
from sluice.api.v1.diff_pb2_grpc import add_DiffModelServicer_to_server
from sluice.api.v1.registry_pb2_grpc import add_RegistryServicer_to_server
from sluice.api.v1.rollouts_pb2_grpc import add_RolloutsServicer_to_server
from sluice.api.v1.sync_pb2_grpc import add_SyncServicer_to_server
from sluice.api.v1.telemetry_pb2_grpc import add_TelemetryServicer_to_server
from sluice.api.v1.trust_pb2_grpc import add_TrustServicer_to_server
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors

ADDRESS_FILE = "address"
_NUMBERS = (
    "disk_reserve_bytes",
    "delta_cache_bytes",
    "builders",
    "heartbeat_interval_ms",
    "poll_interval_ms",
)

_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_RECEIVE_BYTES),
    ("grpc.max_concurrent_streams", limits.MAX_STREAMS_PER_CONNECTION),
    ("grpc.server.max_pending_requests", limits.MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", limits.MAX_PENDING_CALLS_HARD),
    ("grpc.keepalive_time_ms", limits.KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", limits.MIN_CLIENT_PING_INTERVAL_MS),
    ("grpc.so_reuseport", 0),  # a second process on this port is an error, not a partner
]


def run(config: ControlConfig) -> None:
    """Serves until SIGTERM or SIGINT. Raises SluiceError when it cannot start."""
    log.configure()
    asyncio.run(serve(config))


async def serve(config: ControlConfig, stop: asyncio.Event | None = None) -> None:
    """Serves until `stop` is set; without one, until SIGTERM or SIGINT.

    Raises SluiceError(CONFIG_INVALID | STATE_LOCKED | STORE_CORRUPT | IO_FAILED | DISK_FULL).
    """
    config.check()
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with os_errors("creating the data directory", config.data):
        config.data.mkdir(parents=True, exist_ok=True)
    with _locked(config.data):
        control = await asyncio.to_thread(Control, config)
        try:
            await control.start()
            await _serve_calls(control, stop)
        finally:
            await control.stop()


async def _serve_calls(control: Control, stop: asyncio.Event) -> None:
    server = aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
    add_RegistryServicer_to_server(RegistryService(control), server)
    add_DiffModelServicer_to_server(DiffModelService(control), server)
    add_DevicesServicer_to_server(DevicesService(control), server)
    add_RolloutsServicer_to_server(RolloutsService(control), server)
    add_SyncServicer_to_server(SyncService(control), server)
    add_TelemetryServicer_to_server(TelemetryService(control), server)
    add_TrustServicer_to_server(TrustService(control), server)
    address = _bind(server, control.config)
    await server.start()
    address_file = control.config.data / ADDRESS_FILE
    try:
        if not control.config.is_loopback():
            log.warning("not_encrypted", listen=address, why="no encryption or authentication yet")
        print(f"listening on {address}", flush=True)  # noqa: T201 - for people and tests
        log.event("listening", address=address, data=control.config.data)
        write_atomic(address_file, address.encode())
        notify("READY=1")
        await _wait(stop)
    finally:
        notify("STOPPING=1")
        log.event("stopping")
        address_file.unlink(missing_ok=True)
        control.end_streams()
        await server.stop(limits.STOP_GRACE_S)


def _bind(server: aio.Server, config: ControlConfig) -> str:
    """Binds the port and returns "host:port" with the port bound."""
    host, _ = config.host_and_port()
    try:
        port = server.add_insecure_port(config.listen)
    except RuntimeError as error:
        port = 0
        cause: RuntimeError | None = error
    else:
        cause = None
    if port == 0:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"cannot listen on {config.listen}",
            hint="is another process listening there? is it an address of this machine?",
            obj=config.listen,
        ) from cause
    return f"{host}:{port}"


async def _wait(stop: asyncio.Event) -> None:
    """Waits for the end, telling systemd's watchdog meanwhile that the event loop runs."""
    interval = watchdog_interval_s()
    while not stop.is_set():
        try:
            async with asyncio.timeout(interval):
                await stop.wait()
        except TimeoutError:
            notify("WATCHDOG=1")


@contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Holds the lock on the data directory. Raises SluiceError(STATE_LOCKED)."""
    path = data / "lock"
    with os_errors("opening the lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SluiceError(
                errors_pb2.STATE_LOCKED,
                f"another control plane works on {data}",
                hint="stop it first, or choose another data directory",
                obj=str(data),
            ) from None
        yield
    finally:
        os.close(descriptor)


def main() -> int:
    """`python -m fleet.server`: the bare entry behind `sluice control serve`."""
    parser = argparse.ArgumentParser(prog="fleet.server", description="Serve a sluice control plane.")
    defaults = ControlConfig(Path())
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--listen", default=defaults.listen)
    for name in _NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--encoder", default=defaults.encoder, help=argparse.SUPPRESS)
    try:
        run(ControlConfig(**vars(parser.parse_args())))
    except SluiceError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
