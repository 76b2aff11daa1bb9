"""Room in an arena, which all processes of a version read, where requests put their inputs before their turn.

A large input is copied once: from the message or the client's shared memory to where the worker reads it. The
request's own thread does that as soon as it has a place, while the worker still runs others, so that the next
batch's inputs lie ready when its turn comes.

Inputs that may share a batch are put one behind the other, in a run: what arrives in order and runs together
then is one array as it lies there (`joined`), and nothing has to be copied into one. A run goes on from where
its last input ends. Where all that lies in it is being read by now, the next batch begins: in the widest free
part of the run's RUN_BYTES, so that the same pages are used again. The way ahead of a run is kept clear of
other inputs while these have room elsewhere.

A place is held by its request and, while a worker may read it, by the exchange with the worker: a request
that gives up does not have its memory overwritten under a running inference. Other places are cut from the
beginning where they fit first. Pages are given back when much less is wanted, and several requests at once
have not been there for a while.

Rules: when there is no room, a request does without (its inputs are then copied when its turn comes); places
never overlap.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.arena import ALIGNMENT, Arena, padded, too_much
from agent.limits import MAX_RUNS, MAX_STAGED_BYTES, RUN_BYTES, STAGED_KEEP_S


class Place:
    """A part of the arena; made by `Staging.take`, given back by the last `drop`.

    Attributes:
        start: where it begins in the arena, bytes.
        size: bytes.
    """

    __slots__ = ("_holders", "_staging", "size", "start")

    def __init__(self, staging: Staging, start: int, size: int) -> None:
        self._staging = staging
        self._holders = 1
        self.start = start
        self.size = size

    @property
    def room(self) -> NDArray[np.uint8]:
        """Its bytes; fewer, none, once the arena is closed."""
        return self._staging.arena.bytes[self.start : self.start + self.size]

    @property
    def is_read(self) -> bool:
        """Whether others than its request need it; under the lock."""
        return self._holders > 1

    def follows(self, other: Place) -> bool:
        """Whether it begins where the other ends."""
        return self._staging is other._staging and self.start == other.start + other.size

    def to(self, last: Place) -> NDArray[np.uint8]:
        """The bytes from its beginning to the end of another that lies behind it."""
        return self._staging.arena.bytes[self.start : last.start + last.size]

    def hold(self) -> bool:
        """One more needs it; false when nobody did any more: it is another's now."""
        with self._staging.lock:
            if not self._holders:
                return False
            self._holders += 1
            return True

    def drop(self) -> None:
        """One less needs it."""
        with self._staging.lock:
            self._holders -= 1
            if not self._holders:
                self._staging.places.remove(self)


class Staged(dict[str, NDArray[Any]]):
    """Inputs by name, in the model's order, that lie in one place, or in several that follow each other, as a
    message to the worker lays them out.
    """

    __slots__ = ("places",)

    def __init__(self, *places: Place) -> None:
        super().__init__()
        self.places = places

    @property
    def start(self) -> int:
        """Where the inputs begin in the arena, bytes."""
        return self.places[0].start

    def hold(self) -> bool:
        """See Place.hold; all of them or none."""
        for number, place in enumerate(self.places):
            if not place.hold():
                for held in self.places[:number]:
                    held.drop()
                return False
        return True

    def drop(self) -> None:
        """See Place.drop."""
        for place in self.places:
            place.drop()


def joined(inputs: Sequence[Mapping[str, NDArray[Any]]]) -> Staged | None:
    """The inputs of requests, in this order, as one array; None where they have to be copied for that."""
    first = inputs[0]
    if not isinstance(first, Staged):
        return None
    if len(inputs) == 1:
        return first
    if len(first) != 1:
        return None
    before, places, samples = None, [], 0
    ((name, array),) = first.items()
    for each in inputs:
        if not isinstance(each, Staged):
            return None
        (place,) = each.places
        if place.size % ALIGNMENT or place.size != each[name].nbytes:
            return None
        if before is not None and not place.follows(before):
            return None
        places.append(place)
        samples += each[name].shape[0]
        before = place
    data = places[0].to(places[-1])
    if data.size != samples * array[:1].nbytes:
        return None
    whole = Staged(*places)
    whole[name] = data.view(array.dtype).reshape(samples, *array.shape[1:])
    return whole


@dataclass
class _Run:
    """Where inputs of one kind go: `next` is the place of the next one; the run ends before `end`."""

    start: int
    next: int
    end: int


class Staging:
    """The room of one version's processes; safe to use from any thread.

    Attributes:
        arena: all of it.
        lock: of the places; held for a few instructions only.
        places: in use, by `start`.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.lock = threading.Lock()
        self.places: list[Place] = []
        self._end = arena.bytes.size
        self._runs: dict[Hashable, _Run] = {}
        self._crowded = -math.inf  # when several places were in use last (time.monotonic)
        self._reached = 0  # bytes of the room that may be resident

    @classmethod
    def create(cls) -> Staging:
        """With an arena of its own. Raises OSError."""
        return cls(Arena.create(MAX_STAGED_BYTES))

    def close(self) -> None:
        """Nothing is staged any more; may be repeated."""
        with self.lock:
            self.arena.close()

    def share(self) -> int:
        """Another descriptor of the arena, the caller's to close. Raises OSError once this is closed."""
        with self.lock:
            return os.dup(self.arena.descriptor)

    def take(self, size: int, kind: Hashable = None) -> Place | None:
        """A place of `size` bytes, held once; None when there is no room.

        Args:
            size: bytes.
            kind: of inputs that may share a batch with others of it; None: with none.
        """
        with self.lock:
            now = time.monotonic()
            if self.places:
                self._crowded = now
            else:
                self._runs.clear()
                if now - self._crowded > STAGED_KEEP_S and too_much(self._reached, size):
                    self.arena.give_back(0, padded(self._reached, mmap.PAGESIZE))
                    self._reached = 0
            start = self._first_fit(size, self._runs.values()) if kind is None else self._in_run(kind, size)
            if start is None:
                self._runs.clear()
                start = self._first_fit(size)
            if start is None:
                return None
            self._reached = max(self._reached, start + size)
            taken = Place(self, start, size)
            index = len(self.places)
            while index and self.places[index - 1].start > start:
                index -= 1
            self.places.insert(index, taken)
            return taken

    # Under the lock.

    def _in_run(self, kind: Hashable, size: int) -> int | None:
        """The next place of the kind's run, or the first of a new one."""
        run = self._runs.get(kind)
        if run is not None:
            inside = [place for place in self.places if run.start <= place.start < run.end]
            if all(place.is_read for place in inside):  # nothing waits that this one could be joined with
                run.next = _widest(inside, run.start, run.end)
            if run.next + size <= run.end and self._is_free(run.next, size):
                start = run.next
                run.next = padded(start + size)
                return start
        self._runs.pop(kind, None)
        while len(self._runs) >= MAX_RUNS:
            self._runs.pop(next(iter(self._runs)))
        length = max(size, RUN_BYTES)
        begin = self._first_fit(length, self._runs.values())
        if begin is not None:
            self._runs[kind] = _Run(begin, padded(begin + size), begin + length)
        return begin

    def _is_free(self, start: int, size: int) -> bool:
        return not any(
            place.start < start + size and start < place.start + place.size for place in self.places
        )

    def _first_fit(self, size: int, runs: Iterable[_Run] = ()) -> int | None:
        """The first place of so many bytes that nothing lies in, and no run will want."""
        taken = [(place.start, place.start + place.size) for place in self.places]
        taken += [(run.next, run.end) for run in runs if run.next < run.end]
        start = 0
        for begin, end in sorted(taken):
            if begin - start >= size:
                break
            start = max(start, padded(end))
        return start if start + size <= self._end else None


def _widest(places: Sequence[Place], start: int, end: int) -> int:
    """Where the widest part between `start` and `end` begins that none of the places, in order, lies in."""
    widest, best, free = 0, start, start
    for place in places:
        if place.start - free > widest:
            widest, best = place.start - free, free
        free = padded(place.start + place.size)
    return free if end - free > widest else best
