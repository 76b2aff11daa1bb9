"""Pools: the symbols and raw bits of records."""

from __future__ import annotations

from edge_tests.conformance.plain.fault import check

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


class Bits:
    """A stream of bits, each byte from its lowest on."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> int:
        """A number of so many bits, the lowest first."""
        value = 0
        for place in range(count):
            check(self.at < 8 * len(self.data), "the raw bits end before their records")
            value |= (self.data[self.at // 8] >> (self.at % 8) & 1) << place
            self.at += 1
        return value

    def end(self) -> None:
        left = 8 * len(self.data) - self.at
        check(left < 8, "raw bits that no record takes")
        check(self.take(left) == 0, "padding that is not zero")


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
