"""The bytes between records: as they are, by zstd against the base's, or by the byte model, in two ways.

The base's bytes are known in two ways: without the arrays that records read, and whole.
"""

from __future__ import annotations

from updater import limits
from updater.delta import streams
from updater.delta.program import skeleton, tracking
from updater.delta.program.arithmetic import Coder, CoderError, decisions
from updater.delta.program.body import Known
from updater.delta.program.operands import ProgramError, within

_RAW, _ZSTD, _ZSTD_WHOLE, _MODEL, TRACKED = range(5)
_CODERS = {_MODEL: skeleton.code, TRACKED: tracking.code}
_WORTH = 6 << 10  # beyond, as zstd codes it, plain Python takes boxes seconds
_NOISE = 0.9  # share that zstd leaves of what nothing makes smaller
_WORTH_THOROUGH = 16 << 10
_VISITS = 250
_NAME_BYTES = 9  # of a header that names the feature which one way needs
_WHOLE_BYTES = 4 << 20  # of a window that a skeleton is also tried against


def _zstd(base: bytes, target: bytes, level: int) -> bytes:
    ranges = ((0, len(base)),)
    coded = [streams.compress_patch(target, base, ranges, level).coded]
    if streams.has_close_patch(len(target), len(base), level):
        coded.append(streams.compress_patch(target, base, ranges, level, close=True).coded)
    return min(coded, key=len)


def encode(known: Known, target: bytes, level: int, thorough: bool) -> bytes:
    """The smallest way found; `thorough` also tries what takes long."""
    if not target:
        return bytes([_RAW])
    base = known.rest
    ways = [bytes([_RAW]) + target]
    if base:
        ways.append(bytes([_ZSTD]) + _zstd(base, target, level))
    if thorough and known.whole != base and len(known.whole) <= _WHOLE_BYTES:
        ways.append(bytes([_ZSTD_WHOLE]) + _zstd(known.whole, target, level))
    fits = len(target) <= limits.MAX_MODELLED_BYTES and len(base) <= limits.MAX_MODEL_WINDOW_BYTES
    worth = _WORTH_THOROUGH if thorough else _WORTH
    smallest = min(map(len, ways))
    if base != target and fits and smallest <= worth and smallest < _NOISE * len(target):
        for way in _CODERS:
            coded = _modelled(way, base, target)
            if coded is not None:
                ways.append(bytes([way]) + coded)
    return min(ways, key=lambda way: len(way) + _NAME_BYTES * (way[0] == TRACKED))


def _modelled(way: int, base: bytes, target: bytes) -> bytes | None:
    coder = Coder(limit=_VISITS, budget=decisions(len(target)))
    try:
        _CODERS[way](coder, base, len(target), target)
    except CoderError:  # it would take decoders too long
        return None
    return coder.finish()


def decode(known: Known, frame: bytes, size: int, tracks: bool = True) -> bytes:
    """The inverse of `encode`: `size` bytes; without `tracks` the way of that name is not known.

    Raises ProgramError, SluiceError(DELTA_CORRUPT | DELTA_INVALID).
    """
    way, body = frame[:1], frame[1:]
    if way == bytes([_RAW]):
        return body
    if way in (bytes([_ZSTD]), bytes([_ZSTD_WHOLE])):
        window = known.rest if way == bytes([_ZSTD]) else known.whole
        stream = streams.Stream(streams.PATCH, size, body, ((0, len(window)),))
        return streams.decode(stream, lambda offset, length: window[offset : offset + length])
    code = _CODERS.get(frame[0]) if frame and (tracks or frame[0] != TRACKED) else None
    if code is None:
        raise ProgramError("a skeleton is coded in a way that is not known")
    within("modelled bytes", size, limits.MAX_MODELLED_BYTES)
    within("bytes of base for the byte model", len(known.rest), limits.MAX_MODEL_WINDOW_BYTES)
    coder = Coder(body, _VISITS, decisions(size))
    out = code(coder, known.rest, size, None)
    coder.end()
    return out
