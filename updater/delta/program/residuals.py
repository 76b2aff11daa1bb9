"""Residuals as symbols with contexts, per record: what goes into the pools, and how it comes back.

Each coder is a pair: `..._contexts`, from what both sides know, and writer and reader of symbols and raw
bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import tokens
from updater.delta.program.operands import ProgramError
from updater.delta.program.pools import OpenPool, Pool
from updater.delta.program.records import (
    BF16,
    CODE_EDGE,
    CODE_LEVELS,
    F16,
    F32,
    FRACTIONS,
    KINDS,
    SPARSE,
    Record,
)

Array = NDArray[Any]
Ints = NDArray[np.int64]

PLAIN_ESCAPE = 248
_PLAIN_ROOM = 6  # octaves above a level that need no escape
_FINE = 16  # octaves coded with three bits of mantissa
GAP_ESCAPE = 199
SIZE_ESCAPE = 63


GROUPED = 4096  # elements from which a record has contexts of its own
MAX_GROUPS = 63


def groups(records: list[Record]) -> list[int]:
    """The group of each record of a pool: its own if it is large, else the common group 0."""
    out, last = [], 0
    for record in records:
        own = record.count >= GROUPED and record.residual != SPARSE
        last += own and last < MAX_GROUPS
        out.append(last if own else 0)
    return out


def levels(record: Record) -> Array:
    """[rows, columns] activity levels."""
    assert record.activity is not None
    return np.broadcast_to(record.activity.levels().astype(np.int16), (record.rows, record.columns))


def float_pool(record: Record) -> str:
    """The pool of a FLOAT record."""
    return "float" if record.dtype == F32 else "half"


def float_contexts(record: Record, predicted: Array) -> Array:
    """Octaves between the expected change and the predicted number's last place, in halves."""
    if record.dtype == F32:
        exponent = (predicted >> 23 & 255).astype(np.int16) - np.int16(127)
    elif record.dtype == BF16:
        exponent = (predicted >> 7 & 255).astype(np.int16) - np.int16(127)
    else:
        assert record.dtype == F16
        exponent = (predicted >> 10 & 31).astype(np.int16) - np.int16(15)
    contexts: Array = np.clip(2 * exponent.reshape(record.rows, -1) - levels(record) + np.int16(40), 0, 159)
    return contexts.astype(np.uint16).reshape(-1)


def wide_contexts(record: Record) -> Array:
    """The expected size of a difference of wide integers."""
    top = KINDS["wide"].contexts - 1
    return np.clip(levels(record) + np.int16(8), 0, top).astype(np.uint16).reshape(-1)


def code_contexts(record: Record, fractions: Array | None) -> Array:
    """The expected change and the lost fraction of codes."""
    level = np.clip(levels(record) + np.int16(9), 0, CODE_LEVELS - 1).astype(np.uint16)
    lost = FRACTIONS // 2 if fractions is None else fractions.reshape(record.rows, -1)
    return (level * np.uint16(FRACTIONS) + lost).astype(np.uint16).reshape(-1)


def plain_contexts(record: Record, number: int) -> Array:
    """`number` counts the plain records of a block."""
    return ((levels(record) & 1) + np.int16(2 * min(number, 47))).astype(np.uint16).reshape(-1)


def put_tokens(pool: Pool, contexts: Ints, differences: Ints) -> None:
    """Adds differences as tokens."""
    coded = tokens.encode(differences)
    pool.add(coded.tokens, contexts, coded.signs, coded.remainders)


def get_tokens(pool: OpenPool, count: int) -> Ints:
    """The inverse of `put_tokens`."""
    symbols = pool.take(count)
    signs = pool.bits(int(np.count_nonzero(symbols)))
    return tokens.decode(symbols, signs, pool.nibbles(tokens.remainder_count(symbols)))


def put_codes(pool: Pool, contexts: Ints, residual: Ints) -> None:
    """Adds residuals of codes."""
    outside = np.abs(residual) > CODE_EDGE
    symbols = np.where(outside, 2 * CODE_EDGE + 1 + (residual < 0), residual + CODE_EDGE)
    rest = np.abs(residual[outside]) - CODE_EDGE - 1
    nibbles = np.stack([rest & 15, rest >> 4], axis=1).reshape(-1)
    pool.add(symbols.astype(np.uint8), contexts, None, nibbles.astype(np.uint8))


def get_codes(pool: OpenPool, count: int) -> Array:
    """The inverse of `put_codes`, int16."""
    symbols = pool.take(count)
    residual = symbols.astype(np.int16) - np.int16(CODE_EDGE)
    outside = np.flatnonzero(symbols > 2 * CODE_EDGE)
    rest = pool.nibbles(2 * len(outside)).reshape(-1, 2).astype(np.int16)
    size = rest[:, 0] + (rest[:, 1] << 4) + CODE_EDGE + 1
    residual[outside] = np.where(symbols[outside] == 2 * CODE_EDGE + 1, size, -size)
    return residual


def _plain_symbols(record: Record, magnitude: Ints) -> Ints:
    """Octaves below the level's top: sixteen with three bits of mantissa each, 120 with none, then an
    escape.
    """
    above = (levels(record) >> 1).reshape(-1).astype(np.int64) + _PLAIN_ROOM - ((magnitude >> 23) - 127)
    fine = above * 8 + 7 - (magnitude >> 20 & 7)
    symbols = np.where(above < _FINE, fine, _FINE * 8 + above - _FINE)
    outside = (above < 0) | (symbols >= PLAIN_ESCAPE)
    return np.where(outside, PLAIN_ESCAPE, symbols)


def plain_bits(record: Record, words: Array) -> float:
    """Estimated bits of a PLAIN record by the entropy of its symbols."""
    magnitude = words.astype(np.int64) & 0x7FFFFFFF
    counts = np.bincount(_plain_symbols(record, magnitude), minlength=PLAIN_ESCAPE + 1).astype(np.float64)
    used = counts[counts > 0]
    raw = 21 * len(words) + 3 * counts[_FINE * 8 :].sum() + 9 * counts[PLAIN_ESCAPE]
    return float(raw - (used * np.log2(used / used.sum())).sum() + 5 * len(used))


def put_plain(pool: Pool, record: Record, contexts: Ints, words: Array) -> None:
    """Adds float32 words as octaves below their level and raw mantissas."""
    magnitude = words.astype(np.int64) & 0x7FFFFFFF
    symbols = _plain_symbols(record, magnitude)
    coarse, outside = symbols >= _FINE * 8, symbols == PLAIN_ESCAPE
    nibbles = [magnitude >> shift & 15 for shift in range(0, 20, 4)]
    nibbles.append(magnitude[coarse] >> 20 & 7)
    nibbles += [magnitude[outside] >> shift & 15 for shift in (23, 27)]
    signs = (words >> 31).astype(np.uint8)
    pool.add(symbols.astype(np.uint8), contexts, signs, np.concatenate(nibbles).astype(np.uint8))


def get_plain(pool: OpenPool, record: Record) -> Array:
    """The inverse of `put_plain`."""
    symbols = pool.take(record.count).astype(np.int64)
    signs = pool.bits(record.count).astype(np.int64)
    coarse = np.flatnonzero(symbols >= _FINE * 8)
    outside = np.flatnonzero(symbols == PLAIN_ESCAPE)
    magnitude = np.zeros(record.count, dtype=np.int64)
    for shift in range(0, 20, 4):
        magnitude |= pool.nibbles(record.count).astype(np.int64) << shift
    high = 7 - (symbols & 7)
    high[coarse] = pool.nibbles(len(coarse))
    above = np.where(symbols < _FINE * 8, symbols >> 3, symbols - _FINE * 8 + _FINE)
    exponent = (levels(record) >> 1).reshape(-1).astype(np.int64) + _PLAIN_ROOM - above + 127
    escaped = np.zeros(len(outside), dtype=np.int64)
    for shift in (0, 4):
        escaped |= pool.nibbles(len(outside)).astype(np.int64) << shift
    exponent[outside] = escaped
    return ((magnitude | high << 20 | exponent << 23) & 0x7FFFFFFF | signs << 31).astype("<u4")


def _gap_shape(record: Record) -> tuple[int, int, int]:
    """Elements that gaps run over, raw low bits of a gap, context."""
    rows = int(record.used.sum()) if len(record.used) else record.rows
    total = rows * record.columns
    mean4 = 4 * total // max(1, record.changed)
    low = max(0, mean4.bit_length() - 5)
    return total, low, min(63, mean4 >> low)


def put_sparse(gaps_pool: Pool, sizes_pool: Pool, record: Record, residual: Ints) -> None:
    """Adds the places and values of what changed."""
    matrix = residual.reshape(record.rows, -1)
    flat = (matrix[record.used] if len(record.used) else matrix).reshape(-1)
    places = np.flatnonzero(flat)
    _, low, context = _gap_shape(record)
    gaps = np.diff(places, prepend=-1) - 1
    high = gaps >> low
    outside = high >= GAP_ESCAPE
    bits = [(gaps >> bit & 1) for bit in range(low)]
    nibbles = [high[outside] >> shift & 15 for shift in range(0, 32, 4)]
    gaps_pool.add(
        np.minimum(high, GAP_ESCAPE).astype(np.uint8),
        np.full(len(gaps), context),
        np.concatenate(bits).astype(np.uint8) if bits else None,
        np.concatenate(nibbles).astype(np.uint8),
    )
    values = flat[places]
    size = np.abs(values) - 1
    outside = size >= SIZE_ESCAPE
    nibbles = [size[outside] >> shift & 15 for shift in (0, 4)]
    sizes_pool.add(
        np.minimum(size, SIZE_ESCAPE).astype(np.uint8),
        np.full(len(size), min(31, context >> 1)),
        (values < 0).astype(np.uint8),
        np.concatenate(nibbles).astype(np.uint8),
    )


def sparse_contexts(record: Record) -> tuple[Array, Array]:
    """Contexts of the gaps and of the sizes."""
    _, _, context = _gap_shape(record)
    gaps = np.full(record.changed, context, dtype=np.uint16)
    return gaps, np.full(record.changed, min(31, context >> 1), dtype=np.uint16)


def get_sparse(gaps_pool: OpenPool, sizes_pool: OpenPool, record: Record) -> tuple[Ints, Ints]:
    """Places in the record, and what is added there."""
    total, low, _ = _gap_shape(record)
    count = record.changed
    high = gaps_pool.take(count).astype(np.int64)
    outside = np.flatnonzero(high == GAP_ESCAPE)
    rest = np.zeros(len(outside), dtype=np.int64)
    for shift in range(0, 32, 4):
        rest |= gaps_pool.nibbles(len(outside)).astype(np.int64) << shift
    high[outside] = rest
    gaps = high << low
    for bit in range(low):
        gaps |= gaps_pool.bits(count).astype(np.int64) << bit
    if count and int(gaps.max()) >= total:
        raise ProgramError("a gap leads beyond its record")
    places = np.cumsum(gaps + 1) - 1
    if count and places[-1] >= total:
        raise ProgramError("a gap leads beyond its record")
    size = sizes_pool.take(count).astype(np.int64)
    outside = np.flatnonzero(size == SIZE_ESCAPE)
    rest = np.zeros(len(outside), dtype=np.int64)
    for shift in (0, 4):
        rest |= sizes_pool.nibbles(len(outside)).astype(np.int64) << shift
    size[outside] = rest
    values = np.where(sizes_pool.bits(count) == 1, -size - 1, size + 1)
    if len(record.used):
        row, column = np.divmod(places, record.columns)
        places = np.flatnonzero(record.used)[row] * record.columns + column
    return places, values
