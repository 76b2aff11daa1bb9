"""Runs a program: the bytes that it writes.

Order: records; the symbols of all pools; what is the same as in the base; floats; what follows from these;
integers and codes, which need scales; the skeleton; copies of what was written. Rules: work goes piece by
piece, so that memory follows from the block and not from what the records name; whatever the program holds,
it ends with the block's length or an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import body, predictors, residuals, skeletons
from updater.delta.program.arithmetic import decisions
from updater.delta.program.bits import CHUNK
from updater.delta.program.body import Opened
from updater.delta.program.operands import Operands, ProgramError, ReadBase
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.pools import OpenPool, OpenPools
from updater.delta.program.records import (
    CAST,
    CODES,
    DTYPES,
    FLOAT,
    GIVEN,
    I8,
    KINDS,
    PLAIN,
    POOL,
    QUANTISED,
    SAME,
    SELF,
    SPARSE,
    STEPPED,
    ZEROING,
    Record,
)
from updater.delta.program.values import FOLLOWING, Values

Array = NDArray[Any]
_COPY_BYTES = 256 << 10  # of the base read at a time: what fits a core's cache is copied once, not twice


def ordered(record: Record) -> bool:
    """Whether its residuals are differences in the order of floats."""
    return record.op in (FLOAT, CAST, STEPPED) or (record.op in ZEROING and record.dtype != I8)


def decode(
    read: ReadBase, data: bytes | memoryview, offset: int, length: int, tracks: bool = True
) -> memoryview:
    """The `length` bytes of the target at `offset` that a program writes; `tracks`: see `skeletons.decode`.

    Raises ProgramError, or another arithmetic or look-up error, for what no encoder writes; SluiceError as
    `read` and `open_body` do.
    """
    return Reader(body.open_body(data, offset, length), read, tracks).run()


class Reader:
    """One run of a program.

    Args:
        opened: the program.
        read: gives bytes of the base.
        tracks: whether the skeleton may be coded along the base.
    """

    def __init__(self, opened: Opened, read: ReadBase, tracks: bool = True) -> None:
        self._opened, self._tracks = opened, tracks
        self._records = opened.records
        self._block = np.empty(opened.place.length, dtype=np.uint8)
        self._out = self._block.data
        place = opened.place
        if place.window_length:  # inside the base, also where the skeleton does not look at it
            read(place.window_start, 0)
            read(place.window_start + place.window_length, 0)
        self._values = Values(Operands(read), opened.records, self._block)
        self._groups = residuals.groups(opened.records)
        self._members: dict[str, list[int]] = {}
        for number, record in enumerate(self._records):
            for name in residuals.pools_of(record):
                self._members.setdefault(name, []).append(number)
        groups = {
            name: residuals.group_count(name, self._groups, found) for name, found in self._members.items()
        }
        self._pools = OpenPools(opened.packed, KINDS, groups, decisions(place.length))

    def run(self) -> memoryview:
        """Writes all of the block."""
        self._decode(account=False)
        numbers = range(len(self._records))
        for number in numbers:
            if self._records[number].op == SAME:
                self._same(number)
        for number in numbers:
            if self._records[number].op in (FLOAT, PLAIN):
                self._record(number)
        for number in numbers:
            record = self._records[number]
            if record.op in FOLLOWING:
                value = self._values.get(number)
                if not record.silent:
                    self._values.write(number, Piece.whole(1, record.count), value)
                    self._values.done(number)
        for number in numbers:
            if self._records[number].op not in (*FOLLOWING, FLOAT, PLAIN, SAME, SELF, GIVEN):
                self._record(number)
        self._pools.end()
        self._skeleton()
        self._selves()
        return self._out

    def costs(self) -> dict[int, float]:
        """Bytes that the symbols of each record take, by its number; nothing is written."""
        self._decode(account=True)
        out: dict[int, float] = {}
        for name, numbers in self._members.items():
            left = iter(self._pools[name].costs)
            for number in numbers:
                record = self._records[number]
                parts = (
                    1 if record.residual == SPARSE else sum(1 for _ in pieces(record.rows, record.columns))
                )
                out[number] = out.get(number, 0.0) + sum(next(left) for _ in range(parts))
        return out

    def _decode(self, account: bool) -> None:
        for name in KINDS:
            for number in self._members.get(name, ()):
                self._tell(name, number)
        self._pools.decode(account)

    def _same(self, number: int) -> None:
        record, base = self._records[number], self._values.base
        width = DTYPES[record.dtype].itemsize
        if record.axes:
            for start in range(0, record.count, CHUNK):
                size = min(CHUNK, record.count - start)
                part = base.laid(f"<u{width}", record.base, record.axes, start, size).view(np.uint8)
                self._block[record.at + start * width :][: len(part)] = part
        else:
            for start in range(0, record.length, _COPY_BYTES):
                raw = base.bytes(record.base + start, min(_COPY_BYTES, record.length - start))
                self._block[record.at + start :][: len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        self._values.done(number)

    def _tell(self, name: str, number: int) -> None:
        """Says the contexts of a record's symbols in a pool."""
        record, pool, group = self._records[number], self._pools[name], self._groups.get(number, 0)
        if record.residual == SPARSE:
            pool.tell(residuals.sparse_contexts(record)[name == "sizes"], 0)
            return
        for piece in pieces(record.rows, record.columns):
            if record.op == FLOAT:
                words = predictors.floats(self._values.base, record, piece)
                self._values.write(number, piece, words)  # read once: `_piece` finds it here
                contexts = residuals.float_contexts(record, words, piece)
            elif record.op == PLAIN:
                pool.tell(residuals.plain_contexts(record, group, piece), 0)
                continue
            elif name == "wide":
                contexts = residuals.wide_contexts(record, piece)
            else:
                fractions = None
                if record.op == CODES and record.gain_bits:
                    _, fractions = self._values.predicted(number, piece)
                contexts = residuals.code_contexts(record, fractions, piece)
            pool.tell(piece.of_rows(contexts, record.used), group)

    def _record(self, number: int) -> None:
        record = self._records[number]
        pool = self._pools[residuals.pools_of(record)[0]] if record.residual == POOL else None
        for piece in pieces(record.rows, record.columns):
            self._values.write(number, piece, self._piece(record, number, piece, pool))
        if record.residual == SPARSE:
            places, missed = residuals.get_sparse(self._pools["gaps"], self._pools["sizes"], record)
            self._change(number, places, missed)
        elif record.exceptions:
            places = np.array([place for place, _ in record.exceptions], dtype=np.int64)
            self._change(number, places, np.array([value for _, value in record.exceptions], dtype=np.int64))
        self._values.done(number)

    def _piece(self, record: Record, number: int, piece: Piece, pool: OpenPool | None) -> Array:
        """The elements of a piece, but for changes that come one by one."""
        if record.op == PLAIN:
            assert pool is not None
            return residuals.get_plain(pool, record, piece)
        if record.op == STEPPED:
            assert pool is not None
            codes = np.zeros(piece.count, dtype=np.int16)
            _add(record, piece, codes, lambda count: residuals.get_codes(pool, count))
            return predictors.stepped(
                record, predictors.floats(self._values.base, record, piece), codes, piece
            )
        bits = 8 * DTYPES[record.dtype].itemsize
        if record.op == FLOAT:
            guess = predictors.ordered(self._values.piece(number, piece), bits)
        else:
            guess, _ = self._values.predicted(number, piece)
        if pool is None:
            pass
        elif record.op in (CODES, QUANTISED):
            _add(record, piece, guess, lambda count: residuals.get_codes(pool, count))
        else:
            guess = guess.view(np.uint32)
            _add(record, piece, guess, lambda count: residuals.get_tokens(pool, count))
        return predictors.unordered(guess, bits) if ordered(record) else guess

    def _change(self, number: int, places: NDArray[np.int64], missed: Array) -> None:
        """Adds to elements that lie in the block already, modulo their width."""
        record, elements = self._records[number], self._values.elements(number)
        bits = 8 * elements.itemsize
        words = elements[places]
        moved = (missed & ((1 << bits) - 1)).astype(np.uint32)
        if ordered(record):
            elements[places] = predictors.unordered(predictors.ordered(words, bits) + moved, bits)
        else:
            elements[places] = words.astype(np.uint32) + moved

    def _skeleton(self) -> None:
        opened = self._opened
        size = opened.place.length - sum(record.length for record in opened.records)
        known = body.Known(self._values.base, opened.place, opened.records)
        between = np.frombuffer(skeletons.decode(known, opened.skeleton, size, self._tracks), dtype=np.uint8)
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


def _add(record: Record, piece: Piece, guess: Array, take: Callable[[int], Array]) -> None:
    """Adds what the prediction of a piece misses, in the rows that have changes."""
    if not len(record.used):
        guess += take(piece.count)
        return
    chosen = record.used[piece.rows]
    width = piece.shape[1]
    if chosen.any():
        guess.reshape(piece.shape)[chosen] += take(int(chosen.sum()) * width).reshape(-1, width)
