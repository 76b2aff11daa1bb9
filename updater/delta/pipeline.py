"""Decodes blocks ahead of the one whose turn it is to be written, where cores are free.

Order in is order out. Rules: as many blocks are held as `ahead` says and one more, so that memory stays
bounded; with `ahead` 0 no thread is started; an error comes out in its block's turn.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from updater.delta.block import Block

Parts = list[bytes | memoryview]


@dataclass(frozen=True)
class Decoded:
    """A block's bytes of the target, in parts.

    Attributes:
        length: bytes of all parts.
        boundary: the first byte of the delta behind the block.
    """

    parts: Parts
    length: int
    boundary: int


def free_cores(most: int) -> int:
    """Blocks to decode ahead on this machine: none on one core, else up to `most`."""
    return min(most, len(os.sched_getaffinity(0)) - 1)


class Pipeline:
    """Decodes blocks in threads.

    Args:
        decode: gives a block's bytes or raises.
        ahead: blocks decoded beside the one that is waited for.
    """

    def __init__(self, decode: Callable[[Block], Parts], ahead: int) -> None:
        self._decode = decode
        self._ahead = ahead
        self._waiting: deque[tuple[Future[Parts], Block, int]] = deque()
        self._pool = ThreadPoolExecutor(ahead + 1, thread_name_prefix="delta-decoder") if ahead else None

    def put(self, block: Block, boundary: int) -> Iterator[Decoded]:
        """Takes a block; gives those whose turn has come."""
        if self._pool is None:
            yield Decoded(self._decode(block), block.target_length, boundary)
            return
        self._waiting.append((self._pool.submit(self._decode, block), block, boundary))
        while len(self._waiting) > self._ahead or (self._waiting and self._waiting[0][0].done()):
            yield self._next()

    def drain(self) -> Iterator[Decoded]:
        """All that is left."""
        while self._waiting:
            yield self._next()

    def close(self) -> None:
        """Drops what is left and waits for the threads, each busy with one block at most."""
        self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _next(self) -> Decoded:
        future, block, boundary = self._waiting.popleft()
        return Decoded(future.result(), block.target_length, boundary)
