"""The plan of a delta: the target cut into pieces with their origin in the base, and the pieces into blocks.

Pure: spans and bytes in, pieces out. Rules: pieces follow each other without a hole; a tensor is cut between
elements only; a block holds at most `block_size` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from updater.delta.elements import BYTES, ElementType, element_type
from updater.delta.matching import Match
from updater.formats.span import Quantisation, TensorSpan

Bytes = NDArray[np.uint8]

_COPY_BYTES = 24  # a shorter equal run is left to the patch
_APART_BYTES = 64  # of a gap as long in both files: what differs is one piece up to equal runs of this length
_WORD = 4


@dataclass(frozen=True)
class Rescale:
    """Scales of a tensor on both sides, and how its elements run through the channels.

    Attributes:
        old: of the base's tensor.
        new: of the target's.
        inner: elements that follow each other in one channel.
        start: where in the tensor the piece's first element lies.
    """

    old: Quantisation
    new: Quantisation
    inner: int
    start: int = 0


@dataclass(frozen=True)
class Piece:
    """A range of the target and where it may come from.

    Attributes:
        offset: in the target.
        length: bytes.
        kind: the element type; bytes for what is no tensor.
        base_offset: of as many bytes in the base; None when there is no counterpart.
        equal: whether those bytes are the same, so that they can be copied.
        tensor: whether the piece is (part of) a tensor.
        rescale: how its codes can be requantised, if both sides have scales.
    """

    offset: int
    length: int
    kind: ElementType
    base_offset: int | None
    equal: bool
    tensor: bool
    rescale: Rescale | None = None

    def cut(self, length: int) -> tuple[Piece, Piece]:
        """The first `length` bytes and the rest."""
        rest_base = None if self.base_offset is None else self.base_offset + length
        rest_scale = self.rescale and replace(
            self.rescale, start=self.rescale.start + length // self.kind.width
        )
        rest = replace(
            self,
            offset=self.offset + length,
            length=self.length - length,
            base_offset=rest_base,
            rescale=rest_scale,
        )
        return replace(self, length=length), rest


def make_pieces(base: Bytes, target: Bytes, matches: Sequence[Match]) -> list[Piece]:
    """Cuts the target into tensors and the gaps between them.

    Args:
        base: the base's bytes.
        target: the target's bytes.
        matches: the target's tensors in the order of their offsets.
    """
    pieces: list[Piece] = []
    end, base_end = 0, 0  # behind the last tensor, and behind its origin
    for match in matches:
        span = match.span
        origin = match.copy_offset
        if origin is None and match.base is not None:
            origin = match.base.offset
        pieces += _gap(base, target, (end, span.offset), base_end, origin)
        if span.length:
            pieces.append(_tensor(match))
        end, base_end = span.offset + span.length, base_end + span.offset + span.length - end
        if origin is not None:
            base_end = origin + span.length
    pieces += _gap(base, target, (end, len(target)), base_end, len(base))
    return _merged(pieces)


def _tensor(match: Match) -> Piece:
    span = match.span
    kind = element_type(span.dtype)
    if span.length % kind.width:
        kind = BYTES
    if match.copy_offset is not None:
        return Piece(span.offset, span.length, BYTES, match.copy_offset, True, False)
    if match.base is None:
        return Piece(span.offset, span.length, kind, None, False, True)
    scale = _rescale(match.base, span) if kind.reading != "float" and kind.width <= 4 else None
    return Piece(span.offset, span.length, kind, match.base.offset, False, True, scale)


def _rescale(origin: TensorSpan, span: TensorSpan) -> Rescale | None:
    old, new = origin.quantisation, span.quantisation
    if old is None or new is None or old.axis != new.axis or len(old.scales) != len(new.scales):
        return None
    channels = len(new.scales)
    if len(old.zero_points) != channels or len(new.zero_points) != channels:
        return None
    inner = max(1, span.length)
    if channels > 1:
        if new.axis is None or not 0 <= new.axis < len(span.shape) or span.shape[new.axis] != channels:
            return None
        inner = 1
        for size in span.shape[new.axis + 1 :]:
            inner *= size
    return Rescale(old, new, max(1, inner))


def _gap(base: Bytes, target: Bytes, ends: tuple[int, int], before: int, after: int | None) -> list[Piece]:
    """The pieces between two tensors: what equals the base's bytes at either end, and what is left between.

    Args:
        base: the base's bytes.
        target: the target's bytes.
        ends: of the gap in the target.
        before: where the base goes on after the previous tensor.
        after: where the next tensor's origin begins in the base, if it has one.
    """
    start, end = ends
    length = end - start
    if length == 0:
        return []
    if after is None:
        after = before + length
    if after - before == length and after <= len(base):
        return _aligned(base, target, ends, before)
    head = _common(base[before : before + length], target[start:end])
    if head == length:
        return [Piece(start, length, BYTES, before, True, False)]
    room = min(length - head, after) if after <= len(base) else 0
    tail = _common(base[after - room : after][::-1], target[end - room : end][::-1])
    if head < _COPY_BYTES:
        head = 0
    if tail < _COPY_BYTES:
        tail = 0
    pieces = []
    if head:
        pieces.append(Piece(start, head, BYTES, before, True, False))
    pieces.append(Piece(start + head, length - head - tail, BYTES, None, False, False))
    if tail:
        pieces.append(Piece(end - tail, tail, BYTES, after - tail, True, False))
    return pieces


def _aligned(base: Bytes, target: Bytes, ends: tuple[int, int], before: int) -> list[Piece]:
    """The pieces of a gap that is as long in both files: long equal runs, and between them what differs.

    Such gaps often differ in numbers only; what differs begins and ends where a 4-byte number can.
    """
    start, end = ends
    differs = np.flatnonzero(base[before : before + end - start] != target[start:end])
    words = np.unique((differs + start) // _WORD)
    pieces: list[Piece] = []
    place = start
    breaks = np.flatnonzero(np.diff(words) > _APART_BYTES // _WORD)
    for first, last in zip(words[[0, *(breaks + 1)]], words[[*breaks, -1]]) if len(words) else ():
        low, high = max(start, int(first) * _WORD), min(end, (int(last) + 1) * _WORD)
        if low > place:
            pieces.append(Piece(place, low - place, BYTES, before + place - start, True, False))
        pieces.append(Piece(low, high - low, BYTES, before + low - start, False, False))
        place = high
    if end > place:
        pieces.append(Piece(place, end - place, BYTES, before + place - start, True, False))
    return pieces


def _common(one: Bytes, other: Bytes) -> int:
    """How many bytes two arrays have in common at their beginning."""
    count = min(len(one), len(other))
    differing = np.flatnonzero(one[:count] != other[:count])
    return int(differing[0]) if len(differing) else count


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins copies that follow each other in both files."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.equal
            and piece.equal
            and last.base_offset is not None
            and piece.base_offset == last.base_offset + last.length
        ):
            merged[-1] = replace(last, length=last.length + piece.length)
        else:
            merged.append(piece)
    return merged


def make_blocks(pieces: Sequence[Piece], block_size: int) -> list[list[Piece]]:
    """Distributes the pieces over blocks of at most `block_size` bytes."""
    blocks: list[list[Piece]] = []
    room = 0
    for whole in pieces:
        piece = whole
        while piece.length:
            if room < piece.kind.width:
                blocks.append([])
                room = block_size
            if piece.length <= room:
                part, length = piece, 0
            else:
                part, rest = piece.cut(room - room % piece.kind.width)
                piece, length = rest, rest.length
            blocks[-1].append(part)
            room -= part.length
            if length == 0:
                break
    return blocks
