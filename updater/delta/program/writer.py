"""Writes a program: records, what their predictions miss, and the bytes between them.

Order: records; every record's residual into its pool; pools coded; the skeleton. Rules: nothing is written
that a reader would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import body, pools, predictors, residuals, skeletons
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.body import Place
from updater.delta.program.operands import Operands, ReadBase
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.pools import Packed, Pool
from updater.delta.program.records import (
    CAST,
    DTYPES,
    FLOAT,
    KINDS,
    PLAIN,
    SAME,
    SPARSE,
    STEPPED,
    Record,
    Share,
    code_records,
)
from updater.delta.program.row_bits import RowBits
from updater.delta.program.values import Values

Array = NDArray[Any]

_SLIGHT = 100  # a skeleton of less than this part of the pools is tried with one window only ...
_SLIGHT_THOROUGH = 400  # ... at effort max


def encode(
    read: ReadBase, target: bytes, places: Sequence[Place], records: list[Record], level: int, thorough: bool
) -> tuple[bytes, Packed, bool]:
    """The program that writes `target`, its pools, and whether its skeleton tracks the base.

    Of the places, which differ in their windows, none longer than the first one's, the best is taken.
    Raises ProgramError when readers would not take it.
    """
    place = places[0]
    coder = Coder(limit=body.RECORD_LIMIT, budget=decisions(len(target)))
    rows, share = RowBits(), Share(len(target))
    share.add(place.window_length)
    code_records(coder, records, len(target), place.offset, rows, share)
    named = rows.finish()
    block = np.frombuffer(target, dtype=np.uint8)
    base = Operands(read)
    values = Values(base, records, block)
    for number, record in enumerate(records):
        if record.op in (FLOAT, PLAIN, SAME):
            values.done(number)
    groups = residuals.groups(records)
    found = {name: Pool(kind) for name, kind in KINDS.items()}
    for number, record in enumerate(records):
        if residuals.pools_of(record):
            _put(found, values, number, groups.get(number, 0), values.stored(number))
    packed = pools.encode(found, decisions(len(target)))
    coded = coder.finish()
    skeleton = body.outside(target, records)
    ways: list[tuple[bytes, bytes]] = []
    for place in places:
        slight = _SLIGHT_THOROUGH if thorough else _SLIGHT
        if ways and slight * len(ways[0][1]) < packed.size:
            break
        frame = skeletons.encode(body.Known(base, place, records), skeleton, level, thorough)
        ways.append((body.encode_head(place, len(coded), len(named), packed), frame))
    head, frame = min(ways, key=lambda parts: len(parts[0]) + len(parts[1]))
    parts = (head, coded, named, *packed.tables.values(), packed.stream, packed.raw, frame)
    return b"".join(parts), packed, frame[0] == skeletons.TRACKED


def _put(found: dict[str, Pool], values: Values, number: int, group: int, wanted: Array) -> None:
    """Adds what the prediction of a record misses."""
    record = values.records[number]
    pool = found[residuals.pools_of(record)[0]]
    if record.residual == SPARSE:
        whole = Piece.whole(record.rows, record.columns)
        guess, _ = values.predicted(number, whole)
        residuals.put_sparse(pool, found["sizes"], record, wanted.astype(np.int16) - guess)
        return
    for piece in pieces(record.rows, record.columns):
        part = wanted[piece.start : piece.start + piece.count]
        if record.op == PLAIN:
            contexts = residuals.plain_contexts(record, group, piece)
            residuals.put_plain(pool, record, contexts, part.view("<u4"), piece)
            continue
        contexts, missed = _missed(values, record, number, piece, part)
        contexts, missed = piece.of_rows(contexts, record.used), piece.of_rows(missed, record.used)
        if residuals.pools_of(record) == ("codes",):
            residuals.put_codes(pool, contexts, group, missed)
        else:
            residuals.put_tokens(pool, contexts, group, missed)


def _missed(values: Values, record: Record, number: int, piece: Piece, wanted: Array) -> tuple[Array, Array]:
    """Contexts of a piece, and what its prediction misses."""
    bits = 8 * DTYPES[record.dtype].itemsize
    if record.op == FLOAT:
        words = predictors.floats(values.base, record, piece)
        contexts = residuals.float_contexts(record, words, piece)
        actual = predictors.ordered(wanted.view(f"<u{bits // 8}"), bits)
        return contexts, predictors.difference(actual, predictors.ordered(words, bits), bits)
    if record.op == STEPPED:
        words = predictors.floats(values.base, record, piece)
        codes = predictors.step_codes(record, words, wanted.view(words.dtype), piece)
        return residuals.code_contexts(record, None, piece), codes
    guess, fractions = values.predicted(number, piece)
    if residuals.pools_of(record) == ("codes",):
        return residuals.code_contexts(record, fractions, piece), wanted.astype(np.int16) - guess
    actual = predictors.ordered(wanted, 16) if record.op == CAST else wanted.view("<u4")
    return residuals.wide_contexts(record, piece), predictors.difference(actual, guess, bits)
