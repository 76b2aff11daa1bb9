"""Bytes between tensors, coded along the base's: for graphs whose names became longer or shorter.

As `skeleton`, with another rule of where the alignment goes on. It stays in the base: where it is lost, the
six bytes just written are looked for in the base from where it last agreed. As far as it moved is its jump:
a byte that is not the one at the alignment is often the one a jump ahead, and the alignment goes on behind
that. Numbers such as lengths, which change with the names, are modelled by what was last added to a byte of
the base in such a place.
"""

from __future__ import annotations

from bisect import bisect_left

from updater import limits
from updater.delta.program.arithmetic import Coder
from updater.delta.program.bytemodel import ByteModel
from updater.delta.program.skeleton import LONG, MATCH, Place, agreement, bucket, look, mixed

_SURE = 4  # bytes that must have agreed before one bit decides
_LOST = 3  # an alignment that agreed for fewer bytes is looked for
_JUMPED = 8  # how long an alignment is thought to agree behind a jump, at least


class _Track:
    """The alignment.

    Attributes:
        place: where it is; at -1 if nowhere.
        jump: how far it moved when it was last found again.
    """

    def __init__(self, base: bytes) -> None:
        self._edge = len(base)
        self._mark = 0  # the place behind the byte that last agreed
        self.place = Place(0 if base else -1, LONG)
        self.jump = 0
        self._where: dict[bytes, list[int]] = {}
        for place in range(MATCH, len(base)):
            self._where.setdefault(base[place - MATCH : place], []).append(place)

    def find(self, out: bytearray) -> None:
        """Looks for a lost alignment; drops one that has left the base."""
        track = self.place
        if track.run < _LOST and len(out) - self._edge >= MATCH:
            places = self._where.get(bytes(out[-MATCH:]), ())
            if places:
                index = bisect_left(places, self._mark)
                at = places[index] if index < len(places) else places[-1]
                if at != track.at:
                    if track.at >= 0:
                        self.jump = at - track.at
                    self.place = Place(at, agreement(out, at), track.history)
        if self.place.at >= self._edge:
            self.place = Place(-1, 0)

    def leap(self, out: bytearray) -> int:
        """The byte a jump ahead; -1 if there is none."""
        far = self.place.at + self.jump
        return out[far] if self.place.at >= 0 and self.jump and 0 <= far < self._edge else -1

    def move(self, right: bool, leapt: bool) -> None:
        """Goes on behind a byte that agreed (`right`), or agreed with the one a jump ahead (`leapt`)."""
        track = self.place
        track.history = (track.history << 1 | (not right)) & 255
        track.at += self.jump * leapt + 1
        track.run = track.run + 1 if right else max(_JUMPED, track.run // 2) if leapt else track.run // 4
        if right or leapt:
            self._mark = track.at


def code(coder: Coder, base: bytes, size: int, target: bytes | None) -> bytes:
    """Writes `target`, of `size` bytes, or reads it."""
    out = bytearray(base)
    edge = len(base)
    model = ByteModel(coder, limits.MAX_MIXED_BYTES)
    seen = {base[place - MATCH : place]: place for place in range(MATCH, edge)}
    track, found = _Track(base), Place(-1, 0)
    shift = [0] * 256  # what was last added to the alignment's byte, by the byte written before it
    while len(out) < edge + size:
        here = len(out)
        given = target[here - edge] if target is not None else 0
        if found.at < 0 and here >= MATCH:
            found = look(out, seen)
        track.find(out)
        place, leap = track.place, track.leap(out)
        first = out[place.at] if place.at >= 0 else -1
        second = out[found.at] if found.at >= 0 else -1
        agree = 2 if first == second else int(second >= 0)
        byte = tried = -1
        if first >= 0 and place.run >= _SURE:
            ahead = 1 if leap == first else 0 if leap < 0 else 2
            context = ("hit", 0, 0, agree, bucket(place.run), place.history & 3, ahead)
            byte, tried = (first, -1) if coder.bit(context, int(given == first)) else (-1, first)
        if byte < 0 and second >= 0 and found.run >= _SURE and second != tried:
            context = ("hit", 1, int(tried >= 0), agree, bucket(found.run), 0, 0)
            if coder.bit(context, int(given == second)):
                byte = second
            elif tried < 0:
                tried = second
        one = out[-1] if here >= 4 else 0
        if byte < 0:
            missed, guess = int(tried >= 0), max(first, 0)
            shifted = (guess + shift[one]) & 255
            special = ((leap + 1) << 9 | guess << 1 | missed, shifted << 9 | one << 1 | missed)
            byte = mixed(model, out, edge, (place, found), special, tried, given)
        out.append(byte)
        seen[bytes(out[-MATCH - 1 : -1])] = here
        if first >= 0:
            if byte != first:
                shift[one] = (byte - first) & 255
            track.move(byte == first, byte == leap != first)
        if found.at >= 0:
            found = Place(found.at + 1, found.run + 1) if second == byte else Place(-1, 0)
    return bytes(out[edge:])
