"""A block's program: records, the pools of their residuals, and the bytes between the records.

Layout: head (varints): bytes of the records' coder, start and length of the base's window (the start folded,
against the block's offset), a mask of the pools that are there, for each of these the bytes of its tables,
its rANS stream and its raw part, and the nibbles and bits of that; then these parts in order; then the
skeleton, whose first byte says how it is coded. Decoding order: records; float pools; what follows from
floats alone; integers and codes, which need scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta import varint
from updater.delta.program import predictors, residuals, skeletons
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.operands import Operands, ProgramError, ReadBase
from updater.delta.program.pools import OpenPool, Pool, open_pool
from updater.delta.program.records import (
    BF16,
    BIAS,
    CAST,
    CODES,
    DTYPES,
    EXCEPTIONS,
    F16,
    F32,
    FLOAT,
    GIVEN,
    HIGHEST,
    KINDS,
    LOWEST,
    PEAK,
    PEAKED,
    PLAIN,
    POOL,
    PRODUCT,
    PRUNED,
    QUANTISED,
    RANGED,
    REFER,
    RESCALED,
    SAME,
    SELF,
    SPARSE,
    U8,
    Record,
    code_records,
)  # fmt: skip

Array = NDArray[Any]
Ints = NDArray[np.int64]

_RECORD_LIMIT = 30  # visits after which a model of the records' coder keeps its rate


@dataclass(frozen=True)
class Place:
    """Where a program works.

    Attributes:
        offset: of the block in the target.
        length: bytes that it writes.
        window_start, window_length: the part of the base that the skeleton is coded against.
    """

    offset: int
    length: int
    window_start: int
    window_length: int


def operands(read: ReadBase, length: int) -> Operands:
    """The base within the budget of a block that writes `length` bytes."""
    return Operands(read, limits.OPERAND_EXPANSION * length + limits.OPERAND_OVERHEAD_BYTES)


def outside(data: bytes, records: list[Record]) -> bytes:
    """The bytes that no record covers."""
    parts, end = [], 0
    for record in records:
        parts.append(data[end : record.at])
        end = record.at + record.length
    parts.append(data[end:])
    return b"".join(parts)


_FOLLOWING = (SAME, REFER, PRODUCT, PEAK, PEAKED, RANGED, LOWEST, HIGHEST)


class Values:
    """The values of records, made when asked for."""

    def __init__(self, base: Operands, records: list[Record]) -> None:
        self.base, self.records = base, records
        self.done: dict[int, Array] = {}

    def get(self, number: int, depth: int = 0) -> Array:
        """The elements of a record that follows from floats alone."""
        if number in self.done:
            return self.done[number]
        if not 0 <= number < len(self.records) or depth > 64:
            raise ProgramError("a record refers to one that is not there, or in a circle")
        record = self.records[number]
        if record.op == SAME:
            value: Array = self.base.array(DTYPES[record.dtype], record.count, record.base)
        elif record.op == GIVEN:
            value = np.array(record.words, dtype="<u4").view("<f4")
        elif record.op == REFER:
            value = self.get(record.one, depth + 1)
        elif record.op == PRODUCT:
            one, two = self.get(record.one, depth + 1), self.get(record.two, depth + 1)
            value = predictors.flush(predictors.flush(one) * predictors.flush(two))
        elif record.op == PEAKED:
            low, high = (predictors.flush(self.get(n, depth + 1)) for n in (record.one, record.two))
            value = predictors.flush(np.maximum(np.abs(low), np.abs(high)) / np.float32(127))
        elif record.op == RANGED:
            low, high = (predictors.flush(self.get(n, depth + 1)) for n in (record.one, record.two))
            value = predictors.flush(predictors.flush(high - low) / np.float32(255))
        elif record.op in (PEAK, LOWEST, HIGHEST):
            value = predictors.reduce(self.base, record)
        else:
            raise ProgramError("an operand is not known yet")
        if len(value) != record.count:
            raise ProgramError("an operand has another number of elements")
        self.done[number] = value
        return value


def predicted(values: Values, number: int) -> tuple[Array, Array | None]:
    """Integer prediction of QUANTISED, BIAS, RESCALED, CODES, CAST; fractions for CODES."""
    record, base = values.records[number], values.base
    if record.op == CODES:
        guess, fraction = predictors.codes(base, record)
        return guess.reshape(-1), None if fraction is None else fraction.reshape(-1)
    if record.op == CAST:
        return predictors.ordered(predictors.cast(base, record), 16), None
    if record.op == PRUNED:
        return predictors.ordered(predictors.pruned(base, record), 32), None
    make = {QUANTISED: predictors.quantise, BIAS: predictors.bias, RESCALED: predictors.rescale}[record.op]
    return make(base, record, values.get(record.one)), None


def encode(
    read: ReadBase, target: bytes, place: Place, records: list[Record], level: int
) -> tuple[bytes, dict[str, int]]:
    """The program that writes `target`, and its parts' sizes.

    Raises ValueError when decoders would not take what the records ask for.
    """
    coder = Coder(limit=_RECORD_LIMIT, budget=decisions(len(target)))
    code_records(coder, records, len(target), place.offset)
    pools = {name: Pool(kind) for name, kind in KINDS.items()}
    base = operands(read, len(target))
    values = Values(base, records)
    for number, record in enumerate(records):
        if record.op in (FLOAT, PLAIN):
            kind = DTYPES[record.dtype]
            values.done[number] = np.frombuffer(target, kind, count=record.count, offset=record.at)
    plain = 0
    for number, record in enumerate(records):
        if record.op == GIVEN:
            continue
        kind = DTYPES[record.dtype]
        wanted = np.frombuffer(target, kind, count=record.count, offset=record.at)
        if record.op == FLOAT:
            bits = 8 * kind.itemsize
            guess = predictors.floats(base, record)
            words = wanted.view(f"<u{kind.itemsize}")
            difference = predictors.ordered(words, bits) - predictors.ordered(guess, bits)
            pool = pools[residuals.float_pool(record)]
            residuals.put_tokens(pool, residuals.float_contexts(record, guess), difference)
        elif record.op == PLAIN:
            contexts = residuals.plain_contexts(record, plain)
            plain += 1
            residuals.put_plain(pools["plain"], record, contexts, wanted.view("<u4"))
        elif record.residual in (POOL, SPARSE):
            ints, fractions = predicted(values, number)
            actual = predictors.ordered(wanted, 16) if record.op == CAST else wanted.astype(np.int64)
            if record.residual == SPARSE:
                residuals.put_sparse(pools["gaps"], pools["sizes"], record, actual - ints)
            elif record.op in (BIAS, RESCALED, CAST):
                residuals.put_tokens(pools["wide"], residuals.wide_contexts(record), actual - ints)
            else:
                residuals.put_codes(pools["codes"], residuals.code_contexts(record, fractions), actual - ints)
    return _joined(base, target, place, records, coder.finish(), pools, level)


def _joined(
    base: Operands,
    target: bytes,
    place: Place,
    records: list[Record],
    coded: bytes,
    pools: dict[str, Pool],
    level: int,
) -> tuple[bytes, dict[str, int]]:
    sizes = {"records": len(coded)}
    parts, head, mask = [coded], bytearray(), 0
    members: dict[str, list[Record]] = {name: [] for name in pools}
    for record in records:
        if record.op == FLOAT:
            members[residuals.float_pool(record)].append(record)
        elif record.residual == POOL and record.op in (QUANTISED, CODES):
            members["codes"].append(record)
    for index, (name, pool) in enumerate(pools.items()):
        if pool.symbols:
            mask |= 1 << index
            packed = pool.encode(residuals.groups(members[name]) or None)
            parts += packed
            head += b"".join(varint.encode(value) for value in (*map(len, packed), *pool.counts()))
            sizes[name] = sum(map(len, packed))
            sizes[name + " tables"] = len(packed[0])
    frame = skeletons.encode(*_known(base, place, records), outside(target, records), level)
    sizes["skeleton"] = len(frame)
    start = b"".join(
        (
            varint.encode(len(coded)),
            varint.encode_signed(place.window_start - place.offset),
            varint.encode(place.window_length),
            bytes([mask]),
        )
    )
    return start + bytes(head) + b"".join(parts) + frame, sizes


def _known(base: Operands, place: Place, records: list[Record]) -> tuple[bytes, bytes]:
    """The base's window without the arrays that records read, and all of it."""
    window = base.bytes(place.window_start, place.window_length) if place.window_length else b""
    return outside(window, _shadow(records, place)), window


def _shadow(records: list[Record], place: Place) -> list[Record]:
    """The parts of the window that records read as arrays: those bytes are no use to the skeleton."""
    ranges = []
    for record in records:
        kind = F32 if record.op in (QUANTISED, BIAS, CAST, PRUNED) else record.dtype
        if record.op in (SELF, GIVEN, PEAK, LOWEST, HIGHEST) or record.base < 0:
            continue
        start = record.base - place.window_start
        end = start + record.count * DTYPES[kind].itemsize
        start, end = max(0, start), min(place.window_length, end)
        if start < end:
            ranges.append(Record(SAME, U8, start, end - start))
    kept: list[Record] = []
    for item in sorted(ranges, key=lambda record: (record.at, -record.length)):
        if not kept or item.at >= kept[-1].at + kept[-1].length:
            kept.append(item)
    return kept


@dataclass(frozen=True)
class Opened:
    """A program taken apart: its records, for each pool its parts and counts, and the coded skeleton."""

    place: Place
    records: list[Record]
    index: dict[str, list[int]]
    raw: dict[str, list[bytes]]
    record_bytes: int
    skeleton: bytes


def open_body(body: bytes, offset: int, length: int) -> Opened:
    """Reads the records and cuts the rest. Raises ProgramError, SluiceError(DELTA_INVALID)."""
    reader = varint.Reader(body, "a program")
    record_bytes = reader.varint()
    window_start, window_length = offset + reader.signed(), reader.varint()
    if window_length > limits.MAX_WINDOW_BYTES:
        raise ProgramError("a program's window is over its limit")
    mask = reader.byte()
    index = {name: [reader.varint() for _ in range(5)] for at, name in enumerate(KINDS) if mask >> at & 1}
    coder = Coder(reader.take(record_bytes), _RECORD_LIMIT, decisions(length))
    records = code_records(coder, None, length, offset)
    raw = {name: [reader.take(size) for size in counts[:3]] for name, counts in index.items()}
    place = Place(offset, length, window_start, window_length)
    return Opened(place, records, index, raw, record_bytes, reader.take(reader.left))


def decode(read: ReadBase, body: bytes, offset: int, length: int) -> bytes:
    """The `length` bytes of the target at `offset` that a program writes.

    Raises ProgramError, or another arithmetic or look-up error, for what no encoder writes; SluiceError as
    `read` and `open_body` do.
    """
    opened = open_body(body, offset, length)
    base = operands(read, length)
    values = Values(base, opened.records)
    _decode_floats(values, opened.index, opened.raw)
    for number, record in enumerate(opened.records):
        if record.op in _FOLLOWING:
            values.get(number)
    _decode_integers(values, opened.index, opened.raw)
    size = length - sum(record.length for record in opened.records)
    between = skeletons.decode(*_known(base, opened.place, opened.records), opened.skeleton, size)
    if len(between) != size:
        raise ProgramError("a program's skeleton has another size than its records leave")
    return _woven(values, between, length)


def _woven(values: Values, between: bytes, length: int) -> bytes:
    out = bytearray()
    used = 0
    for number, record in enumerate(values.records):
        if record.op == GIVEN:
            continue
        gap = record.at - len(out)
        out += between[used : used + gap]
        used += gap
        if record.op == SELF:
            if not 0 <= record.base <= record.at - record.length:
                raise ProgramError("a copy reads what is not written yet")
            out += out[record.base : record.base + record.length]
        else:
            out += np.ascontiguousarray(values.done.pop(number)).tobytes()
    out += between[used:]
    if len(out) != length:
        raise ProgramError("a program writes another size than its block has")
    return bytes(out)


def _open(
    name: str, contexts: list[Array], index: dict[str, list[int]], raw: dict[str, list[bytes]],
    members: list[Record] | None = None,
) -> OpenPool | None:  # fmt: skip
    if name not in index:
        if contexts:
            raise ProgramError("a record takes from a pool that is not there")
        return None
    pool = open_pool(KINDS[name], contexts, raw[name], residuals.groups(members) if members else None)
    pool.split(index[name][3], index[name][4])
    return pool


def _decode_floats(values: Values, index: dict[str, list[int]], raw: dict[str, list[bytes]]) -> None:
    records = values.records
    for name, dtypes in (("float", (F32,)), ("half", (F16, BF16))):
        mine = [n for n, record in enumerate(records) if record.op == FLOAT and record.dtype in dtypes]
        guesses = {n: predictors.floats(values.base, records[n]) for n in mine}
        pool = _open(
            name,
            [residuals.float_contexts(records[n], guesses[n]) for n in mine],
            index,
            raw,
            [records[n] for n in mine],
        )
        for n in mine:
            assert pool is not None
            kind = DTYPES[records[n].dtype]
            bits = 8 * kind.itemsize
            word = predictors.ordered(guesses.pop(n), bits) + residuals.get_tokens(pool, records[n].count)
            values.done[n] = predictors.unordered(word, bits).astype(f"<u{kind.itemsize}").view(kind)
    mine = [n for n, record in enumerate(records) if record.op == PLAIN]
    contexts = [residuals.plain_contexts(records[n], place) for place, n in enumerate(mine)]
    pool = _open("plain", contexts, index, raw)
    for n in mine:
        assert pool is not None
        values.done[n] = residuals.get_plain(pool, records[n]).view("<f4")


def _decode_integers(values: Values, index: dict[str, list[int]], raw: dict[str, list[bytes]]) -> None:
    records = values.records
    mine = [
        n for n, record in enumerate(records) if record.op in (QUANTISED, BIAS, RESCALED, CODES, CAST, PRUNED)
    ]
    guess = {n: predicted(values, n) for n in mine}
    wide = [n for n in mine if records[n].residual == POOL and records[n].op in (BIAS, RESCALED, CAST)]
    codes = [n for n in mine if records[n].residual == POOL and records[n].op in (QUANTISED, CODES)]
    sparse = [n for n in mine if records[n].residual == SPARSE]
    wide_pool = _open("wide", [residuals.wide_contexts(records[n]) for n in wide], index, raw)
    contexts = [residuals.code_contexts(records[n], guess[n][1]) for n in codes]
    code_pool = _open("codes", contexts, index, raw, [records[n] for n in codes])
    pairs = [residuals.sparse_contexts(records[n]) for n in sparse]
    gaps = _open("gaps", [pair[0] for pair in pairs], index, raw)
    sizes = _open("sizes", [pair[1] for pair in pairs], index, raw)
    for n in mine:
        record, value = records[n], guess.pop(n)[0]
        if record.residual == EXCEPTIONS:
            for place, difference in record.exceptions:
                if abs(difference) >= 1 << 8 * DTYPES[record.dtype].itemsize:
                    raise ProgramError("an exception does not fit its record")
                value[place] += difference
        elif record.residual == SPARSE:
            assert gaps is not None
            assert sizes is not None
            places, differences = residuals.get_sparse(gaps, sizes, record)
            value[places] += differences.astype(value.dtype)
        elif record.residual == POOL and record.op in (QUANTISED, CODES):
            assert code_pool is not None
            value += residuals.get_codes(code_pool, record.count)
        elif record.residual == POOL:
            assert wide_pool is not None
            value += residuals.get_tokens(wide_pool, record.count)
        if record.op == PRUNED:
            values.done[n] = predictors.unordered(value, 32).astype("<u4").view("<f4")
            continue
        if record.op == CAST:
            value = predictors.unordered(value, 16)
        values.done[n] = value.astype(DTYPES[record.dtype])
