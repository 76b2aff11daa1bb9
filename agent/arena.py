"""Memory that the agent and worker processes share: arenas, each written by one side only.

An arena is a memfd, sealed against shrinking, so that neither side can make the other fault, and mapped whole
by both. Its size is only address space: pages come into being when they are written. Each process has one for
each direction, which holds the message that is on its way; the processes of one version share a third, where
requests put their inputs before it is known which process runs them (staging.py). The pages of a message over
ARENA_KEEP_BYTES are given back when a much smaller one follows, so that one large request does not stay
resident, and a stream of large ones does not pay for new pages each time.

Rules: one message at a time lies in an arena of a direction, from its beginning; the word where a message is,
and that its place may be overwritten, goes through the pipes beside the arenas (transport.py), whose system
calls also order the memory accesses, on every architecture.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from agent.limits import ARENA_KEEP_BYTES, MAX_FRAME_PAYLOAD_BYTES

ARENA_BYTES = MAX_FRAME_PAYLOAD_BYTES
ALIGNMENT = 64  # bytes, of every tensor
_MUCH_SMALLER = 4


class Arena:
    """One end of an arena.

    Attributes:
        descriptor: of the memfd; to be handed to the other process, then closed by `close_descriptor`.
        bytes: all of it.
    """

    def __init__(self, descriptor: int, size: int = ARENA_BYTES) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, size: int = ARENA_BYTES) -> Arena:
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

    def give_back(self, start: int, size: int) -> None:
        """Frees the pages of a part, which then reads as zeros; `start` is a multiple of the page size."""
        with contextlib.suppress(ValueError):  # closed meanwhile: the pages went with it
            self._map.madvise(mmap.MADV_REMOVE, start, size)

    def make_way(self, last: int, following: int) -> None:
        """The writer's message of `last` bytes was taken, and one of `following` bytes comes next."""
        if too_much(last, following):
            self.give_back(0, padded(last, mmap.PAGESIZE))


def too_much(resident: int, following: int) -> bool:
    """Whether so many bytes should be given back when only `following` are needed next."""
    return resident > ARENA_KEEP_BYTES and following * _MUCH_SMALLER < resident


def padded(size: int, to: int = ALIGNMENT) -> int:
    """`size` rounded up, so that what follows it begins aligned."""
    return -(-size // to) * to
