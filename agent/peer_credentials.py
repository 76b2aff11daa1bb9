"""Who is at the other end of a unix socket: the kernel's word (SO_PEERCRED, SO_PEERGROUPS), and what it
allows.

Both are of the moment when the caller connected, and cannot be forged. The decisions are pure.
"""

from __future__ import annotations

import grp
import socket
import struct
from dataclasses import dataclass

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_SO_PEERGROUPS = 59  # Linux 4.13; Python's socket module does not name it
_MOST_GROUPS = 256  # the largest answer that Python takes is 1 KiB
_ROOT = 0


@dataclass(frozen=True)
class PeerCredentials:
    """One caller.

    Attributes:
        process: its id, of the moment when it connected.
        user: its effective user id.
        groups: its effective group id and its supplementary groups.
    """

    process: int
    user: int
    groups: frozenset[int]

    def may(self, own_user: int, group: int | None) -> bool:
        """Whether this is root, the agent's own user, or a member of the group."""
        return self.user in (_ROOT, own_user) or (group is not None and group in self.groups)


def credentials_of(connection: socket.socket) -> PeerCredentials:
    """The caller behind an accepted connection. Raises OSError."""
    layout = struct.Struct("iII")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    process, user, group = layout.unpack(data)
    groups = {group}
    try:
        more = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:
        more = b""  # an old kernel, or more groups than anybody has: the first one has to do
    groups.update(value for (value,) in struct.iter_unpack("I", more))
    return PeerCredentials(process, user, frozenset(groups))


def group_id(name: str, key: str) -> int:
    """The id of a group, given by name or number.

    Args:
        name: as the configuration has it.
        key: of the configuration, for the message.

    Raises SluiceError(CONFIG_INVALID).
    """
    try:
        return int(name) if name.isascii() and name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"{key}: there is no group {name!r} on this box",
            hint=f"make it (`groupadd --system {name}`), or name another",
            obj=key,
        ) from error
