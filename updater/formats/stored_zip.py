"""The entries of a zip file that are stored as they are: where each one's bytes lie, and its name.

PyTorch's checkpoints and TorchScript files and NumPy's .npz are such files. Their names only help to find
counterparts, so a file that contradicts itself yields fewer entries, or none, and never an error. Order: the
end record behind the last entry, then the directory that it names, then for each entry its local header.
Rules: nothing is decompressed; entries lie inside the file and never overlap; the layout is that of PKWARE's
APPNOTE, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from updater.formats import limits

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_COMMENT_BYTES = (1 << 16) - 1
_IN_EXTRA = 0xFFFFFFFF  # a number that the zip64 field has
_ZIP64 = 1
_ENCRYPTED = 1
_STORED = 0


@dataclass(frozen=True)
class Entry:
    """A stored entry: its name without the directory that all entries lie in, and its bytes' place."""

    name: str
    offset: int
    length: int


def entries(data: memoryview) -> tuple[Entry, ...]:
    """The stored entries of a zip file by offset; none of any other file."""
    if bytes(data[:4]) != b"PK\x03\x04":
        return ()
    try:
        found = _read(data)
    except struct.error:  # a record that the file ends in
        return ()
    roots = {entry.name.partition("/")[0] for entry in found}
    if len(roots) == 1 and all("/" in entry.name for entry in found):  # the file's own name, in PyTorch's
        found = [Entry(entry.name.partition("/")[2], entry.offset, entry.length) for entry in found]
    kept: list[Entry] = []
    for entry in sorted(found, key=lambda entry: entry.offset):
        if not kept or entry.offset >= kept[-1].offset + kept[-1].length:
            kept.append(entry)
    return tuple(kept)


def _read(data: memoryview) -> list[Entry]:
    count, place, end = _directory(data)
    found: list[Entry] = []
    text = 0
    for _ in range(min(count, limits.MAX_TENSORS)):
        if place + _CENTRAL.size > end:
            break
        head = _CENTRAL.unpack(data[place : place + _CENTRAL.size])
        flags, method, packed, size, name_length, extra_length, comment_length = (
            head[3], head[4], head[8], head[9], head[10], head[11], head[12],
        )  # fmt: skip
        body = place + _CENTRAL.size
        place = body + name_length + extra_length + comment_length
        text += name_length
        if head[0] != b"PK\x01\x02" or place > end or text > limits.MAX_TEXT_BYTES:
            break
        if method != _STORED or flags & _ENCRYPTED or name_length > limits.MAX_NAME_BYTES:
            continue
        extra = bytes(data[body + name_length : body + name_length + extra_length])
        size, packed, local = _wide(extra, (size, packed, head[16]))
        if size != packed or not size or local + _LOCAL.size > len(data):
            continue
        near = _LOCAL.unpack(data[local : local + _LOCAL.size])
        offset = local + _LOCAL.size + near[9] + near[10]
        if near[0] == b"PK\x03\x04" and offset + size <= len(data):
            name = bytes(data[body : body + name_length]).decode("utf-8", "replace")
            found.append(Entry(name, offset, size))
    return found


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Of the directory: entries, and where it begins and ends; (0, 0, 0) if there is none."""
    tail = max(0, len(data) - _END.size - _COMMENT_BYTES)
    at = bytes(data[tail:]).rfind(b"PK\x05\x06")
    if at < 0:
        return 0, 0, 0
    at += tail
    record = _END.unpack(data[at : at + _END.size])
    count, size, place = record[4], record[5], record[6]
    if at >= _LOCATOR.size and bytes(data[at - _LOCATOR.size :][:4]) == b"PK\x06\x07":
        wide = _LOCATOR.unpack(data[at - _LOCATOR.size : at])[2]
        if wide + _END64.size <= at and bytes(data[wide : wide + 4]) == b"PK\x06\x06":
            count, size, place = _END64.unpack(data[wide : wide + _END64.size])[7:10]
    return (count, place, place + size) if place + size <= at else (0, 0, 0)


def _wide(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """The numbers of an entry, those that do not fit 32 bits from its zip64 field."""
    if _IN_EXTRA not in numbers:
        return numbers
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack("<2H", extra[place : place + 4])
        if kind == _ZIP64:
            field = extra[place + 4 : place + 4 + length]
            words = [word[0] for word in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            one, two, three = (words.pop(0) if n == _IN_EXTRA and words else n for n in numbers)
            return one, two, three
        place += 4 + length
    return numbers
