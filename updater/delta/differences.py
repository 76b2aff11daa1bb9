"""Codes literals of a block as differences from bytes of the base that are nearly the same.

Order: `updater.delta.alignment` finds the stretches of the block; each lies in a window of the base that is
put together from ranges, so it is cut where these end; what of a literal lies in a stretch becomes a copy or
a difference of bytes. Rule: what is no literal stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from updater.delta import alignment, tensors
from updater.delta.alignment import Stretch
from updater.delta.assembly import Coding
from updater.delta.candidates import Candidate
from updater.delta.elements import BYTES, ELEMENT_TYPES, ElementType
from updater.delta.instructions import DENSE, DIFFERENCE, SPARSE, Tensor
from updater.delta.plan import Piece
from updater.delta.streams import Ranges

Bytes = NDArray[np.uint8]

_LEAST_WIDE = 256  # bytes of a stretch from which its elements may have more than one byte
_BYTE_WAYS = tuple((BYTES, coding) for coding in (DENSE, SPARSE))
_WIDE_WAYS = tuple((ELEMENT_TYPES[number], coding) for number in (3, 6, 9) for coding in (DENSE, SPARSE))


class Differences:
    """The stretches of one block.

    Args:
        base: the base's bytes.
        target: the target's bytes.
        offset: where the block begins in the target.
        data: the block's bytes.
        window: bytes of the base in which stretches are looked for.
        ranges: where these lie in the base.
        thorough: also tries elements of more than one byte.
    """

    def __init__(
        self,
        base: Bytes,
        target: Bytes,
        offset: int,
        data: bytes,
        window: bytes,
        ranges: Ranges,
        thorough: bool,
    ) -> None:
        self._base, self._target = base, target
        self._ways = _BYTE_WAYS + _WIDE_WAYS if thorough else _BYTE_WAYS
        self.stretches = [
            Stretch(offset + part.start, offset + part.end, part.shift - offset)
            for stretch in alignment.find(window, data)
            for part in _located(stretch, ranges)
        ]

    def code(self, codings: Sequence[Coding], cost: Callable[[bytes], int]) -> list[list[Coding]]:
        """The codings of a block with literals as differences: of the type that costs least, and of bytes.

        Args:
            codings: of the block.
            cost: about how many bytes a stream takes.
        """
        parts = list(self._cut(codings))
        if not any(isinstance(part, Stretch) for part in parts):
            return []
        ways = [list(self._coded(parts, kind, coding)) for kind, coding in self._ways]
        best = min(ways, key=lambda way: cost_of(way, cost))
        # Other coders than the one that costs are estimated by may prefer runs of zeros to gaps.
        return [best] if best is ways[0] else [best, ways[0]]

    def _cut(self, codings: Sequence[Coding]) -> Iterator[Coding | Stretch]:
        """The codings of a block, and the stretches that lie in its literals."""
        index = 0
        for whole in codings:
            piece = whole.piece
            if piece.equal or whole.candidate is not None:
                yield whole
                continue
            place, end = piece.offset, piece.offset + piece.length
            while index < len(self.stretches) and self.stretches[index].end <= place:
                index += 1
            at = index
            while at < len(self.stretches) and self.stretches[at].start < end:
                stretch = self.stretches[at]
                start, stop = max(stretch.start, place), min(stretch.end, end)
                if start > place:
                    yield _literal(place, start)
                yield Stretch(start, stop, stretch.shift)
                place = stop
                at += 1
            if place < end:
                yield _literal(place, end)

    def _coded(self, parts: Sequence[Coding | Stretch], kind: ElementType, coding: int) -> Iterator[Coding]:
        for part in parts:
            if isinstance(part, Coding):
                yield part
                continue
            start, end, width = part.start, part.end, kind.width
            if end - start < _LEAST_WIDE:
                yield self._difference(start, end, part.shift, BYTES, coding)
                continue
            low, high = start + -start % width, end - end % width
            for begin, stop, of in ((start, low, BYTES), (low, high, kind), (high, end, BYTES)):
                if begin < stop:
                    yield self._difference(begin, stop, part.shift, of, coding)

    def _difference(self, start: int, end: int, shift: int, kind: ElementType, coding: int) -> Coding:
        origin = start + shift
        ours, theirs = self._target[start:end], self._base[origin : origin + end - start]
        equal = bool(np.array_equal(ours, theirs))
        piece = Piece(start, end - start, BYTES, origin, equal, False)
        if equal:
            return Coding(piece, None)
        guess = tensors.predict(kind, len(ours) // kind.width, theirs, None)
        folded = tensors.residual(ours.view(kind.dtype), guess, kind)
        item = Tensor(DIFFERENCE, coding, kind, len(folded), origin, 0, ())
        if coding == DENSE:
            return Coding(piece, Candidate(item, tuple(tensors.planes(folded))))
        gaps, values = tensors.sparse(folded)
        return Coding(piece, Candidate(replace(item, gap_bytes=len(gaps)), (gaps, *tensors.planes(values))))


def cost_of(codings: Sequence[Coding], cost: Callable[[bytes], int]) -> int:
    """About the bytes that the differences of a block take."""
    streams: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    for coding in codings:
        if coding.candidate is not None:
            for number, part in enumerate(coding.candidate.parts):
                streams[coding.candidate.item.kind.number, number].append(part)
    return sum(cost(b"".join(parts)) for parts in streams.values())


def _literal(start: int, end: int) -> Coding:
    return Coding(Piece(start, end - start, BYTES, None, False, False), None)


def _located(stretch: Stretch, ranges: Ranges) -> Iterator[Stretch]:
    """A stretch cut at the ends of the window's ranges, its shifts counted in the base."""
    begin = 0  # of a range in the window
    for offset, length in ranges:
        start = max(stretch.start, begin - stretch.shift)
        end = min(stretch.end, begin + length - stretch.shift)
        if start < end:
            yield Stretch(start, end, stretch.shift + offset - begin)
        begin += length
