"""Writes deltas field by field: any of them may be wrong, and the checksums are right all the same.

A plain writer of docs/delta-format.md beside the one in `updater`: it checks nothing, so that it can write
what no encoder writes. Numbers go in as they lie in the file.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard

MAGIC = b"\x89SLD\r\n\x1a\n"
RAW, ZSTD, PATCH, LZMA = 0, 1, 2, 3
MAGICLESS = zstandard.FORMAT_ZSTD1_MAGICLESS

INVALID = "DELTA_INVALID"
TRUNCATED = "DELTA_TRUNCATED"
CORRUPT = "DELTA_CORRUPT"
WRONG_BASE = "DELTA_WRONG_BASE"
MISMATCH = "DELTA_TARGET_MISMATCH"
UNSUPPORTED = "DELTA_UNSUPPORTED"
LIMIT = "DELTA_LIMIT_EXCEEDED"


@dataclass(frozen=True)
class Made:
    """A vector as it is made; see `edge_tests.conformance.index.Vector`.

    Attributes:
        base: what the decoder is given; None for no base.
        target: what must come out; None where one of `errors` must.
        announced: the target that the decoder is told beforehand, if any.
    """

    name: str
    about: str
    base: bytes | None
    delta: bytes
    target: bytes | None = None
    errors: tuple[str, ...] = ()
    announced: bytes | None = None


def varint(value: int, width: int = 0) -> bytes:
    """LEB128; `width` bytes at least, which makes it longer than allowed."""
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value >= 0x80 or len(out) + 1 < width else 0))
        value >>= 7
        if not value and len(out) >= width:
            return bytes(out)


def signed(value: int) -> bytes:
    """A folded varint."""
    return varint(2 * value if value >= 0 else -2 * value - 1)


@dataclass(frozen=True)
class Header:
    """The header's fields as they are written; None stands for what is right."""

    base: bytes | None
    target: bytes
    block_count: int = 1
    block_size: int = 4096
    features: Sequence[str | bytes] = ()
    magic: bytes = MAGIC
    version: int = 1
    flags: int | None = None
    base_digest: bytes | None = None
    base_size: int | None = None
    target_digest: bytes | None = None
    target_size: int | None = None
    feature_count: int | None = None
    body_length: int | None = None
    checksum: int | None = None
    behind: bytes = b""
    block_count_width: int = 0

    def encode(self) -> bytes:
        """The header's bytes."""
        flags = int(self.base is not None) if self.flags is None else self.flags
        body = bytes([flags])
        if flags & 1:
            known = self.base or b""
            body += self.base_digest or hashlib.sha256(known).digest()
            body += varint(len(known) if self.base_size is None else self.base_size)
        body += self.target_digest or hashlib.sha256(self.target).digest()
        body += varint(len(self.target) if self.target_size is None else self.target_size)
        body += varint(self.block_size) + varint(self.block_count, self.block_count_width)
        body += varint(len(self.features) if self.feature_count is None else self.feature_count)
        for feature in self.features:
            name = feature.encode() if isinstance(feature, str) else feature
            body += varint(len(name)) + name
        body += self.behind
        length = len(body) if self.body_length is None else self.body_length
        data = self.magic + struct.pack("<BH", self.version, length) + body
        right = zlib.crc32(data)
        return data + struct.pack("<I", right if self.checksum is None else self.checksum)


@dataclass(frozen=True)
class Block:
    """A block's fields as they are written; None stands for what is right."""

    payload: bytes
    target_length: int
    marker: int = 0x42
    number: int | None = None
    seed: int | None = None
    payload_length: int | None = None
    fields: bytes | None = None
    checksum: int | None = None

    def encode(self, number: int, seed: int) -> bytes:
        """The block's bytes, as block `number` behind a header of checksum `seed`."""
        length = len(self.payload) if self.payload_length is None else self.payload_length
        fields = self.fields or varint(length) + varint(self.target_length)
        start = self.seed if self.seed is not None else seed
        place = struct.pack("<Q", number if self.number is None else self.number)
        right = zlib.crc32(self.payload, zlib.crc32(fields, zlib.crc32(place, start)))
        checksum = right if self.checksum is None else self.checksum
        return bytes([self.marker]) + fields + struct.pack("<I", checksum) + self.payload


def seed_of(header: bytes) -> int:
    """The header's checksum, which begins those of its blocks."""
    return int(struct.unpack("<I", header[-4:])[0])


def delta(header: Header, blocks: Sequence[Block], end: bytes = b"E") -> bytes:
    """A delta file."""
    start = header.encode()
    seed = seed_of(start)
    return start + b"".join(block.encode(number, seed) for number, block in enumerate(blocks)) + end


@dataclass(frozen=True)
class Stream:
    """A stream as it is written. `window` has (distance, length) pairs; None stands for what is right."""

    coder: int
    coded: bytes
    length: int
    window: Sequence[tuple[int, int]] = field(default_factory=tuple)
    coded_length: int | None = None
    range_count: int | None = None

    def entry(self) -> bytes:
        """Its part of the table."""
        out = bytes([self.coder]) + varint(self.length)
        if self.coder != RAW:
            out += varint(len(self.coded) if self.coded_length is None else self.coded_length)
        if self.coder == PATCH:
            out += varint(len(self.window) if self.range_count is None else self.range_count)
            for distance, length in self.window:
                out += signed(distance) + varint(length)
        return out


def raw(data: bytes) -> Stream:
    """A stream as it is."""
    return Stream(RAW, data, len(data))


def zstd(data: bytes) -> Stream:
    """A stream in a zstd frame."""
    return Stream(ZSTD, frame(data), len(data))


def packed(data: bytes, lc: int = 3, lp: int = 0, pb: int = 2) -> Stream:
    """A stream of LZMA with its properties."""
    size = max(4096, len(data))
    known = {"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": size, "lc": lc, "lp": lp, "pb": pb}
    head = bytes([(pb * 5 + lp) * 9 + lc])
    return Stream(LZMA, head + lzma.compress(data, lzma.FORMAT_RAW, filters=[known]), len(data))


def patch(data: bytes, base: bytes, window: Sequence[tuple[int, int]], offset: int = 0) -> Stream:
    """A stream in a frame whose dictionary are ranges of the base; `offset` is the block's."""
    known, cursor = b"", offset
    for distance, length in window:
        known += base[cursor + distance : cursor + distance + length]
        cursor += distance + length
    return Stream(PATCH, frame(data, known), len(data), window)


def frame(
    data: bytes, dictionary: bytes | None = None, content_size: bool = True, window_log: int | None = None
) -> bytes:
    """A zstd frame as the format has them, or without what it must have."""
    options: dict[str, int] = {} if window_log is None else {"window_log": window_log}
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19,
        source_size=len(data) + len(dictionary or b""),
        write_content_size=content_size,
        write_checksum=False,
        write_dict_id=False,
        format=MAGICLESS,
        **options,
    )
    known = None
    if dictionary is not None:
        known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return bytes(zstandard.ZstdCompressor(dict_data=known, compression_params=parameters).compress(data))


def payload(
    instructions: bytes | Stream, *streams: Stream, count: int | None = None, behind: bytes = b""
) -> bytes:
    """A block's payload: stream 0 holds `instructions`."""
    table = [raw(instructions) if isinstance(instructions, bytes) else instructions, *streams]
    out = varint(len(table) if count is None else count)
    return out + b"".join(s.entry() for s in table) + b"".join(s.coded for s in table) + behind


def copy(distance: int, length: int) -> bytes:
    """The instruction copy."""
    return b"\0" + signed(distance) + varint(length)


def literal(stream: int, length: int) -> bytes:
    """The instruction literal."""
    return b"\1" + varint(stream) + varint(length)


def program(stream: int, size: int, length: int) -> bytes:
    """The instruction program."""
    return b"\3" + varint(stream) + varint(size) + varint(length)


@dataclass(frozen=True)
class Tensor:
    """The instruction tensor; `requantise` has parameter stream, start, inner, channels, shift, many."""

    predictor: int
    coding: int
    kind: int
    count: int
    streams: Sequence[int]
    distance: int = 0
    gap_bytes: int = 0
    requantise: Sequence[int] = ()

    def encode(self) -> bytes:
        """Its bytes."""
        out = bytes([2, self.predictor, self.coding, self.kind]) + varint(self.count)
        if self.predictor != 0:
            out += signed(self.distance)
        if self.coding == 1:
            out += varint(self.gap_bytes)
        out += b"".join(varint(stream) for stream in self.streams)
        if self.requantise:
            out += b"".join(varint(number) for number in self.requantise[:-1]) + bytes(self.requantise[-1:])
        return out


def one_block(
    base: bytes | None, target: bytes, body: bytes, features: Sequence[str] = (), length: int | None = None
) -> bytes:
    """A delta of one block."""
    size = len(target) if length is None else length
    header = Header(base, target, 1, max(4096, size), features)
    return delta(header, [Block(body, size)])
