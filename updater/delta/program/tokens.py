"""Integers as tokens for the entropy coder and raw nibbles behind them.

A difference d is a sign and a size n = |d|. Sizes below 32 are tokens of their own. A size with b >= 6
significant
bits gives its bit length and the 1 to 4 bits below the top one as token, so many that the bits left over (the
remainder) fill whole nibbles: uniform enough to be stored as they are, and fast to put back. 32-bit words
need
235 tokens. Signs of sizes that are not zero are one bit each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

SMALL = 32  # sizes below are tokens


def _layout(bits: int = 32) -> tuple[I64, I64, I64]:
    """By token: the size without its remainder, the remainder's nibbles; by bit length: its first token."""
    sizes, nibbles = list(range(SMALL)), [0] * SMALL
    first = [0] * (bits + 1)
    for length in range(6, bits + 1):
        modelled = 1 + (length - 2) % 4
        first[length] = len(sizes)
        width = length - 1 - modelled
        for value in range(1 << modelled):
            sizes.append((1 << modelled | value) << width)
            nibbles.append(width // 4)
    return np.array(sizes), np.array(nibbles), np.array(first)


SIZES, NIBBLES, FIRST = _layout()
ALPHABET = len(SIZES)


@dataclass(frozen=True)
class Tokens:
    """Coded integers.

    Attributes:
        tokens: [n] below ALPHABET.
        signs: [sizes that are not zero] 1 for negative.
        remainders: the nibbles, low to high: first the lowest nibble of every element that has one, in
        order, ...
    """

    tokens: U8
    signs: U8
    remainders: U8


def bit_lengths(sizes: NDArray[Any]) -> I64:
    """Significant bits of integers from 0 to 2^32 - 1."""
    _, exponents = np.frexp(sizes.astype(np.float64))  # exact: below 2^53
    lengths: I64 = exponents.astype(np.int64)
    return lengths


def encode(differences: I64) -> Tokens:
    """Tokens of integers from -(2^32 - 1) to 2^32 - 1."""
    sizes = np.abs(differences)
    lengths = bit_lengths(sizes)
    modelled = np.where(sizes < SMALL, 0, 1 + (lengths - 2) % 4)
    width = np.maximum(lengths - 1 - modelled, 0)
    tokens = np.where(sizes < SMALL, sizes, FIRST[lengths] + (sizes >> width) - (1 << modelled))
    planes = []
    for plane in range(int(NIBBLES.max())):
        having = NIBBLES[tokens] > plane
        planes.append(sizes[having] >> 4 * plane & 15)
    return Tokens(
        tokens.astype(np.uint8),
        (differences[sizes > 0] < 0).astype(np.uint8),
        np.concatenate(planes).astype(np.uint8),
    )


def remainder_count(tokens: U8) -> int:
    """Nibbles that belong to tokens."""
    return int(NIBBLES[tokens].sum())


def decode(tokens: U8, signs: U8, remainders: U8) -> I64:
    """The integers; takes exactly as many signs and nibbles as the tokens need."""
    sizes = SIZES[tokens]
    nibbles = NIBBLES[tokens]
    at = 0
    for plane in range(int(nibbles.max()) if len(tokens) else 0):
        having = np.flatnonzero(nibbles > plane)
        sizes[having] |= remainders[at : at + len(having)].astype(np.int64) << 4 * plane
        at += len(having)
    negative = np.zeros(len(tokens), dtype=bool)
    negative[sizes > 0] = signs.astype(bool)
    out: I64 = np.where(negative, -sizes, sizes)
    return out
