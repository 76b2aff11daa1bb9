"""The control plane's process: locks its data directory, brings up the parts, serves until told to stop.

In order: settings are checked; DATA is created and locked, so that no second process can work on it; the
database is migrated; rollouts resume; the ports are bound and their addresses written to DATA/address and
DATA/enrolment-address; READY=1. Both ports speak TLS only; at the first every caller must show a certificate,
at the second nobody does, and only Enrolment is served (gRPC for Python cannot leave it to the caller). On
SIGTERM or SIGINT: no new calls, running ones get STOP_GRACE_S, what is only in memory is written, exit 0.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import grpc
from grpc import aio

from fleet import limits, log
from fleet.access import Access, Policy
from fleet.access_interceptor import AccessInterceptor
from fleet.config import ControlConfig, host_and_port
from fleet.control import Control
from fleet.data_lock import data_locked
from fleet.interceptor import ErrorInterceptor
from fleet.notify import notify, watchdog_interval_s
from fleet.services.audit import AuditService
from fleet.services.devices import DevicesService
from fleet.services.diff import DiffModelService
from fleet.services.identities import EnrolmentService, IdentitiesService
from fleet.services.operators import OperatorsService
from fleet.services.registry import RegistryService
from fleet.services.rollouts import RolloutsService
from fleet.services.sync import SyncService
from fleet.services.telemetry import TelemetryService
from fleet.services.trust import TrustService
from sluice.api.v1 import errors_pb2
from sluice.api.v1.audit_pb2_grpc import add_AuditServicer_to_server
from sluice.api.v1.devices_pb2_grpc import add_DevicesServicer_to_server
from sluice.api.v1.diff_pb2_grpc import add_DiffModelServicer_to_server
from sluice.api.v1.identity_pb2_grpc import (
    add_EnrolmentServicer_to_server,
    add_IdentitiesServicer_to_server,
)
from sluice.api.v1.operators_pb2_grpc import add_OperatorsServicer_to_server
from sluice.api.v1.registry_pb2_grpc import add_RegistryServicer_to_server
from sluice.api.v1.rollouts_pb2_grpc import add_RolloutsServicer_to_server
from sluice.api.v1.sync_pb2_grpc import add_SyncServicer_to_server
from sluice.api.v1.telemetry_pb2_grpc import add_TelemetryServicer_to_server
from sluice.api.v1.trust_pb2_grpc import add_TrustServicer_to_server
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors

ADDRESS_FILE = "address"
ENROLMENT_ADDRESS_FILE = "enrolment-address"
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

    Raises SluiceError(CONFIG_INVALID | KEY_UNAVAILABLE | STATE_LOCKED | STORE_CORRUPT | IO_FAILED |
    DISK_FULL).
    """
    config.check()
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with os_errors("creating the data directory", config.data):
        config.data.mkdir(parents=True, exist_ok=True)
    with data_locked(config.data):
        control = await asyncio.to_thread(Control, config)
        try:
            await control.start()
            await _serve_calls(control, stop)
        finally:
            await control.stop()


async def _serve_calls(control: Control, stop: asyncio.Event) -> None:
    access = Access(Policy(control.callers), control.database, control.operators, control.audit)
    let_in = AccessInterceptor(access)
    server = make_server(control, let_in)
    enrolment = make_enrolment_server(control, let_in)
    # Held here, because gRPC asks them for the newest certificate at each handshake.
    credentials = [control.authority.server_credentials(verify=verify) for verify in (True, False)]
    address = _bind(server, control.config.listen, credentials[0])
    enrolment_address = _bind(enrolment, control.config.enrolment(), credentials[1])
    await server.start()
    await enrolment.start()
    files = {ENROLMENT_ADDRESS_FILE: enrolment_address, ADDRESS_FILE: address}
    try:
        print(f"listening on {address}", flush=True)  # noqa: T201 - for people and tests
        print(f"enrolment on {enrolment_address}", flush=True)  # noqa: T201
        online = control.trust.online_key.keyid
        log.event(
            "listening",
            address=address,
            enrolment=enrolment_address,
            data=control.config.data,
            online_key=online,
        )
        for name, bound in files.items():
            write_atomic(control.config.data / name, bound.encode())
        notify("READY=1")
        await _wait(stop)
    finally:
        notify("STOPPING=1")
        log.event("stopping")
        for name in files:
            (control.config.data / name).unlink(missing_ok=True)
        control.end_streams()
        await asyncio.gather(server.stop(limits.STOP_GRACE_S), enrolment.stop(limits.STOP_GRACE_S))
        await access.stop()


def make_server(control: Control, *interceptors: aio.ServerInterceptor) -> aio.Server:
    """A server with every service but Enrolment, behind the interceptors; no port is bound yet."""
    server = aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=_OPTIONS)
    add_RegistryServicer_to_server(RegistryService(control), server)
    add_DiffModelServicer_to_server(DiffModelService(control), server)
    add_DevicesServicer_to_server(DevicesService(control), server)
    add_IdentitiesServicer_to_server(IdentitiesService(control), server)
    add_RolloutsServicer_to_server(RolloutsService(control), server)
    add_SyncServicer_to_server(SyncService(control), server)
    add_TelemetryServicer_to_server(TelemetryService(control), server)
    add_OperatorsServicer_to_server(OperatorsService(control), server)
    add_AuditServicer_to_server(AuditService(control), server)
    add_TrustServicer_to_server(TrustService(control), server)
    return server


def make_enrolment_server(control: Control, *interceptors: aio.ServerInterceptor) -> aio.Server:
    """A server for callers without certificates, behind the interceptors; no port is bound yet."""
    server = aio.server(
        interceptors=[ErrorInterceptor(), *interceptors],
        options=[*_OPTIONS[1:], ("grpc.max_receive_message_length", limits.MAX_ENROLMENT_BYTES)],
        maximum_concurrent_rpcs=limits.MAX_ENROLMENTS,
    )
    add_EnrolmentServicer_to_server(EnrolmentService(control), server)
    return server


def _bind(server: aio.Server, listen: str, credentials: grpc.ServerCredentials) -> str:
    """Binds a port and returns "host:port" with the port bound."""
    host, _ = host_and_port(listen)
    try:
        port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        port = 0
        cause: RuntimeError | None = error
    else:
        cause = None
    if port == 0:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"cannot listen on {listen}",
            hint="is another process listening there? is it an address of this machine?",
            obj=listen,
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


def main() -> int:
    """`python -m fleet.server`: the bare entry behind `sluice control serve`."""
    parser = argparse.ArgumentParser(prog="fleet.server", description="Serve a sluice control plane.")
    defaults = ControlConfig(Path())
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--listen", default=defaults.listen)
    parser.add_argument("--enrol-listen", default=defaults.enrol_listen)
    parser.add_argument("--certificate-life-s", type=float, default=defaults.certificate_life_s)
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
