"""Pools: the symbols and raw bits of records."""

from __future__ import annotations

from edge_tests.conformance.plain.bits import Bits

# (name, alphabet, contexts), in the order of the mask's bits
POOLS = (
    ("float", 240, 160),
    ("half", 240, 160),
    ("plain", 249, 96),
    ("wide", 240, 64),
    ("codes", 203, 1024),
    ("gaps", 200, 64),
    ("sizes", 64, 32),
)


class Pool:
    """The symbols and raw bits of a pool, taken record by record."""

    def __init__(self, symbols: list[int], raw: bytes) -> None:
        self.symbols = symbols
        self.bits = Bits(raw)
        self.at = 0

    def take(self, count: int) -> list[int]:
        """The next symbols."""
        self.at += count
        return self.symbols[self.at - count : self.at]


def read_token(token: int, bits: Bits) -> int:
    """The difference of a token, with its raw bits."""
    if token == 0:
        return 0
    negative = bits.take(1)
    size = token
    if token >= 16:
        width = (token - 16) // 8 + 1
        size = (8 + token % 8) << width | bits.take(width)
    return -size if negative else size
