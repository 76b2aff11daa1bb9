"""Bytes of a fuzzer read as decisions; behind their end every decision is the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

_EDGES = (0, 1, 2, 7, 8, 15, 16, 31, 32, 62, 63, 64)  # bits of numbers that like to go wrong


class Choices:
    """Decisions, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not used yet."""
        return max(0, len(self._data) - self._at)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, count: int) -> int:
        """An integer from 0 to count - 1."""
        value, room = self._byte(), 256
        while room < count:
            value, room = value << 8 | self._byte(), room << 8
        return value % count

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def rarely(self) -> bool:
        """True once in sixteen times; false at the end."""
        return self._byte() & 15 == 15

    def small(self) -> int:
        """0 to 255."""
        return self._byte()

    def number(self) -> int:
        """An integer from 0 to 2^64 - 1: mostly small, else close to a power of two."""
        kind = self._byte()
        if kind < 160:
            return kind & 31
        if kind < 224:
            return self._byte() << 8 | self._byte()
        edge = 1 << _EDGES[kind % len(_EDGES)]
        return max(0, edge + self._byte() % 5 - 2) % (1 << 64)

    def signed(self) -> int:
        """An integer between -2^63 and 2^63."""
        value = self.number() >> 1
        return -value if self._byte() & 1 else value

    def bytes(self, count: int) -> bytes:
        """`count` bytes; zeros behind the end."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece.ljust(count, b"\0")
