"""The streams of a block: byte sequences that its instructions take from, each coded on its own.

Coders: raw (as it is), zstd, and patch (zstd with a window of the base as raw-content dictionary, which is
what `zstd --patch-from` does). Frames are written without magic, dictionary id and checksum, and with their
content size: the decoder knows what it allocates, and zstd decodes in one pass without a window buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from updater import limits
from updater.delta import faults, varint

RAW, ZSTD, PATCH = 0, 1, 2
CODER_NAMES = ("literal", "literal", "patch")
_FORMAT = zstandard.FORMAT_ZSTD1_MAGICLESS
_NOISE_BYTES = 64 << 10
_NOISE_BITS = 7.9
_THOROUGH_LEVEL = 19
_THOROUGH_BYTES = 8 << 20

Ranges = tuple[tuple[int, int], ...]  # (offset, length) in the base
ReadBase = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Stream:
    """One coded stream.

    Attributes:
        coder: RAW, ZSTD or PATCH.
        length: decoded bytes.
        coded: the coded bytes.
        window: for PATCH: the ranges of the base that, put together, are the dictionary.
    """

    coder: int
    length: int
    coded: bytes
    window: Ranges = ()


def encode_table(streams: Sequence[Stream], block_offset: int) -> bytes:
    """A block's payload: the table of its streams, then their coded bytes."""
    out = bytearray(varint.encode(len(streams)))
    for stream in streams:
        out.append(stream.coder)
        out += varint.encode(stream.length)
        if stream.coder != RAW:
            out += varint.encode(len(stream.coded))
        if stream.coder == PATCH:
            out += varint.encode(len(stream.window))
            cursor = block_offset
            for offset, length in stream.window:
                out += varint.encode_signed(offset - cursor) + varint.encode(length)
                cursor = offset + length
    return bytes(out) + b"".join(stream.coded for stream in streams)


def decode_table(
    payload: bytes, block_offset: int, target_length: int, window_bytes: int, features: Sequence[str]
) -> list[Stream]:
    """Reads a block's payload apart, without decoding a stream.

    Raises SluiceError(DELTA_INVALID | DELTA_UNSUPPORTED | DELTA_LIMIT_EXCEEDED).
    """
    reader = varint.Reader(payload, "a block's stream table")
    count = reader.varint()
    if not count:
        raise faults.invalid("a block has no streams")
    if count > limits.MAX_STREAMS:
        raise faults.over_limit("streams in a block", count, limits.MAX_STREAMS)
    allowed = limits.STREAM_EXPANSION * target_length + limits.STREAM_OVERHEAD_BYTES
    total = window_total = 0
    table: list[tuple[int, int, int, Ranges]] = []
    for index in range(count):
        coder = reader.byte()
        if coder > PATCH:
            raise faults.unsupported(f"the delta has a stream coder {coder} that this decoder lacks")
        length = reader.varint()
        coded_length = length if coder == RAW else reader.varint()
        total += length
        if total > allowed:
            raise faults.over_limit("decoded bytes in a block's streams", total, allowed)
        window: Ranges = ()
        if coder == PATCH:
            if "patch" not in features or index == 0:
                raise faults.invalid("a block has a patch where its header or its place does not allow one")
            window = _ranges(reader, block_offset)
            window_total += sum(length for _, length in window)
            if window_total > window_bytes:
                raise faults.over_limit("window bytes in a block", window_total, window_bytes)
        table.append((coder, length, coded_length, window))
    streams = [Stream(coder, length, reader.take(coded), window) for coder, length, coded, window in table]
    reader.end()
    return streams


def _ranges(reader: varint.Reader, cursor: int) -> Ranges:
    count = reader.varint()
    if not count:
        raise faults.invalid("a window has no ranges")
    if count > limits.MAX_WINDOW_RANGES:
        raise faults.over_limit("ranges in a window", count, limits.MAX_WINDOW_RANGES)
    ranges = []
    for _ in range(count):
        offset, length = cursor + reader.signed(), reader.varint()
        if offset < 0 or length == 0:
            raise faults.invalid(f"a window has a range of {length} bytes at {offset} of the base")
        ranges.append((offset, length))
        cursor = offset + length
    return tuple(ranges)


def decode(stream: Stream, read_base: ReadBase) -> bytes:
    """The bytes of a stream. `read_base(offset, length)` gives bytes of the base or raises.

    Raises SluiceError(DELTA_CORRUPT | DELTA_INVALID).
    """
    if stream.coder == RAW:
        return stream.coded
    if not stream.length:
        raise faults.invalid("a stream of no bytes is coded")
    dictionary = None
    try:
        # Checked before zstd allocates by it: a frame may announce any size.
        frame = zstandard.get_frame_parameters(stream.coded, format=_FORMAT)
        if frame.content_size != stream.length or frame.window_size > max(stream.length, 1 << 10):
            raise faults.invalid(
                f"a zstd frame announces {frame.content_size} bytes in a stream of {stream.length}"
            )
        if stream.coder == PATCH:
            window = b"".join(read_base(offset, length) for offset, length in stream.window)
            dictionary = zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, format=_FORMAT)
        data = decompressor.decompress(stream.coded, max_output_size=stream.length, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, struct.error) as error:
        raise faults.corrupt(f"a zstd frame of {len(stream.coded)} bytes does not decode: {error}") from error
    if len(data) != stream.length:
        raise faults.corrupt(f"a stream of {stream.length} bytes decoded to {len(data)}")
    return data


def compress(data: bytes, level: int) -> Stream:
    """Codes a stream: zstd at `level`, or at level 1 (whose plain literals suit byte planes), or raw."""
    best = Stream(RAW, len(data), data)
    if not data:
        return best
    # In noise a higher level takes long and finds nothing.
    for attempt in dict.fromkeys((1,) if _is_noise(data) else (1, level)):
        parameters = _parameters(attempt, len(data), 0)
        coded = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
        if len(coded) + 1 < len(best.coded):
            best = Stream(ZSTD, len(data), coded)
    return best


def _is_noise(data: bytes) -> bool:
    if len(data) < _NOISE_BYTES:
        return False
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / len(data)
    return bool(-(share * np.log2(share)).sum() > _NOISE_BITS)


def compress_patch(data: bytes, window: bytes, ranges: Ranges, level: int) -> Stream:
    """Codes a stream as a patch against `window`, the bytes of the base at `ranges`."""
    dictionary = zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    # Which least match is better shows only by trying; where that is slow it matters little.
    thorough = level >= _THOROUGH_LEVEL and len(data) + len(window) <= _THOROUGH_BYTES
    attempts: tuple[dict[str, int], ...] = ({}, {"min_match": 5}) if thorough else ({},)
    coded = []
    for extra in attempts:
        parameters = _parameters(level, len(data), len(window), **extra)
        compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
        coded.append(compressor.compress(data))
    return Stream(PATCH, len(data), min(coded, key=len), ranges)


def _parameters(level: int, size: int, window: int, **extra: int) -> zstandard.ZstdCompressionParameters:
    window_log = max(zstandard.WINDOWLOG_MIN, (size + window).bit_length())
    return zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=size + window,
        window_log=window_log,
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
        format=_FORMAT,
        **extra,
    )
