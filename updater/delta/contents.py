"""Where in the base the content of some bytes occurs, found by hashes of short windows.

Serves files that no reader understands, and parts that moved: long runs become copies, and the pages of the
base with the most in common become the window of a patch. Used by the encoder only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.streams import Ranges

Bytes = NDArray[np.uint8]
Run = tuple[int, int, int]  # (offset in the data, offset in the base, length)

RUN_BYTES = 1 << 10  # a shorter run is left to the patch
_WINDOW = 32  # bytes hashed together
_STRIDE = 16  # the base is hashed at every so many bytes
_PAGE = 4096  # granularity of the windows that are found
_LOOK = 1 << 20  # positions of the data looked up at a time
# In long data, of each 512 positions 64 are looked up: a common run of RUN_BYTES always has a whole stretch
# of these, and a stretch holds several places that the base is hashed at.
_SPARSE_LOOK_BYTES = 1 << 18
_EVERY = 512
_LOOKED = 64
_STEP = 1 << 16  # bytes compared at a time when a run is followed


class ContentIndex:
    """Finds where in a base the content of some bytes occurs, by hashes of 32-byte windows.

    The hash of a window is sum(byte[i] * B^i) mod 2^64 for an odd B: that of every position comes from one
    running sum, and a window's power is divided out by B's inverse.
    """

    _BASE = 0x9E3779B97F4A7C15

    def __init__(self, base: Bytes) -> None:
        self._base = base
        self._size = len(base)
        count = max(0, (len(base) - _WINDOW) // _STRIDE + 1)
        hashes = np.zeros(count, dtype=np.uint64)
        power = 1
        for index in range(_WINDOW):
            column = base[index : index + (count - 1) * _STRIDE + 1 : _STRIDE] if count else base[:0]
            hashes += column.astype(np.uint64) * np.uint64(power)
            power = power * self._BASE % (1 << 64)
        self._order: NDArray[Any] = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def runs(self, data: Bytes) -> list[Run]:
        """Runs of at least RUN_BYTES that `data` has in common with the base, in order, without overlap."""
        found: list[Run] = []
        covered = 0  # the end of the last run
        for start, places, origins in self._hits(data):
            index = 0
            while index < len(places):
                place, origin = start + int(places[index]), int(origins[index])
                if place >= covered:
                    run = self._follow(data, place, origin, covered)
                    if run[2] >= RUN_BYTES:
                        found.append(run)
                        covered = run[0] + run[2]
                    # Hits inside what was just compared lead to the same run again, or to a worse one.
                    place = max(place + 1, run[0] + run[2])
                else:
                    place = covered
                index = max(index + 1, int(np.searchsorted(places, place - start)))
        return found

    def _follow(self, data: Bytes, place: int, origin: int, floor: int) -> Run:
        """The longest run through a hit that does not begin before `floor`."""
        back = min(place - floor, origin, RUN_BYTES * 4)
        ahead = _common(self._base, origin, data, place)
        before = data[place - back : place][::-1] != self._base[origin - back : origin][::-1]
        back = int(np.argmax(before)) if before.any() else back
        return place - back, origin - back, back + ahead

    def windows(self, data: Bytes, budget: int) -> Ranges:
        """Ranges of the base, `budget` bytes at most, where the most of `data`'s content occurs."""
        votes = np.zeros(self._size // _PAGE + 1, dtype=np.int64)
        for _, _, origins in self._hits(data):
            np.add.at(votes, origins // _PAGE, 1)
        ranked = np.argsort(-votes, kind="stable")[: max(1, budget // _PAGE)]
        pages = np.sort(ranked[votes[ranked] > 0])
        ranges: list[tuple[int, int]] = []
        for page in pages.tolist():
            offset = page * _PAGE
            length = min(_PAGE, self._size - offset)
            if ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
            elif length:
                ranges.append((offset, length))
        return tuple(ranges)

    def _hits(self, data: Bytes) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        """Places of `data` (counted from a start) whose window occurs in the base, and where."""
        if not len(self._sorted):
            return
        base, inverse = np.uint64(self._BASE), np.uint64(pow(self._BASE, -1, 1 << 64))
        for start in range(0, max(0, len(data) - _WINDOW + 1), _LOOK):
            piece = data[start : start + _LOOK + _WINDOW - 1]
            powers = np.cumprod(np.full(len(piece), base, dtype=np.uint64)) * inverse
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(piece.astype(np.uint64) * powers)])
            count = len(piece) - _WINDOW + 1
            backwards = np.cumprod(np.full(count, inverse, dtype=np.uint64)) * base
            hashes = (sums[_WINDOW:] - sums[:count]) * backwards
            looked = np.arange(count)
            if len(data) > _SPARSE_LOOK_BYTES:
                looked = looked[looked % _EVERY < _LOOKED]
            hashes = hashes[looked]
            ranks = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
            same = self._sorted[ranks] == hashes
            yield start, looked[same], self._order[ranks[same]] * _STRIDE


def _common(base: Bytes, origin: int, data: Bytes, place: int) -> int:
    """How many bytes the base from `origin` and the data from `place` have in common."""
    length = 0
    limit = min(len(base) - origin, len(data) - place)
    while length < limit:
        step = min(_STEP, limit - length)
        ours = data[place + length : place + length + step]
        differ = base[origin + length : origin + length + step] != ours
        if differ.any():
            return length + int(np.argmax(differ))
        length += step
    return length
