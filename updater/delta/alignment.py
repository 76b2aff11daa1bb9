"""Where in the base bytes lie that the target has nearly: stretches along which many bytes agree.

Serves content that moved and changed at the same time, in files that no reader understands and between
tensors: a stretch is coded as the difference of its bytes. Order: short windows of the base are hashed at
every place, in several lengths; those of the data lead to exact matches, longest windows first; a match that
agrees in more bytes than going on as before begins a stretch; stretches then grow into the bytes between
them as long as more than half of these agree. Rules: stretches are in order and do not overlap; work is
bounded by MATCHES. Used by the encoder only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MATCHES = 1 << 17  # exact matches that are looked at
_WORD = 8  # bytes that are hashed as one number
_WINDOWS = (32, 8)  # bytes hashed together, the longest first
_BETTER = 8  # bytes by which a match must agree more than the stretch before it, if that goes on
_STEPS = (32, 256, 2048)  # bytes compared at a time while a match is followed, then the last of these
_FACTORS = tuple(
    np.uint64(factor)
    for factor in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
)
_PLACE = np.uint64(0xFFFFFFFF)  # the bits of a key that say where


@dataclass(frozen=True)
class Stretch:
    """Bytes `start` to `end` of the data, which lie at `start` + `shift` of the base, but for some."""

    start: int
    end: int
    shift: int


def find(base: bytes, data: bytes) -> list[Stretch]:
    """The stretches of `data` that lie nearly in `base`; each has at most 2^32 bytes."""
    if min(len(base), len(data)) < _WINDOWS[-1]:
        return []
    return _Search(base, data).run()


def _keys(data: bytes, width: int) -> NDArray[np.uint64]:
    """Of each window a hash (the upper half) and its place, in order; no two are alike."""
    words = np.ndarray((len(data) - _WORD + 1,), dtype="<u8", buffer=data, strides=(1,))
    hashes = words[: len(data) - width + 1] * _FACTORS[0]
    for number in range(1, width // _WORD):
        start = number * _WORD
        hashes += words[start : start + len(hashes)] * _FACTORS[number]
        hashes ^= hashes >> np.uint64(31)
    hashes ^= hashes >> np.uint64(29)
    hashes *= _FACTORS[0]
    hashes &= ~_PLACE
    hashes |= np.arange(len(hashes), dtype=np.uint64)
    hashes.sort()
    return hashes


class _Index:
    """Where the windows of a base are, and which of some data are among them.

    Attributes:
        places: of the data, where a window begins that the base has.
    """

    def __init__(self, base: bytes, data: bytes) -> None:
        self._known: list[NDArray[np.uint64]] = []
        # Of each place of the data the longest window that is known, as its number; and its hash.
        self._level = np.full(len(data), -1, dtype=np.int8)
        self._hashes = np.zeros(len(data), dtype=np.uint64)
        for level, width in enumerate(_WINDOWS):
            if min(len(base), len(data)) < width:
                self._known.append(np.empty(0, dtype=np.uint64))
                continue
            known, wanted = _keys(base, width), _keys(data, width)
            # The first key that is not below the hash with place 0. Keys are in order, so lookups are near.
            ranks = np.minimum(np.searchsorted(known, wanted & ~_PLACE), len(known) - 1)
            wanted = wanted[(known[ranks] ^ wanted) <= _PLACE]
            places = (wanted & _PLACE).astype(np.int64)
            fresh = self._level[places] < 0
            self._level[places[fresh]] = level
            self._hashes[places[fresh]] = wanted[fresh] & ~_PLACE
            self._known.append(known)
        self.places = np.flatnonzero(self._level >= 0)

    def origins(self, place: int, expected: int) -> set[int]:
        """Where the base has the window at `place`: at first, and next to `expected`."""
        known, wanted = self._known[int(self._level[place])], self._hashes[place]
        near = wanted | np.uint64(min(max(expected, 0), int(_PLACE)))
        first, beyond = int(known.searchsorted(wanted)), int(known.searchsorted(near))
        found = {int(known[first]) & int(_PLACE)}
        for rank in (beyond - 1, beyond):
            if first < rank < len(known) and (known[rank] ^ wanted) <= _PLACE:
                found.add(int(known[rank]) & int(_PLACE))
        return found


class _Search:
    """The walk over the matches, and the stretches found so far."""

    def __init__(self, base: bytes, data: bytes) -> None:
        self._base, self._data = base, data
        self._old, self._new = np.frombuffer(base, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8)
        self._found: list[Stretch] = []

    def run(self) -> list[Stretch]:
        """The stretches."""
        index = _Index(self._base, self._data)
        scan = exact = 0  # where to look next, and where the last match of the stretch ended
        for _ in range(MATCHES):
            rank = int(index.places.searchsorted(scan))
            if rank == len(index.places):
                break
            place = int(index.places[rank])
            expected = place + (self._found[-1].shift if self._found else 0)
            length, _, origin = max(
                (self._common(place, origin), -abs(origin - expected), origin)
                for origin in index.origins(place, expected)
            )
            shift = origin - place
            if length < _WINDOWS[-1]:  # another window with the same hash
                scan = place + 1
                continue
            scan = place + length
            last = self._found[-1] if self._found else None
            if last is None or last.shift != shift:
                if last and length <= self._agreeing(place, scan, last.shift) + _BETTER:
                    continue
                self._begin(place, scan, shift, exact)
            else:
                self._found[-1] = Stretch(last.start, scan, shift)
            exact = scan
        if self._found:
            last = self._found[-1]
            end = exact + self._growth(exact, len(self._data), last.shift)
            self._found[-1] = Stretch(last.start, end, last.shift)
        return self._found

    def _begin(self, place: int, end: int, shift: int, exact: int) -> None:
        """A new stretch: it and the one before share the bytes between them as these agree."""
        back = self._growth_back(exact, place, shift)
        if self._found:
            last = self._found[-1]
            ahead = self._growth(exact, place, last.shift)
            if exact + ahead > place - back:  # both claim the middle: cut where the most bytes agree
                low, high = place - back, exact + ahead
                ours = self._equal(low, high, last.shift).cumsum()
                theirs = self._equal(low, high, shift)[::-1].cumsum()[::-1]
                gain = np.concatenate([[0], ours]) + np.concatenate([theirs, [0]])
                cut = low + int(np.argmax(gain))
                ahead, back = cut - exact, place - cut
            self._found[-1] = Stretch(last.start, exact + ahead, last.shift)
        self._found.append(Stretch(place - back, end, shift))

    def _common(self, place: int, origin: int) -> int:
        """Bytes that the data from `place` and the base from `origin` have in common."""
        most = min(len(self._data) - place, len(self._base) - origin)
        length = step = 0
        while length < most:
            size = min(_STEPS[min(step, len(_STEPS) - 1)], most - length)
            ours = self._data[place + length : place + length + size]
            theirs = self._base[origin + length : origin + length + size]
            if ours != theirs:
                differs = int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little")
                return length + ((differs & -differs).bit_length() - 1) // 8
            length += size
            step += 1
        return length

    def _equal(self, start: int, end: int, shift: int) -> NDArray[np.bool_]:
        """Which bytes agree; those beyond the base do not."""
        out = np.zeros(end - start, dtype=np.bool_)
        low, high = max(start, -shift), min(end, len(self._old) - shift)
        if low < high:
            out[low - start : high - start] = self._new[low:high] == self._old[low + shift : high + shift]
        return out

    def _agreeing(self, start: int, end: int, shift: int) -> int:
        low, high = max(start, -shift), min(end, len(self._old) - shift)
        if low >= high:
            return 0
        return int(np.count_nonzero(self._new[low:high] == self._old[low + shift : high + shift]))

    def _growth(self, start: int, end: int, shift: int) -> int:
        """How far a stretch grows from `start` to `end` at most: most of the bytes must agree."""
        end = min(end, len(self._old) - shift)
        return _best(self._equal(start, end, shift)) if start < end else 0

    def _growth_back(self, start: int, end: int, shift: int) -> int:
        start = max(start, -shift)
        return _best(self._equal(start, end, shift)[::-1]) if start < end else 0


def _best(equal: NDArray[np.bool_]) -> int:
    """The length from the begin on at which those that agree are furthest ahead of the others."""
    ahead = np.where(equal, 1, -1).cumsum()
    best = int(np.argmax(ahead))
    return best + 1 if ahead[best] > 0 else 0
