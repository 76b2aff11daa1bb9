"""From a change to words: base + code * step, or the word beside it that codes smaller.

A delta sends small codes as such. Where it cannot (large codes, float64) it subtracts words as ordered
integers, and a change of one size is many differences, one for each exponent and rounding. A `Rounding` lets
the difference be a multiple of a power of two, at the cost of a little precision; which one is best is
measured with the real codec. Words whose code is 0 stay the base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from updater.approximate.layers import CODES, FLOATS, Layer, Words, decode, encode
from updater.approximate.methods import Update
from updater.delta.elements import element_type, from_ordered, to_ordered


@dataclass(frozen=True)
class Rounding:
    """How differences of ordered integers are rounded.

    A difference D becomes M * 2^shift + up when it is positive, -(M * 2^shift + down) when it is negative,
    where M = |D| / 2^shift to the nearest integer (with 0 it stays 0), and shift leaves `bits` explicit bits
    of the significand.

    Attributes:
        bits: of the significand that may change; None leaves every value where it is nearest.
        up: added to positive differences.
        down: taken from negative ones.
        name: for people.
    """

    bits: int | None
    up: int = 0
    down: int = 0

    @property
    def name(self) -> str:
        return "nearest" if self.bits is None else f"{self.bits} bits"


EXACT = Rounding(None)
# With (0, 1) folded differences of both signs share all bits but the lowest, with (1, 1) folded differences
# less one do, with (0, 0) magnitudes do: whichever the codec codes.
ROUNDINGS = (
    EXACT,
    *(Rounding(8, up, down) for up, down in ((0, 1), (1, 1), (0, 0))),
    *(Rounding(bits, up, down) for bits in (6, 4) for up, down in ((0, 1), (1, 1), (0, 0))),
)


def realise(layer: Layer, update: Update, rounding: Rounding = EXACT) -> Words:
    """The words that an update makes of a layer.

    The value is base + code * step: a float64 product and a float64 sum, rounded to the layer's type (of
    8-bit codes: the code itself is added and clamped). A value that would not be finite stays the base's.
    """
    if not layer.is_float:
        low, high = CODES[layer.dtype]
        codes: Words = np.clip(layer.start.astype(np.int64) + update.codes, low, high)
        return codes.astype(layer.base.dtype)
    wanted = encode(decode(layer.base, layer.dtype) + update.reals(layer.rows), layer.dtype)
    moved = update.codes != 0
    if rounding.bits is not None:
        wanted = _rounded(layer, wanted, rounding)
    finite = np.isfinite(decode(wanted, layer.dtype))
    return np.where(moved & finite, wanted, layer.base)


def _rounded(layer: Layer, wanted: Words, rounding: Rounding) -> Words:
    """The words whose ordered difference to the base's is what `rounding` makes of it."""
    assert rounding.bits is not None
    kind = element_type(layer.dtype)
    shift = FLOATS[layer.dtype] - rounding.bits
    if shift < 1:
        return wanted
    old, new = to_ordered(layer.base, kind), to_ordered(wanted, kind)
    rises = new > old
    word: Any = old.dtype.type
    size = np.where(rises, new - old, old - new)
    # Overflow cannot happen: two finite words are less than the words' range apart.
    units = (size >> word(shift)) + ((size >> word(shift - 1)) & word(1))
    step = units << word(shift)
    up = np.where(units > 0, step + word(rounding.up), word(0))
    down = np.where(units > 0, step + word(rounding.down), word(0))
    moved = np.where(rises, old + up, old - down)
    # A difference that would wrap around the words' range is left as it is.
    wrapped = np.where(rises, moved < old, moved > old)
    moved = np.where(wrapped | (size == 0), new, moved)
    return np.ascontiguousarray(from_ordered(moved, kind)).astype(layer.base.dtype)
