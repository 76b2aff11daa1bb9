"""Which rows of records change: the gaps between them as Golomb-Rice codes, outside of the arithmetic coder.

A model has thousands of such rows, and a decision of the arithmetic coder takes plain Python a microsecond.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import bits
from updater.delta.program.bits import BitReader
from updater.delta.program.operands import ProgramError

Ints = NDArray[np.int64]


class RowBits:
    """The gaps between rows that change, of all records: gap >> low in unary, then the low bits.

    Args:
        data: what is read; None to write.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._reader = None if data is None else BitReader(data)
        self._fields: list[tuple[NDArray[Any], NDArray[np.uint8]]] = []

    def code(self, gaps: Ints, low: int, count: int, zeros: int) -> Ints:
        """Sends `count` gaps, or reads them."""
        if self._reader is None:
            unary = np.zeros(count + zeros, dtype=np.uint8)
            unary[np.cumsum((gaps >> low) + 1) - 1] = 1
            self._fields.append((unary, np.ones(len(unary), dtype=np.uint8)))
            self._fields.append((gaps & ((1 << low) - 1), np.full(count, low, dtype=np.uint8)))
            return gaps
        ones = np.flatnonzero(self._reader.same(1, count + zeros))
        if len(ones) != count or ones[-1] != count + zeros - 1:
            raise ProgramError("the gaps between rows are not as many as there should be")
        high = np.diff(ones, prepend=-1) - 1
        return (high << low) + self._reader.same(low, count).astype(np.int64)

    def finish(self) -> bytes:
        """The bits written; after reading, refuses what is left."""
        if self._reader is not None:
            self._reader.end()
        return bits.pack(self._fields)
