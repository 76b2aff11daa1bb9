"""The Sync stream: desired state down, reported state up, for as long as the agent runs.

One thread. It opens the stream with Hello, sends the reported state whenever it changed and at every
heartbeat, and hands each desired state on. When the stream ends it waits with backoff and full jitter and
opens another on a new channel; while none stands it polls at moments that are fixed for this device by a hash
of its id, so that a fleet that lost its control plane at once does not come back at once, not even after a
second failure. Rules: a stale desired state (lower generation) is never handed on; state is always sent
whole; nothing here blocks serving or installing.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from agent import update_limits as limits
from agent.control import Channels, Control
from agent.retry import Backoff
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)


def poll_delay_s(device_id: str, interval_s: float, now_s: float) -> float:
    """Seconds until this device's next moment to poll: its own fixed phase of every interval.

    Args:
        device_id: decides the phase, by SHA-256.
        interval_s: between polls, above 0.
        now_s: any clock that only moves forward.
    """
    digest = hashlib.sha256(device_id.encode()).digest()
    phase_s = int.from_bytes(digest[:8], "big") / 2**64 * interval_s
    return interval_s - (now_s - phase_s) % interval_s


class _Outgoing(Iterator[sync_pb2.ConnectRequest]):
    """What one stream sends: Hello, then the reported state on change and at each heartbeat, until closed."""

    def __init__(self, hello: sync_pb2.Hello, reported: Callable[[], sync_pb2.ReportedState]) -> None:
        self.heartbeat_s = limits.HEARTBEAT_DEFAULT_S
        self._hello: sync_pb2.Hello | None = hello
        self._reported = reported
        self._changed = True
        self._closed = False
        self._last_s = 0.0
        self._condition = threading.Condition()

    def __next__(self) -> sync_pb2.ConnectRequest:
        with self._condition:
            if self._hello is not None and not self._closed:
                hello, self._hello = self._hello, None
                return sync_pb2.ConnectRequest(hello=hello)
            while not self._closed:
                now = time.monotonic()
                due_s = self._last_s + (limits.REPORT_LEAST_S if self._changed else self.heartbeat_s)
                if now >= due_s:
                    break
                self._condition.wait(due_s - now)
            if self._closed:
                raise StopIteration
            self._changed = False
            self._last_s = time.monotonic()
        return sync_pb2.ConnectRequest(reported=self._reported())

    def changed(self) -> None:
        with self._condition:
            self._changed = True
            self._condition.notify_all()

    def set_heartbeat(self, seconds: float) -> None:
        with self._condition:
            self.heartbeat_s = min(max(seconds, limits.HEARTBEAT_LEAST_S), limits.HEARTBEAT_MOST_S)
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()


class Sync:
    """Keeps the device and the control plane in step.

    Args:
        address: of the control plane, host:port.
        identity: gives the channel of each stream.
        device_id: decides when this device polls.
        hello: built anew for each stream.
        reported: the state to send; called from this module's threads.
        on_desired: takes each desired state that is not stale; must return soon.
        poll_interval_s: until the control plane says otherwise.
        reconnect_max_s: upper bound of the backoff.
    """

    def __init__(
        self,
        address: str,
        *,
        identity: Channels,
        device_id: str,
        hello: Callable[[], sync_pb2.Hello],
        reported: Callable[[], sync_pb2.ReportedState],
        on_desired: Callable[[sync_pb2.DesiredState], None],
        on_connected: Callable[[], None],
        poll_interval_s: float,
        reconnect_max_s: float,
    ) -> None:
        self._control = Control(address, identity)
        self._device_id = device_id
        self._hello = hello
        self._reported = reported
        self._on_desired = on_desired
        self._on_connected = on_connected
        self._poll_interval_s = poll_interval_s
        self._backoff = Backoff(min(limits.RECONNECT_FIRST_S, reconnect_max_s), reconnect_max_s)
        self._stop = threading.Event()
        self._wake = threading.Event()  # set: do not wait any longer for the next stream
        self._renewed = False
        self._guard = threading.Lock()
        self._outgoing: _Outgoing | None = None
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self.connected = False
        self.error = "not tried yet"

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the stream and the thread."""
        self._stop.set()
        self._wake.set()
        with self._guard:
            if self._call is not None:
                self._call.cancel()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def alive(self) -> bool:
        """Whether the thread runs; for the watchdog."""
        return self._thread.is_alive()

    def changed(self) -> None:
        """The reported state changed: send it soon."""
        with self._guard:
            outgoing = self._outgoing
        if outgoing is not None:
            outgoing.changed()

    def renewed(self) -> None:
        """There are newer credentials: the stream is closed and opened anew with them, at once."""
        with self._guard:
            self._renewed = True
            if self._outgoing is not None:
                self._outgoing.close()
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._wake.clear()
            try:
                if self._stream():
                    continue
            except SluiceError as error:
                self._note(error)
            if time.monotonic() - began >= limits.STREAM_STABLE_S:
                self._backoff.reset()
            self._between_streams(self._backoff.next_wait_s())
        self._control.close()

    def _note(self, error: SluiceError) -> None:
        """Says why no stream stands, once for each new reason: a box may be offline for weeks."""
        if self.error != str(error):
            log.warning("control plane: %s", error)
        self.error = str(error)

    def _stream(self) -> bool:
        """One stream, from Hello to its end; whether it ended for newer credentials. Raises SluiceError."""
        outgoing = _Outgoing(self._hello(), self._reported)
        try:
            with self._guard:
                if self._stop.is_set():
                    return False
                self._renewed = False
                self._outgoing = outgoing
                self._call = self._control.connect(outgoing, limits.STREAM_LIFE_S)
            for message in self._call:
                self._take(message, outgoing)
            if self._renewed:
                return True
            raise SluiceError(
                errors_pb2.CONTROL_UNREACHABLE,
                "the control plane ended the stream",
                obj=self._control.address,
            )
        except grpc.RpcError as error:
            if self._stop.is_set() or self._renewed:
                return self._renewed
            raise self._control.failed(error, "keeping the sync stream") from error
        finally:
            self.connected = False
            outgoing.close()
            with self._guard:
                self._outgoing = None
                if self._call is not None:
                    self._call.cancel()
                self._call = None
            self._control.close()

    def _take(self, message: sync_pb2.ConnectResponse, outgoing: _Outgoing) -> None:
        kind = message.WhichOneof("message")
        if kind == "welcome":
            self._welcome(message.welcome)
            outgoing.set_heartbeat(message.welcome.heartbeat_interval_ms / 1000 or limits.HEARTBEAT_DEFAULT_S)
            if not self.connected:
                log.info("connected to the control plane at %s", self._control.address)
            self.connected = True
            self.error = ""
            self._on_connected()
        elif kind == "desired":
            self._on_desired(message.desired)

    def _welcome(self, welcome: sync_pb2.Welcome) -> None:
        if welcome.poll_interval_ms:
            self._poll_interval_s = min(
                max(welcome.poll_interval_ms / 1000, limits.POLL_LEAST_S), limits.POLL_MOST_S
            )

    def _between_streams(self, wait_s: float) -> None:
        """Waits before the next stream, polling when it is this device's moment."""
        until = time.monotonic() + wait_s
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= until:
                return
            poll_s = poll_delay_s(self._device_id, self._poll_interval_s, now)
            if poll_s > until - now:
                self._wake.wait(until - now)
                return
            if self._wake.wait(poll_s):
                return
            self._poll()

    def _poll(self) -> None:
        try:
            response = self._control.poll(
                sync_pb2.PollRequest(hello=self._hello(), reported=self._reported())
            )
        except SluiceError as error:
            self._note(error)
            return
        self._welcome(response.welcome)
        self._on_connected()
        self._on_desired(response.desired)
