"""The base as a block's program reads it: arrays at offsets, in whatever layout they lie.

How much a program may read is decided with its records (`records.Share`), not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import layout
from updater.delta.program.layout import Axes

Array = NDArray[Any]
ReadBase = Callable[[int, int], bytes]  # (offset, length); refuses what lies outside the base


class ProgramError(ValueError):
    """A program that no encoder writes, or that decoders would refuse."""


class LimitError(ProgramError):
    """A number of a program is over a limit."""

    def __init__(self, what: str, value: int, limit: int) -> None:
        super().__init__(f"the program asks for {value} {what}; the limit is {limit}")
        self.what, self.value, self.limit = what, value, limit


def within(what: str, value: int, limit: int) -> None:
    """Raises LimitError if a value is over a limit."""
    if value > limit:
        raise LimitError(what, value, limit)


class Operands:
    """Reads arrays of the base.

    Args:
        read: gives bytes of the base.
    """

    def __init__(self, read: ReadBase) -> None:
        self._read = read
        self._band: tuple[object, int, Array] | None = None  # what, its first element, gathered last

    def bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`."""
        if length < 0:
            raise ProgramError("a program reads less than nothing of the base")
        return self._read(offset, length)

    def array(self, dtype: np.dtype[Any] | str, count: int, offset: int) -> Array:
        """`count` elements at byte `offset`; read-only."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.bytes(offset, count * kind.itemsize), dtype=kind)

    def laid(self, dtype: np.dtype[Any] | str, offset: int, axes: Axes, start: int, count: int) -> Array:
        """Elements [start, start + count) of an operand whose first lies at byte `offset`.

        They come in the target's order, gathered in bands of whole steps of the first axis, for pieces that
        follow each other.
        """
        kind = np.dtype(dtype)
        axes = layout.merged(axes) or ((layout.count(axes), 1),)
        parts = []
        while count > 0:
            first, band = self._banded(kind, offset, axes, start)
            part = band[start - first : start - first + count]
            if not part.size:
                raise ProgramError("an operand has fewer elements than its record")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, dtype=kind)])

    def _banded(self, kind: np.dtype[Any], offset: int, axes: Axes, start: int) -> tuple[int, Array]:
        """The band that holds an element, and its first element."""
        before = 0
        while len(axes) > 1 and layout.count(axes[1:]) > limits.GATHER_ELEMENTS:
            inner = layout.count(axes[1:])
            row = (start - before) // inner
            if row >= axes[0][0]:
                raise ProgramError("an operand has fewer elements than its record")
            offset += row * axes[0][1] * kind.itemsize
            before += row * inner
            axes = axes[1:]
        size, stride = axes[0]
        inner = layout.count(axes[1:])
        step = max(1, limits.GATHER_ELEMENTS // inner)
        row = (start - before) // inner // step * step
        key, first = (kind, offset, axes), before + row * inner
        known = self._band
        if known is None or known[:2] != (key, first):
            if row >= size:
                raise ProgramError("an operand has fewer elements than its record")
            some: Axes = ((min(step, size - row), stride), *axes[1:])
            known = self._band = None  # let go of it first
            known = (key, first, self._gather(kind, offset + row * stride * kind.itemsize, some))
            self._band = known
        return first, known[2]

    def _gather(self, kind: np.dtype[Any], offset: int, axes: Axes) -> Array:
        """All elements of a layout, flat, in the target's order."""
        sizes = [size for size, _ in axes]
        span, wide, count = layout.cover(axes), kind.itemsize, layout.count(axes)
        if span <= 2 * count:
            whole = self.array(kind, span, offset)
            strides = [stride * wide for _, stride in axes]
            return np.lib.stride_tricks.as_strided(whole, sizes, strides, writeable=False).reshape(-1)
        length = layout.run_length(axes)
        runs = [self.bytes(offset + at * wide, length * wide) for at in layout.starts(axes)]
        order = sorted(range(len(axes)), key=lambda place: axes[place][1])[::-1]
        found = np.frombuffer(b"".join(runs), dtype=kind).reshape([sizes[place] for place in order])
        return found.transpose([order.index(place) for place in range(len(axes))]).reshape(-1)
