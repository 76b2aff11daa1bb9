"""Records and their fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.arithmetic import Arithmetic, budget
from edge_tests.conformance.plain.bits import Bits
from edge_tests.conformance.plain.fault import OVER_LIMIT, check

NAMES = (
    *("same", "refer", "product", "peak", "lowest", "highest", "quantised", "bias", "rescaled", "float"),
    *("plain", "codes", "cast", "peaked", "self", "ranged", "pruned", "given", "thinned", "masked"),
    *("spanned", "zeros", "stepped"),
)
TYPES = ("f32", "i8", "u8", "i32", "i64", "f16", "bf16", "i4", "u4")
BITS = {"f32": 32, "i8": 8, "u8": 8, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "i4": 4, "u4": 4}
RANGES = {"i8": (-128, 127), "u8": (0, 255), "i32": (-(1 << 31), (1 << 31) - 1), "i4": (-8, 7), "u4": (0, 15)}

F32 = ("f32",)
CODES = ("i8", "u8", "i4", "u4")
NIBBLES = ("i4", "u4")
FLOATS = ("f32", "f16", "bf16")
REDUCED = ("peak", "lowest", "highest", "spanned", "zeros")
ZEROED = ("pruned", "thinned", "masked")
ALLOWED = {
    **dict.fromkeys(("same", "refer", "self"), TYPES[:7]),
    **dict.fromkeys(("product", *REDUCED, "plain", "peaked", "ranged", "given"), F32),
    "zeros": CODES,
    **dict.fromkeys(ZEROED, (*FLOATS, "i8")),
    **dict.fromkeys(("quantised", "codes"), CODES),
    **dict.fromkeys(("bias", "rescaled"), ("i32",)),
    **dict.fromkeys(("float", "cast", "stepped"), FLOATS),
}
READING = ("same", *REDUCED, "quantised", "bias", "rescaled", "float", "codes", "cast", *ZEROED, "stepped")
PREDICTED = ("quantised", "bias", "rescaled", "codes", "cast", *ZEROED, "stepped")  # and float
MOST_STRIDE = 1 << 40
MOST_GROUP = 64
MOST_HALVES = 1 << 17
MOST_PHASE = 1 << 31
MOST_ROW_BITS = 32
MOST_ZERO_POINT = 1 << 9
MOST_THRESHOLD = 1 << 31
EXACT, EXCEPTIONS, POOL, SPARSE = 0, 1, 2, 3
DIGITS = (0, 7, 9, 11, 14)
REAL_DIGITS = (12, 24)
ONE, MINUS_ZERO = 0x3F800000, 0x80000000
MOST_GAIN = 1 << 20
MOST_LEVEL = 4096
MOST_STEP_EXPONENT = 200
RECORD_LIMIT = 30


def bytes_of(kind: str, count: int) -> int:
    """The bytes that so many elements take."""
    return (count * BITS[kind] + 7) // 8


def signed(kind: str, word: int) -> int:
    """The code of a word of that type."""
    return word - (1 << BITS[kind]) if kind in ("i8", "i4") and word >> (BITS[kind] - 1) else word


@dataclass
class Record:
    """One record; fields that its operation lacks stay as they are here."""

    op: str
    type: str
    count: int
    at: int
    words: list[int] = field(default_factory=list)
    rows: int = 1
    base: int | None = None
    one: int = -1
    two: int = -1
    by_rows: int = 1
    zero: int = 0
    base_zero: int = 0
    clamps: bool = False
    signs: bool = False
    residual: int = EXACT
    exceptions: list[tuple[int, int]] = field(default_factory=list)
    digits: int = 0
    gains: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    factors: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    changed: int = 0
    used: list[int] | None = None
    levels: list[list[int]] = field(default_factory=list)
    narrow: str = ""
    axes: list[tuple[int, int]] = field(default_factory=list)
    group: int = 1
    silent: bool = False
    halves: int = 0
    phase: int = 0
    has_zeros: bool = False
    marks: list[int] = field(default_factory=list)

    @property
    def bits(self) -> int:
        return BITS[self.type]

    @property
    def length(self) -> int:
        """Bytes that it writes."""
        return 0 if self.silent else bytes_of(self.type, self.count)

    @property
    def columns(self) -> int:
        return self.count // self.rows

    @property
    def reads_floats(self) -> bool:
        """Whether its source is of a type of floats that the record says."""
        if self.op == "float":
            return self.type == "f32"
        return self.op in (*REDUCED, "quantised", "bias", "cast")

    @property
    def source_type(self) -> str:
        """The element type of what it reads of the base."""
        return (self.narrow or "f32") if self.reads_floats else self.type

    @property
    def reads(self) -> int:
        """Elements that it reads of the base."""
        return self.count * (self.two if self.op in REDUCED else 1)

    @property
    def span(self) -> int:
        """Elements of the base from the first to the last that it reads."""
        if not self.axes:
            return self.reads
        return sum((size - 1) * stride for size, stride in self.axes) + 1

    @property
    def changing(self) -> list[int]:
        """The rows that may change."""
        return list(range(self.rows)) if self.used is None else self.used

    def level(self, row: int, column: int) -> int:
        """The activity level of an element; rows that may not change are not counted."""
        rows, columns = self.levels
        return (rows[row] if len(rows) > 1 else rows[0]) + (
            columns[column] if len(columns) > 1 else columns[0]
        )


def read_records(data: bytes, row_data: bytes, offset: int, length: int) -> list[Record]:
    """The records of a program that writes `length` bytes at `offset`, from their stream and rows."""
    coder = Arithmetic(data, RECORD_LIMIT, budget(length))
    rows = Bits(row_data)
    total = coder.unsigned("records")
    check(total <= limits.MAX_INSTRUCTIONS, "too many records", OVER_LIMIT)
    records: list[Record] = []
    end, base_end, before, runs, silent = 0, offset, (0, 0), 0, 0
    for number in range(total):
        op = coder.tree(("op", before[0], before[1] > 1), 5)
        kind = coder.tree(("type", op), 3)
        kind += coder.bit("unsigned", op) if kind == 7 else 0
        check(op < len(NAMES) and kind < len(TYPES), "an operation or type that is not known")
        check(TYPES[kind] in ALLOWED[NAMES[op]], "an operation has a type that it cannot have")
        unwritten = NAMES[op] in REDUCED and coder.bit("silent") == 1
        count = coder.number("count", (op, kind, before))
        gap = coder.number("gap", (op, kind, before))
        record = Record(NAMES[op], TYPES[kind], count, end + gap, silent=unwritten or NAMES[op] == "given")
        silent += count if unwritten else 0
        check(silent <= length // 4, "too many values that are not written")
        most = 2 * length if record.type in NIBBLES else length
        check(1 <= count <= most and gap >= 0, "a record lies outside the program")
        check(record.at + record.length <= length, "a record lies outside the program")
        if record.op == "given":
            record.words = [coder.plain(32) for _ in range(count)]
        if count > 1:
            record.rows = coder.number("rows", (op, count))
            check(record.rows >= 1 and count % record.rows == 0, "rows do not divide the count")
        if record.op in (*READING, "self") or coder.bit("counterpart", op):
            if record.reads_floats and coder.bit("narrow"):
                record.narrow = "bf16" if coder.bit("bfloat") else "f16"
            check(record.op != "cast" or record.type != record.source_type, "a cast of no change")
            record.base = base_end + gap + coder.number("base", (op, kind))
        _read_operands(coder, record, op, number, length)
        if record.op in READING and record.source_type not in NIBBLES and coder.bit("laid"):
            _read_axes(coder, record)
            runs += runs_of(record)
            check(runs <= limits.MAX_OPERAND_RUNS, "too many runs of the base", OVER_LIMIT)
        _read_residual(coder, rows, record, op)
        records.append(record)
        end = record.at + record.length
        if record.base is not None and record.op not in (*REDUCED, "self"):
            base_end = record.base + bytes_of(record.source_type, count)
        before = (op, min(count, 2))
    coder.end()
    rows.end()
    return records


def _read_operands(coder: Arithmetic, record: Record, op: int, number: int, length: int) -> None:
    name = record.op
    if name in ("refer", "product", "quantised", "bias", "rescaled", "peaked", "ranged", "zeros"):
        record.one = number - coder.number("one", (op,))
    if name == "quantised":
        record.has_zeros = coder.bit("zeros") == 1
    if name in ("product", "peaked", "ranged") or record.has_zeros:
        record.two = number - coder.number("two", (op,))
    if name == "rescaled":
        record.two = coder.number("two", (op, record.count), near=record.base)
    if name in REDUCED:
        record.two = coder.number("two", (op, record.count))
        check(1 <= record.two <= 8 * length, "a record reduces too many elements")
        if name in ("peak", "spanned"):
            record.halves = coder.number("halves", (op,), near=254)
            check(1 <= record.halves <= MOST_HALVES, "a divisor is out of its range")
        record.residual = EXCEPTIONS if coder.bit("inexact") else EXACT
    if name in (*REDUCED, "quantised", "bias", "rescaled", "float", "codes", "thinned", "masked", "stepped"):
        record.by_rows = coder.bit("by rows", op)
    if name == "quantised" and record.rows == 1 and not record.by_rows:
        record.phase = coder.number("phase", (op,))
        check(0 <= record.phase <= MOST_PHASE, "a phase is out of its range")
    if name == "thinned":
        record.group = 1 << coder.tree(("group",), 3)
        side = record.columns if record.by_rows else record.rows
        check(2 <= record.group <= MOST_GROUP and side % record.group == 0, "groups do not fit their record")
    if name == "cast" and record.type == "f16":
        record.clamps = coder.bit("clamps") == 1
    if name in ("quantised", "codes", *ZEROED):
        record.zero = coder.number("zero", (op,))
    if name == "codes":
        record.base_zero = coder.number("base zero", (op,))
    if name in ZEROED and record.type != "i8":
        record.signs = coder.bit("signs") == 1
    most = MOST_THRESHOLD if name in ZEROED else MOST_ZERO_POINT
    check(max(abs(record.zero), abs(record.base_zero)) <= most, "a zero point is out of its range")


def _read_residual(coder: Arithmetic, rows: Bits, record: Record, op: int) -> None:
    name = record.op
    if name in (*PREDICTED, "float", "plain"):
        record.residual = coder.tree(("residual", op), 2)
    kind = record.residual
    check(kind == POOL or name not in ("float", "plain", "stepped"), "floats without a residual")
    exact = name in ZEROED or (name == "cast" and record.type == "f32")
    check(kind != POOL or not exact, "a record of exact words has a pool")
    check(kind != SPARSE or name in ("codes", "quantised"), "a sparse residual of what is no code")
    if kind == EXCEPTIONS or name == "stepped":
        _read_exceptions(coder, record, op)
    if name == "codes" or (name == "float" and record.type == "f32"):
        _read_gains(coder, record, op)
    if kind == SPARSE:
        record.changed = coder.unsigned("changed")
        check(1 <= record.changed <= record.count, "no changes, or more than elements")
    if name == "masked":
        check(coder.bit("rows used", kind) == 1, "a masked record masks nothing")
        record.marks = _read_used(coder, rows, kind, record.rows if record.by_rows else record.columns)
    elif (kind == SPARSE or (kind == POOL and name != "plain")) and coder.bit("rows used", kind):
        record.used = _read_used(coder, rows, kind, record.rows)
    if name == "stepped":
        _read_steps(coder, record)
    if kind == POOL:
        _read_activity(coder, record)


def _read_exceptions(coder: Arithmetic, record: Record, op: int) -> None:
    following = 0
    for _ in range(coder.unsigned("exceptions")):
        place = following + coder.unsigned("place", op)
        check(place < record.count, "an exception lies outside its record")
        value = coder.signed("value", op)
        check(abs(value) < 1 << record.bits, "an exception does not fit its record")
        record.exceptions.append((place, value))
        following = place + 1


def _read_gains(coder: Arithmetic, record: Record, op: int) -> None:
    choice = coder.tree(("gain bits", op), 3)
    reals = REAL_DIGITS if record.op == "float" else ()
    check(choice < len(DIGITS) + len(reals), "gains of an unknown precision")
    size = record.rows if record.by_rows else record.columns
    if choice >= len(DIGITS):
        digits = reals[choice - len(DIGITS)]
        record.factors = _read_reals(coder, "factor", size, digits, ONE)
        record.offsets = _read_reals(coder, "offset", size, digits, MINUS_ZERO)
        return
    record.digits = DIGITS[choice]
    if record.digits:
        for _ in range(size):
            gain = (1 << record.digits) + coder.signed("gain", record.digits)
            check(abs(gain) <= MOST_GAIN, "a gain is out of its range")
            record.gains.append(gain)


def _read_steps(coder: Arithmetic, record: Record) -> None:
    """The step of each row that may change, or one for all; 0 for other rows."""
    record.steps = [0.0] * (record.rows if record.by_rows else 1)
    last = 0
    for row in record.changing if record.by_rows else [0]:
        if coder.bit("still"):
            continue
        last += coder.signed("step")
        check(abs(last // 2048) <= MOST_STEP_EXPONENT, "a step is out of its range")
        record.steps[row] = (2048 + last % 2048) * 2.0 ** (last // 2048)


def _read_reals(coder: Arithmetic, name: str, size: int, digits: int, neutral: int) -> list[int]:
    """Words of float32 with so many significant bits."""
    out, last = [], 127
    for _ in range(size):
        if coder.bit("neutral", name):
            out.append(neutral)
            continue
        sign = coder.bit("negative", name)
        last += coder.signed("exponent", name)
        check(1 <= last <= 254, "an exponent is out of its range")
        out.append(sign << 31 | last << 23 | coder.plain(digits - 1) << (24 - digits))
    return out


def _read_used(coder: Arithmetic, rows: Bits, residual: int, size: int) -> list[int]:
    """Some of `size` rows or columns."""
    low = coder.number("row bits", (residual,))
    count, zeros = coder.unsigned("used"), coder.unsigned("row zeros")
    check(0 <= low <= MOST_ROW_BITS, "low bits of rows are out of their range")
    check(1 <= count <= size and zeros <= size, "more rows than a record has")
    unary = [rows.take(1) for _ in range(count + zeros)]
    check(sum(unary) == count and unary[-1] == 1, "the gaps between rows are not as many as said")
    highs, passed = [], 0
    for bit in unary:
        if bit:
            highs.append(passed)
        passed = 0 if bit else passed + 1
    out, row = [], -1
    for high in highs:
        row += 1 + (high << low) + rows.take(low)
        out.append(row)
    check(row < size, "a row lies outside its record")
    return out


def _read_axes(coder: Arithmetic, record: Record) -> None:
    number = coder.tree(("axes",), 2) + 1
    sizes, left = [0] * number, record.reads
    for place in range(1, number):
        sizes[place] = coder.number("size", (number, place, record.reads))
        check(sizes[place] >= 1 and left % sizes[place] == 0, "axes do not divide what is read")
        left //= sizes[place]
    sizes[0] = left
    strides = [coder.number("stride", (number, place, record.reads)) for place in range(number)]
    check(all(0 <= stride <= MOST_STRIDE for stride in strides), "a stride is out of its range")
    record.axes = list(zip(sizes, strides, strict=True))


def runs_of(record: Record) -> int:
    """Runs of the base that a record's elements fall into."""
    run = 1
    for size, stride in sorted(record.axes, key=lambda axis: axis[1]):
        if size > 1:
            if stride != run:
                break
            run *= size
    return record.reads // run


def _read_activity(coder: Arithmetic, record: Record) -> None:
    for side, size in enumerate((len(record.changing), record.columns)):
        full = coder.bit("full", side)
        levels: list[int] = []
        last = previous = 0
        for place in range(size if full else 1):
            spread = min(3, abs(last - previous))
            step = coder.signed("level", side, min(place, 2), spread)
            previous, last = last, last + step
            check(abs(last) <= MOST_LEVEL, "a level is out of its range")
            levels.append(last)
        record.levels.append(levels)
