"""What records predict: operands as float32 words, and the elements of each operation."""

from __future__ import annotations

import math

from edge_tests.conformance.plain import limits, number
from edge_tests.conformance.plain.fault import OVER_LIMIT, check
from edge_tests.conformance.plain.record import (
    BITS,
    CODES,
    NIBBLES,
    RANGES,
    READING,
    REDUCED,
    ZEROED,
    Record,
    bytes_of,
    signed,
)
from edge_tests.conformance.plain.tensor import FLOAT, UNSIGNED, order, unorder

OPERANDS = (
    *("same", "refer", "product", "peak", "lowest", "highest", "float", "plain", "peaked", "ranged"),
    *("given", "spanned"),
)
ZERO_POINTS = ("same", "refer", "zeros")
ORDERED = ("peak", "lowest", "highest", "spanned", "float", "cast", *ZEROED, "stepped")  # but for codes
FOLLOWING = ("refer", "product", *REDUCED, "peaked", "ranged")


class Base:
    """The base file as a program reads it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def words(self, offset: int, count: int, width: int) -> list[int]:
        """`count` unsigned numbers of `width` bytes."""
        end = offset + count * width
        check(offset >= 0 and end <= len(self.data), "a range lies outside the base")
        return [int.from_bytes(self.data[at : at + width], "little") for at in range(offset, end, width)]

    def source(self, record: Record) -> list[int]:
        """What a record reads: words of its source type."""
        offset = record.base if record.base is not None else -1
        if record.source_type in NIBBLES:
            octets = self.words(offset, bytes_of(record.source_type, record.reads), 1)
            return [octets[index // 2] >> 4 * (index % 2) & 15 for index in range(record.reads)]
        width = BITS[record.source_type] // 8
        if not record.axes:
            return self.words(offset, record.reads, width)
        end = offset + record.span * width
        check(offset >= 0 and end <= len(self.data), "a source lies outside the base")
        out = []
        for index in range(record.reads):
            at, left = offset, index
            for size, stride in reversed(record.axes):
                at += left % size * stride * width
                left //= size
            out.append(int.from_bytes(self.data[at : at + width], "little"))
        return out

    def floats(self, record: Record) -> list[int]:
        """What a record reads, as float32 words."""
        words = self.source(record)
        return [number.widened(word, record.narrow) for word in words] if record.narrow else words


def base_bytes(record: Record) -> int:
    """The bytes of the base that a record reads; of old scales as many as there can be."""
    if record.op not in READING:
        return 0
    total = bytes_of(record.source_type, record.reads)
    return total + 4 * record.count if record.op == "rescaled" else total


class Operands:
    """The words of records that others may refer to.

    Args:
        records: all of the program's.
        base: the base.
    """

    def __init__(self, records: list[Record], base: Base) -> None:
        self.records = records
        self.base = base
        self.known: dict[int, list[int]] = {}

    def get(self, place: int, allowed: tuple[str, ...] = OPERANDS, links: int = 0) -> list[int]:
        """The elements of record `place`, words or codes, if its operation is one of those allowed."""
        check(0 <= place < len(self.records), "a record refers to one that is not there")
        check(links <= limits.MAX_REFERENCES, "references make a circle or too long a chain", OVER_LIMIT)
        record = self.records[place]
        check(record.op in allowed, f"a record of operation {record.op} is no operand")
        if place not in self.known:
            self.known[place] = corrected(record, self._follow(record, links + 1), record.exceptions)
        return self.known[place]

    def floats(self, place: int, links: int = 0) -> list[int]:
        """The words of a record of float32."""
        words = self.get(place, OPERANDS, links)
        check(self.records[place].type == "f32", "an operand is not of float32")
        return words

    def zero_points(self, place: int) -> list[int]:
        """The codes of a record of 8 bits."""
        words = self.get(place, ZERO_POINTS)
        kind = self.records[place].type
        check(kind in CODES, "zero points that are no codes")
        return [signed(kind, word) for word in words]

    def _follow(self, record: Record, links: int) -> list[int]:
        if record.op == "given":
            return record.words
        if record.op == "zeros":
            return self._zeros(record, self.floats(record.one, links))
        if record.op in REDUCED:
            return self._reduced(record)
        if record.op == "refer":
            one = self.get(record.one, OPERANDS, links)
            check(self.records[record.one].type == record.type, "a record refers to one of another type")
            check(len(one) == record.count, "an operand has another count")
            return one
        one, two = self.floats(record.one, links), self.floats(record.two, links)
        check(max(len(one), len(two)) == record.count, "operands have other counts")
        check(len(one) in (1, record.count) and len(two) in (1, record.count), "operands have other counts")
        out = []
        for index in range(record.count):
            left = number.flush(one[index if len(one) > 1 else 0])
            right = number.flush(two[index if len(two) > 1 else 0])
            out.append(_combined(record.op, left, right))
        return out

    def _reduced(self, record: Record) -> list[int]:
        divisor = record.halves / 2
        out = []
        for part in self._parts(record):
            if record.op == "peak":
                top = number.value_of(_extreme("peak", part))
                out.append(number.flush(number.word_of(top / divisor)))
            elif record.op == "spanned":
                low, high = _with_zero("lowest", part), _with_zero("highest", part)
                span = number.value_of(number.flush(number.word_of(high - low)))
                out.append(number.flush(number.word_of(span / divisor)))
            else:
                out.append(_extreme(record.op, part))
        return out

    def _zeros(self, record: Record, scales: list[int]) -> list[int]:
        check(len(scales) == record.count, "another number of scales than of zero points")
        low, high = RANGES[record.type]
        out = []
        for word, part in zip(scales, self._parts(record), strict=True):
            scale = number.value_of(number.flush(word))
            point = number.rint(low - _with_zero("lowest", part) / (1.0 if scale == 0 else scale))
            out.append(number.clamp(point, low, high) % 256)
        return out

    def _parts(self, record: Record) -> list[list[int]]:
        """What each result of a reduction follows from."""
        words = self.base.floats(record)
        if record.by_rows:
            return [words[index * record.two : (index + 1) * record.two] for index in range(record.count)]
        return [words[index :: record.count] for index in range(record.count)]


def corrected(record: Record, words: list[int], added: list[tuple[int, int]]) -> list[int]:
    """Predictions as words, with differences added at some places, modulo their width."""
    bits = record.bits
    reading = FLOAT if record.op in ORDERED and record.type not in CODES else UNSIGNED
    out = [word % (1 << bits) for word in words]
    for place, difference in added:
        out[place] = unorder((order(out[place], reading, bits) + difference) % (1 << bits), reading, bits)
    return out


def _combined(op: str, one: int, two: int) -> int:
    if number.is_nan(one) or number.is_nan(two):
        return number.NAN
    left, right = number.value_of(one), number.value_of(two)
    if op == "product":
        return number.flush(number.word_of(left * right))
    if op == "peaked":
        return number.flush(number.word_of(max(abs(left), abs(right)) / 127))
    span = number.flush(number.word_of(right - left))
    return number.flush(number.word_of(number.value_of(span) / 255))


def _extreme(op: str, words: list[int]) -> int:
    """The least, the greatest or the greatest magnitude, flushed, as a word."""
    if any(number.is_nan(word) for word in words):
        return number.NAN
    values = [number.value_of(word) for word in words]
    if op == "peak":
        picked = max(abs(value) for value in values)
    else:
        picked = min(values) if op == "lowest" else max(values)
    return number.word_of(number.value_of(number.flush(number.word_of(picked))) + 0.0)


def _with_zero(op: str, words: list[int]) -> float:
    """The least or the greatest of some numbers and 0."""
    value = number.value_of(_extreme(op, words))
    if math.isnan(value):
        return value
    picked = min(value, 0.0) if op == "lowest" else max(value, 0.0)
    return picked if picked else 0.0


def channel(record: Record, index: int, size: int) -> int:
    """Which of `size` scales or zero points belongs to an element."""
    row, column = divmod(index, record.columns)
    if size == 1:
        return 0
    if record.by_rows:
        check(record.rows % size == 0, "another number of scales than of channels")
        return row % size
    if record.rows == 1:
        check(record.phase + record.columns <= size, "another number of scales than of channels")
        return record.phase + column
    groups = size // record.columns
    check(
        size % record.columns == 0 and record.rows % groups == 0, "another number of scales than of channels"
    )
    return row // (record.rows // groups) * record.columns + column


def gain_of(record: Record, index: int) -> int:
    """The gain of an element's row or column."""
    row, column = divmod(index, record.columns)
    return record.gains[row if record.by_rows else column]


def predict(record: Record, base: Base, operands: Operands) -> tuple[list[int], list[int]]:
    """The prediction for each element, and for codes the lost fraction of each.

    Predictions are words of float, cast and pruned records, and codes of the others.
    """
    middle = [16] * record.count
    if record.op == "quantised":
        return _quantised(record, base.floats(record), operands), middle
    if record.op == "bias":
        return _bias(record, base.floats(record), operands), middle
    if record.op == "rescaled":
        return _rescaled(record, base.source(record), operands), middle
    if record.op == "codes":
        return _codes(record, base.source(record))
    if record.op == "float":
        return _floats(record, base.floats(record)), middle
    if record.op == "stepped":
        return base.source(record), middle
    if record.op in ZEROED:
        return _zeroed(record, base.source(record)), middle
    words = base.floats(record)
    if record.type == "f32":
        return words, middle
    if record.type == "f16":
        return [number.to_half(word, record.clamps) for word in words], middle
    return [number.to_bfloat16(word) for word in words], middle


def _quantised(record: Record, words: list[int], operands: Operands) -> list[int]:
    scales = operands.floats(record.one)
    zeros = [record.zero]
    low, high = RANGES[record.type]
    if record.has_zeros:
        zeros = operands.zero_points(record.two)
        check(len(zeros) == len(scales), "another number of zero points than of scales")
    elif record.type == "i8" and record.zero == 0:
        low = -127
    out = []
    for index, word in enumerate(words):
        place = channel(record, index, len(scales))
        scale = number.value_of(number.flush(scales[place]))
        zero = number.rounded(float(zeros[place if record.has_zeros else 0]))
        quotient = number.rounded(number.value_of(number.flush(word)) / (1.0 if scale == 0 else scale))
        out.append(number.clamp(number.rounded(number.rint(quotient) + zero), low, high))
    return out


def _bias(record: Record, words: list[int], operands: Operands) -> list[int]:
    scales = operands.floats(record.one)
    check(len(scales) in (1, record.count), "another number of scales than of elements")
    low, high = RANGES["i32"]
    out = []
    for index, word in enumerate(words):
        scale = number.value_of(number.flush(scales[index if len(scales) > 1 else 0]))
        quotient = number.value_of(number.flush(word)) / (1.0 if scale == 0 else scale)
        out.append(number.clamp(number.rint(quotient), low, high))
    return out


def _rescaled(record: Record, words: list[int], operands: Operands) -> list[int]:
    scales = operands.floats(record.one)
    check(len(scales) in (1, record.count), "another number of scales than of elements")
    olds = operands.base.words(record.two, len(scales), 4)
    low, high = RANGES["i32"]
    out = []
    for index, word in enumerate(words):
        code = float(word - (1 << 32) if word >> 31 else word)
        old = number.value_of(number.flush(olds[index if len(olds) > 1 else 0]))
        new = number.value_of(number.flush(scales[index if len(scales) > 1 else 0]))
        out.append(number.clamp(number.rint(code * old / (1.0 if new == 0 else new)), low, high))
    return out


def _codes(record: Record, words: list[int]) -> tuple[list[int], list[int]]:
    low, high = RANGES[record.type]
    digits, out, lost = record.digits, [], []
    for index, word in enumerate(words):
        code = signed(record.type, word) - record.base_zero
        fraction = 16
        if digits:
            code = code * gain_of(record, index) + (1 << (digits - 1))
            fraction = ((code & ((1 << digits) - 1)) << 5) >> digits
            code >>= digits
        out.append(min(high, max(low, code + record.zero)))
        lost.append(fraction)
    return out, lost


def _floats(record: Record, words: list[int]) -> list[int]:
    if record.factors:
        return _affine(record, words)
    if record.type != "f32" or not record.digits:
        return words
    out = []
    for index, word in enumerate(words):
        gain = gain_of(record, index) / (1 << record.digits)
        product = number.value_of(number.flush(word)) * gain
        out.append(number.flush(number.word_of(product)))
    return out


def stepped(record: Record, words: list[int], codes: list[tuple[int, int]]) -> list[int]:
    """The source's words with multiples of a step added; what would not be finite stays."""
    out = list(words)
    for index, code in codes:
        step = record.steps[index // record.columns if record.by_rows else 0]
        word = words[index] if record.type == "f32" else number.widened(words[index], record.type)
        total = number.value_of(word) + code * step
        made = number.narrowed(total, record.type)
        if code and made is not None:
            out[index] = made
    return out


def _affine(record: Record, words: list[int]) -> list[int]:
    out = []
    for index, word in enumerate(words):
        row, column = divmod(index, record.columns)
        place = row if record.by_rows else column
        factor, offset = number.value_of(record.factors[place]), number.value_of(record.offsets[place])
        product = number.flush(number.word_of(number.value_of(number.flush(word)) * factor))
        out.append(number.flush(number.word_of(number.value_of(product) + offset)))
    return out


def _zeroed(record: Record, words: list[int]) -> list[int]:
    half = 1 << (record.bits - 1)
    sizes = [min(word, 256 - word) if record.type == "i8" else word & (half - 1) for word in words]
    if record.op == "pruned":
        gone = {index for index, size in enumerate(sizes) if size < record.zero}
    elif record.op == "masked":
        marks = set(record.marks)
        gone = {
            index
            for index in range(record.count)
            if (index // record.columns if record.by_rows else index % record.columns) in marks
        }
    else:
        gone = _thinned(record, sizes)
    kept = half if record.signs else 0
    return [word & kept if index in gone else word for index, word in enumerate(words)]


def _thinned(record: Record, sizes: list[int]) -> set[int]:
    """The elements that are not among the largest of their group."""
    gone: set[int] = set()
    step = 1 if record.by_rows else record.columns
    for index in range(record.count):
        row, column = divmod(index, record.columns)
        if (column if record.by_rows else row) % record.group == 0:
            group = [index + step * place for place in range(record.group)]
            group.sort(key=lambda place: (-sizes[place], place))
            gone.update(group[max(0, record.zero) :])
    return gone
