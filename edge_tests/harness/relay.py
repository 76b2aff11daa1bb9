"""A TCP relay to a control plane for tests of what is sent upwards: it can cut a connection and freeze.

with Relay(control.address) as relay:
relay.cut_after(700_000)      # each connection dies after so many bytes towards the server
relay.freeze()                # bytes stop, connections stay
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_PIECE = 16 << 10


class Relay:
    """Relays every connection to `upstream`, "host:port".

    Attributes:
        address: where to connect instead.
        connections: made so far.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._budget: int | None = None
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False

    def cut_after(self, count: int | None) -> None:
        """Each later connection is cut after `count` bytes towards the server; None: never."""
        self._budget = count

    def freeze(self) -> None:
        """Relays nothing until `thaw`."""
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._open.set()
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            _end(sock)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._upstream, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self.connections += 1
                self._sockets |= {near, far}
            threading.Thread(target=self._pump, args=(near, far, self._budget), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, None), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, budget: int | None) -> None:
        """Moves bytes one way until either end closes or the budget is used up."""
        moved = 0
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                self._open.wait()
                target.sendall(piece)
                moved += len(piece)
                if budget is not None and moved >= budget:
                    break
        for sock in (source, target):
            _end(sock)
            with self._lock:
                self._sockets.discard(sock)


def _end(sock: socket.socket) -> None:
    """Closes a socket; closing alone would not wake a thread that waits in accept or recv."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
