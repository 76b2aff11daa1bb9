"""Records: arrays of the target and how each is made. The part of a delta that both sides run alike.

A record writes `count` elements of `dtype` at byte `at` of the target. Its operation predicts them from the
base,
from parameters or from other records; a residual follows where the operation has one: as symbols in a pool,
or as a
short list of exceptions. Arrays are looked at as matrices of `rows` x count/rows.

Arithmetic: integers, or single IEEE 754 operations on float32/float64 arrays (multiply, divide, rint),
which NumPy
rounds correctly on every machine; subnormal float32 operands and results count as zero, so that a
flush-to-zero mode
cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import activity, bits
from updater.delta.program.activity import Activity
from updater.delta.program.arithmetic import Coder
from updater.delta.program.bits import BitReader
from updater.delta.program.operands import ProgramError, within
from updater.delta.program.pools import Kind

Array = NDArray[Any]
Ints = NDArray[np.int64]

(
    SAME,
    REFER,
    PRODUCT,
    PEAK,
    LOWEST,
    HIGHEST,
    QUANTISED,
    BIAS,
    RESCALED,
    FLOAT,
    PLAIN,
    CODES,
    CAST,
    PEAKED,
    SELF,
    RANGED,
    PRUNED,
    GIVEN,
) = range(18)
NAMES = (
    *("same", "refer", "product", "peak", "lowest", "highest", "quantised", "bias", "rescaled", "float"),
    *("plain", "codes", "cast", "peaked", "self", "ranged", "pruned", "given"),
)
F32, I8, U8, I32, I64, F16, BF16 = range(7)
DTYPES = (np.dtype("<f4"), np.dtype("i1"), np.dtype("u1"), np.dtype("<i4"), np.dtype("<i8"), np.dtype("<u2"),
          np.dtype("<u2"))  # fmt: skip

RANGES = {I8: (-128, 127), U8: (0, 255), I32: (-(1 << 31), (1 << 31) - 1)}  # of codes

# How the residual comes: none, exceptions, a pool, or sparse in pools.
EXACT, EXCEPTIONS, POOL, SPARSE = range(4)

CODE_EDGE = 100  # residuals of codes beyond +-100 escape
FRACTIONS = 32
CODE_LEVELS = 32
KINDS = {
    "float": Kind(240, 160),
    "half": Kind(240, 160),
    "plain": Kind(249, 96),
    "wide": Kind(240, 64),
    "codes": Kind(2 * CODE_EDGE + 3, FRACTIONS * CODE_LEVELS),
    "gaps": Kind(200, 64),
    "sizes": Kind(64, 32),
}
GAIN_BITS = (0, 7, 9, 11, 14)
MAX_GAIN = 1 << 20
MAX_ZERO_POINT = 1 << 9  # of CODES
# The element types that an operation may have; any where it is not listed.
_ANY = frozenset((F32, I8, U8, I32, I64, F16, BF16))
_FLOATS = frozenset((F32,))
_CODES = frozenset((I8, U8))


@dataclass
class Record:
    """One array; fields that an operation does not use stay at their defaults.

    Attributes:
        op, dtype, at, count, rows: see the module.
        base: byte offset of the operand in the base.
        one, two: numbers of records that are operands (counted in the order of the list).
        by_rows: whether per-channel operands run along rows (else along columns).
        zero, base_zero: zero points; for CAST zero 1 clamps as ONNX's converter does; for PRUNED zero is the
            least magnitude word that is kept, base_zero 1 keeps the signs of what becomes zero.
        gain_bits: binary digits of `gains`, 0 for none.
        gains: per row or column, in units of 2^-gain_bits.
        activity: levels for contexts.
        residual: EXACT, EXCEPTIONS, POOL or SPARSE.
        exceptions: (index, value) pairs for EXCEPTIONS.
        used: for SPARSE and POOL: which rows have changes; empty for all.
        changed: for SPARSE: how many elements changed.
        words: for GIVEN: the float32 words. Such a record writes nothing; others refer to it.
    """

    op: int
    dtype: int
    at: int
    count: int
    rows: int = 1
    base: int = 0
    one: int = 0
    two: int = 0
    by_rows: bool = True
    zero: int = 0
    base_zero: int = 0
    gain_bits: int = 0
    gains: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    activity: Activity | None = None
    residual: int = EXACT
    exceptions: list[tuple[int, int]] = field(default_factory=list)
    used: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    changed: int = 0
    words: list[int] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return self.count // self.rows

    @property
    def based(self) -> bool:
        """Whether the base predicts its elements."""
        if self.op == CODES:
            return not self.gain_bits or bool(self.gains.any())
        return self.op not in (PLAIN, SELF, GIVEN)

    @property
    def length(self) -> int:
        return 0 if self.op == GIVEN else self.count * DTYPES[self.dtype].itemsize


class Fields:
    """Codes integers that often repeat what was last said in the same context."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self._last: dict[object, int] = {}

    def number(self, context: tuple[object, ...], value: int = 0, near: int | None = None) -> int:
        """A signed integer: as the last one in this context, or its difference to `near` (or to that one)."""
        last = self._last.get(context, 0)
        if self.coder.bit(("again", *context), int(value == last)):
            return last
        reference = last if near is None else near
        value = reference + self.coder.signed(("number", context[0]), value - reference)
        within("as a number of a record", abs(value), limits.MAX_RECORD_NUMBER)
        self._last[context] = value
        return value


_KINDS_OF = {
    **dict.fromkeys((PRODUCT, PEAK, LOWEST, HIGHEST, PLAIN, PEAKED, RANGED, PRUNED, GIVEN), _FLOATS),
    **dict.fromkeys((QUANTISED, CODES), _CODES),
    **dict.fromkeys((BIAS, RESCALED), frozenset((I32,))),
    FLOAT: frozenset((F32, F16, BF16)),
    CAST: frozenset((F16, BF16)),
}
_BASED = frozenset((SELF, SAME, PEAK, LOWEST, HIGHEST, QUANTISED, BIAS, RESCALED, FLOAT, CODES, CAST, PRUNED))


def code_records(
    coder: Coder, records: list[Record] | None, target_size: int, base_start: int, rows: RowBits
) -> list[Record]:
    """Sends records in the order of their places, or reads them.

    Args:
        coder: either direction.
        records: what is sent; None to read.
        target_size: bytes that the records may write.
        base_start: where the base is thought to go on before the first record.
        rows: in the coder's direction.

    Raises ProgramError for what no encoder sends.
    """
    fields = Fields(coder)
    total = coder.unsigned("records", len(records or ()))
    within("records", total, limits.MAX_INSTRUCTIONS)
    out: list[Record] = []
    end, base_end = 0, base_start
    last_key: tuple[int, int] = (0, 0)
    for number in range(total):
        given = records[number] if records else Record(0, 0, 0, 1)
        op = _symbol(coder, ("op", last_key[0], last_key[1] > 1), given.op, 5)
        dtype = _symbol(coder, ("dtype", op), given.dtype, 3)
        count = fields.number(("count", op, dtype, last_key), given.count)
        gap = fields.number(("gap", op, dtype, last_key), given.at - end)
        record = Record(op, dtype, end + gap, count)
        _check_place(record, gap, target_size)
        if op == GIVEN:
            record.words = [coder.bits(given.words[i] if records else 0, 32) for i in range(count)]
        if count > 1:
            record.rows = fields.number(("rows", op, count), given.rows)
            if record.rows < 1 or count % record.rows:
                raise ProgramError("a record's rows do not divide its elements")
        base_end = _code_base(fields, record, given, base_end, record.at - end)
        _code_operands(fields, record, given, number, target_size)
        _code_residual(fields, record, given, records is not None, rows)
        out.append(record)
        end = record.at + record.length
        last_key = (op, min(count, 2))
    return out


def _check_place(record: Record, gap: int, target_size: int) -> None:
    if record.op > GIVEN or record.dtype > BF16 or record.dtype not in _KINDS_OF.get(record.op, _ANY):
        raise ProgramError("a record has an operation or type that is not known")
    if not 1 <= record.count <= target_size or gap < 0 or record.at + record.length > target_size:
        raise ProgramError("a record lies outside the target")


def _code_base(fields: Fields, record: Record, given: Record, base_end: int, shift: int) -> int:
    """The place in the base; gives where the base is thought to go on."""
    op = record.op
    if op not in _BASED and not fields.coder.bit(("counterpart", op), int(given.base >= 0)):
        record.base = -1
        return base_end
    guess = base_end + shift
    record.base = guess + fields.number(("base", op, record.dtype), given.base - guess)
    if op in (PEAK, LOWEST, HIGHEST, SELF):
        return base_end
    width = 4 if op in (QUANTISED, BIAS, CAST) else DTYPES[record.dtype].itemsize
    return record.base + record.count * width


def _code_operands(fields: Fields, record: Record, given: Record, number: int, target_size: int) -> None:
    op = record.op
    if op in (REFER, PRODUCT, QUANTISED, BIAS, RESCALED, PEAKED, RANGED):
        record.one = number - fields.number(("one", op), number - given.one)
    if op in (PRODUCT, PEAKED, RANGED):
        record.two = number - fields.number(("two", op), number - given.two)
    if op == RESCALED:  # the place of the old scales
        record.two = fields.number(("two", op, record.count), given.two, near=record.base)
    if op in (PEAK, LOWEST, HIGHEST):  # elements of the base that go into one
        record.two = fields.number(("two", op, record.count), given.two)
        if not 1 <= record.two <= 8 * target_size:
            raise ProgramError("a record reduces more elements than its block allows")
    if op in (PEAK, LOWEST, HIGHEST, QUANTISED, BIAS, RESCALED, FLOAT, CODES):
        record.by_rows = bool(fields.coder.bit(("by rows", op), int(given.by_rows)))
    if op in (QUANTISED, CODES, CAST, PRUNED):
        record.zero = fields.number(("zero", op), given.zero)
        record.base_zero = fields.number(("base zero", op), given.base_zero)
        most = MAX_ZERO_POINT if op == CODES else 1 << 31
        if max(abs(record.zero), abs(record.base_zero)) > most:
            raise ProgramError("a zero point or threshold lies outside its range")


def _symbol(coder: Coder, context: object, value: int, bits: int) -> int:
    out = 1
    for shift in range(bits - 1, -1, -1):
        out = out << 1 | coder.bit((context, out), value >> shift & 1)
    return out - (1 << bits)


def _code_residual(fields: Fields, record: Record, given: Record, writing: bool, rows: RowBits) -> None:
    coder = fields.coder
    if record.op in (QUANTISED, BIAS, RESCALED, CODES, CAST, FLOAT, PLAIN, PRUNED):
        record.residual = _symbol(coder, ("residual", record.op), given.residual, 2)
    if record.op in (FLOAT, PLAIN) and record.residual != POOL:
        raise ProgramError("a record of floats has no residual")
    if record.residual == SPARSE and record.op not in (CODES, QUANTISED):
        raise ProgramError("a record that is no 8-bit code has a sparse residual")
    if record.residual == POOL and record.op == PRUNED:
        raise ProgramError("a pruned record has a residual that it cannot have")
    if record.residual == EXCEPTIONS:
        _code_exceptions(coder, record, given, writing)
    if record.op in (FLOAT, CODES):
        _code_gains(coder, record, given, writing)
    if record.residual == SPARSE:
        record.changed = coder.unsigned("changed", given.changed)
        if record.changed > record.count:
            raise ProgramError("a record changes more elements than it has")
    if record.residual == SPARSE or (record.residual == POOL and record.op != PLAIN):
        _code_used(fields, record, given, rows)
    if record.residual == POOL:
        record.activity = activity.code(
            coder, (record.rows, record.columns), record.used, given.activity if writing else None
        )


def _code_exceptions(coder: Coder, record: Record, given: Record, writing: bool) -> None:
    last = 0
    for index in range(coder.unsigned("exceptions", len(given.exceptions))):
        place, value = given.exceptions[index] if writing else (0, 0)
        last += coder.unsigned(("place", record.op), place - last)
        record.exceptions.append((last, coder.signed(("value", record.op), value)))
        if last >= record.count:
            raise ProgramError("an exception lies outside its record")
        last += 1


def _code_gains(coder: Coder, record: Record, given: Record, writing: bool) -> None:
    choice = _symbol(coder, ("gain bits", record.op), GAIN_BITS.index(given.gain_bits), 3)
    if choice >= len(GAIN_BITS):
        raise ProgramError("a record's gains have an unknown precision")
    record.gain_bits = GAIN_BITS[choice]
    if not record.gain_bits:
        return
    size = record.rows if record.by_rows else record.columns
    near = 1 << record.gain_bits
    record.gains = np.empty(size, dtype=np.int64)
    for place in range(size):
        value = int(given.gains[place]) if writing else 0
        value = near + coder.signed(("gain", record.gain_bits), value - near)
        if abs(value) > MAX_GAIN:
            raise ProgramError("a gain lies outside its range")
        record.gains[place] = value


def _code_used(fields: Fields, record: Record, given: Record, rows: RowBits) -> None:
    """Which rows a residual goes to: how many here, the gaps between them as Golomb-Rice codes in `rows`."""
    coder = fields.coder
    if not coder.bit(("rows used", record.residual), int(len(given.used) > 0)):
        return
    gaps = np.diff(np.flatnonzero(given.used), prepend=-1) - 1
    mean = int(gaps.mean()) if len(gaps) else 0
    low = fields.number(("row bits", record.residual), max(0, mean.bit_length() - 1))
    count = coder.unsigned("used", len(gaps))
    zeros = coder.unsigned("row zeros", int((gaps >> low).sum()) if len(gaps) else 0)
    if not 0 <= low <= bits.MAX_WIDTH or not 1 <= count <= record.rows or zeros > record.rows:
        raise ProgramError("a record names rows that it does not have")
    places = np.cumsum(rows.code(gaps, low, count, zeros) + 1) - 1
    if places[-1] >= record.rows:
        raise ProgramError("a row lies outside its record")
    record.used = np.zeros(record.rows, dtype=bool)
    record.used[places] = True


class RowBits:
    """The gaps between rows that change, of all records: gap >> low in unary, then the low bits.

    Args:
        data: what is read; None to write.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._reader = None if data is None else BitReader(data)
        self._fields: list[tuple[NDArray[Any], NDArray[np.uint8]]] = []

    def code(self, gaps: Ints, low: int, count: int, zeros: int) -> Ints:
        """Sends `count` gaps, or reads them."""
        if self._reader is None:
            unary = np.zeros(count + zeros, dtype=np.uint8)
            unary[np.cumsum((gaps >> low) + 1) - 1] = 1
            self._fields.append((unary, np.ones(len(unary), dtype=np.uint8)))
            self._fields.append((gaps & ((1 << low) - 1), np.full(count, low, dtype=np.uint8)))
            return gaps
        ones = np.flatnonzero(self._reader.same(1, count + zeros))
        if len(ones) != count or ones[-1] != count + zeros - 1:
            raise ProgramError("the gaps between rows are not as many as there should be")
        high = np.diff(ones, prepend=-1) - 1
        return (high << low) + self._reader.same(low, count).astype(np.int64)

    def finish(self) -> bytes:
        """The bits written; after reading, refuses what is left."""
        if self._reader is not None:
            self._reader.end()
        return bits.pack(self._fields)
