"""Takes fields off the front of bytes."""

from __future__ import annotations

from edge_tests.conformance.plain.fault import INVALID, Fault, check


def unfold(folded: int) -> int:
    """The signed number of a folded one."""
    return folded // 2 if folded % 2 == 0 else -((folded + 1) // 2)


class Reader:
    """Bytes and a place in them; running out of them gives the error `code`."""

    def __init__(self, data: bytes, what: str, code: str = INVALID) -> None:
        self.data = data
        self.what = what
        self.code = code
        self.at = 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise Fault(f"{self.what} ends early", self.code)
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for index in range(10):
            byte = self.byte()
            value |= (byte & 127) << (7 * index)
            if byte < 128:
                check(index == 0 or byte != 0, f"{self.what}: a varint is longer than it need be")
                check(value < 1 << 64, f"{self.what}: a varint has more than 64 bits")
                return value
        raise Fault(f"{self.what}: a varint has more than ten bytes")

    def signed(self) -> int:
        return unfold(self.varint())

    def end(self) -> None:
        check(self.left() == 0, f"{self.what} has bytes that nothing takes")
