"""Runs a program: the bytes that it writes.

Order: records; what is the same as in the base; floats; what follows from these; integers and codes, which
need scales; the skeleton; copies of what was written. Rules: work goes piece by piece, so that memory follows
from the block and not from what the records name; whatever the program holds, it ends with the block's length
or an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import body, predictors, residuals, skeletons
from updater.delta.program.body import Opened
from updater.delta.program.operands import ProgramError, ReadBase
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.pools import OpenPool
from updater.delta.program.records import (
    CAST,
    CODES,
    DTYPES,
    EXCEPTIONS,
    FLOAT,
    GIVEN,
    KINDS,
    PLAIN,
    POOL,
    PRUNED,
    SAME,
    SELF,
    SPARSE,
    Record,
)
from updater.delta.program.values import FOLLOWING, Values

Array = NDArray[Any]
_ORDERED = (FLOAT, CAST, PRUNED)  # residuals of these are differences in the order of floats


def decode(read: ReadBase, data: bytes, offset: int, length: int) -> bytearray:
    """The `length` bytes of the target at `offset` that a program writes.

    Raises ProgramError, or another arithmetic or look-up error, for what no encoder writes; SluiceError as
    `read` and `open_body` do.
    """
    return _Reader(body.open_body(data, offset, length), read).run()


class _Reader:
    """One run of a program."""

    def __init__(self, opened: Opened, read: ReadBase) -> None:
        self._opened = opened
        self._records = opened.records
        self._out = bytearray(opened.place.length)
        self._block = np.frombuffer(self._out, dtype=np.uint8)
        self._values = Values(body.operands(read, opened.place.length), opened.records, self._block)
        self._groups = residuals.groups(opened.records)
        self._pools: dict[str, OpenPool] = {}

    def run(self) -> bytearray:
        """Writes all of the block."""
        self._same()
        numbers = range(len(self._records))
        floats = [n for n in numbers if self._records[n].op in (FLOAT, PLAIN)]
        self._run(floats)
        for number in numbers:
            record = self._records[number]
            if record.op in FOLLOWING:
                value = self._values.get(number)
                self._values.write(number, Piece.whole(1, record.count), value)
        late = (*FOLLOWING, FLOAT, PLAIN, SAME, SELF, GIVEN)
        self._run([n for n in numbers if self._records[n].op not in late])
        for pool in self._pools.values():
            pool.end()
        if self._opened.pools.keys() - self._pools.keys():
            raise ProgramError("a program has a pool that no record takes from")
        self._skeleton()
        self._selves()
        return self._out

    def _same(self) -> None:
        for number, record in enumerate(self._records):
            if record.op == SAME:
                raw = self._values.base.bytes(record.base, record.length)
                self._block[record.at : record.at + record.length] = np.frombuffer(raw, dtype=np.uint8)
                self._values.done(number)

    def _run(self, numbers: Sequence[int]) -> None:
        """Opens the pools of records that are predicted alike, then puts the records into the block."""
        members: dict[str, list[int]] = {}
        for number in numbers:
            if name := residuals.pool_of(self._records[number]):
                members.setdefault(name, []).append(number)
                if name == "gaps":
                    members.setdefault("sizes", []).append(number)
        for name, found in members.items():
            self._pools[name] = self._open(name, found)
        for number in numbers:
            self._record(number)
            self._values.done(number)

    def _open(self, name: str, numbers: Sequence[int]) -> OpenPool:
        if name not in self._opened.pools:
            raise ProgramError("a record takes from a pool that is not there")
        records = [self._records[number] for number in numbers]
        groups = [0 if name == "plain" else self._groups.get(number, 0) for number in numbers]
        sizes = [record.changed if record.residual == SPARSE else record.count for record in records]
        pool = OpenPool(KINDS[name], self._opened.pools[name], groups, sizes)
        for number, group in zip(numbers, groups):
            self._tell(pool, name, number, group)
        pool.decode()
        return pool

    def _tell(self, pool: OpenPool, name: str, number: int, group: int) -> None:
        record = self._records[number]
        if record.residual == SPARSE:
            pool.tell(residuals.sparse_contexts(record)[name == "sizes"], group)
            return
        for piece in pieces(record.rows, record.columns):
            if record.op == FLOAT:
                words = predictors.floats(self._values.base, record, piece)
                pool.tell(residuals.float_contexts(record, words, piece), group)
            elif record.op == PLAIN:
                pool.tell(residuals.plain_contexts(record, self._groups[number], piece), 0)
            elif name == "wide":
                pool.tell(residuals.wide_contexts(record, piece), group)
            else:
                fractions = None
                if record.op == CODES and record.gain_bits:
                    _, fractions = self._values.predicted(number, piece)
                pool.tell(residuals.code_contexts(record, fractions, piece), group)

    def _record(self, number: int) -> None:
        record = self._records[number]
        pool = self._pools.get(residuals.pool_of(record)) if record.residual == POOL else None
        for piece in pieces(record.rows, record.columns):
            self._values.write(number, piece, self._piece(record, number, piece, pool))
        if record.residual == SPARSE:
            places, missed = residuals.get_sparse(self._pools["gaps"], self._pools["sizes"], record)
            self._change(record, places, missed)
        elif record.residual == EXCEPTIONS:
            places = np.array([place for place, _ in record.exceptions], dtype=np.int64)
            self._change(record, places, np.array([value for _, value in record.exceptions], dtype=np.int64))

    def _piece(self, record: Record, number: int, piece: Piece, pool: OpenPool | None) -> Array:
        """The elements of a piece, but for changes that come one by one."""
        if record.op == PLAIN:
            assert pool is not None
            return residuals.get_plain(pool, record, piece)
        bits = 8 * DTYPES[record.dtype].itemsize
        if record.op == FLOAT:
            guess = predictors.ordered(predictors.floats(self._values.base, record, piece), bits)
        else:
            guess, _ = self._values.predicted(number, piece)
        if pool is not None:
            if residuals.pool_of(record) == "codes":
                guess += residuals.get_codes(pool, piece.count)
            else:
                guess = guess.view(np.uint32)
                guess += residuals.get_tokens(pool, piece.count)
        return predictors.unordered(guess, bits) if record.op in _ORDERED else guess

    def _change(self, record: Record, places: NDArray[np.int64], missed: Array) -> None:
        """Adds to elements that lie in the block already, modulo their width."""
        bits = 8 * DTYPES[record.dtype].itemsize
        elements = np.frombuffer(self._out, f"<u{bits // 8}", count=record.count, offset=record.at)
        words = elements[places]
        moved = (missed & ((1 << bits) - 1)).astype(np.uint32)
        if record.op in _ORDERED:
            elements[places] = predictors.unordered(predictors.ordered(words, bits) + moved, bits)
        else:
            elements[places] = words.astype(np.uint32) + moved

    def _skeleton(self) -> None:
        opened = self._opened
        size = opened.place.length - sum(record.length for record in opened.records)
        known = body.Known(self._values.base, opened.place, opened.records)
        between = np.frombuffer(skeletons.decode(known, opened.skeleton, size), dtype=np.uint8)
        if len(between) != size:
            raise ProgramError("a program's skeleton has another size than its records leave")
        end = used = 0
        for at, length in [*((record.at, record.length) for record in opened.records), (len(self._out), 0)]:
            self._block[end:at] = between[used : used + at - end]
            used += at - end
            end = at + length

    def _selves(self) -> None:
        for record in self._records:
            if record.op == SELF:
                end = record.base + record.length
                if not 0 <= record.base <= end <= record.at:
                    raise ProgramError("a copy reads what is not written yet")
                self._block[record.at : record.at + record.length] = self._block[record.base : end]
