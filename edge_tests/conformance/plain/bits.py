"""A stream of bits, each byte from its lowest on."""

from __future__ import annotations

from edge_tests.conformance.plain.fault import check


class Bits:
    """Numbers of chosen widths, taken off bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> int:
        """A number of so many bits, the lowest first."""
        value = 0
        for place in range(count):
            check(self.at < 8 * len(self.data), "bits end before their records")
            value |= (self.data[self.at // 8] >> (self.at % 8) & 1) << place
            self.at += 1
        return value

    def end(self) -> None:
        left = 8 * len(self.data) - self.at
        check(left < 8, "bits that no record takes")
        check(self.take(left) == 0, "padding that is not zero")
