"""Calls to the control plane, each with a deadline, each failure a SluiceError.

One `Control` belongs to one thread. It opens its channel on the first call and drops it after any failure of
the connection: a new channel starts clean, which avoids both gRPC's own reconnection backoff behind ours and
the memory that long-lived reconnecting channels keep (grpc#34843, #38499).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from agent import update_limits as limits
from sluice.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    diff_pb2,
    diff_pb2_grpc,
    errors_pb2,
    registry_pb2,
    registry_pb2_grpc,
    sync_pb2,
    sync_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
    trust_pb2,
    trust_pb2_grpc,
)
from updater.errors import SluiceError
from updater.wire import from_rpc_error

log = logging.getLogger(__name__)
_REFUSED = (errors_pb2.CERTIFICATE_REVOKED, errors_pb2.CERTIFICATE_EXPIRED, errors_pb2.CERTIFICATE_INVALID)
_Reply = TypeVar("_Reply")
_OPTIONS = [
    ("grpc.keepalive_time_ms", limits.KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
    ("grpc.max_receive_message_length", limits.MAX_RECEIVE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
    ("grpc.enable_retries", 0),  # retries are ours: bounded and reported
]


class CancelledError(Exception):
    """The work is no longer wanted: the agent stops, or another version is desired."""


class Channels(Protocol):
    """What gives channels to the control plane: agent.identity.BoxIdentity."""

    generation: int

    def refused(self) -> None:
        """The certificate does not count any more: get another soon."""
        ...

    def newer(self, generation: int, timeout_s: float) -> bool:
        """Waits for credentials after those of this generation; whether there are."""
        ...

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Raises SluiceError(UNAUTHENTICATED) while there is no certificate."""
        ...


class Control:
    """The control plane as one thread of the agent sees it.

    Args:
        address: host:port.
        identity: gives channels, and says by its generation when there are newer credentials.
    """

    def __init__(self, address: str, identity: Channels) -> None:
        self.address = address
        self._identity = identity
        self._generation = -1
        self._fetching = False
        self._channel: grpc.Channel | None = None

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _open(self) -> grpc.Channel:
        generation = self._identity.generation
        if generation != self._generation and not self._fetching:
            self.close()  # a renewed certificate counts from the next call on
        if self._channel is None:
            self._channel = self._identity.channel(self.address, _OPTIONS)
            self._generation = generation
        return self._channel

    def failed(self, error: grpc.RpcError, doing: str) -> SluiceError:
        """The SluiceError for a failed call; drops the channel when the connection is at fault."""
        failure = from_rpc_error(error, doing, self.address)
        if failure.reason == errors_pb2.CONTROL_UNREACHABLE:
            self.close()
        elif failure.reason in _REFUSED:
            self._identity.refused()
        return failure

    def _call(self, doing: str, call: Callable[[grpc.Channel], _Reply]) -> _Reply:
        try:
            return call(self._open())
        except grpc.RpcError as error:
            failure = self.failed(error, doing)
            # Nothing was done yet: a caller is looked at before its call is.
            expired = failure.reason == errors_pb2.CERTIFICATE_EXPIRED
            if not expired or not self._identity.newer(self._generation, limits.RENEWED_WAIT_S):
                raise failure from error
        try:
            return call(self._open())
        except grpc.RpcError as error:
            raise self.failed(error, doing) from error

    def check(self, device_id: str) -> bool:
        """Asks for this device's twin, which changes nothing; False when it is not known there yet.

        Raises SluiceError(CONTROL_UNREACHABLE | ...).
        """
        request = devices_pb2.GetDeviceRequest(id=device_id)
        try:
            self._call(
                "asking whether it answers",
                lambda channel: devices_pb2_grpc.DevicesStub(channel).GetDevice(
                    request, timeout=limits.CHECK_TIMEOUT_S
                ),
            )
        except SluiceError as error:
            if error.reason == errors_pb2.DEVICE_UNKNOWN:
                return False
            raise
        return True

    def get_version(self, model: str, version: int) -> registry_pb2.Version:
        request = registry_pb2.GetVersionRequest(model=model, version=version)
        return self._call(
            f"asking for {model}@{version}",
            lambda channel: registry_pb2_grpc.RegistryStub(channel).GetVersion(
                request, timeout=limits.CALL_TIMEOUT_S
            ),
        )

    def get_metadata(self, role: str, version: int | None, timeout_s: float) -> bytes:
        """One role's signed metadata, not verified; empty where there is none."""
        request = trust_pb2.GetMetadataRequest(role=role, version=version or 0)
        return self._call(
            f"asking for the {role} metadata",
            lambda channel: trust_pb2_grpc.TrustStub(channel).GetMetadata(request, timeout=timeout_s),
        ).metadata

    def plan(self, request: diff_pb2.PlanRequest) -> diff_pb2.PlanResponse:
        timeout_s = limits.CALL_TIMEOUT_S + request.wait_ms / 1000
        return self._call(
            f"planning {request.model}@{request.version}",
            lambda channel: diff_pb2_grpc.DiffModelStub(channel).Plan(request, timeout=timeout_s),
        )

    def poll(self, request: sync_pb2.PollRequest) -> sync_pb2.PollResponse:
        return self._call(
            "polling",
            lambda channel: sync_pb2_grpc.SyncStub(channel).Poll(request, timeout=limits.CALL_TIMEOUT_S),
        )

    def report(self, request: telemetry_pb2.ReportRequest) -> telemetry_pb2.ReportResponse:
        return self._call(
            "sending telemetry",
            lambda channel: telemetry_pb2_grpc.TelemetryStub(channel).Report(
                request, timeout=limits.CALL_TIMEOUT_S
            ),
        )

    def connect(
        self, outgoing: Iterator[sync_pb2.ConnectRequest], life_s: float
    ) -> sync_pb2_grpc._ConnectCall:  # type: ignore[name-defined]
        """Opens the Sync stream; iterate over the result and `cancel` it to end."""
        return sync_pb2_grpc.SyncStub(self._open()).Connect(outgoing, timeout=life_s)

    def fetch(
        self, digest: str, offset: int, device_id: str, cancelled: Callable[[], bool]
    ) -> Iterator[diff_pb2.FetchResponse]:
        """The bytes of an offered delta from `offset`, in messages.

        Raises SluiceError(CONTROL_UNREACHABLE) when the link is cut or brings nothing for FETCH_STALL_S, the
        control plane's own errors, and CancelledError.
        """
        doing = f"fetching {digest}"
        request = diff_pb2.FetchRequest(digest=digest, offset=offset, device_id=device_id)
        call = diff_pb2_grpc.DiffModelStub(self._open()).Fetch(request, timeout=limits.FETCH_TIMEOUT_S)
        guard = _Guard(call.cancel, cancelled)
        self._fetching = True
        try:
            while True:
                with guard:
                    message = next(call, None)
                if message is None:
                    return
                if cancelled():
                    raise CancelledError(doing)
                yield message
        except grpc.RpcError as error:
            if guard.why == "cancelled":
                raise CancelledError(doing) from error
            failure = self.failed(error, doing)
            if guard.why == "stalled":
                failure.message = f"{self.address} sent nothing for {limits.FETCH_STALL_S:g} s while {doing}"
            raise failure from error
        finally:
            self._fetching = False
            guard.close()
            call.cancel()


class _Guard:
    """Cancels a call that waits too long for its next message, or that is no longer wanted.

    Entered around each wait, so that time spent on the bytes received does not count.
    """

    def __init__(self, cancel: Callable[[], object], cancelled: Callable[[], bool]) -> None:
        self.why = ""
        self._cancel = cancel
        self._cancelled = cancelled
        self._waiting_since: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fetch-guard", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._waiting_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._waiting_since = None

    def _watch(self) -> None:
        while not self._done.wait(limits.CANCEL_CHECK_S):
            since = self._waiting_since
            if self._cancelled():
                self.why = "cancelled"
            elif since is not None and time.monotonic() - since > limits.FETCH_STALL_S:
                self.why = "stalled"
            if self.why:
                self._cancel()
                return

    def close(self) -> None:
        self._done.set()
        self._thread.join()
