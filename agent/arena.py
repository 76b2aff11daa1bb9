"""Memory that the agent and one worker share: one arena for each direction, written by one side only.

An arena is a memfd, sealed against shrinking, so that neither side can make the other fault, and mapped whole
by both. Its size is only address space: pages come into being when they are written. The pages of a message
over ARENA_KEEP_BYTES are given back when a much smaller one follows, so that one large request does not stay
resident, and a stream of large ones does not pay for new pages each time.

Rules: one message at a time lies in an arena, from its beginning; the word that it is there, and that it may
be overwritten, goes over the socket beside it (transport.py), whose system calls also order the memory
accesses.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from agent.limits import ARENA_KEEP_BYTES, MAX_FRAME_PAYLOAD_BYTES

_MUCH_SMALLER = 4


class Arena:
    """One end of an arena.

    Attributes:
        descriptor: of the memfd; to be handed to the other process, then closed by `close_descriptor`.
        bytes: all of it.
    """

    def __init__(self, descriptor: int, size: int = MAX_FRAME_PAYLOAD_BYTES) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, size: int = MAX_FRAME_PAYLOAD_BYTES) -> Arena:
        """A new arena. Raises OSError."""
        descriptor = os.memfd_create("sluice-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise

    def close_descriptor(self) -> None:
        """The mapping stays; it goes when nobody refers to it or to arrays over it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def close(self) -> None:
        """Lets go of the memory; where arrays over it are still in use, with the last of them."""
        self.close_descriptor()
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()

    def make_way(self, last: int, following: int) -> None:
        """The writer's message of `last` bytes was taken, and one of `following` bytes comes next."""
        if last > ARENA_KEEP_BYTES and following * _MUCH_SMALLER < last:
            self._map.madvise(mmap.MADV_REMOVE)
