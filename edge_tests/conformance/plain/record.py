"""Records and their fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.arithmetic import Arithmetic, budget
from edge_tests.conformance.plain.fault import check

NAMES = (
    *("same", "refer", "product", "peak", "lowest", "highest", "quantised", "bias", "rescaled", "float"),
    *("plain", "codes", "cast", "peaked", "self", "ranged", "pruned", "given"),
)
TYPES = ("f32", "i8", "u8", "i32", "i64", "f16", "bf16")
WIDTHS = {"f32": 4, "i8": 1, "u8": 1, "i32": 4, "i64": 8, "f16": 2, "bf16": 2}
RANGES = {"i8": (-128, 127), "u8": (0, 255), "i32": (-(1 << 31), (1 << 31) - 1)}

F32 = ("f32",)
CODES = ("i8", "u8")
ALLOWED = {
    **dict.fromkeys(("same", "refer", "self"), TYPES),
    **dict.fromkeys(("product", "peak", "lowest", "highest", "plain", "peaked", "ranged"), F32),
    **dict.fromkeys(("pruned", "given"), F32),
    **dict.fromkeys(("quantised", "codes"), CODES),
    **dict.fromkeys(("bias", "rescaled"), ("i32",)),
    "float": ("f32", "f16", "bf16"),
    "cast": ("f16", "bf16"),
}
REDUCED = ("peak", "lowest", "highest")
BASED = (*REDUCED, *("same", "self", "quantised", "bias", "rescaled", "float", "codes", "cast", "pruned"))
EXACT, EXCEPTIONS, POOL, SPARSE = 0, 1, 2, 3
DIGITS = (0, 7, 9, 11, 14)
MOST_GAIN = 1 << 20
MOST_LEVEL = 4096
RECORD_LIMIT = 30


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
    residual: int = EXACT
    exceptions: list[tuple[int, int]] = field(default_factory=list)
    digits: int = 0
    gains: list[int] = field(default_factory=list)
    changed: int = 0
    used: list[int] | None = None
    levels: list[list[int]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return WIDTHS[self.type]

    @property
    def length(self) -> int:
        """Bytes that it writes."""
        return 0 if self.op == "given" else self.count * self.width

    @property
    def columns(self) -> int:
        return self.count // self.rows

    def level(self, index: int) -> int:
        """The activity level of an element."""
        rows, columns = self.levels
        row, column = divmod(index, self.columns)
        return (rows[row] if len(rows) > 1 else rows[0]) + (
            columns[column] if len(columns) > 1 else columns[0]
        )


def read_records(data: bytes, offset: int, length: int) -> list[Record]:
    """The records of a program that writes `length` bytes at `offset`."""
    coder = Arithmetic(data, RECORD_LIMIT, budget(length))
    total = coder.unsigned("records")
    check(total <= limits.MAX_INSTRUCTIONS, "too many records")
    records: list[Record] = []
    end, base_end, before = 0, offset, (0, 0)
    for number in range(total):
        op = coder.tree(("op", before[0], before[1] > 1), 5)
        kind = coder.tree(("type", op), 3)
        count = coder.number("count", (op, kind, before))
        gap = coder.number("gap", (op, kind, before))
        check(op < len(NAMES) and kind < len(TYPES), "an operation or type that is not known")
        check(TYPES[kind] in ALLOWED[NAMES[op]], "an operation has a type that it cannot have")
        record = Record(NAMES[op], TYPES[kind], count, end + gap)
        check(1 <= count <= length and gap >= 0, "a record lies outside the program")
        check(record.at + record.length <= length, "a record lies outside the program")
        if record.op == "given":
            record.words = [coder.plain(32) for _ in range(count)]
        if count > 1:
            record.rows = coder.number("rows", (op, count))
            check(record.rows >= 1 and count % record.rows == 0, "rows do not divide the count")
        if record.op in BASED or coder.bit("counterpart", op):
            record.base = base_end + gap + coder.number("base", (op, kind))
        _read_operands(coder, record, op, number, length)
        _read_residual(coder, record, op)
        records.append(record)
        end = record.at + record.length
        if record.base is not None and record.op not in (*REDUCED, "self"):
            wide = record.op in ("quantised", "bias", "cast")
            base_end = record.base + count * (4 if wide else record.width)
        before = (op, min(count, 2))
    return records


def _read_operands(coder: Arithmetic, record: Record, op: int, number: int, length: int) -> None:
    name = record.op
    if name in ("refer", "product", "quantised", "bias", "rescaled", "peaked", "ranged"):
        record.one = number - coder.number("one", (op,))
    if name in ("product", "peaked", "ranged"):
        record.two = number - coder.number("two", (op,))
    if name == "rescaled":
        record.two = coder.number("two", (op, record.count), near=record.base)
    if name in REDUCED:
        record.two = coder.number("two", (op, record.count))
        check(1 <= record.two <= 8 * length, "a record reduces too many elements")
    if name in (*REDUCED, "quantised", "bias", "rescaled", "float", "codes"):
        record.by_rows = coder.bit("by rows", op)
    if name in ("quantised", "codes", "cast", "pruned"):
        record.zero = coder.number("zero", (op,))
        record.base_zero = coder.number("base zero", (op,))
        most = 1 << 9 if name == "codes" else 1 << 31
        check(max(abs(record.zero), abs(record.base_zero)) <= most, "a zero point is out of its range")


def _read_residual(coder: Arithmetic, record: Record, op: int) -> None:
    name = record.op
    if name in ("quantised", "bias", "rescaled", "float", "plain", "codes", "cast", "pruned"):
        record.residual = coder.tree(("residual", op), 2)
    kind = record.residual
    check(kind == POOL or name not in ("float", "plain"), "floats without a residual")
    check(kind != POOL or name != "pruned", "a pruned record has a pool")
    check(kind != SPARSE or name in ("codes", "quantised"), "a sparse residual of what is no code")
    if kind == EXCEPTIONS:
        _read_exceptions(coder, record, op)
    if name in ("float", "codes"):
        _read_gains(coder, record, op)
    if kind == SPARSE:
        _read_changes(coder, record)
    if kind == POOL:
        _read_activity(coder, record)


def _read_exceptions(coder: Arithmetic, record: Record, op: int) -> None:
    following = 0
    for _ in range(coder.unsigned("exceptions")):
        place = following + coder.unsigned("place", op)
        check(place < record.count, "an exception lies outside its record")
        value = coder.signed("value", op)
        check(abs(value) < 1 << (8 * record.width), "an exception does not fit its record")
        record.exceptions.append((place, value))
        following = place + 1


def _read_gains(coder: Arithmetic, record: Record, op: int) -> None:
    choice = coder.tree(("gain bits", op), 3)
    check(choice < len(DIGITS), "gains of an unknown precision")
    record.digits = DIGITS[choice]
    if record.digits:
        for _ in range(record.rows if record.by_rows else record.columns):
            gain = (1 << record.digits) + coder.signed("gain", record.digits)
            check(abs(gain) <= MOST_GAIN, "a gain is out of its range")
            record.gains.append(gain)


def _read_changes(coder: Arithmetic, record: Record) -> None:
    record.changed = coder.unsigned("changed")
    check(1 <= record.changed <= record.count, "no changes, or more than elements")
    if coder.bit("rows used"):
        record.used = []
        following = 0
        for _ in range(coder.unsigned("used")):
            row = following + coder.unsigned("row gap")
            check(row < record.rows, "a row lies outside its record")
            record.used.append(row)
            following = row + 1


def _read_activity(coder: Arithmetic, record: Record) -> None:
    for side, size in enumerate((record.rows, record.columns)):
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
