"""A whole delta: header, blocks, end marker."""

from __future__ import annotations

import hashlib
import zlib

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.block import Block, decode_block
from edge_tests.conformance.plain.fault import (
    CORRUPT,
    INVALID,
    MISMATCH,
    OVER_LIMIT,
    TRUNCATED,
    WRONG_BASE,
    check,
)
from edge_tests.conformance.plain.header import Header, read_header
from edge_tests.conformance.plain.reader import Reader


def decode(base: bytes | None, delta: bytes, announced: tuple[bytes, int] | None = None) -> bytes:
    """The target, which may have been announced by its SHA-256 and size. Raises Fault."""
    file = Reader(delta, "the delta", TRUNCATED)
    header = read_header(file)
    if announced is not None:
        check(
            (header.target_digest, header.target_size) == announced, "another target than announced", MISMATCH
        )
    known = _proven(base, header)
    target = bytearray()
    for number in range(header.block_count):
        _read_block(file, header, number, known, target)
    check(file.byte() == 0x45, "no end marker where the last block ends")
    check(len(target) == header.target_size, "the blocks do not write the target's size")
    check(file.left() == 0, "bytes after the end marker")
    check(hashlib.sha256(target).digest() == header.target_digest, "another target", MISMATCH)
    return bytes(target)


def _proven(base: bytes | None, header: Header) -> bytes:
    if header.base_digest is None:
        return b""
    if base is None:
        check(False, "no base was given", WRONG_BASE)
        return b""
    check(len(base) == header.base_size, "the base has another size", WRONG_BASE)
    check(hashlib.sha256(base).digest() == header.base_digest, "another base", WRONG_BASE)
    return base


def _read_block(file: Reader, header: Header, number: int, base: bytes, target: bytearray) -> None:
    check(file.byte() == 0x42, f"no block {number} where one is due")
    start = file.at
    payload_length, target_length = file.varint(), file.varint()
    fields = file.data[start : file.at]
    check(1 <= target_length <= header.block_size, "a block's target length is out of its range", INVALID)
    check(payload_length <= target_length + limits.BLOCK_OVERHEAD_BYTES, "a payload is too long", OVER_LIMIT)
    checksum = int.from_bytes(file.take(4), "little")
    payload = file.take(payload_length)
    found = zlib.crc32(number.to_bytes(8, "little"), header.checksum)
    found = zlib.crc32(payload, zlib.crc32(fields, found))
    check(found == checksum, f"the checksum of block {number} does not match", CORRUPT)
    check(len(target) + target_length <= header.target_size, "a block writes beyond the target")
    target += decode_block(Block(payload, len(target), target_length), header.features, base)
