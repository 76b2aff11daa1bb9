"""The delta file around its blocks: header, block heads, end marker. docs/delta-format.md has the layout.

Order: magic, version, header, blocks in the order of the target, end marker, nothing more. Rules kept
here: the header's checksum covers all of it; a block's checksum is seeded by the header's and by the block's
number, so that a block of another delta, or one out of order, is noticed at once; every length is compared
with a limit before anything is read for it. Pure: bytes in, values out.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from updater import limits
from updater.delta import faults, varint
from updater.digests import from_raw, raw
from updater.limits import DecodeLimits

# As PNG's: a high bit, a CRLF, a ^Z and an LF each show one kind of damage done by text-mode transfers.
MAGIC = b"\x89SLD\r\n\x1a\n"
VERSION = 1
PREFIX = struct.Struct("<8sBH")  # magic, version, bytes of the header's body
CHECKSUM = struct.Struct("<I")
MARK_BLOCK = 0x42
MARK_END = 0x45
MOST_HEAD_BYTES = 1 + 2 * 10 + 4  # of a block: its marker, two varints, its checksum
FLAG_BASE = 1
_FEATURE = re.compile(rb"[a-z0-9][a-z0-9.-]*")

# What version 1's decoder understands beyond the container itself.
FEATURES: tuple[str, ...] = ("lzma", "patch", "program", "requantise", "tensor", "tracking")


@dataclass(frozen=True)
class Header:
    """What a delta says about itself.

    Attributes:
        base_digest: the base's digest; None for a full copy, which needs no base.
        base_size: bytes; 0 without a base.
        target_digest: the digest of the file that the delta writes.
        target_size: bytes.
        block_size: the most target bytes that one block writes.
        block_count: blocks in the delta.
        features: names of what a decoder must understand, sorted.
    """

    base_digest: str | None
    base_size: int
    target_digest: str
    target_size: int
    block_size: int
    block_count: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class BlockHead:
    """The fixed part before a block's payload."""

    payload_length: int
    target_length: int
    checksum: int
    fields: bytes  # the two lengths as written: the checksum covers them


def encode_header(header: Header) -> bytes:
    """The bytes of a delta up to its first block."""
    body = bytearray([FLAG_BASE if header.base_digest is not None else 0])
    if header.base_digest is not None:
        body += raw(header.base_digest) + varint.encode(header.base_size)
    body += raw(header.target_digest)
    for value in (header.target_size, header.block_size, header.block_count, len(header.features)):
        body += varint.encode(value)
    for feature in header.features:
        name = feature.encode("ascii")
        body += varint.encode(len(name)) + name
    data = PREFIX.pack(MAGIC, VERSION, len(body)) + bytes(body)
    return data + CHECKSUM.pack(zlib.crc32(data))


def header_length(start: bytes, bounds: DecodeLimits) -> int:
    """Bytes of the whole header, from its first `PREFIX.size` bytes.

    Raises SluiceError: DELTA_INVALID, DELTA_UNSUPPORTED, DELTA_LIMIT_EXCEEDED.
    """
    magic, version, length = PREFIX.unpack(start)
    check_magic(magic)
    if version != VERSION:
        raise faults.unsupported(f"the delta has version {version}; this decoder reads version {VERSION}")
    if length > bounds.header_bytes:
        raise faults.over_limit("header bytes", length, bounds.header_bytes)
    return PREFIX.size + int(length) + CHECKSUM.size


def check_magic(start: bytes) -> None:
    """Refuses bytes that no delta begins with; fewer than eight are judged as far as they go."""
    if not MAGIC.startswith(start[: len(MAGIC)]):
        raise faults.invalid(
            f"not a delta: it begins with {start[: len(MAGIC)].hex(' ')} instead of {MAGIC.hex(' ')}"
        )


def decode_header(data: bytes, bounds: DecodeLimits) -> Header:
    """Reads a whole header.

    Raises SluiceError: DELTA_CORRUPT, DELTA_INVALID, DELTA_UNSUPPORTED, DELTA_LIMIT_EXCEEDED.
    """
    if zlib.crc32(data[: -CHECKSUM.size]) != CHECKSUM.unpack(data[-CHECKSUM.size :])[0]:
        raise faults.corrupt("the header's checksum does not match")
    reader = varint.Reader(data[PREFIX.size : -CHECKSUM.size], "the header")
    flags = reader.byte()
    if flags & ~FLAG_BASE:
        raise faults.invalid(f"the header has unknown flags 0x{flags:02x}")
    base_digest, base_size = None, 0
    if flags & FLAG_BASE:
        base_digest, base_size = from_raw(reader.take(32)), reader.varint()
    target_digest = from_raw(reader.take(32))
    target_size, block_size, block_count = reader.varint(), reader.varint(), reader.varint()
    if target_size > bounds.target_bytes:
        raise faults.over_limit("target bytes", target_size, bounds.target_bytes)
    if block_size > bounds.block_bytes:
        raise faults.over_limit("bytes a block", block_size, bounds.block_bytes)
    if block_size == 0:
        raise faults.invalid("the header has a block size of 0")
    if not -(-target_size // block_size) <= block_count <= target_size:
        raise faults.invalid(f"{block_count} blocks of up to {block_size} bytes cannot hold {target_size}")
    most = limits.MAX_SMALL_BLOCKS + target_size // limits.MEAN_BLOCK_BYTES
    if block_count > most:
        raise faults.over_limit("blocks", block_count, most)
    features = _features(reader)
    reader.end()
    return Header(base_digest, base_size, target_digest, target_size, block_size, block_count, features)


def _features(reader: varint.Reader) -> tuple[str, ...]:
    count = reader.varint()
    if count > limits.MAX_FEATURES:
        raise faults.over_limit("features", count, limits.MAX_FEATURES)
    names = []
    for _ in range(count):
        length = reader.varint()
        if length > limits.MAX_FEATURE_CHARACTERS:
            raise faults.over_limit("characters in a feature's name", length, limits.MAX_FEATURE_CHARACTERS)
        name = reader.take(length)
        if not _FEATURE.fullmatch(name):
            raise faults.invalid(f"the header has a malformed feature name {name!r}")
        names.append(name.decode("ascii"))
    if sorted(set(names)) != names:
        raise faults.invalid("the header's features are not sorted and distinct")
    if unknown := [name for name in names if name not in FEATURES]:
        raise faults.unsupported(f"the delta needs what this decoder lacks: {', '.join(unknown)}")
    return tuple(names)


def header_checksum(data: bytes) -> int:
    """The checksum at the end of a header's bytes; it seeds those of the blocks."""
    return int(CHECKSUM.unpack(data[-CHECKSUM.size :])[0])


def block_checksum(seed: int, number: int, fields: bytes, payload: bytes) -> int:
    """The checksum of block `number` (from 0): over its number, its two lengths and its payload."""
    return zlib.crc32(payload, zlib.crc32(fields, zlib.crc32(struct.pack("<Q", number), seed)))


def encode_block(seed: int, number: int, target_length: int, payload: bytes) -> bytes:
    """A block as it lies in the file."""
    fields = varint.encode(len(payload)) + varint.encode(target_length)
    checksum = block_checksum(seed, number, fields, payload)
    return bytes([MARK_BLOCK]) + fields + CHECKSUM.pack(checksum) + payload


def scan_block_head(data: bytes | bytearray, number: int, block_size: int) -> tuple[BlockHead, int]:
    """Reads a block's head off the front of a growing buffer; gives it and its length.

    Raises varint.Incomplete when more bytes are needed, SluiceError(DELTA_INVALID | DELTA_LIMIT_EXCEEDED).
    """
    what = f"the head of block {number}"
    if not data:
        raise varint.Incomplete
    if data[0] != MARK_BLOCK:
        raise faults.invalid(f"expected block {number}, found the byte 0x{data[0]:02x}")
    payload_length, end = varint.scan(data, 1, what)
    target_length, end = varint.scan(data, end, what)
    if not 1 <= target_length <= block_size:
        raise faults.invalid(
            f"block {number} writes {target_length} bytes; the header allows 1 to {block_size}"
        )
    if payload_length > target_length + limits.BLOCK_OVERHEAD_BYTES:
        raise faults.over_limit(
            f"payload bytes in block {number}", payload_length, target_length + limits.BLOCK_OVERHEAD_BYTES
        )
    if len(data) < end + CHECKSUM.size:
        raise varint.Incomplete
    (checksum,) = CHECKSUM.unpack_from(data, end)
    head = BlockHead(payload_length, target_length, int(checksum), bytes(data[1:end]))
    return head, end + CHECKSUM.size
