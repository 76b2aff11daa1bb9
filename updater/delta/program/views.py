"""Arrays of the base as an array of the target may see them: in another order of axes, or in part.

Used by the encoder only, to look for pairs; `pairing` chooses among what this proposes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import layout, planner
from updater.delta.program.layout import MAX_AXES, Axes
from updater.delta.program.planner import Item

Array = NDArray[Any]
Shape = tuple[int, ...]
_STARTS = 16  # places tried for a slice


@dataclass(frozen=True)
class View:
    """Some elements of an array of the base, in the order of the target's.

    Attributes:
        item: the array.
        axes: sizes and strides of what is seen.
        start: elements of the array before the first one seen.
        skip: steps along the first axis of the target that lie before what is seen.
    """

    item: Item
    axes: Axes
    start: int = 0
    skip: int = 0

    @property
    def count(self) -> int:
        """Elements seen."""
        return layout.count(self.axes)

    @property
    def plain(self) -> bool:
        """Whether it is the array as it lies."""
        return not layout.merged(self.axes) and self.count == len(self.item.value)

    def words(self, places: Array) -> Array:
        """The elements at places of the target's order."""
        at = np.full(len(places), self.start, dtype=np.int64)
        rest = places
        for size, stride in reversed(self.axes):
            rest, index = np.divmod(rest, size)
            at += index * stride
        return self.item.value[at]

    def taken(self, shape: Shape) -> Item:
        """What is seen as an array of its own; `shape` is the target's."""
        item, width = self.item, self.item.value.itemsize
        if self.plain:
            return item
        axes = layout.merged(self.axes)
        value = item.value[self.start :]
        if axes:
            sizes, strides = zip(*((size, stride * width) for size, stride in self.axes))
            value = np.lib.stride_tricks.as_strided(value, sizes, strides, writeable=False).reshape(-1)
        meaning = item.quantisation
        return replace(
            item,
            at=item.at + self.start * width,
            value=value[: self.count],
            axes=axes,
            shape=shape,
            quantisation=meaning if meaning is not None and meaning.axis is None else None,
        )


def sizes_of(shape: Shape) -> Shape:
    """A shape without axes of one element."""
    return tuple(size for size in shape if size != 1)


def strides_of(sizes: Shape) -> Shape:
    """Strides of an array that lies row by row."""
    return tuple(math.prod(sizes[place + 1 :]) for place in range(len(sizes)))


def orders(item: Item, shape: Shape) -> Iterator[View]:
    """All of an array as it lies, then in every order of axes that gives the shape."""
    count = len(item.value)
    seen: set[Axes] = {()}
    yield View(item, ((count, 1),))
    old, new = sizes_of(item.shape), sizes_of(shape)
    if math.prod(old) != count or math.prod(new) != count:
        return
    found: list[Axes] = []
    if len(old) == len(new) <= MAX_AXES and sorted(old) == sorted(new):
        strides = strides_of(old)
        for order in permutations(range(len(old))):
            axes = tuple((old[place], strides[place]) for place in order)
            if tuple(size for size, _ in axes) == new:
                found.append(axes)
    # Both seen as matrices: the groups of axes change places.
    lines = {math.prod(old[:place]) for place in range(1, len(old))}
    for place in range(1, len(new)):
        rows = math.prod(new[:place])
        if count // rows in lines:
            found.append(((rows, 1), (count // rows, rows)))
    for axes in found:
        if layout.merged(axes) not in seen:
            seen.add(layout.merged(axes))
            yield View(item, axes)


def slices(item: Item, shape: Shape) -> Iterator[View]:
    """Parts of a larger array, and all of one that has fewer steps along the first axis."""
    old, new = sizes_of(item.shape), sizes_of(shape)
    if len(old) != len(new) or not 1 <= len(new) <= MAX_AXES or math.prod(old) != len(item.value):
        return
    if len(set(old) ^ set(new)) > 2:
        return
    strides = strides_of(old)
    for order in permutations(range(len(old))):
        differ = [at for at, place in enumerate(order) if old[place] != new[at]]
        if len(differ) != 1:
            continue
        at = differ[0]
        whole, wanted, step = old[order[at]], new[at], strides[order[at]]
        axes = tuple((min(old[place], size), strides[place]) for place, size in zip(order, new))
        if wanted < whole:
            starts = {0, whole - wanted, *range(0, min(whole - wanted + 1, _STARTS * wanted), wanted)}
            for start in sorted(starts):
                yield View(item, axes, start * step)
        elif at == 0:
            for skip in (0, wanted - whole):
                yield View(item, axes, 0, skip)


def sample_places(count: int, most: int) -> Array:
    """At most `most` places spread over `count` elements."""
    number = min(count, most)
    step = max(1, count // max(1, number))
    if number < count:
        step |= 1  # an even step would see few columns of a matrix
    return np.arange(number, dtype=np.int64) * step % max(1, count)


def normal(values: Array) -> Array:
    """Numbers less their mean, of length 1; zeros where they are all alike."""
    moved = planner.finite(values)
    moved = moved - moved.mean()
    size = float(np.sqrt(moved @ moved))
    return moved / size if size > 0 and np.isfinite(size) else np.zeros(len(moved))
