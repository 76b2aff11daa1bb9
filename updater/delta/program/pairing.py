"""Which array of the base each array of the target follows from, and how it lies there.

Order, for each array: the same name, type and size; the same content, under any name and in any order of
its axes; likeness of a sample, in other types and orders of axes too; rows that occur in the base; parts of a
larger array, or a smaller one that it has grown from. Rules: the choice depends on the files alone; an
array's base, however it lies in the file, is handed on in the order of the target's elements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import parts, planner, views
from updater.delta.program.layout import Axes
from updater.delta.program.planner import Item
from updater.delta.program.records import NIBBLES, SOURCES
from updater.delta.program.views import View

Array = NDArray[Any]
_ALIKE = 0.5  # correlation from which arrays are a pair
_SURE = 0.97  # ... and from which no other order of the axes is tried
_CHANCE = 6.0  # correlation, times the root of the elements compared, that chance does not reach
_TAKEN = 0.01  # what is taken off the likeness to an array that another one follows from
_SAMPLE = 2048  # elements compared
_LEAST = 4  # elements of an array that is compared
_LEAST_PART = 64  # elements of an array that is looked for inside others
_ROW_BYTES = 32  # of a row that is looked for
_MAX_SEGMENTS = 4096  # into which an array is cut by where its rows lie
_FOUND = 0.3  # share of the rows that must be found for that
_HASHED = 1 << 20  # elements hashed at a time


def pair(old: list[Item], new: list[Item]) -> list[Item]:
    """The new items with `base` set; those of which parts follow from different arrays are cut."""
    return _Pairing(old).run(new)


class _Pairing:
    """What is known of the base's arrays, and which of them are taken."""

    def __init__(self, old: list[Item]) -> None:
        self._taken: set[int] = set()
        self._samples: dict[tuple[int, Axes, int, int], Array] = {}
        self._hashes: dict[int, Array] = {}
        self._by_name: dict[tuple[str, str, int, int], list[Item]] = defaultdict(list)
        self._by_size: dict[int, list[Item]] = defaultdict(list)
        self._by_rank: dict[int, list[Item]] = defaultdict(list)
        self._by_row: dict[tuple[int, int], list[Item]] = defaultdict(list)
        self._by_content: dict[tuple[int, int, int], list[Item]] = defaultdict(list)
        for item in old:
            self._by_name[item.role, item.name, item.dtype, len(item.value)].append(item)
            if item.role == "data":
                self._by_size[len(item.value)].append(item)
                self._by_rank[len(views.sizes_of(item.shape))].append(item)
                self._by_row[item.dtype, _row(item)].append(item)
                self._by_content[_fingerprint(item)].append(item)

    def run(self, new: list[Item]) -> list[Item]:
        """Pairs all items: what is sure first."""
        later = []
        for item in new:
            found = self._by_name.get((item.role, item.name, item.dtype, len(item.value)))
            if found:
                item.base = found.pop(0)
            if item.role == "data" and len(item.value) >= _LEAST and not _equal(item.base, item):
                same = self._same(item)
                if same is None:
                    later.append(item)
                else:
                    item.base = same.taken(item.shape)
            self._take(item)
        cut: dict[int, list[Item]] = {}
        for item in later:
            score = self._like(item)
            if score < _ALIKE and item.dtype not in NIBBLES:
                pieces = self._rows(item)
                if not pieces and item.base is None:
                    pieces = self._part(item)
                if pieces:
                    cut[id(item)] = pieces
            self._take(item)
        return [piece for item in new for piece in cut.get(id(item), [item])]

    def _take(self, item: Item) -> None:
        if item.base is not None:
            self._taken.add(item.base.at)

    def _same(self, item: Item) -> View | None:
        """An array with the same content, in any order of its axes."""
        if len(item.value) < _LEAST_PART:
            return None
        places = views.sample_places(len(item.value), _SAMPLE)
        wanted = _bytes(item.value[places])
        for other in self._by_content.get(_fingerprint(item), ()):
            for view in _orders(other, item):
                if np.array_equal(_bytes(view.words(places)), wanted) and _equal(
                    view.taken(item.shape), item
                ):
                    return view
        return None

    def _like(self, item: Item) -> float:
        """Sets the array of as many elements that is most alike; one of the same name, if it is at all."""
        wanted = views.normal(_numbers(item, views.sample_places(len(item.value), _SAMPLE)))
        others = [other for other in self._by_size.get(len(item.value), []) if other is not item.base]
        best: View | None = None
        least = 0.0
        if item.base is not None:
            least = float(wanted @ self._sample(View(item.base, ((len(item.value), 1),))))
            if least > _ALIKE:
                return least
            others.insert(0, item.base)
        for other in others:
            if other.dtype != item.dtype and other.dtype not in SOURCES:
                continue
            for view in _orders(other, item):
                score = float(wanted @ self._sample(view))
                score -= _TAKEN if other.at in self._taken and other is not item.base else 0.0
                if score > max(least, _ALIKE):
                    best, least = view, score
                if score > _SURE:
                    break
        if best is not None:
            item.base = best.taken(item.shape)
        return least

    def _sample(self, view: View) -> Array:
        """Numbers of a view, to be multiplied with those of an array of as many elements."""
        key = (view.item.at, view.axes, view.start, view.count)
        if key not in self._samples:
            words = view.words(views.sample_places(view.count, _SAMPLE))
            self._samples[key] = views.normal(planner.numbers(replace(view.item, value=words)))
        return self._samples[key]

    def _part(self, item: Item) -> list[Item]:
        """An array that is part of a larger one, or that has grown: it, or what it is cut into."""
        if len(item.value) < _LEAST_PART:
            return []
        best: View | None = None
        least = _ALIKE
        for other in self._by_rank.get(len(views.sizes_of(item.shape)), []):
            if other.dtype != item.dtype and other.dtype not in SOURCES:
                continue
            for view in views.slices(other, item.shape):
                if view.count < max(_LEAST_PART, len(item.value) // 4):
                    continue
                begin = view.skip * _step(item)
                places = begin + views.sample_places(view.count, _SAMPLE)
                score = float(views.normal(_numbers(item, places)) @ self._sample(view))
                if score > max(least, _CHANCE / np.sqrt(len(places))):
                    best, least = view, score
        if best is None:
            return []
        begin = best.skip * _step(item)
        pieces = _cut(item, [begin, begin + best.count])
        for piece in pieces:
            if piece.at == item.at + begin * item.value.itemsize:
                piece.base = best.taken(piece.shape)
        return pieces

    def _rows(self, item: Item) -> list[Item]:
        """An array whose rows lie elsewhere in the base, in runs: cut into these."""
        row = _row(item)
        count = len(item.value) // max(1, row)
        others = self._by_row.get((item.dtype, row), [])
        if row * item.value.itemsize < _ROW_BYTES or count < 2 or not others:
            return []
        known = np.concatenate([self._hashed(other) for other in others])
        order = np.argsort(known, kind="stable")
        wanted = _hashes(item)
        place = np.minimum(np.searchsorted(known[order], wanted), len(order) - 1)
        found = known[order][place] == wanted
        if found.mean() < _FOUND:
            return []
        source = np.where(found, order[place], 0)
        # Rows that were not found go on where those before them lie.
        last = np.maximum.accumulate(np.where(found, np.arange(count), 0))
        shift = (source - np.arange(count))[last]
        bounds = np.cumsum([0, *(len(self._hashed(other)) for other in others)])
        owner = np.searchsorted(bounds, np.arange(count) + shift, side="right") - 1
        change = (np.diff(shift) != 0) | (np.diff(found.astype(np.int8)) != 0) | (np.diff(owner) != 0)
        cuts = np.flatnonzero(change) + 1
        if len(cuts) >= _MAX_SEGMENTS or (not len(cuts) and _equal(item.base, item)):
            return []
        pieces = _cut(replace(item, base=None), [int(cut) * row for cut in cuts])
        for piece in pieces:
            first = (piece.at - item.at) // item.value.itemsize // row
            number = int(owner[first])
            if number < len(others):
                start = (first + int(shift[first]) - int(bounds[number])) * row
                if 0 <= start <= len(others[number].value) - len(piece.value):
                    piece.base = View(others[number], ((len(piece.value), 1),), start).taken(piece.shape)
        return pieces

    def _hashed(self, item: Item) -> Array:
        if item.at not in self._hashes:
            self._hashes[item.at] = _hashes(item)
        return self._hashes[item.at]


def _orders(other: Item, item: Item) -> Iterator[View]:
    """How an array may be seen for it to be another's base; codes of four bits only as they lie."""
    for view in views.orders(other, item.shape):
        if view.plain or other.dtype not in NIBBLES:
            yield view


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint8)


def _equal(one: Item | None, other: Item) -> bool:
    """Whether two arrays have the same type and bytes."""
    return (
        one is not None
        and one.dtype == other.dtype
        and np.array_equal(_bytes(one.value), _bytes(other.value))
    )


def _numbers(item: Item, places: Array) -> Array:
    return planner.numbers(replace(item, value=item.value[places]))


def _step(item: Item) -> int:
    """Elements of one step along the first axis that has more than one."""
    sizes = views.sizes_of(item.shape)
    return len(item.value) // sizes[0] if sizes else 1


def _row(item: Item) -> int:
    """Elements of one step along the first axis; 0 for what is no matrix."""
    return _step(item) if len(views.sizes_of(item.shape)) > 1 else 0


def _cut(item: Item, cuts: list[int]) -> list[Item]:
    """An array in pieces, cut before the elements given."""
    bounds = sorted({0, len(item.value), *cuts})
    return [parts.part(item, start, stop) for start, stop in pairwise(bounds)]


def _fingerprint(item: Item) -> tuple[int, int, int]:
    """Alike for arrays that have the same elements in any order."""
    words = item.value.view(f"<u{item.value.itemsize}")
    return item.dtype, len(words), int(np.add.reduce(words, dtype=np.uint64))


def _hashes(item: Item) -> Array:
    """A hash of each row."""
    row = _row(item)
    words = item.value.view(f"<u{item.value.itemsize}").reshape(-1, row)
    factors = (np.arange(1, 2 * row, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    step = max(1, _HASHED // row)
    found = [
        ((words[at : at + step] + np.uint64(1)) * factors).sum(axis=1, dtype=np.uint64)
        for at in range(0, len(words), step)
    ]
    return np.concatenate(found)
