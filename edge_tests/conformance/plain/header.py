"""The header of a delta."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import CORRUPT, OVER_LIMIT, TRUNCATED, UNSUPPORTED, check
from edge_tests.conformance.plain.reader import Reader

MAGIC = bytes.fromhex("89 53 4c 44 0d 0a 1a 0a")
FEATURES = ("lzma", "patch", "program", "requantise", "tensor", "tracking")


@dataclass
class Header:
    """The fields of the body, and the checksum behind it."""

    base_digest: bytes | None
    base_size: int
    target_digest: bytes
    target_size: int
    block_size: int
    block_count: int
    features: list[str]
    checksum: int


def read_header(file: Reader) -> Header:
    """Reads the header off the front of the file."""
    start = file.data[:8]
    check(MAGIC.startswith(start), "not a delta")
    check(len(start) == 8, "the delta ends in its magic", TRUNCATED)
    file.take(8)
    check(file.byte() == 1, "another version", UNSUPPORTED)
    size = int.from_bytes(file.take(2), "little")
    check(size <= limits.MAX_DELTA_HEADER_BYTES, "the header is too long", OVER_LIMIT)
    body = Reader(file.take(size), "the header")
    covered = file.data[: file.at]
    checksum = int.from_bytes(file.take(4), "little")
    check(zlib.crc32(covered) == checksum, "the header's checksum does not match", CORRUPT)
    flags = body.byte()
    check(flags <= 1, "unknown flags")
    base_digest, base_size = None, 0
    if flags == 1:
        base_digest, base_size = body.take(32), body.varint()
    target_digest = body.take(32)
    target_size, block_size, block_count = body.varint(), body.varint(), body.varint()
    check(target_size <= limits.MAX_TARGET_BYTES, "the target is too large", OVER_LIMIT)
    check(block_size <= limits.MAX_BLOCK_BYTES, "blocks are too large", OVER_LIMIT)
    check(block_size >= 1, "blocks of no bytes")
    check(block_count * block_size >= target_size, "too few blocks")
    check(block_count <= target_size, "more blocks than bytes")
    most = limits.MAX_SMALL_BLOCKS + target_size // limits.MEAN_BLOCK_BYTES
    check(block_count <= most, "too many blocks", OVER_LIMIT)
    features = _features(body)
    body.end()
    return Header(
        base_digest, base_size, target_digest, target_size, block_size, block_count, features, checksum
    )


def _features(body: Reader) -> list[str]:
    count = body.varint()
    check(count <= limits.MAX_FEATURES, "too many features", OVER_LIMIT)
    names: list[bytes] = []
    for _ in range(count):
        length = body.varint()
        check(length <= limits.MAX_FEATURE_CHARACTERS, "a feature's name is too long", OVER_LIMIT)
        name = body.take(length)
        check(re.fullmatch(rb"[a-z0-9][a-z0-9.-]*", name) is not None, "a malformed feature name")
        check(not names or names[-1] < name, "features are not sorted and distinct")
        names.append(name)
    out = [name.decode("ascii") for name in names]
    for known in out:
        check(known in FEATURES, f"the feature {known} is not known", UNSUPPORTED)
    return out
