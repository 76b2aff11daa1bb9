"""Integers as tokens for the entropy coder and raw bits beside them.

A difference d is a sign and a size n = |d|, below 2^32. Sizes below 16 are tokens of their own. A larger one
gives its bit length and the three bits below its top one as token; the bits left over are nearly uniform and
stay raw, behind one bit for the sign. 240 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.bits import CHUNK, BitReader

I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]

SMALL_BITS = 4  # sizes of up to so many bits are tokens
SMALL = 1 << SMALL_BITS
FINE_BITS = SMALL_BITS - 1  # below the top one of a larger size, that its token tells


def _layout() -> tuple[U32, U8]:
    """By token: the least size, and the raw bits beside it with the sign's."""
    sizes, widths = list(range(SMALL)), [0] + [1] * (SMALL - 1)
    for length in range(SMALL_BITS + 1, 33):
        for fine in range(1 << FINE_BITS):
            sizes.append((1 << FINE_BITS | fine) << (length - SMALL_BITS))
            widths.append(length - SMALL_BITS + 1)
    return np.array(sizes, dtype=np.uint32), np.array(widths, dtype=np.uint8)


SIZES, WIDTHS = _layout()
ALPHABET = len(SIZES)


def bit_lengths(sizes: NDArray[Any]) -> NDArray[np.int32]:
    """Significant bits of integers from 0 to 2^32 - 1."""
    _, exponents = np.frexp(sizes.astype(np.float64))  # exact: below 2^53
    return exponents


def encode(differences: I32) -> tuple[U8, U32, U8]:
    """Tokens, raw fields and their widths, [n] each, of differences."""
    tokens = np.empty(len(differences), dtype=np.uint8)
    fields = np.empty(len(differences), dtype=np.uint32)
    for begin in range(0, len(differences), CHUNK):
        part = differences[begin : begin + CHUNK]
        negative = part < 0
        sizes = np.where(negative, np.uint32(0) - part.view(np.uint32), part.view(np.uint32))
        rest = np.maximum(bit_lengths(sizes) - SMALL_BITS, 0).astype(np.uint32)
        top = sizes >> rest
        # (length - 5) * 8 + 16 + fine = rest * 8 + top, as top holds the leading one (8).
        tokens[begin : begin + CHUNK] = rest * np.uint32(1 << FINE_BITS) + top
        raw = sizes - (top << rest)
        fields[begin : begin + CHUNK] = np.where(sizes > 0, raw << np.uint32(1) | negative, 0)
    return tokens, fields, WIDTHS[tokens]


def decode(tokens: U8, bits: BitReader) -> U32:
    """The differences modulo 2^32; takes the bits that belong to the tokens."""
    fields = bits.take(WIDTHS.take(tokens))
    sign = fields & np.uint32(1)
    fields >>= np.uint32(1)
    fields |= SIZES.take(tokens)
    np.negative(sign, out=sign)
    fields ^= sign
    fields -= sign
    return fields
