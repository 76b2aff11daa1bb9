"""The streams of a block: byte sequences that its instructions take from, each coded on its own.

Coders: raw (as it is), zstd, patch (zstd with a window of the base as raw-content dictionary, which is what
`zstd --patch-from` does), and lzma, which is slower and often smaller. Frames of zstd are written without
magic, dictionary id and checksum, and with their content size: the decoder knows what it allocates, and zstd
decodes in one pass without a window buffer. LZMA's are one byte of properties and the coded bytes with their
end marker; the dictionary is as long as the stream.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from updater import limits
from updater.delta import faults, varint

RAW, ZSTD, PATCH, LZMA = 0, 1, 2, 3
CODER_NAMES = ("literal", "literal", "patch", "literal")
_FORMAT = zstandard.FORMAT_ZSTD1_MAGICLESS
_NOISE_BYTES = 64 << 10
_NOISE_BITS = 7.9
_THOROUGH_LEVEL = 19
_THOROUGH_BYTES = 8 << 20
_CLOSE_MATCH = 5  # bytes of the shortest match of a patch that leaves out short ones

_PROPERTIES = 225  # numbers that LZMA's byte of properties may be: 9 lc x 5 lp x 5 pb
_MOST_LITERAL_BITS = 4  # lc + lp, as liblzma has it
_LEAST_DICTIONARY = 4096
_LZMA_PRESET = 9
_LZMA_GAIN = 0.99  # of what another coder leaves: LZMA, which decodes slower, must be below that
# Properties that are tried, (pb * 5 + lp) * 9 + lc: 3, 0, 2 of lc, lp and pb, which suits most; then others.
_LZMA_SHAPES = (93, 3, 0, 55, 110)
_SAMPLE_BYTES = 256 << 10  # of a stream by which properties are chosen
_QUICK_SHARE = 0.85  # of its length that a stream may have to be tried in short time

Ranges = tuple[tuple[int, int], ...]  # (offset, length) in the base
ReadBase = Callable[[int, int], bytes]
MakeDictionary = Callable[[bytes, zstandard.ZstdCompressionParameters], zstandard.ZstdCompressionDict]


@dataclass(frozen=True)
class Stream:
    """One coded stream.

    Attributes:
        coder: RAW, ZSTD, PATCH or LZMA.
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
        if coder > LZMA:
            raise faults.unsupported(f"the delta has a stream coder {coder} that this decoder lacks")
        length = reader.varint()
        coded_length = length if coder == RAW else reader.varint()
        total += length
        if total > allowed:
            raise faults.over_limit("decoded bytes in a block's streams", total, allowed)
        window: Ranges = ()
        if coder == LZMA and "lzma" not in features:
            raise faults.invalid("a block has a stream of LZMA, which its header does not name")
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
    if stream.coder == LZMA:
        return _decode_lzma(stream)
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


def _decode_lzma(stream: Stream) -> bytes:
    if not stream.coded:
        raise faults.corrupt("an LZMA stream has no properties")
    filters = _lzma_filters(stream)
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        # A byte more than there may be, so that the end marker is read too.
        data = decompressor.decompress(stream.coded[1:], stream.length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise faults.corrupt(
            f"an LZMA stream of {len(stream.coded)} bytes does not decode: {error}"
        ) from error
    if len(data) != stream.length or not decompressor.eof or decompressor.unused_data:
        raise faults.corrupt(f"an LZMA stream does not hold just {stream.length} bytes and its end")
    return data


def _lzma_filters(stream: Stream) -> list[dict[str, int]]:
    """What liblzma is told: from the byte of properties, and the stream's length."""
    properties = stream.coded[0]
    context, rest = properties % 9, properties // 9
    position, states = rest % 5, rest // 5
    if properties >= _PROPERTIES or context + position > _MOST_LITERAL_BITS:
        raise faults.invalid("an LZMA stream has properties that cannot be")
    size = max(_LEAST_DICTIONARY, stream.length)
    return [{"id": lzma.FILTER_LZMA1, "dict_size": size, "lc": context, "lp": position, "pb": states}]


def smaller(stream: Stream, data: bytes, thorough: bool) -> Stream:
    """The stream of `data` that is given, or one of LZMA where that is clearly smaller.

    Args:
        stream: as another coder has it.
        data: its bytes.
        thorough: tries more, also where little is to be gained.
    """
    size = len(stream.coded) + 4 * len(stream.window)
    if not data or (stream.coder == RAW and _is_noise(data)):
        return stream
    if thorough:
        sample = (
            data[(len(data) - _SAMPLE_BYTES) // 2 :][:_SAMPLE_BYTES] if len(data) > _SAMPLE_BYTES else data
        )
        coded = min((_lzma(sample, shape) for shape in _LZMA_SHAPES), key=lambda tried: len(tried.coded))
        tried = coded if len(sample) == len(data) else _lzma(data, coded.coded[0])
    elif size > _QUICK_SHARE * len(data):
        return stream
    else:
        tried = _lzma(data, _LZMA_SHAPES[0])
    return tried if len(tried.coded) < _LZMA_GAIN * size else stream


def _lzma(data: bytes, properties: int) -> Stream:
    """A stream of LZMA with the properties given."""
    head = bytes([properties])
    (known,) = _lzma_filters(Stream(LZMA, len(data), head))
    coded = lzma.compress(data, lzma.FORMAT_RAW, filters=[{"preset": _LZMA_PRESET, **known}])
    return Stream(LZMA, len(data), head + coded)


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


def compress_patch(
    data: bytes,
    window: bytes,
    ranges: Ranges,
    level: int,
    *,
    close: bool = False,
    dictionary: MakeDictionary | None = None,
) -> Stream:
    """Codes a stream as a patch against `window`, the bytes of the base at `ranges`.

    Args:
        data: its bytes.
        window: what it may refer to.
        ranges: where this lies in the base.
        level: zstd level.
        close: leaves out short matches. Which is better shows only by trying.
        dictionary: gives the window to a compressor with some parameters, where that is prepared already.
    """
    extra = {"min_match": _CLOSE_MATCH} if close else {}
    parameters = _parameters(level, len(data), len(window), **extra)
    if dictionary is None:
        known = zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    else:
        known = dictionary(window, parameters)
    compressor = zstandard.ZstdCompressor(dict_data=known, compression_params=parameters)
    return Stream(PATCH, len(data), compressor.compress(data), ranges)


def has_close_patch(size: int, window: int, level: int) -> bool:
    """Whether a patch without short matches is worth a try; where that is slow it matters little."""
    return level >= _THOROUGH_LEVEL and size + window <= _THOROUGH_BYTES


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
