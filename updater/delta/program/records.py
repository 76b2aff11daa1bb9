"""Records: arrays of the target and how each is made. The part of a delta that both sides run alike.

A record writes `count` elements of `dtype` at byte `at` of the target. Its operation predicts them from the
base,
from parameters or from other records; a residual follows where the operation has one: as symbols in a pool,
or as a
short list of exceptions. Arrays are looked at as matrices of `rows` x count/rows.

Arithmetic: integers, or single IEEE 754 operations on float32/float64 arrays (multiply, divide, rint),
which NumPy rounds correctly on every machine; subnormal float32 operands and results count as zero, so that a
flush-to-zero mode cannot matter (but in STEPPED, which keeps them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program import activity, affine, bits, layout, steps
from updater.delta.program.activity import Activity
from updater.delta.program.affine import Affine
from updater.delta.program.arithmetic import Coder
from updater.delta.program.fields import Fields
from updater.delta.program.layout import Axes
from updater.delta.program.operands import ProgramError, within
from updater.delta.program.pools import Kind
from updater.delta.program.row_bits import RowBits

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
    THINNED,
    MASKED,
    SPANNED,
    ZEROS,
    STEPPED,
) = range(23)
NAMES = (
    *("same", "refer", "product", "peak", "lowest", "highest", "quantised", "bias", "rescaled", "float"),
    *("plain", "codes", "cast", "peaked", "self", "ranged", "pruned", "given", "thinned", "masked"),
    *("spanned", "zeros", "stepped"),
)
F32, I8, U8, I32, I64, F16, BF16, I4, U4 = range(9)
# As arrays hold them; I4 and U4 lie two to a byte in files (see nibbles.py).
DTYPES = tuple(map(np.dtype, ("<f4", "i1", "u1", "<i4", "<i8", "<u2", "<u2", "i1", "u1")))
BITS = (32, 8, 8, 32, 64, 16, 16, 4, 4)
NIBBLES = (I4, U4)

RANGES = {
    I8: (-128, 127),
    U8: (0, 255),
    I32: (-(1 << 31), (1 << 31) - 1),
    I4: (-8, 7),
    U4: (0, 15),
}  # of codes

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
MAX_ZERO_POINT = 1 << 9  # of codes
MAX_THRESHOLD = 1 << 31  # of a magnitude's word
# The element types that an operation may have; any where it is not listed.
_ANY = frozenset((F32, I8, U8, I32, I64, F16, BF16))
_FLOATS = frozenset((F32,))
_CODES = frozenset((I8, U8, I4, U4))
ZEROING = (PRUNED, THINNED, MASKED)
SOURCES = (F32, F16, BF16)
MAX_HALVES = 1 << 17
MAX_PHASE = 1 << 31
MAX_GROUP = 64  # elements of which THINNED keeps some; a power of two


def bytes_of(dtype: int, count: int) -> int:
    """Bytes of `count` elements in a file."""
    return (count * BITS[dtype] + 7) // 8


@dataclass
class Record:
    """One array; fields that an operation does not use stay at their defaults.

    Attributes:
        op, dtype, at, count, rows: see the module.
        base: byte offset of the operand in the base.
        one, two: numbers of records that are operands (counted in the order of the list).
        by_rows: whether per-channel operands run along rows (else along columns).
        zero, base_zero: zero points; for CAST zero 1 clamps as ONNX's converter does; for PRUNED zero is the
            least magnitude that is kept, for THINNED how many elements of each group stay; base_zero 1 keeps
            the signs of what becomes zero.
        source: element type of the base where floats of it are read: F32, F16 or BF16, widened to float32.
        axes: where the operand's elements lie behind `base`; () for one behind the other.
        group: for THINNED: elements of a group, along rows or down columns.
        silent: whether the record writes nothing and is only referred to, as every GIVEN is.
        halves: for PEAK and SPANNED: what is divided by, in halves.
        phase: for QUANTISED along the columns of one row: the channel of its first element.
        zeros: for QUANTISED: whether record two has a zero point for each scale.
        gain_bits: binary digits of `gains`, 0 for none.
        gains: per row or column, in units of 2^-gain_bits.
        affine: for FLOAT of float32: factors and offsets per row or column, instead of gains.
        activity: levels for contexts.
        residual: EXACT, EXCEPTIONS, POOL or SPARSE.
        exceptions: (index, value) pairs for EXCEPTIONS, and of STEPPED.
        used: for SPARSE and POOL: which rows have changes, empty for all; for MASKED: which rows or columns
            are zero.
        changed: for SPARSE: how many elements changed.
        steps: for STEPPED: [1], or [rows] by rows, float64 of 12 significant bits; what a code of 1 adds.
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
    affine: Affine | None = None
    activity: Activity | None = None
    residual: int = EXACT
    exceptions: list[tuple[int, int]] = field(default_factory=list)
    used: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    changed: int = 0
    words: list[int] = field(default_factory=list)
    steps: steps.Reals = field(default_factory=lambda: np.empty(0))
    source: int = F32
    axes: Axes = ()
    group: int = 0
    silent: bool = False
    halves: int = 254
    zeros: bool = False
    phase: int = 0

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
        return 0 if self.op == GIVEN or self.silent else bytes_of(self.dtype, self.count)

    @property
    def widens(self) -> bool:
        """Whether the operand is read as floats of type `source`."""
        return self.op in _WIDENING or (self.op == FLOAT and self.dtype == F32)

    @property
    def operand_dtype(self) -> int:
        """The element type of the operand in the base."""
        return self.source if self.widens else self.dtype

    @property
    def operand_length(self) -> int:
        """Bytes of the base from the operand's first element to its last."""
        count = self.count * (self.two if self.op in REDUCING else 1)
        return bytes_of(self.operand_dtype, layout.cover(self.axes) if self.axes else count)


_KINDS_OF = {
    **dict.fromkeys((PRODUCT, PEAK, LOWEST, HIGHEST, PLAIN, PEAKED, RANGED, GIVEN, SPANNED), _FLOATS),
    **dict.fromkeys(ZEROING, frozenset((F32, F16, BF16, I8))),
    **dict.fromkeys((QUANTISED, CODES, ZEROS), _CODES),
    **dict.fromkeys((BIAS, RESCALED), frozenset((I32,))),
    **dict.fromkeys((FLOAT, CAST, STEPPED), frozenset((F32, F16, BF16))),
}
REDUCING = (PEAK, LOWEST, HIGHEST, SPANNED, ZEROS)
_WIDENING = frozenset((*REDUCING, QUANTISED, BIAS, CAST))  # and FLOAT of float32
_LAID = frozenset((SAME, *REDUCING, QUANTISED, BIAS, RESCALED, FLOAT, CODES, CAST, *ZEROING, STEPPED))
_BASED = _LAID | {SELF}


def code_records(
    coder: Coder,
    records: list[Record] | None,
    target_size: int,
    base_start: int,
    rows: RowBits,
    share: Share,
) -> list[Record]:
    """Sends records in the order of their places, or reads them.

    Args:
        coder: either direction.
        records: what is sent; None to read.
        target_size: bytes that the records may write.
        base_start: where the base is thought to go on before the first record.
        rows: in the coder's direction.
        share: of the base, for what the records read.

    Raises ProgramError for what no encoder sends.
    """
    fields = Fields(coder)
    total = coder.unsigned("records", len(records or ()))
    within("records", total, limits.MAX_INSTRUCTIONS)
    out: list[Record] = []
    end, base_end, runs, unwritten = 0, base_start, 0, 0
    last_key: tuple[int, int] = (0, 0)
    for number in range(total):
        given = records[number] if records else Record(0, 0, 0, 1)
        op = _symbol(coder, ("op", last_key[0], last_key[1] > 1), given.op, 5)
        dtype = _symbol(coder, ("dtype", op), min(given.dtype, I4), 3)
        if dtype == I4:
            dtype += coder.bit(("unsigned", op), int(given.dtype == U4))
        silent = op in REDUCING and bool(coder.bit("silent", int(given.silent)))
        count = fields.number(("count", op, dtype, last_key), given.count)
        gap = fields.number(("gap", op, dtype, last_key), given.at - end)
        record = Record(op, dtype, end + gap, count, silent=silent)
        _check_place(record, gap, target_size)
        unwritten += count if silent else 0
        if unwritten > target_size // 4:
            raise ProgramError("a program has more values that are not written than it may")
        if op == GIVEN:
            record.words = [coder.bits(given.words[i] if records else 0, 32) for i in range(count)]
        if count > 1:
            record.rows = fields.number(("rows", op, count), given.rows)
            if record.rows < 1 or count % record.rows:
                raise ProgramError("a record's rows do not divide its elements")
        base_end = _code_base(fields, record, given, base_end, record.at - end)
        _code_operands(fields, record, given, number, target_size)
        if op in _LAID and record.operand_dtype not in NIBBLES and coder.bit("laid", int(bool(given.axes))):
            _code_axes(fields, record, given)
            runs += layout.runs(record.axes)
            within("runs of operands", runs, limits.MAX_OPERAND_RUNS)
        share.take(record)
        _code_residual(fields, record, given, records is not None, rows)
        out.append(record)
        end = record.at + record.length
        last_key = (op, min(count, 2))
    return out


class Share:
    """The share of the base that a program may look at: each operand's elements, and the window, once.

    Args:
        target_size: bytes that the program writes.
    """

    def __init__(self, target_size: int) -> None:
        self._limit = limits.OPERAND_EXPANSION * target_size + limits.OPERAND_OVERHEAD_BYTES
        self._bytes = 0

    def take(self, record: Record) -> None:
        """Counts what a record reads. Raises LimitError."""
        if record.op in _LAID:
            each = record.two if record.op in REDUCING else 1
            self.add(bytes_of(record.operand_dtype, record.count * each))
        if record.op == RESCALED:  # as many old scales as elements, at most
            self.add(record.count * DTYPES[F32].itemsize)

    def add(self, length: int) -> None:
        """Counts bytes. Raises LimitError."""
        self._bytes += length
        within("bytes of base", self._bytes, self._limit)


def _check_place(record: Record, gap: int, target_size: int) -> None:
    if record.op > STEPPED or record.dtype > U4 or record.dtype not in _KINDS_OF.get(record.op, _ANY):
        raise ProgramError("a record has an operation or type that is not known")
    most = target_size * (2 if record.dtype in NIBBLES else 1)
    if not 1 <= record.count <= most or gap < 0 or record.at + record.length > target_size:
        raise ProgramError("a record lies outside the target")


def _code_base(fields: Fields, record: Record, given: Record, base_end: int, shift: int) -> int:
    """The place in the base; gives where the base is thought to go on."""
    op = record.op
    if op not in _BASED and not fields.coder.bit(("counterpart", op), int(given.base >= 0)):
        record.base = -1
        return base_end
    if record.widens and fields.coder.bit("narrow", int(given.source != F32)):
        record.source = BF16 if fields.coder.bit("bfloat", int(given.source == BF16)) else F16
    if op == CAST and record.dtype == record.source:
        raise ProgramError("a cast changes nothing")
    guess = base_end + shift
    record.base = guess + fields.number(("base", op, record.dtype), given.base - guess)
    if op in (*REDUCING, SELF):
        return base_end
    return record.base + bytes_of(record.operand_dtype, record.count)


def _code_axes(fields: Fields, record: Record, given: Record) -> None:
    """Sizes but the first, which follows, and strides of an operand's axes."""
    total = record.count * (record.two if record.op in REDUCING else 1)
    number = _symbol(fields.coder, "axes", len(given.axes) - 1, 2) + 1
    wanted = given.axes or ((0, 0),) * number
    sizes, left = [1] * number, total
    for place in range(1, number):
        size = fields.number(("size", number, place, total), wanted[place][0])
        if size < 1 or left % size:
            raise ProgramError("an operand's axes do not divide its elements")
        sizes[place], left = size, left // size
    sizes[0] = left
    strides = [fields.number(("stride", number, place, total), wanted[place][1]) for place in range(number)]
    if min(strides) < 0 or max(strides) > layout.MAX_STRIDE:
        raise ProgramError("an operand's stride lies outside its range")
    record.axes = tuple(zip(sizes, strides))


def _code_operands(fields: Fields, record: Record, given: Record, number: int, target_size: int) -> None:
    op = record.op
    if op in (REFER, PRODUCT, QUANTISED, BIAS, RESCALED, PEAKED, RANGED, ZEROS):
        record.one = number - fields.number(("one", op), number - given.one)
    if op == QUANTISED:
        record.zeros = bool(fields.coder.bit("zeros", int(given.zeros)))
    if op in (PRODUCT, PEAKED, RANGED) or record.zeros:
        record.two = number - fields.number(("two", op), number - given.two)
    if op == RESCALED:  # the place of the old scales
        record.two = fields.number(("two", op, record.count), given.two, near=record.base)
    if op in REDUCING:
        _code_reduction(fields, record, given, target_size)
    if op in (*REDUCING, QUANTISED, BIAS, RESCALED, FLOAT, CODES, THINNED, MASKED, STEPPED):
        record.by_rows = bool(fields.coder.bit(("by rows", op), int(given.by_rows)))
    if op == QUANTISED and record.rows == 1 and not record.by_rows:
        record.phase = fields.number(("phase", op), given.phase)
        if not 0 <= record.phase <= MAX_PHASE:
            raise ProgramError("a record begins with a channel outside its range")
    if op == THINNED:
        record.group = 1 << _symbol(fields.coder, "group", given.group.bit_length() - 1, 3)
        side = record.columns if record.by_rows else record.rows
        if not 2 <= record.group <= MAX_GROUP or side % record.group:
            raise ProgramError("a record's groups do not divide its rows")
    _code_zeros(fields, record, given)


def _code_zeros(fields: Fields, record: Record, given: Record) -> None:
    """Zero points, thresholds, and the flags that go with them."""
    op = record.op
    if op == CAST and record.dtype == F16:
        record.zero = fields.coder.bit("clamps", given.zero)
    if op in (QUANTISED, CODES, *ZEROING):
        record.zero = fields.number(("zero", op), given.zero)
        if op == CODES:
            record.base_zero = fields.number(("base zero", op), given.base_zero)
        if op in ZEROING and record.dtype != I8:
            record.base_zero = fields.coder.bit("signs", given.base_zero)
        most = MAX_THRESHOLD if op in ZEROING else MAX_ZERO_POINT
        if max(abs(record.zero), abs(record.base_zero)) > most:
            raise ProgramError("a zero point or threshold lies outside its range")


def _code_reduction(fields: Fields, record: Record, given: Record, target_size: int) -> None:
    """Elements of the base that go into one, what they are divided by, and whether there are exceptions."""
    op = record.op
    record.two = fields.number(("two", op, record.count), given.two)
    if not 1 <= record.two <= 8 * target_size:
        raise ProgramError("a record reduces more elements than its block allows")
    if op in (PEAK, SPANNED):
        record.halves = fields.number(("halves", op), given.halves, near=254)
        if not 1 <= record.halves <= MAX_HALVES:
            raise ProgramError("a record divides by a number outside its range")
    record.residual = EXCEPTIONS if fields.coder.bit("inexact", int(bool(given.exceptions))) else EXACT


def _symbol(coder: Coder, context: object, value: int, bits: int) -> int:
    out = 1
    for shift in range(bits - 1, -1, -1):
        out = out << 1 | coder.bit((context, out), value >> shift & 1)
    return out - (1 << bits)


def _code_residual(fields: Fields, record: Record, given: Record, writing: bool, rows: RowBits) -> None:
    coder = fields.coder
    if record.op in (QUANTISED, BIAS, RESCALED, CODES, CAST, FLOAT, PLAIN, *ZEROING, STEPPED):
        record.residual = _symbol(coder, ("residual", record.op), given.residual, 2)
    if record.op in (FLOAT, PLAIN, STEPPED) and record.residual != POOL:
        raise ProgramError("a record of floats has no residual")
    if record.residual == SPARSE and record.op not in (CODES, QUANTISED):
        raise ProgramError("a record that is no 8-bit code has a sparse residual")
    if record.residual == POOL and (record.op in ZEROING or (record.op, record.dtype) == (CAST, F32)):
        raise ProgramError("a record of exact words has a residual that it cannot have")
    if record.residual == EXCEPTIONS or record.op == STEPPED:
        _code_exceptions(coder, record, given, writing)
    if record.op == CODES or (record.op == FLOAT and record.dtype == F32):
        _code_gains(coder, record, given, writing)
    if record.residual == SPARSE:
        record.changed = coder.unsigned("changed", given.changed)
        if not 1 <= record.changed <= record.count:
            raise ProgramError("a record changes no elements or more than it has")
    if record.op == MASKED:
        _code_used(fields, record, given, rows, record.rows if record.by_rows else record.columns)
        if not len(record.used):
            raise ProgramError("a record marks no row")
    elif record.residual == SPARSE or (record.residual == POOL and record.op != PLAIN):
        _code_used(fields, record, given, rows, record.rows)
    if record.op == STEPPED:
        sides = record.rows if record.by_rows else 1
        used = record.used if record.by_rows else record.used[:0]
        record.steps = steps.code(coder, sides, used, given.steps if writing else None)
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
        if last >= record.count or abs(record.exceptions[-1][1]) >> BITS[record.dtype]:
            raise ProgramError("an exception lies outside its record or its elements' range")
        last += 1


def _code_gains(coder: Coder, record: Record, given: Record, writing: bool) -> None:
    choice = GAIN_BITS.index(given.gain_bits)
    if given.affine is not None:
        choice = len(GAIN_BITS) + affine.DIGITS.index(given.affine.digits)
    choice = _symbol(coder, ("gain bits", record.op), choice, 3)
    size = record.rows if record.by_rows else record.columns
    if choice >= len(GAIN_BITS):
        if record.op != FLOAT or choice - len(GAIN_BITS) >= len(affine.DIGITS):
            raise ProgramError("a record's gains have an unknown precision")
        record.affine = affine.code(coder, affine.DIGITS[choice - len(GAIN_BITS)], size, given.affine)
        return
    record.gain_bits = GAIN_BITS[choice]
    if not record.gain_bits:
        return
    near = 1 << record.gain_bits
    record.gains = np.empty(size, dtype=np.int64)
    for place in range(size):
        value = int(given.gains[place]) if writing else 0
        value = near + coder.signed(("gain", record.gain_bits), value - near)
        if abs(value) > MAX_GAIN:
            raise ProgramError("a gain lies outside its range")
        record.gains[place] = value


def _code_used(fields: Fields, record: Record, given: Record, rows: RowBits, size: int) -> None:
    """Which of `size` rows are marked: how many here, the gaps between as Golomb-Rice codes in `rows`."""
    coder = fields.coder
    if not coder.bit(("rows used", record.residual), int(len(given.used) > 0)):
        return
    gaps = np.diff(np.flatnonzero(given.used), prepend=-1) - 1
    mean = int(gaps.mean()) if len(gaps) else 0
    low = fields.number(("row bits", record.residual), max(0, mean.bit_length() - 1))
    count = coder.unsigned("used", len(gaps))
    zeros = coder.unsigned("row zeros", int((gaps >> low).sum()) if len(gaps) else 0)
    if not 0 <= low <= bits.MAX_WIDTH or not 1 <= count <= size or zeros > size:
        raise ProgramError("a record names rows that it does not have")
    places = np.cumsum(rows.code(gaps, low, count, zeros) + 1) - 1
    if places[-1] >= size:
        raise ProgramError("a row lies outside its record")
    record.used = np.zeros(size, dtype=bool)
    record.used[places] = True
