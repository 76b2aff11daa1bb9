"""Codes the streams of one block, each content once, as hard as asked.

The ways to code a block have many streams in common, and each takes zstd's highest levels long: what was
coded is remembered while the block lasts, HELD_BYTES of it at most.
"""

from __future__ import annotations

import enum
import hashlib

from updater.delta import streams
from updater.delta.base_windows import BaseWindows
from updater.delta.streams import Ranges, Stream

HELD_BYTES = 64 << 20  # coded bytes remembered for one block
_ROUGH_LEVEL = 3
_RANGE_BYTES = 4  # about, that a range of a window takes in a table
_PATCHED = 0.7  # of what zstd leaves without a window, found out fast: a patch below that is the smaller one


class Care(enum.IntEnum):
    """How hard it is tried to make a stream small.

    ROUGH is fast, to compare ways. FINE takes the encoder's level; CLOSE tries more for patches; PACKED also
    tries LZMA, and EXHAUSTIVE several shapes of it and where little is to be gained.
    """

    ROUGH = 0
    FINE = 1
    CLOSE = 2
    PACKED = 3
    EXHAUSTIVE = 4


class StreamCoder:
    """The streams of one block; for one thread.

    Args:
        windows: what literals may refer to.
        level: zstd level of all care but ROUGH.
        thorough: tries zstd without a window also where the patch is far ahead.
    """

    def __init__(self, windows: BaseWindows, level: int, thorough: bool) -> None:
        self._windows, self._level, self._thorough = windows, level, thorough
        self._known: dict[tuple[bytes, bool, Care], Stream] = {}
        self._ranges: dict[bytes, Ranges] = {}
        self._held = 0

    def code(self, data: bytes, care: Care, literal: bool = False) -> Stream:
        """The stream of some bytes; `literal`: they may refer to the base."""
        return self._remembered(data, hashlib.blake2b(data, digest_size=16).digest(), care, literal)

    def _remembered(self, data: bytes, digest: bytes, care: Care, literal: bool) -> Stream:
        key = (digest, literal, care)
        known = self._known.get(key)
        if known is None:
            known = self._coded(data, digest, care, literal)
            if self._held + len(known.coded) <= HELD_BYTES:
                self._held += len(known.coded)
                self._known[key] = known
        return known

    def _coded(self, data: bytes, digest: bytes, care: Care, literal: bool) -> Stream:
        if care >= Care.PACKED:
            close = self._remembered(data, digest, Care.CLOSE, literal)
            return streams.smaller(close, data, care == Care.EXHAUSTIVE)
        if care == Care.CLOSE:
            fine = self._remembered(data, digest, Care.FINE, literal)
            if not literal or (fine.coder != streams.PATCH and not self._thorough):
                return fine
            return self._least(fine, self._patch(data, digest, care))
        level = _ROUGH_LEVEL if care == Care.ROUGH else self._level
        patch = self._patch(data, digest, care) if literal else None
        if patch is None:
            return streams.compress(data, level)
        if care == Care.FINE and not self._thorough:
            quick = streams.compress(data, _ROUGH_LEVEL)
            if _size(patch) < _PATCHED * _size(quick):
                return patch
        return self._least(streams.compress(data, level), patch)

    def _least(self, stream: Stream, patch: Stream | None) -> Stream:
        return patch if patch is not None and _size(patch) < _size(stream) else stream

    def _patch(self, data: bytes, digest: bytes, care: Care) -> Stream | None:
        """The bytes as a patch; None where there is nothing to refer to, or no other way to patch them."""
        if not data:
            return None
        if digest not in self._ranges:
            self._ranges[digest] = self._windows.ranges(data)
        ranges = self._ranges[digest]
        if not ranges:
            return None
        window = self._windows.read(ranges)
        level = _ROUGH_LEVEL if care == Care.ROUGH else self._level
        close = care == Care.CLOSE
        if close and not streams.has_close_patch(len(data), len(window), level):
            return None
        return streams.compress_patch(
            data, window, ranges, level, close=close, dictionary=self._windows.dictionary
        )


def _size(stream: Stream) -> int:
    """The bytes that a stream takes, with its window in the table."""
    ranges = _RANGE_BYTES * len(stream.window)
    return len(stream.coded) + (ranges + 3 if ranges else 0)
