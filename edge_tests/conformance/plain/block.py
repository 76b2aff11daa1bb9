"""One block: its streams and instructions."""

from __future__ import annotations

from dataclasses import dataclass

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import OVER_LIMIT, UNSUPPORTED, check
from edge_tests.conformance.plain.program import run_program
from edge_tests.conformance.plain.reader import Reader
from edge_tests.conformance.plain.stream import decode_streams
from edge_tests.conformance.plain.tensor import read_tensor


@dataclass
class Block:
    """A payload, and the range of the target that it writes."""

    payload: bytes
    offset: int
    length: int


class Cursor:
    """The place in the base that distances are counted from."""

    def __init__(self, at: int) -> None:
        self.at = at

    def base_offset(self, listing: Reader) -> int:
        """Reads a base distance; the offset becomes the cursor."""
        self.at += listing.signed()
        check(self.at >= 0, "an instruction reads before the base")
        return self.at


def positive(listing: Reader) -> int:
    """A count or length of an instruction."""
    value = listing.varint()
    check(1 <= value <= limits.MAX_TARGET_BYTES, "a count or length is out of its range")
    return value


def stream_number(listing: Reader, streams: list[Reader]) -> int:
    """The number of a stream other than the first."""
    number = listing.varint()
    check(1 <= number < len(streams), "an instruction names a stream that is not there")
    return number


def cut(base: bytes, offset: int, length: int) -> bytes:
    """A range of the base."""
    check(offset >= 0 and length >= 0 and offset + length <= len(base), "a range lies outside the base")
    return base[offset : offset + length]


def decode_block(block: Block, features: list[str], base: bytes) -> bytes:
    """The bytes that a block writes."""
    streams = decode_streams(block.payload, block.offset, block.length, features, base)
    listing = streams[0]
    out = bytearray()
    cursor = Cursor(block.offset)
    instructions = programs = 0
    while listing.left():
        instructions += 1
        check(instructions <= limits.MAX_INSTRUCTIONS, "too many instructions", OVER_LIMIT)
        room = block.length - len(out)
        opcode = listing.byte()
        if opcode == 0:
            offset, length = cursor.base_offset(listing), positive(listing)
            check(length <= room, "a copy writes beyond its block")
            out += cut(base, offset, length)
        elif opcode == 1:
            number, length = stream_number(listing, streams), positive(listing)
            check(length <= room, "a literal writes beyond its block")
            out += streams[number].take(length)
        elif opcode == 2:
            check("tensor" in features, "the feature tensor is not named")
            written = read_tensor(listing, streams, features, cursor, room, base)
            length = len(written)
            out += written
        elif opcode == 3:
            check("program" in features, "the feature program is not named")
            programs += 1
            check(programs == 1, "a block has two programs")
            number = stream_number(listing, streams)
            size, length = positive(listing), positive(listing)
            check(length <= room, "a program writes beyond its block")
            data = streams[number].take(size)
            out += run_program(data, block.offset + len(out), length, base, "tracking" in features)
        else:
            check(False, f"the opcode {opcode} is not known", UNSUPPORTED)
            length = 0
        cursor.at += length
    check(len(out) == block.length, "a block writes less than it says")
    for stream in streams:
        stream.end()
    return bytes(out)
