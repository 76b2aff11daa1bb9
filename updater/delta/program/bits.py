"""Raw bits beside the symbols: one stream, read from the lowest bit of each byte on.

A field has a width of 0 to 32 bits and its lowest bit comes first. Fields are written and read by the array:
NumPy places all of them at once. Rules: a reader never looks beyond its bytes; what is left behind the last
field is padding: fewer than eight bits, all zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.operands import ProgramError

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

MAX_WIDTH = 32
CHUNK = 1 << 16  # fields placed at a time: their arrays stay in a core's cache


class BitsError(ProgramError):
    """A stream of bits that no encoder writes."""


def pack(fields: Sequence[tuple[NDArray[Any], U8]]) -> bytes:
    """The stream of fields, given as (values [n], widths [n]) one after the other."""
    total = sum(int(widths.sum(dtype=np.int64)) for _, widths in fields)
    words = np.zeros(total // 32 + 2, dtype=np.uint64)
    at = 0
    for values, widths in fields:
        for begin in range(0, len(values), CHUNK):
            at = _place(words, at, values[begin : begin + CHUNK], widths[begin : begin + CHUNK])
    return words.astype("<u4").tobytes()[: (total + 7) // 8]


def _place(words: U64, at: int, values: NDArray[Any], widths: U8) -> int:
    ends = np.cumsum(widths, dtype=np.int64)
    starts = ends - widths + (at & 31)
    first, index = at >> 5, starts >> 5
    shifted = values.astype(np.uint64) << (starts & 31).view(np.uint64)
    # Fields never share a bit, so that adding is joining; sums stay below 2^32, which float64 holds exactly.
    size = int(index[-1]) + 1
    low = np.bincount(index, weights=(shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), minlength=size)
    high = np.bincount(index, weights=(shifted >> np.uint64(32)).astype(np.float64), minlength=size)
    words[first : first + size] += low.astype(np.uint64)
    words[first + 1 : first + 1 + size] += high.astype(np.uint64)
    return at + int(ends[-1])


class BitReader:
    """Takes fields off a stream.

    Args:
        data: the bytes.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._size = 8 * len(data)
        self._words = np.frombuffer(b"".join((data, bytes(8 + -len(data) % 4))), dtype="<u4")
        self._at = 0

    def take(self, widths: U8) -> U32:
        """[n] fields of the given widths, each at most MAX_WIDTH. Raises BitsError behind the end."""
        out = np.empty(len(widths), dtype=np.uint32)
        for begin in range(0, len(widths), CHUNK):
            part = widths[begin : begin + CHUNK]
            ends = np.cumsum(part, dtype=np.int64)
            end = self._at + int(ends[-1])
            if end > self._size:
                raise BitsError("a program's raw bits end before its records")
            first = self._at >> 5
            starts = ends
            starts -= part
            starts += self._at & 31
            words = self._words[first : (end >> 5) + 2].astype(np.uint64)
            words[:-1] |= words[1:] << np.uint64(32)
            field = words.take(starts >> 5)
            starts &= 31
            field >>= starts.view(np.uint64)
            field &= _MASKS.take(part)
            out[begin : begin + CHUNK] = field
            self._at = end
        return out

    def same(self, width: int, count: int) -> U32:
        """[count] fields of one width. Raises BitsError behind the end."""
        return self.take(np.full(count, width, dtype=np.uint8))

    def end(self) -> None:
        """Refuses what is left but padding."""
        left = self._size - self._at
        if left >= 8 or (left and int(self._words[self._at >> 5]) >> (self._at & 31)):
            raise BitsError("a program's raw bits go on behind its records")


_MASKS = np.array([(1 << width) - 1 for width in range(256)], dtype=object)
_MASKS = np.minimum(_MASKS, (1 << MAX_WIDTH) - 1).astype(np.uint64)
