"""Makes the programs of blocks: pairs the arrays of both files once, then plans and codes block by block.

A block's program knows its own bytes and the base, no other block. Arrays that a block cuts are planned by
their whole rows and what is left before and behind these. Every program is run before it is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import arrange, pairing, parts, planner, reader, scales, windows, writer, zeroing
from updater.delta.program.arrange import Known
from updater.delta.program.body import Place, outside
from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.records import F32
from updater.formats.span import TensorSpan

Bytes = NDArray[np.uint8]

_LEAST_BYTES = 256  # a smaller block gains nothing by a program
_ALONE_BYTES = 256 << 10  # of a block that is also tried without records
_WINDOW_SHARE = 3  # of what a program may read: one part may be the window, beside ...
_WINDOW_LEAST = limits.OPERAND_OVERHEAD_BYTES // 2  # ... this
_WINDOW_BYTES = 1 << 20  # of a large base's window beyond the block's own length


@dataclass(frozen=True)
class ProgramBytes:
    """A program.

    Attributes:
        data: its bytes.
        pool_bytes: of these, those of the pools.
        entropy_bytes: what the pools would take at the entropy of their symbols.
        predicted: bytes of the block that follow from the base.
        covered: bytes of the block that are elements of records.
        tracks: whether its skeleton is coded along the base, which a header must name.
    """

    data: bytes
    pool_bytes: int
    entropy_bytes: float
    predicted: int
    covered: int
    tracks: bool = False


class ProgramEncoder:
    """Makes programs for the blocks of one target; safe to use from several threads.

    Args:
        base: the base's bytes.
        base_spans: its tensors.
        target: the target's bytes.
        target_spans: its tensors.
        level: zstd level of skeletons.
        thorough: also tries what takes long.
        only: (offset, length) of ranges of the target without which a block gets no program; None for all.
    """

    def __init__(
        self,
        base: Bytes,
        base_spans: Sequence[TensorSpan],
        target: Bytes,
        target_spans: Sequence[TensorSpan],
        level: int,
        thorough: bool,
        only: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._only = only
        self._base, self._target, self._level, self._thorough = base, target, level, thorough
        old, _ = planner.items_of(base, base_spans)
        new, self._follows = planner.items_of(target, target_spans)
        with np.errstate(all="ignore"):
            self._items = pairing.pair(old, new)
        self._arrays = windows.arrays_of([(span.offset, span.length) for span in base_spans])
        scales.link(self._items)
        zeroing.mark(self._items)
        places: dict[bytes, int] = {}
        for item in old:
            if item.dtype == F32 and len(item.value) <= 1 << 16:
                places.setdefault(item.content, item.at)
        self._known = Known(base, Operands(self._read), places)

    def encode(self, offset: int, length: int) -> ProgramBytes | None:
        """The program that writes `length` bytes of the target at `offset`; None if there is none."""
        if length < _LEAST_BYTES or not self._concerned(offset, length):
            return None
        try:
            with np.errstate(all="ignore"):  # tensors may hold any bits; what comes out is compared
                return self._encode(offset, length)
        except (ArithmeticError, LookupError, ValueError) as error:
            # A defect of the planner must not cost the delta: the block is coded without a program.
            warnings.warn(
                f"no program for the block at byte {offset}: {error}; please report this",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _concerned(self, offset: int, length: int) -> bool:
        if self._only is None:
            return True
        return any(start < offset + length and start + size > offset for start, size in self._only)

    def _encode(self, offset: int, length: int) -> ProgramBytes | None:
        target = self._target[offset : offset + length].tobytes()
        items = list(parts.inside(self._items, offset, length))
        place = self._place(offset, length, scales.left_of(length, items))
        ways = [arrange.records_for(self._known, target, items, self._follows, place.window_length)]
        if ways[0] and length <= _ALONE_BYTES:
            ways.append([])
        if not (ways[0] or self._thorough) and length > limits.MAX_MODELLED_BYTES:
            return None  # it would be no more than a patch of the block
        found: list[ProgramBytes] = []
        for records in ways:
            try:
                skeleton = outside(target, records)
                places = [place]
                if self._thorough:  # a second window doubles the slowest part, for a hundredth or nothing
                    places += windows.others(self._base, self._arrays, place, records, skeleton)
                program, packed, tracks = writer.encode(
                    self._read, target, places, records, self._level, self._thorough
                )
                predicted = sum(record.length for record in records if record.based)
                covered = sum(record.length for record in records)
                found.append(ProgramBytes(program, packed.size, packed.entropy, predicted, covered, tracks))
            except ProgramError:  # decoders would refuse it
                continue
        if not found:
            return None
        best = min(found, key=lambda program: len(program.data))
        try:
            right = reader.decode(self._read, best.data, offset, length) == target
        except ProgramError:
            right = False
        if not right:  # a defect, which must not cost the delta: the block is coded without a program
            warnings.warn(
                f"the program for the block at byte {offset} does not rebuild it; please report this",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return best

    def _place(self, offset: int, length: int, left: int) -> Place:
        size = len(self._base)
        # The window counts against what the program may read, as the arrays do.
        most = min(
            limits.MAX_WINDOW_BYTES,
            limits.OPERAND_EXPANSION * length // _WINDOW_SHARE + _WINDOW_LEAST,
            left,
        )
        if size <= most:
            return Place(offset, length, 0, size)
        room = min(most, length + _WINDOW_BYTES)
        middle = offset * size // max(1, len(self._target))
        return Place(offset, length, max(0, min(size - room, middle - min(room, _WINDOW_BYTES) // 2)), room)

    def _read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(self._base):
            raise ProgramError("a program reads beyond the base")
        return self._base[offset : offset + length].tobytes()
