"""The byte model along the base: the alignment stays in the base and goes on behind jumps."""

from __future__ import annotations

from edge_tests.conformance.plain.arithmetic import Arithmetic
from edge_tests.conformance.plain.byte_model import MATCH, Mixer, Place, Skeleton, bucket

SURE = 4
LOST = 3
JUMPED = 8


class Tracked(Skeleton):
    """Bytes that follow those of `rest`, which is the base as far as it is known."""

    def __init__(self, mixer: Mixer, coder: Arithmetic, rest: bytes) -> None:
        super().__init__(mixer, coder, rest)
        self.places: dict[bytes, list[int]] = {}
        for place in range(MATCH, self.edge):
            self.places.setdefault(rest[place - MATCH : place], []).append(place)
        self.mark = 0
        self.jump = 0
        self.shift = [0] * 256

    def _step(self) -> None:
        here = len(self.out)
        if self.found.at < 0 and here >= MATCH:
            self._look(here)
        if self.aligned.run < LOST and here - self.edge >= MATCH:
            self._align(here)
        if self.aligned.at >= self.edge:
            self.aligned = Place(-1, 0)
        track, found = self.aligned, self.found
        first = self.out[track.at] if track.at >= 0 else -1
        second = self.out[found.at] if found.at >= 0 else -1
        agree = 2 if first == second else 1 if second >= 0 else 0
        leap = self._leap()
        byte, sure = -1, -1
        if first >= 0 and track.run >= SURE:
            ahead = 0 if leap < 0 else 1 if leap == first else 2
            if self.coder.bit("hit", 0, 0, agree, bucket(track.run), track.history & 3, ahead):
                byte = first
            else:
                sure = first
        if byte < 0 and second >= 0 and found.run >= SURE and second != sure:
            if self.coder.bit("hit", 1, 1 if sure >= 0 else 0, agree, bucket(found.run), 0, 0):
                byte = second
            elif sure < 0:
                sure = second
        if byte < 0:
            byte = self._mixed(here, first, second, sure)
        one = self._one(here)
        self.out.append(byte)
        if here >= MATCH:
            self.seen[bytes(self.out[here - MATCH : here])] = here
        if first >= 0:
            if byte != first:
                self.shift[one] = (byte - first) & 255
            self._follow(byte == first, byte == leap)
        if found.at >= 0:
            self.found = Place(found.at + 1, found.run + 1) if second == byte else Place(-1, 0)

    def _one(self, here: int) -> int:
        return self.out[here - 1] if here >= 4 else 0

    def _align(self, here: int) -> None:
        """Takes the alignment to where the last bytes lie in the base."""
        places = self.places.get(bytes(self.out[here - MATCH : here]), [])
        if not places:
            return
        at = next((place for place in places if place >= self.mark), places[-1])
        if at == self.aligned.at:
            return
        if self.aligned.at >= 0:
            self.jump = at - self.aligned.at
        self.aligned = Place(at, self._agreement(at, here), self.aligned.history)

    def _leap(self) -> int:
        far = self.aligned.at + self.jump
        if self.aligned.at < 0 or self.jump == 0 or not 0 <= far < self.edge:
            return -1
        return self.out[far]

    def _follow(self, right: bool, leapt: bool) -> None:
        track = self.aligned
        track.history = (track.history << 1 | (0 if right else 1)) & 255
        if right:
            track.at, track.run = track.at + 1, track.run + 1
        elif leapt:
            track.at, track.run = track.at + self.jump + 1, max(JUMPED, track.run // 2)
        else:
            track.at, track.run = track.at + 1, track.run // 4
        if right or leapt:
            self.mark = track.at

    def _special(self, here: int, guess: int, miss: int) -> tuple[int, int]:
        one = self._one(here)
        shifted = (guess + self.shift[one]) & 255
        return (self._leap() + 1) << 9 | guess << 1 | miss, shifted << 9 | one << 1 | miss
