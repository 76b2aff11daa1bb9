"""Residuals as symbols with contexts, per record: what goes into the pools, and how it comes back.

Each coder is a pair: `..._contexts`, from what both sides know, and writer and reader of symbols and raw
bits. Contexts and readers work on a `Piece` of a record, so that a core's cache holds what they make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import tokens
from updater.delta.program.operands import ProgramError
from updater.delta.program.piece import Piece
from updater.delta.program.pools import OpenPool, Pool
from updater.delta.program.records import (
    BF16,
    CODE_EDGE,
    CODE_LEVELS,
    CODES,
    F16,
    F32,
    FLOAT,
    FRACTIONS,
    KINDS,
    PLAIN,
    POOL,
    QUANTISED,
    SPARSE,
    STEPPED,
    Record,
)

Array = NDArray[Any]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]

PLAIN_ESCAPE = 248
_PLAIN_ROOM = 6  # octaves above a level that need no escape
_FINE = 16  # octaves coded with three bits of mantissa
GAP_ESCAPE = 199
SIZE_ESCAPE = 63


GROUPED = 4096  # elements from which a record has contexts of its own
MAX_GROUPS = 63
_OWN = ("float", "half", "codes")  # pools whose contexts are kept apart by group


def pools_of(record: Record) -> tuple[str, ...]:
    """The pools that a record's residual goes to."""
    if record.residual == SPARSE:
        return ("gaps", "sizes")
    if record.residual != POOL:
        return ()
    if record.op == FLOAT:
        return ("float",) if record.dtype == F32 else ("half",)
    if record.op == PLAIN:
        return ("plain",)
    return ("codes",) if record.op in (CODES, QUANTISED, STEPPED) else ("wide",)


def groups(records: list[Record]) -> dict[int, int]:
    """The group of each record, by number, counted within its pool.

    In float, half and codes a large record has contexts of its own and small ones share group 0; in plain the
    group is the record's place.
    """
    out: dict[int, int] = {}
    last: dict[str, int] = {}
    for number, record in enumerate(records):
        name = next(iter(pools_of(record)), "")
        if name == "plain":
            out[number] = last.get(name, 0)
            last[name] = out[number] + 1
        elif name in _OWN:
            own = record.count >= GROUPED
            last[name] = min(MAX_GROUPS, last.get(name, 0) + own)
            out[number] = last[name] if own else 0
    return out


def group_count(name: str, found: Mapping[int, int], numbers: Sequence[int]) -> int:
    """How many groups of contexts a pool has that the records `numbers` take from."""
    return 1 + max(found.get(number, 0) for number in numbers) if name in _OWN else 1


def levels(record: Record, piece: Piece) -> NDArray[np.int16]:
    """Activity levels that broadcast to the piece's [rows, columns]."""
    assert record.activity is not None
    rows, columns = record.activity.rows, record.activity.columns
    rows = rows[piece.rows] if len(rows) > 1 else rows
    columns = columns[piece.columns] if len(columns) > 1 else columns
    return (rows[:, None] + columns[None, :]).astype(np.int16)


def float_contexts(record: Record, predicted: Array, piece: Piece) -> U16:
    """Octaves between the expected change and the predicted number's last place, in halves."""
    if record.dtype == F32:
        exponent = (predicted >> 23).astype(np.int16) & np.int16(255)
        bias = 127
    elif record.dtype == BF16:
        exponent = (predicted >> 7).astype(np.int16) & np.int16(255)
        bias = 127
    else:
        assert record.dtype == F16
        exponent = (predicted >> 10).astype(np.int16) & np.int16(31)
        bias = 15
    exponent <<= 1
    away = exponent.reshape(piece.shape) - (levels(record, piece) + np.int16(2 * bias - 40))
    contexts: U16 = np.clip(away, 0, 159).view(np.uint16).reshape(-1)
    return contexts


def wide_contexts(record: Record, piece: Piece) -> U16:
    """The expected size of a difference of wide integers."""
    top = KINDS["wide"].contexts - 1
    level = np.clip(levels(record, piece) + np.int16(8), 0, top).view(np.uint16)
    return np.broadcast_to(level, piece.shape).reshape(-1)


def code_contexts(record: Record, fractions: Array | None, piece: Piece) -> U16:
    """The expected change and the lost fraction of codes."""
    level = np.clip(levels(record, piece) + np.int16(9), 0, CODE_LEVELS - 1).view(np.uint16)
    lost = np.full((1, 1), FRACTIONS // 2) if fractions is None else fractions.reshape(piece.shape)
    contexts: U16 = level * np.uint16(FRACTIONS) + lost.astype(np.uint16)
    return np.broadcast_to(contexts, piece.shape).reshape(-1)


def plain_contexts(record: Record, number: int, piece: Piece) -> U16:
    """`number` counts the plain records of a block."""
    level = ((levels(record, piece) & np.int16(1)) + np.int16(2 * min(number, 47))).view(np.uint16)
    return np.broadcast_to(level, piece.shape).reshape(-1)


def put_tokens(pool: Pool, contexts: U16, group: int, differences: I32) -> None:
    """Adds differences as tokens."""
    symbols, fields, widths = tokens.encode(differences)
    pool.add(symbols, contexts, group, (fields, widths))


def get_tokens(pool: OpenPool, count: int) -> U32:
    """The inverse of `put_tokens`, modulo 2^32."""
    return tokens.decode(pool.take(count), pool.bits)


def put_codes(pool: Pool, contexts: U16, group: int, residual: NDArray[np.int16]) -> None:
    """Adds residuals of codes."""
    size = np.abs(residual)
    outside = size > CODE_EDGE
    symbols = np.where(outside, 2 * CODE_EDGE + 1 + (residual < 0), residual + CODE_EDGE).astype(np.uint8)
    rest = size[outside] - (CODE_EDGE + 1)
    pool.add(symbols, contexts, group, (rest, np.full(len(rest), 8, dtype=np.uint8)))


def get_codes(pool: OpenPool, count: int) -> NDArray[np.int16]:
    """The inverse of `put_codes`."""
    symbols = pool.take(count)
    residual = symbols.astype(np.int16)
    residual -= np.int16(CODE_EDGE)
    outside = np.flatnonzero(symbols > 2 * CODE_EDGE)
    if len(outside):
        size = pool.bits.same(8, len(outside)).astype(np.int16) + np.int16(CODE_EDGE + 1)
        residual[outside] = np.where(symbols[outside] == 2 * CODE_EDGE + 1, size, -size)
    return residual


def _plain_symbols(record: Record, magnitude: U32, piece: Piece) -> I32:
    """Octaves below the level's top: sixteen with three bits of mantissa each, 120 with none, then an
    escape.
    """
    top = np.broadcast_to((levels(record, piece) >> 1) + np.int16(_PLAIN_ROOM + 127), piece.shape).reshape(-1)
    above = top - (magnitude >> 23).astype(np.int32)
    fine = above * 8 + 7 - (magnitude >> 20 & 7).astype(np.int32)
    symbols = np.where(above < _FINE, fine, _FINE * 8 + above - _FINE)
    outside = (above < 0) | (symbols >= PLAIN_ESCAPE)
    return np.where(outside, PLAIN_ESCAPE, symbols).astype(np.int32)


def plain_bits(record: Record, words: Array) -> float:
    """Estimated bits of a PLAIN record by the entropy of its symbols."""
    symbols = _plain_symbols(
        record, words.astype(np.uint32) & np.uint32(0x7FFFFFFF), Piece.whole(record.rows, record.columns)
    )
    counts = np.bincount(symbols, minlength=PLAIN_ESCAPE + 1).astype(np.float64)
    used = counts[counts > 0]
    raw = 21 * len(words) + 3 * counts[_FINE * 8 :].sum() + 8 * counts[PLAIN_ESCAPE]
    return float(raw - (used * np.log2(used / used.sum())).sum() + 5 * len(used))


def _plain_widths(symbols: Array) -> U8:
    """A sign and 20 bits of mantissa; three more where the symbol has none, eight of exponent if escaped."""
    widths: U8 = (21 + 3 * (symbols >= _FINE * 8) + 8 * (symbols == PLAIN_ESCAPE)).astype(np.uint8)
    return widths


def put_plain(pool: Pool, record: Record, contexts: U16, words: U32, piece: Piece) -> None:
    """Adds float32 words as octaves below their level and raw mantissas."""
    magnitude = words & np.uint32(0x7FFFFFFF)
    symbols = _plain_symbols(record, magnitude, piece)
    fields = words >> np.uint32(31) | (magnitude & np.uint32(0xFFFFF)) << np.uint32(1)
    fields |= (
        np.where(symbols >= _FINE * 8, magnitude >> np.uint32(20) & np.uint32(7), 0).astype(np.uint32) << 21
    )
    fields |= np.where(symbols == PLAIN_ESCAPE, magnitude >> np.uint32(23), 0).astype(np.uint32) << 24
    pool.add(symbols.astype(np.uint8), contexts, 0, (fields, _plain_widths(symbols)))


def get_plain(pool: OpenPool, record: Record, piece: Piece) -> U32:
    """The inverse of `put_plain` for a piece: float32 words."""
    symbols = pool.take(piece.count)
    fields = pool.bits.take(_plain_widths(symbols))
    coarse = symbols >= _FINE * 8
    high = np.where(coarse, fields >> 21 & 7, (7 - (symbols & 7)).astype(np.uint32))
    above = np.where(coarse, symbols - np.int16(_FINE * 8 - _FINE), symbols >> 3).astype(np.int32)
    top = np.broadcast_to((levels(record, piece) >> 1) + np.int16(_PLAIN_ROOM + 127), piece.shape).reshape(-1)
    exponent = (top - above).astype(np.uint32)
    exponent = np.where(symbols == PLAIN_ESCAPE, fields >> 24, exponent)
    words = fields >> 1 & np.uint32(0xFFFFF) | high << 20 | exponent << np.uint32(23)
    return (words & np.uint32(0x7FFFFFFF) | fields << 31).astype(np.uint32)


def _gap_shape(record: Record) -> tuple[int, int, int]:
    """Elements that gaps run over, raw low bits of a gap, context."""
    rows = int(record.used.sum()) if len(record.used) else record.rows
    total = rows * record.columns
    mean4 = 4 * total // max(1, record.changed)
    low = max(0, mean4.bit_length() - 5)
    return total, low, min(63, mean4 >> low)


def put_sparse(gaps_pool: Pool, sizes_pool: Pool, record: Record, residual: NDArray[np.int16]) -> None:
    """Adds the places and values of what changed."""
    matrix = residual.reshape(record.rows, -1)
    flat = (matrix[record.used] if len(record.used) else matrix).reshape(-1)
    places = np.flatnonzero(flat)
    _, low, _ = _gap_shape(record)
    gaps = np.diff(places, prepend=-1) - 1
    high = gaps >> low
    far = high[high >= GAP_ESCAPE]
    contexts = sparse_contexts(record)
    gaps_pool.add(
        np.minimum(high, GAP_ESCAPE).astype(np.uint8),
        contexts[0],
        0,
        (gaps & ((1 << low) - 1), np.full(len(gaps), low, dtype=np.uint8)),
        (far, np.full(len(far), 32, dtype=np.uint8)),
    )
    values = flat[places]
    size = np.abs(values) - 1
    large = size[size >= SIZE_ESCAPE]
    sizes_pool.add(
        np.minimum(size, SIZE_ESCAPE).astype(np.uint8),
        contexts[1],
        0,
        ((values < 0).astype(np.uint8), np.ones(len(values), dtype=np.uint8)),
        (large, np.full(len(large), 8, dtype=np.uint8)),
    )


def sparse_contexts(record: Record) -> tuple[U16, U16]:
    """Contexts of the gaps and of the sizes."""
    _, _, context = _gap_shape(record)
    gaps = np.full(record.changed, context, dtype=np.uint16)
    return gaps, np.full(record.changed, min(31, context >> 1), dtype=np.uint16)


def get_sparse(gaps_pool: OpenPool, sizes_pool: OpenPool, record: Record) -> tuple[Array, NDArray[np.int16]]:
    """Places in the record, ascending, and what is added there."""
    total, low, _ = _gap_shape(record)
    count = record.changed
    high = gaps_pool.take(count).astype(np.int64)
    lows = gaps_pool.bits.same(low, count)
    outside = np.flatnonzero(high == GAP_ESCAPE)
    high[outside] = gaps_pool.bits.same(32, len(outside))
    gaps = high << low | lows
    if count and int(gaps.max()) >= total:
        raise ProgramError("a gap leads beyond its record")
    places = np.cumsum(gaps + 1) - 1
    if count and places[-1] >= total:
        raise ProgramError("a gap leads beyond its record")
    size = sizes_pool.take(count).astype(np.int16)
    negative = sizes_pool.bits.same(1, count)
    outside = np.flatnonzero(size == SIZE_ESCAPE)
    size[outside] = sizes_pool.bits.same(8, len(outside))
    values = np.where(negative == 1, -size - 1, size + 1)
    if len(record.used):
        row, column = np.divmod(places, record.columns)
        places = np.flatnonzero(record.used)[row] * record.columns + column
    return places, values
