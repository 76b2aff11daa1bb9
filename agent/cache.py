"""The response cache: outputs by the content of their inputs, for models that ask for it. Pure.

A model that answers the same to the same inputs can opt in (option `cache_ttl_s` of its variant). The key is
a digest of everything the answer depends on: version, input names, datatypes, shapes and bytes. An entry
lives for the model's time; the cache as a whole has a bound in bytes. When it is full, a new entry displaces
the ones that were asked for least, if it has itself been asked for more often than each of them: keys seen
once do not drive out those in use. Counts are halved every CACHE_HALVE_AFTER look-ups, so that yesterday's
favourites fade.

Rules: what is kept is a copy of nobody's memory that changes; counts and entries are both bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.limits import CACHE_BYTES, CACHE_ENTRY_BYTES, CACHE_HALVE_AFTER, MAX_CACHE_COUNTS
from runtimes.datatypes import encode

Arrays = dict[str, NDArray[Any]]
Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Entry:
    """Outputs, until when they hold, and what they take."""

    outputs: Arrays
    until: float
    size: int


class Cache:
    """Outputs by key. Not thread-safe: its caller holds a lock."""

    def __init__(self, most_bytes: int = CACHE_BYTES, entry_bytes: int = CACHE_ENTRY_BYTES) -> None:
        """`most_bytes` of outputs are kept; each entry counts as `entry_bytes` more than its outputs."""
        self._most = most_bytes
        self._entry_bytes = entry_bytes
        self._entries: dict[bytes, _Entry] = {}
        self._asked: dict[bytes, int] = {}
        self._looked_up = 0
        self.size = 0

    def get(self, key: bytes, now: float) -> Arrays | None:
        """The outputs kept under `key`, if they still hold; counts the question either way."""
        self._count(key)
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.until:
            self._drop(key)
            return None
        return dict(entry.outputs)

    def put(self, key: bytes, outputs: Mapping[str, NDArray[Any]], ttl_s: float, now: float) -> bool:
        """Keeps outputs for `ttl_s` seconds if there is room, or others are asked for less; says whether."""
        size = self._entry_bytes + sum(_size(array) for array in outputs.values())
        if size > self._most:
            return False
        if key in self._entries:
            self._drop(key)
        if self.size + size > self._most and not self._make_room(size, self._asked.get(key, 0), now):
            return False
        self._entries[key] = _Entry(
            {name: _frozen(array) for name, array in outputs.items()}, now + ttl_s, size
        )
        self.size += size
        return True

    def _make_room(self, size: int, asked: int, now: float) -> bool:
        """Drops what does not hold any more, then the least asked for; false if that is not less."""
        for key in [key for key, entry in self._entries.items() if now >= entry.until]:
            self._drop(key)
        leaving, free = [], self._most - self.size
        for key in sorted(self._entries, key=lambda other: self._asked.get(other, 0)):
            if free >= size:
                break
            if self._asked.get(key, 0) >= asked:
                return False
            leaving.append(key)
            free += self._entries[key].size
        for key in leaving:
            self._drop(key)
        return True

    def _drop(self, key: bytes) -> None:
        self.size -= self._entries.pop(key).size

    def _count(self, key: bytes) -> None:
        self._looked_up += 1
        if self._looked_up >= CACHE_HALVE_AFTER or len(self._asked) >= MAX_CACHE_COUNTS:
            self._looked_up = 0
            self._asked = {other: count // 2 for other, count in self._asked.items() if count > 1}
            if len(self._asked) >= MAX_CACHE_COUNTS:
                self._asked = {other: count for other, count in self._asked.items() if other in self._entries}
        self._asked[key] = self._asked.get(key, 0) + 1


def key_of(model: str, version: int, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """The digest of what an answer depends on."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(repr((model, version)).encode())
    for name, array in inputs.items():
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(
            encode(array) if array.dtype.hasobject else np.ascontiguousarray(array).reshape(-1).data
        )
    return digest.digest()


def _size(array: NDArray[Any]) -> int:
    return len(encode(array)) if array.dtype.hasobject else array.nbytes


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    copy = array.copy()  # a view would keep a whole batch's outputs
    copy.flags.writeable = False
    return copy
