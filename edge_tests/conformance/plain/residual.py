"""Residuals: the contexts of a record's symbols, and what its symbols and raw bits add."""

from __future__ import annotations

from edge_tests.conformance.plain.fault import check
from edge_tests.conformance.plain.pool import Pool, read_token
from edge_tests.conformance.plain.record import POOL, SPARSE, Record

GROUPED = 4096
MOST_GROUPS = 63
PLAIN_FINE, PLAIN_ESCAPE = 128, 248
GAP_ESCAPE, SIZE_ESCAPE = 199, 63


def pools_of(record: Record) -> tuple[str, ...]:
    """The names of the pools that a record takes from."""
    if record.residual == SPARSE:
        return ("gaps", "sizes")
    if record.residual != POOL:
        return ()
    if record.op == "float":
        return ("float",) if record.type == "f32" else ("half",)
    if record.op in ("codes", "quantised", "stepped"):
        return ("codes",)
    return ("plain",) if record.op == "plain" else ("wide",)


def groups(name: str, records: list[Record]) -> list[int]:
    """The group of each record of a pool."""
    out, last = [], 0
    for record in records:
        large = name in ("float", "half", "codes") and record.count >= GROUPED
        if large:
            last = min(last + 1, MOST_GROUPS)
        out.append(last if large else 0)
    return out


def contexts(name: str, record: Record, words: list[int], lost: list[int], plains: int) -> list[int]:
    """The contexts of a record's symbols in a pool.

    Args:
        name: the pool.
        record: the record.
        words: the prediction.
        lost: the lost fractions, for codes.
        plains: how many plain records come before this one.
    """
    if name in ("gaps", "sizes"):
        _, _, context = _gap_shape(record)
        return [context if name == "gaps" else min(31, context >> 1)] * record.changed
    out = []
    for index, level in levels(record):
        if name in ("float", "half"):
            out.append(min(159, max(0, 2 * _exponent(record, words[index]) - level + 40)))
        elif name == "plain":
            out.append(level % 2 + 2 * min(plains, 47))
        elif name == "wide":
            out.append(min(63, max(0, level + 8)))
        else:
            out.append(32 * min(31, max(0, level + 9)) + lost[index])
    return out


def levels(record: Record) -> list[tuple[int, int]]:
    """The elements that may change, each with its activity level."""
    out = []
    for place, row in enumerate(record.changing):
        for column in range(record.columns):
            out.append((row * record.columns + column, record.level(place, column)))  # noqa: PERF401
    return out


def _exponent(record: Record, word: int) -> int:
    if record.type == "f32":
        return (word >> 23 & 255) - 127
    if record.type == "bf16":
        return (word >> 7 & 255) - 127
    return (word >> 10 & 31) - 15


def differences(record: Record, pool: Pool) -> list[tuple[int, int]]:
    """Elements, and what tokens or codes add to each."""
    places = [index for index, _ in levels(record)]
    symbols = pool.take(len(places))
    if record.op not in ("codes", "quantised", "stepped"):
        return [(place, read_token(symbol, pool.bits)) for place, symbol in zip(places, symbols, strict=True)]
    out = []
    for place, symbol in zip(places, symbols, strict=True):
        difference = symbol - 100
        if symbol > 200:
            size = pool.bits.take(8) + 101
            difference = size if symbol == 201 else -size
        out.append((place, difference))
    return out


def plain_words(record: Record, pool: Pool) -> list[int]:
    """The float32 words of a plain record."""
    out = []
    for symbol, (_, level) in zip(pool.take(record.count), levels(record), strict=True):
        sign, low = pool.bits.take(1), pool.bits.take(20)
        fine = pool.bits.take(3) if symbol >= PLAIN_FINE else 7 - (symbol & 7)
        if symbol == PLAIN_ESCAPE:
            exponent = pool.bits.take(8)
        else:
            above = symbol >> 3 if symbol < PLAIN_FINE else symbol - 128 + 16
            exponent = ((level >> 1) + 6 - above + 127) % 256
        out.append(sign << 31 | exponent << 23 | fine << 20 | low)
    return out


def _gap_shape(record: Record) -> tuple[int, int, int]:
    """Elements that gaps run over, their raw low bits, their context."""
    total = len(record.changing) * record.columns
    mean = 4 * total // record.changed
    low = max(0, mean.bit_length() - 5)
    return total, low, min(63, mean >> low)


def changes(record: Record, gaps: Pool, sizes: Pool) -> list[tuple[int, int]]:
    """Places and what is added there."""
    total, low, _ = _gap_shape(record)
    symbols = gaps.take(record.changed)
    lows = [gaps.bits.take(low) for _ in symbols]
    highs = [gaps.bits.take(32) if symbol == GAP_ESCAPE else symbol for symbol in symbols]
    places, at = [], -1
    for part, rest in zip(highs, lows, strict=True):
        at += (part << low | rest) + 1
        check(at < total, "a gap leads beyond its record")
        row, column = divmod(at, record.columns)
        places.append(record.changing[row] * record.columns + column)
    symbols = sizes.take(record.changed)
    signs = [sizes.bits.take(1) for _ in symbols]
    values = [(sizes.bits.take(8) if symbol == SIZE_ESCAPE else symbol) + 1 for symbol in symbols]
    return [
        (place, -value if sign else value) for place, sign, value in zip(places, signs, values, strict=True)
    ]
