"""Codes one block of the target several ways and keeps the smallest.

Ways: tensors each by their cheapest predictor, with planes in streams of their own or shared; the whole
block as a patch; that with long runs as copies; the block, or what no tensor covers, as differences from
bytes of the base that are nearly the same; a program for all of it; the bytes as they are. Of a large block
the ways are coded fast first, and the best of them as the encoder's level says. Rule: what decoders would
refuse is never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta import assembly
from updater.delta.assembly import OWN_STREAM_BYTES, Coding, Encoded, Payload
from updater.delta.base_windows import BaseWindows
from updater.delta.candidates import Estimator, choose
from updater.delta.contents import RUN_BYTES
from updater.delta.differences import Differences, cost_of
from updater.delta.elements import BYTES
from updater.delta.instructions import PLAIN
from updater.delta.plan import Piece
from updater.delta.program.encoder import ProgramBytes, ProgramEncoder
from updater.delta.stream_coder import Care, StreamCoder

Bytes = NDArray[np.uint8]

_TRIVIAL_BYTES = 128  # a payload below this is not worth another way
_TINY_BYTES = 16 << 10  # payloads below this are always compared with a patch of the whole block
_SURE = 0.9  # share of a block that its program predicts from the base, above which no other way is tried
_BASED = 0.5  # share of what a program covers that the base predicts, for no other way to be tried
_AHEAD = 0.97  # of what fast zstd leaves: a program below that is kept where records cover the block
_LOOSE = 0.2  # share of literals in a block from which bytes that are nearly equal are looked for
_SMALL_BYTES = 256 << 10  # a block up to this is coded all ways at the encoder's level
_BLOCK_BYTES = 12  # about, that a block takes beside its payload
# What is done with the ways of a block, one after the other: how hard they are coded then, how many of them
# at most, and how much larger one may be than the smallest for that. First after a fast look, then at effort
# max, which has no fast look.
_STEPS = ((Care.FINE, 3, 1.3), (Care.CLOSE, 1, 1.0), (Care.PACKED, 1, 1.15))
_THOROUGH_STEPS = ((Care.EXHAUSTIVE, 1 << 10, 1.15),)
_HOPE = 1.2  # how much larger a quick patch may be for a slow one to be tried ...
_HOPE_THOROUGH = 1.3  # ... at effort max
_HOPE_LITERALS = 1.1  # the same of tensors as literals


@dataclass(frozen=True)
class Way:
    """One way to code a block: its pieces, and from how many bytes on a plane is a stream of its own.

    `payloads` keeps what was put together of it, as (offset, length, payload) of each block.
    """

    codings: Sequence[Coding]
    own_bytes: int = OWN_STREAM_BYTES
    payloads: list[tuple[int, int, Payload]] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class Found:
    """A way that was coded: (bytes of the target, block) of each block."""

    blocks: Sequence[tuple[int, Encoded]]

    @property
    def size(self) -> int:
        """Bytes of the payloads, and of what more than one block takes."""
        return sum(len(block.payload) for _, block in self.blocks) + _BLOCK_BYTES * (len(self.blocks) - 1)

    def fits(self) -> bool:
        """Whether decoders take every block."""
        return all(block.fits(length) for length, block in self.blocks)


class BlockEncoder:
    """Codes blocks of one target; safe to use from several threads.

    Args:
        base: the base's bytes.
        target: the target's bytes.
        level: zstd level.
        programs: make the programs of blocks, of which the smallest counts; none to do without.
        thorough: tries every way, also where a program predicts nearly all of a block.
    """

    def __init__(
        self,
        base: Bytes,
        target: Bytes,
        level: int,
        programs: Sequence[ProgramEncoder] = (),
        thorough: bool = True,
    ) -> None:
        self._programs = programs
        self._thorough = thorough
        self._base = base
        self._target = target
        self._level = level
        self._windows = BaseWindows(base)
        self._estimator = Estimator(self._windows.whole)

    def encode(self, pieces: Sequence[Piece]) -> Found:
        """The smallest way found to code a block."""
        offset = pieces[0].offset
        length = sum(piece.length for piece in pieces)
        program = self._program(offset, length)
        data = self._target[offset : offset + length].tobytes()
        if program is not None and not self._thorough and self._surely_best(program, data):
            block = assembly.program_block(program, length, offset)
            if block.fits(length):
                return Found([(length, block)])
        coder = StreamCoder(self._windows, self._level, self._thorough)
        fast = not self._thorough and (length > _SMALL_BYTES or not self._windows.whole)
        care = Care.ROUGH if fast else Care.CLOSE
        codings = [
            Coding(piece, None if piece.equal else choose(piece, self._base, self._target, self._estimator))
            for piece in pieces
        ]
        ways = [Way(codings)]
        split = [part for coding in codings for part in self._split(coding)]
        if len(split) > len(codings):
            ways.append(Way(split))
        if any(coding.candidate is not None for coding in codings):
            ways.append(Way(codings, own_bytes=length + 1))
            if any(map(_is_plain, codings)) and (self._thorough or self._literals_may_win(codings)):
                ways.append(Way([self._without_plain(coding) for coding in codings]))
        found = [self._assembled(way, coder, care) for way in ways]
        others = [Found([(length, assembly.raw_block(data, offset))])]
        if program is not None:
            others.append(Found([(length, assembly.program_block(program, length, offset))]))
        least = min(way.size for way in (*found, *others))
        more: list[Way] = []
        generic = self._generic_may_win(data, least, coder)
        if generic:
            whole = Coding(Piece(offset, length, BYTES, None, False, False), None)
            more.append(Way([whole]))
            parts = self._split(whole)
            if len(parts) > 1:
                more.append(Way(parts))
        loose = sum(coding.piece.length for coding in codings if _is_literal(coding))
        if least > _TRIVIAL_BYTES and (self._thorough or generic or loose > _LOOSE * length):
            more += self._nearly(codings, data, least)
        more = [way for way in more if way not in ways]
        found += [self._assembled(way, coder, care) for way in more]
        others = [way for way in others if way.fits()]
        return min([*others, *self._finished(ways + more, found, others, coder, care)], key=_size)

    def _finished(
        self,
        ways: Sequence[Way],
        found: Sequence[Found],
        others: Sequence[Found],
        coder: StreamCoder,
        care: Care,
    ) -> list[Found]:
        """The ways that decoders take, and those that may become the smallest coded as well as can be."""
        near = [(way, one) for way, one in zip(ways, found, strict=True) if one.fits()]
        done = [one for _, one in near]
        for step, most, hope in _THOROUGH_STEPS if self._thorough else _STEPS:
            if step <= care:
                continue
            least = min(map(_size, (*others, *done)))
            near.sort(key=lambda pair: pair[1].size)
            near = [
                (way, self._assembled(way, coder, step))
                for way, one in near[:most]
                if _TRIVIAL_BYTES < one.size <= hope * least
            ]
            done += [one for _, one in near]
        return done

    def _program(self, offset: int, length: int) -> ProgramBytes | None:
        found = [programs.encode(offset, length) for programs in self._programs]
        made = [program for program in found if program is not None]
        return min(made, key=lambda program: len(program.data), default=None)

    def _surely_best(self, program: ProgramBytes, data: bytes) -> bool:
        """Whether no other way is worth its time: the base predicts nearly all, and zstd is behind."""
        if program.predicted > _SURE * len(data) and len(program.data) <= _TINY_BYTES:
            return True
        if len(self._base) and program.predicted < _BASED * program.covered:
            return False  # the base may have nearly the same bytes elsewhere
        share = 1.0 if program.predicted > _SURE * len(data) else _AHEAD
        return program.covered > _SURE * len(data) and len(program.data) < share * self._estimator.literal(
            data
        )

    def _without_plain(self, coding: Coding) -> Coding:
        """A tensor without a base as a literal: content that occurs twice in a block is then sent once."""
        return Coding(coding.piece, None) if _is_plain(coding) else coding

    def _literals_may_win(self, codings: Sequence[Coding]) -> bool:
        """Whether the tensors without a base are worth a try as literals, judged by fast compression."""
        parts, cost = [], 0
        for coding in codings:
            if coding.candidate is not None and _is_plain(coding):
                piece = coding.piece
                parts.append(self._target[piece.offset : piece.offset + piece.length].tobytes())
                cost += self._estimator.cost(coding.candidate)
        return self._estimator.literal(b"".join(parts)) < _HOPE_LITERALS * cost

    def _split(self, coding: Coding) -> list[Coding]:
        """A literal with its long runs from anywhere in the base turned into copies."""
        piece = coding.piece
        if piece.equal or coding.candidate is not None or piece.length < RUN_BYTES or not len(self._base):
            return [coding]
        parts: list[Coding] = []
        data = self._target[piece.offset : piece.offset + piece.length]
        end = 0
        for start, origin, length in [*self._windows.contents().runs(data), (piece.length, 0, 0)]:
            if start > end:
                rest = Piece(piece.offset + end, start - end, BYTES, None, False, False)
                parts.append(Coding(rest, None))
            if length:
                parts.append(Coding(Piece(piece.offset + start, length, BYTES, origin, True, False), None))
            end = start + length
        return parts

    def _nearly(self, codings: Sequence[Coding], data: bytes, least: int) -> Iterator[Way]:
        """The block as differences from nearly equal bytes: all of it, and where it would be literals."""
        offset = codings[0].piece.offset
        ranges = self._windows.ranges(data)
        window = self._windows.read(ranges)
        differences = Differences(
            self._base, self._target, offset, data, window, ranges, thorough=self._thorough
        )
        if not differences.stretches:
            return
        ways = [[Coding(Piece(offset, len(data), BYTES, None, False, False), None)]]
        if any(coding.candidate is not None for coding in codings):
            ways.append(list(codings))
        tried = [coded for way in ways for coded in differences.code(way, self._estimator.plain)]
        if not self._thorough:
            costs = [self._estimate(coded) for coded in tried]
            tried = [tried[costs.index(min(costs))]] if min(costs, default=least) < _HOPE * least else []
        for coded in tried:
            yield Way(coded, own_bytes=len(data) + 1)

    def _estimate(self, codings: Sequence[Coding]) -> int:
        """About the bytes of a block, found out fast."""
        pieces = [coding.piece for coding in codings if _is_literal(coding)]
        literals = b"".join(
            self._target[piece.offset : piece.offset + piece.length].tobytes() for piece in pieces
        )
        return self._estimator.literal(literals) + cost_of(codings, self._estimator.plain)

    def _assembled(self, way: Way, coder: StreamCoder, care: Care) -> Found:
        """A way as one block, or several where it has more instructions than one may have."""
        count = -(-len(way.codings) // limits.MAX_INSTRUCTIONS)
        for number in range(0 if way.payloads else count):
            start, end = (len(way.codings) * at // count for at in (number, number + 1))
            codings = way.codings[start:end]
            payload = Payload(self._target, way.own_bytes)
            for coding in codings:
                payload.add(coding)
            length = sum(coding.piece.length for coding in codings)
            way.payloads.append((codings[0].piece.offset, length, payload))
        blocks = [(length, payload.encode(offset, coder, care)) for offset, length, payload in way.payloads]
        return Found(blocks)

    def _generic_may_win(self, data: bytes, size: int, coder: StreamCoder) -> bool:
        """Whether a patch of the whole block is worth a try, judged by a fast one."""
        if size <= _TINY_BYTES:
            return True
        if not len(self._base):
            return False
        hope = _HOPE_THOROUGH if self._thorough else _HOPE
        return len(coder.code(data, Care.ROUGH, literal=True).coded) < hope * size


def _size(found: Found) -> int:
    return found.size


def _is_literal(coding: Coding) -> bool:
    return coding.candidate is None and not coding.piece.equal


def _is_plain(coding: Coding) -> bool:
    return coding.candidate is not None and coding.candidate.item.predictor == PLAIN
