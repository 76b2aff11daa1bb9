"""A unix socket that knows its callers, before a gRPC server that does not.

gRPC does not hand on who is at the other end of a unix socket. So this listens on the public socket, asks
the kernel who connected, and relays each connection to the server's own socket, which lies in a directory
that only the agent's user may enter. The relay's end of that connection is bound to a name made at random;
gRPC gives it to handlers as the peer, and `caller` says who is behind it.

Rules: nobody connects before the socket has its owner and mode; whoever `allow` refuses is closed before a
byte is read; connections are bounded; a caller is forgotten when its connection ends. A socket that a
killed agent left behind is removed first: the lock on the state directory is held by then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.limits import REFUSALS_LOGGED_S, RELAY_BYTES
from agent.peer_credentials import PeerCredentials, credentials_of
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors

log = logging.getLogger(__name__)
MODE = 0o660
_PRIVATE = 0o700
_ABSTRACT = "unix-abstract:"  # how gRPC writes a peer whose socket has a name without a file


class LocalSocket:
    """The public socket of one server.

    Args:
        path: of the public socket; its directory is created when absent.
        private: a directory for the server's own socket; created when absent, entered by nobody else.
        name: of that socket.
        group: the socket's group; None: the agent's own.
        allow: whom to let through; None: whoever may open the socket; the handlers then decide.
        most: connections at once.

    Raises SluiceError(IO_FAILED | CONFIG_INVALID) when the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        private: Path,
        name: str,
        *,
        group: int | None,
        allow: Callable[[PeerCredentials], bool] | None,
        most: int,
    ) -> None:
        self.path = path
        self._allow = allow
        self._most = most
        self._lock = threading.Lock()
        self._callers: dict[str, PeerCredentials] = {}
        self._open: set[socket.socket] = set()
        self._logged_s = float("-inf")
        with os_errors("preparing the directory", private):
            private.mkdir(mode=_PRIVATE, exist_ok=True)
            private.chmod(_PRIVATE)
            (private / name).unlink(missing_ok=True)
            # By descriptor, so that a long path of the directory does not count against a socket's 107 bytes.
            self._directory = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inner = f"/proc/self/fd/{self._directory}/{name}"
        self._wake, self._waker = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._bind(group)
        except BaseException:
            self._listener.close()
            os.close(self._directory)
            raise
        self._thread = threading.Thread(target=self._run, name=f"socket-{name}", daemon=True)

    @property
    def address(self) -> str:
        """What the gRPC server behind this listens on."""
        return f"unix:{self._inner}"

    def start(self) -> None:
        """Takes callers from now on; the server behind must listen already."""
        self._listener.listen()
        self._thread.start()

    def stop(self) -> None:
        """Takes no more callers, ends those there are, and removes the socket."""
        self._waker.close()
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            left = list(self._open)
        for end in left:
            _shut(end)
        self._wake.close()
        os.close(self._directory)

    def caller(self, peer: str) -> PeerCredentials | None:
        """Who is behind a peer of the server; None for one that did not come through here.

        Args:
            peer: as `ServicerContext.peer` gives it.
        """
        with self._lock:
            return self._callers.get(peer.removeprefix(_ABSTRACT))

    def _bind(self, group: int | None) -> None:
        path = self.path
        with os_errors("making the socket", path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            path.chmod(MODE)
        if group is None:
            return
        try:
            os.chown(path, -1, group)
        except PermissionError as error:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                f"{path} cannot be given to the group {group}: the agent's user is not in it",
                hint="add SupplementaryGroups= to the agent's unit (`systemctl edit sluice-agent`)",
                obj=str(path),
            ) from error

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._listener, self._wake], [], [])
            if self._wake in ready:
                return
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # the caller has gone, or there are no descriptors left
                log.warning("a caller of %s was lost: %s", self.path, error)
                time.sleep(0.05)
                continue
            try:
                self._admit(connection)
            except OSError as error:
                log.warning("a caller of %s was lost: %s", self.path, error)
                connection.close()

    def _admit(self, connection: socket.socket) -> None:
        found = credentials_of(connection)
        if self._allow is not None and not self._allow(found):
            self._refuse(connection, found, "may not use it")
            return
        with self._lock:
            full = len(self._callers) >= self._most
        if full:
            self._refuse(connection, found, f"came while {self._most} connections stood")
            return
        name = f"sluice-{secrets.token_hex(16)}"
        inner = socket.socket(socket.AF_UNIX)
        try:
            inner.bind(f"\0{name}")
            with self._lock:
                self._callers[name] = found
                self._open.update((connection, inner))
            inner.connect(self._inner)
        except OSError:
            self._forget(name, connection, inner)
            raise
        ends = _Pair(2, lambda: self._forget(name, connection, inner))
        for source, target in ((connection, inner), (inner, connection)):
            threading.Thread(target=_pump, args=(source, target, ends), name="relay", daemon=True).start()

    def _forget(self, name: str, *ends: socket.socket) -> None:
        with self._lock:
            self._callers.pop(name, None)
            self._open.difference_update(ends)
        for end in ends:
            end.close()

    def _refuse(self, connection: socket.socket, found: PeerCredentials, why: str) -> None:
        connection.close()
        now_s = time.monotonic()
        if now_s - self._logged_s >= REFUSALS_LOGGED_S:
            self._logged_s = now_s
            log.warning("%s: process %d of user %d %s", self.path, found.process, found.user, why)


class _Pair:
    """Calls something once both directions of a connection have ended."""

    def __init__(self, count: int, ended: Callable[[], None]) -> None:
        self._left = count
        self._ended = ended
        self._lock = threading.Lock()

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._ended()


def _pump(source: socket.socket, target: socket.socket, ends: _Pair) -> None:
    """Carries bytes one way until either end closes; both ends then close, as gRPC's connections do."""
    room = memoryview(bytearray(RELAY_BYTES))
    try:
        while count := source.recv_into(room):
            target.sendall(room[:count])
    except OSError:
        pass  # one of them was reset or shut: the same as its end
    finally:
        _shut(source)
        _shut(target)
        ends.done()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
