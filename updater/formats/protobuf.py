"""A walker over protobuf's wire format that says where fields lie instead of copying them.

A protobuf library would parse a model into objects and copy every tensor's bytes out of the file, losing
their place in it: a delta needs the place, and a box has no memory for the copy. The walker knows only the
wire format (https://protobuf.dev/programming-guides/encoding/): a tag is a varint of field number and wire
type; a varint, four bytes, eight bytes, or a length and so many bytes follow. It visits one level of one
message; a reader descends where it wants to. Each field visited counts against a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from updater.errors import SluiceError
from updater.formats import limits
from updater.formats.source import Source

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field: its number, wire type, and either a varint's value and end or the payload's [start, end)."""

    number: int
    wire: int
    start: int  # a varint's value
    end: int


class Walker:
    """Walks the messages of one file, with the count of fields still allowed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.fields_left = limits.MAX_PROTOBUF_FIELDS

    def fields(self, start: int, end: int, message: str, *, outermost: bool = False) -> Iterator[Field]:
        """The fields of the message at [start, end), in order of bytes.

        A field beyond the end of the outermost message means that the file is truncated; beyond the end of
        a nested one, that it is invalid.
        """
        data = self.source.data
        position = start
        while position < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise self.source.invalid(
                    f"at byte {position} lies one field more than the {limits.MAX_PROTOBUF_FIELDS} allowed",
                    hint="store weights as raw_data: load the model with the onnx package and save it again",
                )
            at = position
            tag = data[position]
            position += 1
            if tag >= 0x80:
                tag, position = self._varint(at, end, message, outermost)
            number, wire = tag >> 3, tag & 7
            if wire == LENGTH:
                length, position = self._varint(position, end, message, outermost)
                last = position + length
            elif wire == VARINT:
                value, position = self._varint(position, end, message, outermost)
                yield Field(number, wire, value, position)
                continue
            elif wire == FIXED32:
                last = position + 4
            elif wire == FIXED64:
                last = position + 8
            else:
                raise self.source.invalid(
                    f"the field at byte {at}, in {message}, has wire type {wire}, which no ONNX file uses"
                )
            if last > end:
                raise self._beyond(at, last, end, message, outermost)
            if number == 0:
                raise self.source.invalid(f"the field at byte {at}, in {message}, has number 0")
            yield Field(number, wire, position, last)
            position = last

    def head(self, position: int) -> Field | None:
        """The field at a byte of the file, perhaps reaching beyond its end; None if no field begins there."""
        end = self.source.size
        try:
            tag, start = self._varint(position, end, "the file", True)
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                return Field(number, wire, *self._varint(start, end, "the file", True))
            if wire == LENGTH:
                length, start = self._varint(start, end, "the file", True)
                return Field(number, wire, start, start + length)
        except SluiceError:
            return None
        widths = {FIXED32: 4, FIXED64: 8}
        return Field(number, wire, start, start + widths[wire]) if wire in widths else None

    def packed_varints(self, start: int, end: int, message: str, limit: int) -> list[int] | None:
        """The unsigned values of a packed field; None when there are more than `limit`."""
        if end - start > limit * _MAX_VARINT_BYTES:
            return None
        values: list[int] = []
        position = start
        while position < end:
            if len(values) == limit:
                return None
            value, position = self._varint(position, end, message, False)
            values.append(value)
        return values

    def one_byte_each(self, start: int, end: int) -> bool:
        """Whether all varints of a packed field have one byte (values 0 to 127); reads it in pieces."""
        return all(
            self.source.data[piece : min(piece + limits.PIECE_BYTES, end)].isascii()
            for piece in range(start, end, limits.PIECE_BYTES)
        )

    def _varint(self, position: int, end: int, message: str, outermost: bool) -> tuple[int, int]:
        data = self.source.data
        start = position
        value = shift = 0
        while position < end:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, position
            shift += 7
            if position - start == _MAX_VARINT_BYTES:
                raise self.source.invalid(
                    f"the varint at byte {start}, in {message}, has more than ten bytes"
                )
        raise self._beyond(start, position + 1, end, message, outermost)

    def _beyond(self, at: int, last: int, end: int, message: str, outermost: bool) -> SluiceError:
        if outermost:
            return self.source.truncated(f"the field at byte {at}, in {message}, reaches to byte {last}")
        return self.source.invalid(
            f"the field at byte {at}, in {message}, reaches to byte {last}, but {message} ends at byte {end}"
        )
