"""Chooses what of the base a skeleton may refer to, where it is not simply all of it.

Order: of the base, what neither a record reads nor a reader knows as an array is looked through for byte
sequences that the skeleton has too; the window with the most of them is taken, each sequence counted once.
Two sizes of window compete with the one that lies where the block does: as many bytes, without what records
read, as that one has, where the base is larger; as many as the byte model may know, where that is not the
same.
Rules: no window is longer than the one given; the work is bounded; the caller keeps the smallest program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program.body import Place, shadow
from updater.delta.program.records import Record

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_SEARCH_BYTES = 4 << 20  # of a base, outside its arrays, that is looked through
_GRAM = 8  # bytes of a sequence
_STRIDE = 4  # the base is looked at every so many bytes
_LEAST_ARRAY = 256  # bytes of an array that is left out of the search


@dataclass(frozen=True)
class Ranges:
    """Ranges of a file, ascending, without overlap: [n] begins and ends."""

    starts: Ints
    ends: Ints

    @staticmethod
    def of(ranges: Sequence[tuple[int, int]]) -> Ranges:
        """Of (begin, end), in any order; those that overlap are joined."""
        joined: list[list[int]] = []
        for start, end in sorted(ranges):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            elif end > start:
                joined.append([start, end])
        table = np.array(joined, dtype=np.int64).reshape(-1, 2)
        return Ranges(table[:, 0], table[:, 1])

    def outside(self, size: int) -> Ranges:
        """What a file of `size` bytes has beside these."""
        starts, ends = np.append(0, self.ends), np.append(self.starts, size)
        kept = ends > starts
        return Ranges(starts[kept], ends[kept])

    @property
    def total(self) -> int:
        """Bytes of all ranges."""
        return int((self.ends - self.starts).sum())

    def before(self, places: Ints) -> Ints:
        """How many bytes of the ranges lie before each place: [places]."""
        if not len(self.starts):
            return np.zeros_like(places)
        sums = np.append(0, np.cumsum(self.ends - self.starts))
        number = np.searchsorted(self.starts, places, side="right")
        last = np.maximum(number - 1, 0)
        beyond = np.maximum(places - self.ends[last], 0)
        inside: Ints = np.where(number > 0, places - beyond - self.starts[last] + sums[last], 0)
        return inside


def arrays_of(spans: Sequence[tuple[int, int]]) -> Ranges:
    """The arrays that are left out of the search, of (offset, length) of a base's tensors."""
    return Ranges.of([(offset, offset + length) for offset, length in spans if length >= _LEAST_ARRAY])


def others(
    base: Bytes, arrays: Ranges, place: Place, records: Sequence[Record], skeleton: bytes
) -> list[Place]:
    """The places with other windows that are worth a try beside `place`.

    Args:
        base: the base's bytes.
        arrays: ranges of it that are not looked through.
        place: with the window that is tried anyhow.
        records: the program's.
        skeleton: the bytes between them.
    """
    if not _GRAM <= len(skeleton) <= limits.MAX_MODELLED_BYTES:
        return []
    whole = replace(place, window_start=0, window_length=len(base))
    read = Ranges.of([(part.at, part.at + part.length) for part in shadow(list(records), whole)])
    rest = read.outside(len(base))
    ends = np.array([place.window_start, place.window_start + place.window_length])
    known = int(np.diff(rest.before(ends))[0])
    model = limits.MAX_MODEL_WINDOW_BYTES
    if place.window_length == len(base) and known <= model:
        return []  # it has all there is
    caps = {model} if place.window_length == len(base) else {max(known, model), model}
    hidden = [
        *zip(read.starts.tolist(), read.ends.tolist()),
        *zip(arrays.starts.tolist(), arrays.ends.tolist()),
    ]
    area = Ranges.of(hidden).outside(len(base))
    if area.total > _SEARCH_BYTES:
        return []
    places, weights = _common(base, area, skeleton)
    found = [_best(places, weights, rest, place, cap) for cap in sorted(caps)] if len(places) else []
    return [other for other in dict.fromkeys(found) if other != place]


def _grams(data: Bytes, stride: int) -> NDArray[np.uint64]:
    """Every sequence of _GRAM bytes, at every `stride` bytes."""
    count = (len(data) - _GRAM) // stride + 1
    out = np.zeros(max(0, count), dtype=np.uint64)
    for index in range(_GRAM if count > 0 else 0):
        column = data[index : index + (count - 1) * stride + 1 : stride]
        out |= column.astype(np.uint64) << np.uint64(8 * index)
    return out


def _common(base: Bytes, area: Ranges, skeleton: bytes) -> tuple[Ints, NDArray[Any]]:
    """Where in the area sequences of the skeleton occur, ascending, and what each is worth: together 1."""
    wanted = np.unique(_grams(np.frombuffer(skeleton, dtype=np.uint8), 1))
    places, grams = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
    for start, end in zip(area.starts.tolist(), area.ends.tolist()):
        grams.append(_grams(base[start:end], _STRIDE))
        places.append(start + _STRIDE * np.arange(len(grams[-1])))
    found = np.concatenate(grams)
    hits = wanted[np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)] == found
    _, which, counts = np.unique(found[hits], return_inverse=True, return_counts=True)
    return np.concatenate(places)[hits], 1 / counts[which]


def _best(places: Ints, weights: NDArray[Any], rest: Ranges, place: Place, cap: int) -> Place:
    """The window with the most in common: no longer than `place` has, with `cap` bytes of `rest` at most."""
    sums = np.append(0, np.cumsum(weights))
    known = rest.before(places)
    far = np.searchsorted(places, places + place.window_length - _GRAM, side="right")
    full = np.searchsorted(known, known + cap - _GRAM, side="right")
    ends = np.minimum(far, full)
    first = int(np.argmax(sums[ends] - sums[:-1]))
    start, end = int(places[first]), int(places[ends[first] - 1]) + _GRAM
    return replace(place, window_start=start, window_length=end - start)
