"""What records predict: operands as float32 words, and the elements of each operation."""

from __future__ import annotations

from edge_tests.conformance.plain import limits, number
from edge_tests.conformance.plain.fault import check
from edge_tests.conformance.plain.record import RANGES, REDUCED, Record

OPERANDS = (
    *("same", "refer", "product", "peak", "lowest", "highest", "float", "plain", "peaked", "ranged"),
    "given",
)
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


def base_bytes(record: Record, scales: int) -> int:
    """The bytes of the base that a record reads, with so many old scales."""
    if record.op == "same":
        return record.length
    if record.op in REDUCED:
        return 4 * record.count * record.two
    if record.op == "rescaled":
        return 4 * record.count + 4 * scales
    if record.op in ("quantised", "bias", "cast", "pruned"):
        return 4 * record.count
    if record.op in ("float", "codes"):
        return record.length
    return 0


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

    def get(self, place: int, kind: str, links: int = 0) -> list[int]:
        """The elements of record `place`, which must be of type `kind`."""
        check(0 <= place < len(self.records), "a record refers to one that is not there")
        check(links <= limits.MAX_REFERENCES, "references make a circle or too long a chain")
        record = self.records[place]
        check(record.op in OPERANDS, f"a record of operation {record.op} is no operand")
        check(record.type == kind, "an operand is of another type")
        if place not in self.known:
            self.known[place] = self._follow(record, links + 1)
        return self.known[place]

    def _follow(self, record: Record, links: int) -> list[int]:
        if record.op == "given":
            return record.words
        if record.op in REDUCED:
            return self._reduced(record)
        one = self.get(record.one, record.type, links)
        if record.op == "refer":
            check(len(one) == record.count, "an operand has another count")
            return one
        two = self.get(record.two, record.type, links)
        check(max(len(one), len(two)) == record.count, "operands have other counts")
        check(len(one) in (1, record.count) and len(two) in (1, record.count), "operands have other counts")
        out = []
        for index in range(record.count):
            left = number.flush(one[index if len(one) > 1 else 0])
            right = number.flush(two[index if len(two) > 1 else 0])
            out.append(_combined(record.op, left, right))
        return out

    def _reduced(self, record: Record) -> list[int]:
        check(record.base is not None, "a record without its base")
        words = self.base.words(record.base or 0, record.count * record.two, 4)
        out = []
        for index in range(record.count):
            if record.by_rows:
                part = words[index * record.two : (index + 1) * record.two]
            else:
                part = words[index :: record.count]
            out.append(_extreme(record.op, part))
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
    if any(number.is_nan(word) for word in words):
        return number.NAN
    values = [number.value_of(word) for word in words]
    if op == "peak":
        top = number.flush(number.word_of(max(abs(value) for value in values)))
        return number.flush(number.word_of(number.value_of(top) / 127))
    picked = min(values) if op == "lowest" else max(values)
    return number.flush(number.word_of(picked + 0.0))


def channel(record: Record, index: int, size: int) -> int:
    """Which of `size` values for rows or columns belongs to an element."""
    if size == 1:
        return 0
    return index // record.columns if record.by_rows else index % record.columns


def predict(record: Record, base: Base, operands: Operands) -> tuple[list[int], list[int]]:
    """The prediction for each element, and for codes the lost fraction of each.

    Predictions are words of float, cast and pruned records, and codes of the others.
    """
    offset = record.base if record.base is not None else -1
    middle = [16] * record.count
    if record.op == "quantised":
        return _quantised(record, base.words(offset, record.count, 4), operands), middle
    if record.op == "bias":
        return _bias(record, base.words(offset, record.count, 4), operands), middle
    if record.op == "rescaled":
        return _rescaled(record, base.words(offset, record.count, 4), operands), middle
    if record.op == "codes":
        return _codes(record, base.words(offset, record.count, 1))
    if record.op == "float":
        return _floats(record, base.words(offset, record.count, record.width)), middle
    words = base.words(offset, record.count, 4)
    if record.op == "pruned":
        sign = 0x80000000 if record.base_zero else 0
        return [word & sign if word & 0x7FFFFFFF < record.zero else word for word in words], middle
    if record.type == "f16":
        return [number.to_half(word, record.zero != 0) for word in words], middle
    return [number.to_bfloat16(word) for word in words], middle


def _quantised(record: Record, words: list[int], operands: Operands) -> list[int]:
    scales = operands.get(record.one, "f32")
    sides = record.rows if record.by_rows else record.columns
    check(len(scales) in (1, sides), "another number of scales than of channels")
    low, high = RANGES[record.type]
    if record.type == "i8" and record.zero == 0:
        low = -127
    zero = number.rounded(float(record.zero))
    out = []
    for index, word in enumerate(words):
        scale = number.value_of(number.flush(scales[channel(record, index, len(scales))]))
        quotient = number.rounded(number.value_of(number.flush(word)) / (1.0 if scale == 0 else scale))
        out.append(number.clamp(number.rounded(number.rint(quotient) + zero), low, high))
    return out


def _bias(record: Record, words: list[int], operands: Operands) -> list[int]:
    scales = operands.get(record.one, "f32")
    check(len(scales) in (1, record.count), "another number of scales than of elements")
    low, high = RANGES["i32"]
    out = []
    for index, word in enumerate(words):
        scale = number.value_of(scales[index if len(scales) > 1 else 0])
        quotient = number.value_of(word) / (1.0 if scale == 0 else scale)
        out.append(number.clamp(number.rint(quotient), low, high))
    return out


def _rescaled(record: Record, words: list[int], operands: Operands) -> list[int]:
    scales = operands.get(record.one, "f32")
    check(len(scales) in (1, record.count), "another number of scales than of elements")
    olds = operands.base.words(record.two, len(scales), 4)
    low, high = RANGES["i32"]
    out = []
    for index, word in enumerate(words):
        code = float(word - (1 << 32) if word >> 31 else word)
        old = number.value_of(olds[index if len(olds) > 1 else 0])
        new = number.value_of(scales[index if len(scales) > 1 else 0])
        out.append(number.clamp(number.rint(code * old / (1.0 if new == 0 else new)), low, high))
    return out


def _codes(record: Record, words: list[int]) -> tuple[list[int], list[int]]:
    low, high = RANGES[record.type]
    digits, out, lost = record.digits, [], []
    for index, word in enumerate(words):
        code = (word - 256 if record.type == "i8" and word > 127 else word) - record.base_zero
        fraction = 16
        if digits:
            code = code * record.gains[channel(record, index, len(record.gains))] + (1 << (digits - 1))
            fraction = ((code & ((1 << digits) - 1)) << 5) >> digits
            code >>= digits
        out.append(min(high, max(low, code + record.zero)))
        lost.append(fraction)
    return out, lost


def _floats(record: Record, words: list[int]) -> list[int]:
    if record.type != "f32" or not record.digits:
        return words
    out = []
    for index, word in enumerate(words):
        gain = record.gains[channel(record, index, len(record.gains))] / (1 << record.digits)
        product = number.value_of(number.flush(word)) * gain
        out.append(number.flush(number.word_of(product)))
    return out
