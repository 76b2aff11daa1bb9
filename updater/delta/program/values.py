"""What a program's records are worth: operands and predictions, made when asked for.

Values lie in the block as it is written; what follows from other records is worked out from these. Rules: a
record refers to arrays that are known by then, and never in a circle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import nibbles, predictors
from updater.delta.program.operands import Operands, ProgramError, within
from updater.delta.program.piece import Piece
from updater.delta.program.records import (
    BIAS,
    BITS,
    CAST,
    CODES,
    DTYPES,
    F32,
    FLOAT,
    GIVEN,
    I4,
    I8,
    NIBBLES,
    PEAKED,
    PLAIN,
    PRODUCT,
    QUANTISED,
    RANGED,
    REDUCING,
    REFER,
    SAME,
    U4,
    U8,
    ZEROING,
    ZEROS,
    Record,
)

Array = NDArray[Any]
# What follows from other records, and what records may refer to.
FOLLOWING = (REFER, PRODUCT, PEAKED, RANGED, *REDUCING)
OPERANDS = frozenset((*FOLLOWING, SAME, FLOAT, PLAIN, GIVEN))


class Values:
    """The values of records.

    Args:
        base: the base.
        records: all of the program's.
        block: [length] bytes, the target as far as it is written.
    """

    def __init__(self, base: Operands, records: list[Record], block: NDArray[np.uint8]) -> None:
        self.base, self.records = base, records
        self._block = block
        self._written: set[int] = set()
        self._found: dict[int, Array] = {}
        self._loose: dict[int, NDArray[np.uint8]] = {}  # codes of four bits, one a byte until all are there

    def write(self, number: int, piece: Piece, values: Array) -> None:
        """Puts a piece of a record into the block: float32, or words or integers modulo their width."""
        record = self.records[number]
        if record.dtype in NIBBLES:
            self.elements(number)[piece.start : piece.start + piece.count] = values.astype(np.uint8)
            return
        width = DTYPES[record.dtype].itemsize
        at = record.at + piece.start * width
        kind = f"<u{width}"
        words = values.view(kind) if values.itemsize == width else values.astype(kind)
        raw = words.view(np.uint8)
        self._block[at : at + len(raw)] = raw

    def piece(self, number: int, piece: Piece) -> Array:
        """What `write` put into the block, as words."""
        record = self.records[number]
        kind = np.dtype(f"<u{DTYPES[record.dtype].itemsize}")
        return np.frombuffer(self._block, kind, piece.count, record.at + piece.start * kind.itemsize)

    def elements(self, number: int) -> Array:
        """What `write` put into the block, as words that may be changed until `done`; modulo their width."""
        record = self.records[number]
        if record.dtype in NIBBLES:
            if number not in self._loose:
                self._loose[number] = np.zeros(record.count, dtype=np.uint8)
            return self._loose[number]
        kind = np.dtype(f"<u{DTYPES[record.dtype].itemsize}")
        return self._block[record.at : record.at + record.length].view(kind)

    def done(self, number: int) -> None:
        """Says that all of a record is in the block."""
        self._written.add(number)
        if number in self._loose:
            record = self.records[number]
            self._block[record.at : record.at + record.length] = nibbles.pack(self._loose.pop(number))

    def stored(self, number: int) -> Array:
        """The elements of a record that lies in the block."""
        record = self.records[number]
        if record.dtype in NIBBLES:
            raw = self._block[record.at : record.at + record.length]
            return nibbles.unpack(raw, record.count, 0, record.dtype == I4)
        return np.frombuffer(self._block, DTYPES[record.dtype], count=record.count, offset=record.at)

    def get(self, number: int, depth: int = 0) -> Array:
        """The elements of a record that is written, or that follows from such. Raises ProgramError."""
        if not 0 <= number < len(self.records):
            raise ProgramError("a record refers to one that is not there")
        within("records that lead to each other", depth, limits.MAX_REFERENCES)
        record = self.records[number]
        if record.op not in OPERANDS:
            raise ProgramError("a record refers to one that comes later or has no numbers")
        if number in self._written:
            return self.stored(number)
        if number not in self._found:
            self._found[number] = self._follow(record, depth + 1)
        return self._found[number]

    def _follow(self, record: Record, depth: int) -> Array:
        if record.op == GIVEN:
            return np.array(record.words, dtype="<u4").view("<f4")
        if record.op == REFER:
            value = self.get(record.one, depth)
            if value.dtype != DTYPES[record.dtype] or self.records[record.one].op == ZEROS:
                raise ProgramError("a record refers to one of another type")
        elif record.op == ZEROS:
            value = predictors.zero_points(self.base, record, self._floats(record.one, depth))
        elif record.op in REDUCING:
            value = predictors.reduce(self.base, record)
        elif record.op in (PRODUCT, PEAKED, RANGED):
            one, two = (predictors.flush(self._floats(n, depth)) for n in (record.one, record.two))
            if record.op == PRODUCT:
                value = predictors.flush(one * two)
            elif record.op == PEAKED:
                value = predictors.flush(np.maximum(np.abs(one), np.abs(two)) / np.float32(127))
            else:
                value = predictors.flush(predictors.flush(two - one) / np.float32(255))
        else:
            raise ProgramError("an operand is not known yet")
        if len(value) != record.count:
            raise ProgramError("an operand has another number of elements")
        return self._corrected(record, value)

    def _corrected(self, record: Record, value: Array) -> Array:
        """Adds exceptions: to codes, or to floats in their order."""
        if not record.exceptions:
            return value
        kind = DTYPES[record.dtype]
        bits = BITS[record.dtype]
        places = np.array([place for place, _ in record.exceptions], dtype=np.int64)
        missed = np.array([missed & ((1 << bits) - 1) for _, missed in record.exceptions], dtype=np.uint32)
        if record.dtype == F32:
            words = predictors.ordered(value.view("<u4"), bits)
            words[places] += missed
            return predictors.unordered(words, bits).astype("<u4").view("<f4")
        codes = value.astype(f"<i{kind.itemsize}").view(f"<u{kind.itemsize}")
        codes[places] += missed.astype(codes.dtype)
        if record.dtype in NIBBLES:
            codes = nibbles.extended(codes & np.uint8(15), record.dtype == I4).view(np.uint8)
        return codes.view(kind).astype(np.int16)

    def _floats(self, number: int, depth: int) -> Array:
        value = self.get(number, depth)
        if value.dtype != np.float32:
            raise ProgramError("an operand is not of float32")
        return value

    def _codes(self, number: int) -> Array:
        record = self.records[number] if 0 <= number < len(self.records) else None
        if record is not None and (
            record.op not in (SAME, REFER, ZEROS) or record.dtype not in (I8, U8, I4, U4)
        ):
            raise ProgramError("an operand is not of zero points")
        return self.get(number)

    def predicted(self, number: int, piece: Piece) -> tuple[Array, Array | None]:
        """What a record of integers or words predicts for a piece, flat; lost fractions for CODES."""
        record, base = self.records[number], self.base
        if record.op == CODES:
            return predictors.codes(base, record, piece)
        if record.op == CAST:
            bits = 8 * DTYPES[record.dtype].itemsize
            return predictors.ordered(predictors.cast(base, record, piece), bits), None
        if record.op in ZEROING:
            bits = 8 * DTYPES[record.dtype].itemsize
            words = predictors.zeroed(base, record, piece)
            return words if record.dtype == I8 else predictors.ordered(words, bits), None
        scales = self._floats(record.one, 0)
        if record.op == QUANTISED:
            zeros = self._codes(record.two) if record.zeros else None
            return predictors.quantise(base, record, scales, zeros, piece), None
        make = predictors.bias if record.op == BIAS else predictors.rescale
        return make(base, record, scales, piece), None
