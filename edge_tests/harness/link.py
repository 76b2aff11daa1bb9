"""A bad link: a TCP proxy that counts, slows, cuts and refuses, between an agent and its control plane."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType

CHUNK_BYTES = 16 << 10
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, as a link that breaks


class Link:
    """Forwards TCP connections to `target` until told otherwise.

    Attributes:
        address: where to connect instead.
        down_bytes: bytes that came from the target, over all connections.
        cuts: how often `cut_after` cut.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._cut_at: int | None = None
        self._bytes_per_s = 0.0
        self._open = True
        self._stop = False
        self.down_bytes = 0
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="link")
        self._thread.start()

    def cut_after(self, count: int) -> None:
        """Breaks every connection once, when so many more bytes have come down."""
        with self._lock:
            self._cut_at = self.down_bytes + count

    def slow(self, bytes_per_s: float) -> None:
        """Bytes a second of each connection downwards; 0 for no bound."""
        self._bytes_per_s = bytes_per_s

    def down(self) -> None:
        """Breaks every connection and refuses new ones."""
        self._open = False
        self._break_all()

    def up(self) -> None:
        self._open = True

    def close(self) -> None:
        self._stop = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1).close()
        self._thread.join(5)
        self._listener.close()
        self._break_all()

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        host, _, port = self._target.rpartition(":")
        while True:
            client, _ = self._listener.accept()
            if self._stop:
                client.close()
                return
            try:
                if not self._open:
                    raise ConnectionRefusedError
                server = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._pairs.add((client, server))
            for source, target, downwards in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._pump, args=(source, target, (client, server), downwards), daemon=True
                ).start()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        pair: tuple[socket.socket, socket.socket],
        downwards: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if downwards:
                    if self._bytes_per_s:
                        time.sleep(len(data) / self._bytes_per_s)
                    with self._lock:
                        self.down_bytes += len(data)
                        cut = self._cut_at is not None and self.down_bytes >= self._cut_at
                        if cut:
                            self._cut_at = None
                            self.cuts += 1
                    if cut:
                        self._break_all()
                        return
                target.sendall(data)
        self._drop(pair)

    def _break_all(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            _reset(end)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.close()
