"""The streams of a block."""

from __future__ import annotations

import lzma
import struct

import zstandard

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import CORRUPT, OVER_LIMIT, UNSUPPORTED, Fault, check
from edge_tests.conformance.plain.reader import Reader

RAW, ZSTD, PATCH, LZMA = 0, 1, 2, 3


def decode_streams(
    payload: bytes, offset: int, target_length: int, features: list[str], base: bytes
) -> list[Reader]:
    """A reader for each stream of a block at `offset` of the target."""
    table = Reader(payload, "a stream table")
    count = table.varint()
    check(count >= 1, "a block has no streams")
    check(count <= limits.MAX_STREAMS, "too many streams", OVER_LIMIT)
    decoded = windows = 0
    entries = []
    for number in range(count):
        coder = table.byte()
        check(coder <= LZMA, f"the coder {coder} is not known", UNSUPPORTED)
        length = table.varint()
        coded = length if coder == RAW else table.varint()
        decoded += length
        most = limits.STREAM_EXPANSION * target_length + limits.STREAM_OVERHEAD_BYTES
        check(decoded <= most, "the streams of a block are too long", OVER_LIMIT)
        ranges = []
        check(coder != LZMA or "lzma" in features, "the feature lzma is not named")
        if coder == PATCH:
            check("patch" in features and number > 0, "a patch where none may be")
            ranges = _ranges(table, offset)
            windows += sum(size for _, size in ranges)
            check(windows <= limits.MAX_WINDOW_BYTES, "the windows of a block are too long", OVER_LIMIT)
        entries.append((coder, length, coded, ranges))
    parts = [table.take(coded) for _, _, coded, _ in entries]
    table.end()
    readers = []
    for number, (coder, length, _, ranges) in enumerate(entries):
        data = parts[number]
        if coder == LZMA:
            data = decode_lzma(data, length)
        elif coder != RAW:
            window = b""
            for begin, size in ranges:
                check(begin + size <= len(base), "a window lies outside the base")
                window += base[begin : begin + size]
            data = decode_frame(data, length, window if coder == PATCH else None)
        readers.append(Reader(data, f"stream {number}"))
    return readers


def _ranges(table: Reader, place: int) -> list[tuple[int, int]]:
    count = table.varint()
    check(count >= 1, "a window has no ranges")
    check(count <= limits.MAX_WINDOW_RANGES, "too many ranges", OVER_LIMIT)
    ranges = []
    for _ in range(count):
        begin, size = place + table.signed(), table.varint()
        check(begin >= 0 and size >= 1, "a window has a range that cannot be")
        ranges.append((begin, size))
        place = begin + size
    return ranges


def decode_frame(coded: bytes, length: int, window: bytes | None) -> bytes:
    """A Zstandard frame without its magic, of `length` bytes, with raw content as dictionary or none."""
    check(length >= 1, "a stream of no bytes is coded")
    try:
        frame = zstandard.get_frame_parameters(coded, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    except (zstandard.ZstdError, ValueError, struct.error) as error:
        raise Fault(f"a zstd frame has no header: {error}", CORRUPT) from error
    check(frame.content_size == length, "a frame states another size than its stream")
    check(frame.window_size <= max(length, 1024), "a frame has too large a window")
    dictionary = None
    if window is not None:
        dictionary = zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        data = decompressor.decompress(coded, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise Fault(f"a zstd frame does not decode: {error}", CORRUPT) from error
    check(len(data) == length, "a frame decodes to another size", CORRUPT)
    return data


def decode_lzma(coded: bytes, length: int) -> bytes:
    """A byte of properties, and LZMA of `length` bytes with its end marker."""
    check(length >= 1, "a stream of no bytes is coded")
    check(coded[:1] != b"", "LZMA has no properties", CORRUPT)
    shape = coded[0]
    context, position, states = shape % 9, shape // 9 % 5, shape // 45
    check(states <= 4 and context + position <= 4, "LZMA has properties that cannot be")
    known = {
        "id": lzma.FILTER_LZMA1,
        "dict_size": max(length, 4096),
        "lc": context,
        "lp": position,
        "pb": states,
    }
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[known])
    try:
        data = decoder.decompress(coded[1:], length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise Fault(f"LZMA does not decode: {error}", CORRUPT) from error
    check(decoder.eof and not decoder.unused_data, "LZMA does not end where its stream does", CORRUPT)
    check(len(data) == length, "LZMA decodes to another size", CORRUPT)
    return data
