"""Room in the agent's arena where requests put their inputs before it is their turn.

A large input is copied once: from the message or the client's shared memory to where its worker reads it. The
request's own thread does that as soon as it has a place, while the worker still runs others, so that the next
batch's inputs lie ready when its turn comes.

A place is held by its request and, while the worker may read it, by the exchange with the worker: a request
that gives up does not have its memory overwritten under a running inference. Places are cut from the
beginning where they fit first, so that the same pages are used again; the pages are given back when much less
is wanted.

Rules: when there is no room, a request does without (its inputs are then copied when its turn comes); places
never overlap.
"""

from __future__ import annotations

import mmap
import threading
from typing import Any

from numpy.typing import NDArray

from agent.arena import Arena, padded, too_much
from agent.limits import MAX_STAGED_BYTES


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
    """Inputs by name, in the model's order, that lie in a place as a message to the worker lays them out."""

    __slots__ = ("place",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place


class Staging:
    """The room behind the first part of an arena; safe to use from any thread.

    Attributes:
        arena: whose room it is.
        lock: of the places; held for a few instructions only.
        places: in use, by `start`.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.lock = threading.Lock()
        self.places: list[Place] = []
        self._end = arena.bytes.size
        self._begin = self._end - MAX_STAGED_BYTES
        self._reached = 0  # bytes of the room that may be resident

    def take(self, size: int) -> Place | None:
        """A place of `size` bytes, held once; None when there is no room."""
        with self.lock:
            start, index = self._begin, 0
            for place in self.places:
                if place.start - start >= size:
                    break
                start = padded(place.start + place.size)
                index += 1
            if start + size > self._end:
                return None
            if not self.places and too_much(self._reached, size):
                self.arena.give_back(self._begin, padded(self._reached, mmap.PAGESIZE))
                self._reached = 0
            self._reached = max(self._reached, start + size - self._begin)
            taken = Place(self, start, size)
            self.places.insert(index, taken)
            return taken
