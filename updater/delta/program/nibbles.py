"""Codes of four bits, two to a byte: the first in the low half; behind an odd last one lies a zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
Array = NDArray[Any]


def pack(codes: Array) -> U8:
    """[count] integers modulo 16 as [(count + 1) // 2] bytes."""
    out: U8 = np.zeros(-(-len(codes) // 2), dtype=np.uint8)
    halves = codes.astype(np.uint8) & np.uint8(15)
    out |= halves[::2]
    out[: len(codes) // 2] |= halves[1::2] << np.uint8(4)
    return out


def unpack(data: U8, count: int, skip: int, negative: bool) -> Array:
    """`count` codes behind the first `skip` of the bytes: int8 from -8 on where they may be negative, else
    uint8.
    """
    codes = np.empty(2 * len(data), dtype=np.uint8)
    codes[::2] = data & np.uint8(15)
    codes[1::2] = data >> np.uint8(4)
    return extended(codes[skip : skip + count], negative)


def extended(codes: U8, negative: bool) -> Array:
    """Integers below 16 as int8, those from 8 on below zero; or as they are."""
    if not negative:
        return codes
    out: Array = (codes ^ np.uint8(8)).view(np.int8)
    out -= np.int8(8)
    return out
