"""Who is calling: the user of the process at the other end of a connection from this box.

gRPC tells a handler the caller's address. For a TCP connection over loopback the kernel's table of sockets
(/proc/net/tcp, tcp6) names the user who owns the other end. A caller over a unix socket is known to the
LocalSocket that let it in; over one without it stays unknown.

Rules: a caller that is not on this box is refused; an answer is remembered for PEER_CACHE_S, because reading
the table takes longer the more connections there are; where two users' sockets share an address, neither is
believed.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

from agent.limits import MAX_PEERS, PEER_CACHE_S
from agent.local_socket import LocalSocket
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"
_LOCAL, _STATE, _USER = 1, 3, 7  # columns


class Peers:
    """Looks callers up; safe to use from any thread.

    Args:
        tables: the kernel's.
        local: the unix socket that knows its callers, if there is one.
    """

    def __init__(self, tables: tuple[Path, ...] = TABLES, local: LocalSocket | None = None) -> None:
        self._tables = tables
        self._local = local
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, float]] = {}

    def user(self, peer: str) -> int | None:
        """The caller's user id; None for a caller over a unix socket that does not know its callers.

        Args:
            peer: as `ServicerContext.peer` gives it: "ipv4:127.0.0.1:40000", "ipv6:%5B::1%5D:40000", "unix:".

        Raises:
            SluiceError: REQUEST_INVALID when the caller is not on this box or cannot be told.
        """
        if peer.startswith("unix"):
            caller = self._local.caller(peer) if self._local is not None else None
            return None if caller is None else caller.user
        now = time.monotonic()
        with self._lock:
            known = self._known.get(peer)
        if known is not None and now - known[1] < PEER_CACHE_S:
            return known[0]
        user = self._look_up(*_address(peer), peer)
        with self._lock:
            while len(self._known) >= MAX_PEERS:
                self._known.pop(next(iter(self._known)))
            self._known[peer] = (user, now)
        return user

    def _look_up(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, peer: str) -> int:
        if not address.is_loopback:
            raise _refused(f"shared memory needs a caller on this box, and {address} is elsewhere", peer)
        wanted = {f"{text}:{port:04X}" for text in _spellings(address)}
        users = set()
        for table in self._tables:
            try:
                rows = table.read_text("ascii").splitlines()[1:]
            except OSError:
                continue  # no IPv6 on this box
            for row in rows:
                columns = row.split()
                if columns[_LOCAL] in wanted and columns[_STATE] == _ESTABLISHED:
                    users.add(int(columns[_USER]))
        if len(users) != 1:
            raise _refused(f"the user behind {peer} cannot be told, so it may not use shared memory", peer)
        return users.pop()


def _address(peer: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return ipaddress.ip_address(host.strip("[]")), int(port)
    except ValueError:
        raise _refused(f"the caller's address {peer!r} is not understood", peer) from None


def _spellings(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[str]:
    """The address as the table writes it: 32-bit words in the machine's order, in hexadecimal."""
    packed = address.packed
    if address.version == 4:
        mapped = socket.inet_pton(socket.AF_INET6, f"::ffff:{address}")
        return [_words(packed), _words(mapped)]
    return [_words(packed)]


def _words(packed: bytes) -> str:
    return "".join(
        f"{int.from_bytes(packed[at : at + 4], sys.byteorder):08X}" for at in range(0, len(packed), 4)
    )


def _refused(why: str, peer: str) -> SluiceError:
    return SluiceError(
        errors_pb2.REQUEST_INVALID,
        why,
        hint="send the tensors in the request, or call from a process on this box over loopback",
        obj=peer,
    )
