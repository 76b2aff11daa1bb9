"""A bounded reader of flatbuffers: tables, vectors and strings, every offset checked before it is followed.

The `flatbuffers` package and the classes that flatc generates trust the file: an offset beyond its end
raises struct.error at best, and a cycle or a shared table costs unbounded time. Here each access checks
that it lies inside the file and each table visited counts against a limit. The layout is described at
https://flatbuffers.dev/internals/: little-endian; an offset is unsigned, counted from where it stands; a
table begins with a signed offset back to its vtable, which holds each field's place in the table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from updater.formats import limits
from updater.formats.source import Source

_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_OFFSET_BYTES = 4
_MAX_SIZE = 1 << 31  # bytes of a flatbuffer; offsets beyond it are nonsense


class Flatbuffer:
    """The bytes of a flatbuffer, with the count of tables still allowed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tables_left = limits.MAX_FLATBUFFER_TABLES

    def root(self, what: str) -> Table:
        """The table that the file begins with a reference to."""
        return Table(self, self.follow(0, what), what)

    def check(self, start: int, length: int, what: str) -> None:
        """Raises unless [start, start + length) lies inside the file."""
        if start + length > self.source.size:
            problem = f"{what} lies from byte {start} to byte {start + length}"
            if start > _MAX_SIZE:
                raise self.source.invalid(f"{problem}: no flatbuffer reaches that far")
            raise self.source.truncated(problem)

    def number(self, at: int, form: struct.Struct, what: str) -> int:
        """A number at byte `at`."""
        self.check(at, form.size, what)
        return int(form.unpack_from(self.source.data, at)[0])

    def follow(self, at: int, what: str) -> int:
        """Where the offset at byte `at` leads."""
        offset = self.number(at, _U32, f"the offset of {what}")
        if offset < _OFFSET_BYTES:
            raise self.source.invalid(f"the offset of {what} at byte {at} is {offset}: it leads into itself")
        return at + offset

    def vector(self, at: int, item_bytes: int, what: str) -> tuple[int, int]:
        """The vector that the offset at byte `at` leads to: where its items begin, and their number."""
        start = self.follow(at, what)
        count = self.number(start, _U32, f"the length of {what}")
        start += _OFFSET_BYTES
        self.check(start, count * item_bytes, what)
        return start, count


class Table:
    """One table of a flatbuffer; a field is named by its number in the schema.

    Args:
        buffer: the flatbuffer.
        at: byte where the table begins.
        what: what the table is, for errors.
    """

    def __init__(self, buffer: Flatbuffer, at: int, what: str) -> None:
        source = buffer.source
        buffer.tables_left -= 1
        if buffer.tables_left < 0:
            raise source.invalid(
                f"{what} at byte {at} is one table more than the {limits.MAX_FLATBUFFER_TABLES} allowed"
            )
        self.buffer, self.at, self.what = buffer, at, what
        self._vtable = at - buffer.number(at, _I32, what)
        if self._vtable < 0:
            raise source.invalid(
                f"{what} at byte {at} has its vtable at byte {self._vtable}, before the file"
            )
        vtable_bytes = buffer.number(self._vtable, _U16, f"the vtable of {what}")
        buffer.check(self._vtable, vtable_bytes, f"the vtable of {what}")
        self._table_bytes = buffer.number(self._vtable + 2, _U16, f"the vtable of {what}")
        if vtable_bytes < 4 or vtable_bytes % 2 or self._table_bytes < _OFFSET_BYTES:
            raise source.invalid(
                f"the vtable of {what} at byte {self._vtable} has impossible lengths "
                f"({vtable_bytes} and {self._table_bytes} bytes)"
            )
        buffer.check(at, self._table_bytes, what)
        self._fields = (vtable_bytes - 4) // 2

    def place(self, field: int, length: int) -> int | None:
        """Where a field's `length` bytes lie; None when the table does not have it."""
        if field >= self._fields:
            return None
        offset: int = _U16.unpack_from(self.buffer.source.data, self._vtable + 4 + 2 * field)[0]
        if offset == 0:
            return None
        if offset + length > self._table_bytes:
            raise self.buffer.source.invalid(
                f"field {field} of {self.what} at byte {self.at} lies {offset} bytes into a table of "
                f"{self._table_bytes}"
            )
        return self.at + offset

    def scalar(self, field: int, form: str, default: int = 0) -> int:
        """A number: `form` as in `struct`, little-endian ("b", "B", "i", "I", "Q")."""
        packed = struct.Struct("<" + form)
        at = self.place(field, packed.size)
        return default if at is None else int(packed.unpack_from(self.buffer.source.data, at)[0])

    def vector(self, field: int, item_bytes: int, what: str) -> tuple[int, int]:
        """Where a vector's items begin, and their number; (0, 0) when the table does not have it."""
        at = self.place(field, _OFFSET_BYTES)
        return (0, 0) if at is None else self.buffer.vector(at, item_bytes, f"{what} of {self.what}")

    def numbers(self, field: int, form: str, what: str, limit: int) -> tuple[float, ...] | None:
        """A vector of numbers, () when absent, None when it has more than `limit`."""
        item_bytes = struct.calcsize("<" + form)
        start, count = self.vector(field, item_bytes, what)
        if count > limit:
            return None
        return struct.unpack_from(f"<{count}{form}", self.buffer.source.data, start)

    def text(self, field: int, what: str) -> str:
        """A string, "" when absent."""
        start, count = self.vector(field, 1, what)
        return self.buffer.source.text(start, start + count, f"{what} of {self.what}")

    def table(self, field: int, what: str) -> Table | None:
        """A table, None when absent."""
        at = self.place(field, _OFFSET_BYTES)
        return None if at is None else Table(self.buffer, self.buffer.follow(at, what), what)

    def tables(self, field: int, what: Callable[[int], str], limit: int) -> list[Table]:
        """A vector of tables, at most `limit`; `what` names the table at an index."""
        start, count = self.vector(field, _OFFSET_BYTES, what(0))
        if count > limit:
            raise self.buffer.source.invalid(
                f"the vector of {what(0)} at byte {start} has {count} items, more than the {limit} allowed"
            )
        return [
            Table(self.buffer, self.buffer.follow(start + _OFFSET_BYTES * index, what(index)), what(index))
            for index in range(count)
        ]
