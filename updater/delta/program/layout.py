"""Where the elements of an operand lie in the base: axes of sizes and strides, as an exporter left them.

Axes enumerate the target's elements, the outermost first; element (i0, i1, ...) lies i0 * stride0 + i1 *
stride1 + ... elements behind the operand's first. No axes mean that the elements lie one behind the other.
So a transposed matrix has the axes (rows, 1), (columns, pitch), leading columns of a wider one (rows, pitch),
(columns, 1). Rules: strides are never negative, and a layout that scatters its elements over too many runs
is refused before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

Axes = tuple[tuple[int, int], ...]  # (size, stride in elements), the outermost first

MAX_AXES = 4
MAX_STRIDE = 1 << 40


def count(axes: Axes) -> int:
    """Elements."""
    return math.prod(size for size, _ in axes)


def cover(axes: Axes) -> int:
    """Elements of the base from the first to the last one read."""
    return sum((size - 1) * stride for size, stride in axes) + 1


def run_length(axes: Axes) -> int:
    """Elements that lie one behind the other in the base, whatever their order in the target."""
    length = 1
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if size > 1 and stride != length:
            break
        length *= size
    return length


def runs(axes: Axes) -> int:
    """Separate runs that hold the elements."""
    return count(axes) // run_length(axes)


def starts(axes: Axes) -> list[int]:
    """Where the runs begin, counted in elements from the first."""
    length = 1
    outer: list[Sequence[int]] = []
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if size == 1:
            continue
        if not outer and stride == length:
            length *= size
        else:
            outer.append(range(0, size * stride, stride) if stride else (0,) * size)
    return [sum(steps) for steps in product(*reversed(outer))]


def place(axes: Axes, number: int) -> int:
    """How far behind the first an element lies, by its number in the target's order."""
    if not axes:
        return number
    at = 0
    for size, stride in reversed(axes):
        number, index = divmod(number, size)
        at += index * stride
    return at


def strides(axes: Axes, sizes: Sequence[int]) -> list[int] | None:
    """The stride of each axis of a shape that the elements are given; None if they have none."""
    out = []
    inner = math.prod(sizes)
    for size in sizes:
        inner //= size
        step = place(axes, inner) if size > 1 else 0
        if size > 1 and place(axes, (size - 1) * inner) != (size - 1) * step:
            return None
        out.append(step)
    return out


def merged(axes: Axes) -> Axes:
    """The same layout with as few axes as can be; () for elements that lie one behind the other."""
    out: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return () if not out or (len(out) == 1 and out[0][1] == 1) else tuple(out)


def pitches(axes: Axes) -> list[int]:
    """Elements of the target that one step along each axis but the last passes over."""
    return [count(axes[index + 1 :]) for index in range(len(axes) - 1)]


def part(axes: Axes, start: int, stop: int) -> tuple[int, Axes] | None:
    """The elements [start, stop) of a layout: how far behind the first they begin, and their axes.

    None if they are no layout of their own: they must lie within one step of an axis, or be whole steps.
    """
    if not axes:
        return start, ()
    offset = 0
    for index, (size, stride) in enumerate(axes):
        inner = count(axes[index + 1 :])
        first, last = start // inner, (stop - 1) // inner
        if first == last and size > 0 and index + 1 < len(axes) and stop - start < inner:
            offset += first * stride
            start, stop = start - first * inner, stop - first * inner
            continue
        if start % inner or stop % inner:
            return None
        offset += first * stride
        return offset, merged(((last - first + 1, stride), *axes[index + 1 :]))
    return None
