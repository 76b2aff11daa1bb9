"""Variable-length integers (LEB128) and a bounded reader over bytes.

An unsigned integer below 2^64 is written seven bits to a byte, the lowest first, the high bit set on all
bytes but the last, in the fewest bytes possible: a longer spelling is refused, so each value has exactly one.
Signed integers are first folded ("zigzag": 0, -1, 1, -2, ... become 0, 1, 2, 3, ...).
"""

from __future__ import annotations

from updater.delta.faults import invalid

MAX_VARINT_BYTES = 10


def encode(value: int) -> bytes:
    """The bytes of an unsigned integer, 0 <= value < 2^64."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} does not fit a varint")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fold(value: int) -> int:
    """A signed integer as an unsigned one."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unfold(value: int) -> int:
    """The signed integer that `fold` made unsigned."""
    return value >> 1 if not value & 1 else -((value + 1) >> 1)


def encode_signed(value: int) -> bytes:
    """The bytes of a signed integer, -2^63 <= value < 2^63."""
    return encode(fold(value))


class Reader:
    """Reads fields off bytes; `what` names those bytes in errors. Raises SluiceError(DELTA_INVALID)."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = data
        self._what = what
        self.offset = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.offset

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        at = self.offset
        self.skip(count)
        return bytes(self._data[at : self.offset])

    def skip(self, count: int) -> None:
        """Leaves out the next `count` bytes."""
        if count > self.left:
            raise invalid(f"{self._what} ends at byte {len(self._data)}, {count - self.left} bytes early")
        self.offset += count

    def view(self, count: int) -> memoryview:
        """The next `count` bytes, not copied."""
        at = self.offset
        self.skip(count)
        return memoryview(self._data)[at : self.offset]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for index in range(MAX_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if (byte == 0 and index > 0) or value >> 64:
                    break
                return value
        raise invalid(f"{self._what} has an overlong integer before byte {self.offset}")

    def signed(self) -> int:
        return unfold(self.varint())

    def end(self) -> None:
        """Refuses bytes left over."""
        if self.left:
            raise invalid(f"{self._what} has {self.left} bytes after its end")


class Incomplete(Exception):
    """The bytes at hand end inside a varint: more are needed."""


def scan(data: bytes | bytearray, offset: int, what: str) -> tuple[int, int]:
    """Reads one varint out of a buffer that may still grow; gives the value and the offset behind it.

    Raises Incomplete when the buffer ends inside it, SluiceError(DELTA_INVALID) when it is not canonical.
    """
    end = offset
    while end < len(data) and end - offset < MAX_VARINT_BYTES and data[end] >= 0x80:
        end += 1
    if end == len(data) and end - offset < MAX_VARINT_BYTES:
        raise Incomplete
    reader = Reader(bytes(data[offset : end + 1]), what)
    return reader.varint(), offset + reader.offset
