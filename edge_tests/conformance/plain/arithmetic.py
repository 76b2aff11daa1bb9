"""The arithmetic coder, as a decoder."""

from __future__ import annotations

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import OVER_LIMIT, check
from edge_tests.conformance.plain.reader import unfold

MASK = 0xFFFFFFFF


def budget(length: int) -> int:
    """The decisions that a program, or a skeleton, of so many bytes may take."""
    return min(limits.MAX_CODED_DECISIONS, 32 * length + 4096)


def rate(visits: int) -> int:
    """How far a model moves after so many visits, of 2^16."""
    return 131072 // (2 * visits + 3)


class Arithmetic:
    """A stream of binary decisions and the models it has."""

    def __init__(self, data: bytes, limit: int, decisions: int) -> None:
        self.data = data
        self.limit = limit
        self.left = decisions
        self.low, self.high, self.at = 0, MASK, 4
        self.code = int.from_bytes(data[:4] + bytes(4 - len(data[:4])), "big")
        self.models: dict[tuple[object, ...], list[int]] = {}
        self.last: dict[tuple[object, ...], int] = {}

    def decide(self, probability: int) -> int:
        """A bit that is 1 with a probability of so many 65536ths."""
        self.left -= 1
        check(self.left >= 0, "a stream takes too many decisions", OVER_LIMIT)
        span = self.high - self.low
        middle = self.low + (span >> 16) * probability + (((span & 0xFFFF) * probability) >> 16)
        if self.code <= middle:
            bit, self.high = 1, middle
        else:
            bit, self.low = 0, middle + 1
        while self.low >> 24 == self.high >> 24:
            following = self.data[self.at] if self.at < len(self.data) else 0
            self.low = (self.low << 8) & MASK
            self.high = ((self.high << 8) & MASK) | 0xFF
            self.code = ((self.code << 8) & MASK) | following
            self.at += 1
            check(self.at <= len(self.data) + 4, "a stream ends before its values")
        return bit

    def end(self) -> None:
        """Refuses a stream that is not the shortest for its decisions."""
        for count in range(5):
            step = 1 << (32 - 8 * count)
            value = (self.low + step - 1) // step * step
            if value <= self.high:
                tail = value.to_bytes(5, "big")[1 : 1 + count]
                check(self.data[self.at - 4 :] == tail, "a stream does not end where its values do")
                return

    def bit(self, *context: object) -> int:
        """A bit with the model of a context."""
        model = self.models.setdefault(context, [32768, 0])
        probability, visits = model
        bit = self.decide(probability)
        moved = probability + (((65535 if bit else 0) - probability) * rate(visits) >> 16)
        model[0] = min(65503, max(32, moved))
        if visits < self.limit:
            model[1] = visits + 1
        return bit

    def plain(self, count: int) -> int:
        """A number of so many equally likely bits."""
        value = 0
        for _ in range(count):
            value = 2 * value + self.decide(32768)
        return value

    def tree(self, context: tuple[object, ...], count: int) -> int:
        """A number of so many bits, each with a model."""
        value = 1
        for _ in range(count):
            value = 2 * value + self.bit(context, value)
        return value - (1 << count)

    def unsigned(self, *context: object) -> int:
        """A number of any size up to 65 bits."""
        size = 0
        while self.bit(context, "length", size):
            size += 1
            check(size <= 64, "a number has more than 64 bits")
        value = 1
        for index in range(size):
            bit = self.bit(context, "value", size, value) if index < 3 else self.decide(32768)
            value = 2 * value + bit
        return value - 1

    def signed(self, *context: object) -> int:
        """A number with a sign."""
        return unfold(self.unsigned(*context))

    def number(self, name: str, key: tuple[object, ...], near: int | None = None) -> int:
        """A number that is often the one of the same name and key before."""
        last = self.last.get((name, key), 0)
        if self.bit("again", name, key):
            return last
        value = (last if near is None else near) + self.signed(name)
        check(abs(value) <= limits.MAX_RECORD_NUMBER, "a number is out of its range", OVER_LIMIT)
        self.last[name, key] = value
        return value
