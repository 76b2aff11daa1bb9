"""Element types as the delta sees them, and the order-preserving map from floats to integers.

A type is a width and a reading: unsigned, signed, or sign-magnitude ("float": a sign bit above a magnitude
that grows with the value, true of every IEEE 754 format, of bfloat16 and of the 8-bit floats). All arithmetic
is on unsigned integers of that width and wraps; nothing is computed in floating point, so every machine
agrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Unsigned = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class ElementType:
    """One element type: its number in the delta, its width in bytes, and "unsigned", "signed" or "float"."""

    number: int
    width: int
    reading: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """The little-endian unsigned NumPy type of this width."""
        return np.dtype(f"<u{self.width}")

    @property
    def low(self) -> int:
        """The least integer of the type (integers only)."""
        return -(1 << (8 * self.width - 1)) if self.reading == "signed" else 0

    @property
    def high(self) -> int:
        """The greatest integer of the type (integers only)."""
        return (1 << (8 * self.width - (self.reading == "signed"))) - 1


_READINGS = ("unsigned", "signed", "float")
# Numbered by width, then reading: 0 u8, 1 i8, 2 f8, 3 u16, ... 11 f64.
ELEMENT_TYPES: tuple[ElementType, ...] = tuple(
    ElementType(3 * power + reading, 1 << power, _READINGS[reading])
    for power in range(4)
    for reading in range(3)
)
BYTES = ELEMENT_TYPES[0]

_OF_DTYPE = {
    "float64": 11,
    "float32": 8,
    "complex64": 8,
    "complex128": 11,
    "float16": 5,
    "bfloat16": 5,
    "float8_e4m3fn": 2,
    "float8_e4m3fnuz": 2,
    "float8_e5m2": 2,
    "float8_e5m2fnuz": 2,
    "int64": 10,
    "uint64": 9,
    "int32": 7,
    "uint32": 6,
    "int16": 4,
    "uint16": 3,
    "int8": 1,
    "uint8": 0,
}


def element_type(dtype: str) -> ElementType:
    """The element type for a span's dtype; packed and unknown ones are treated as bytes."""
    return ELEMENT_TYPES[_OF_DTYPE.get(dtype, 0)]


def to_ordered(values: Unsigned, kind: ElementType) -> Unsigned:
    """Maps sign-magnitude bit patterns to unsigned integers in the same order; leaves integers alone.

    A pattern with the sign bit set is inverted, any other gets the sign bit: -0.0 comes just below +0.0, and
    NaNs and infinities keep their bits.
    """
    if kind.reading != "float":
        return values
    sign = values.dtype.type(1 << (8 * kind.width - 1))
    return np.where(values & sign, ~values, values | sign)


def from_ordered(keys: Unsigned, kind: ElementType) -> Unsigned:
    """The inverse of `to_ordered`."""
    if kind.reading != "float":
        return keys
    sign = keys.dtype.type(1 << (8 * kind.width - 1))
    return np.where(keys & sign, keys ^ sign, ~keys)


def fold(residual: Unsigned) -> Unsigned:
    """Signed differences (two's complement in unsigned words) to small unsigned ones: 0, -1, 1 -> 0, 1, 2."""
    bits = residual.dtype.itemsize * 8
    one = residual.dtype.type(1)
    negative = residual >> residual.dtype.type(bits - 1)
    return (residual << one) ^ (~negative + one)


def unfold(folded: Unsigned) -> Unsigned:
    """The inverse of `fold`."""
    one = folded.dtype.type(1)
    return (folded >> one) ^ (~(folded & one) + one)
