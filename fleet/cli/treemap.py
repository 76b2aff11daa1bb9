"""A squarified treemap: rectangles whose areas are as their weights, as square as they go.

Method: Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000). Pure: numbers in, rectangles out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rectangle:
    """A place in the picture; in its units."""

    x: float
    y: float
    width: float
    height: float


def treemap(weights: Sequence[float], area: Rectangle) -> list[Rectangle]:
    """A rectangle for each weight, in their order; together they fill the area.

    Args:
        weights: positive, the largest first.
        area: to fill.
    """
    scale = area.width * area.height / sum(weights) if weights else 0.0
    sizes = [weight * scale for weight in weights]
    placed: list[Rectangle] = []
    free, begin = area, 0
    while begin < len(sizes):
        side = min(free.width, free.height)
        end = begin + 1
        while end < len(sizes) and _worst(sizes[begin : end + 1], side) <= _worst(sizes[begin:end], side):
            end += 1
        strip, free = _strip(sizes[begin:end], free, last=end == len(sizes))
        placed += strip
        begin = end
    return placed


def _worst(sizes: Sequence[float], side: float) -> float:
    """The worst ratio of sides of rectangles that share a strip along `side`."""
    total = sum(sizes)
    if not total or not side:
        return float("inf")
    thickness = total / side
    return max(max(thickness * thickness / size, size / (thickness * thickness)) for size in sizes)


def _strip(sizes: Sequence[float], free: Rectangle, *, last: bool) -> tuple[list[Rectangle], Rectangle]:
    """Places a strip along the shorter side; returns it and what is left of the area."""
    total = sum(sizes)
    upright = free.height <= free.width  # the strip stands at the left
    side = free.height if upright else free.width
    thickness = (free.width if upright else free.height) if last else total / side if side else 0.0
    placed = []
    along = 0.0
    for size in sizes:
        length = side * size / total if total else 0.0
        if upright:
            placed.append(Rectangle(free.x, free.y + along, thickness, length))
        else:
            placed.append(Rectangle(free.x + along, free.y, length, thickness))
        along += length
    if upright:
        return placed, Rectangle(free.x + thickness, free.y, max(0.0, free.width - thickness), free.height)
    return placed, Rectangle(free.x, free.y + thickness, free.width, max(0.0, free.height - thickness))
