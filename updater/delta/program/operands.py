"""The base as a block's program reads it: arrays at offsets, within a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ReadBase = Callable[[int, int], bytes]  # (offset, length); refuses what lies outside the base


class ProgramError(ValueError):
    """A program that no encoder writes, or that decoders would refuse."""


class LimitError(ProgramError):
    """A number of a program is over a limit."""

    def __init__(self, what: str, value: int, limit: int) -> None:
        super().__init__(f"the program asks for {value} {what}; the limit is {limit}")
        self.what, self.value, self.limit = what, value, limit


def within(what: str, value: int, limit: int) -> None:
    """Raises LimitError if a value is over a limit."""
    if value > limit:
        raise LimitError(what, value, limit)


class Operands:
    """Reads arrays of the base.

    Args:
        read: gives bytes of the base.
        budget: bytes that may be read in all; each array also at most as many.
    """

    def __init__(self, read: ReadBase, budget: int) -> None:
        self._read = read
        self._budget, self._read_bytes = budget, 0

    def bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises ProgramError beyond the budget."""
        if length < 0:
            raise ProgramError("a program reads less than nothing of the base")
        self._read_bytes += length
        within("bytes of base", self._read_bytes, self._budget)
        return self._read(offset, length)

    def array(self, dtype: np.dtype[Any] | str, count: int, offset: int) -> Array:
        """`count` elements at byte `offset`; read-only."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.bytes(offset, count * kind.itemsize), dtype=kind)
