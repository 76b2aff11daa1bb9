"""Writes a program: records, what their predictions miss, and the bytes between them.

Order: records; every record's residual into its pool; pools coded; the skeleton. Rules: nothing is written
that a reader would refuse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta import varint
from updater.delta.program import body, predictors, residuals, skeletons
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.body import Place
from updater.delta.program.operands import ReadBase
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.pools import Pool
from updater.delta.program.records import (
    CAST,
    DTYPES,
    FLOAT,
    KINDS,
    PLAIN,
    SAME,
    SPARSE,
    Record,
    code_records,
)
from updater.delta.program.values import Values

Array = NDArray[Any]


def encode(
    read: ReadBase, target: bytes, place: Place, records: list[Record], level: int, thorough: bool
) -> bytes:
    """The program that writes `target`. Raises ProgramError when readers would not take it."""
    coder = Coder(limit=body.RECORD_LIMIT, budget=decisions(len(target)))
    code_records(coder, records, len(target), place.offset)
    block = np.frombuffer(target, dtype=np.uint8)
    base = body.operands(read, len(target))
    values = Values(base, records, block)
    for number, record in enumerate(records):
        if record.op in (FLOAT, PLAIN, SAME):
            values.done(number)
    groups = residuals.groups(records)
    pools = {name: Pool(kind) for name, kind in KINDS.items()}
    for number, record in enumerate(records):
        if residuals.pool_of(record):
            kind = DTYPES[record.dtype]
            wanted = np.frombuffer(block, kind, count=record.count, offset=record.at)
            _put(pools, values, number, groups.get(number, 0), wanted)
    head, mask = bytearray(), 0
    parts: list[bytes] = []
    for index, pool in enumerate(pools.values()):
        if pool.symbols:
            mask |= 1 << index
            packed = pool.encode()
            parts += packed
            head += b"".join(varint.encode(len(part)) for part in packed)
    coded = coder.finish()
    start = b"".join(
        (
            varint.encode(len(coded)),
            varint.encode_signed(place.window_start - place.offset),
            varint.encode(place.window_length),
            bytes([mask]),
        )
    )
    known = body.Known(base, place, records)
    frame = skeletons.encode(known, body.outside(target, records), level, thorough)
    return b"".join((start, head, coded, *parts, frame))


def _put(pools: dict[str, Pool], values: Values, number: int, group: int, wanted: Array) -> None:
    """Adds what the prediction of a record misses."""
    record = values.records[number]
    pool = pools[residuals.pool_of(record)]
    if record.residual == SPARSE:
        whole = Piece.whole(record.rows, record.columns)
        guess, _ = values.predicted(number, whole)
        residuals.put_sparse(pool, pools["sizes"], record, wanted.astype(np.int16) - guess)
        return
    for piece in pieces(record.rows, record.columns):
        part = wanted[piece.start : piece.start + piece.count]
        if record.op == FLOAT:
            bits = 8 * part.itemsize
            words = predictors.floats(values.base, record, piece)
            contexts = residuals.float_contexts(record, words, piece)
            ordered = predictors.ordered(part.view(f"<u{part.itemsize}"), bits)
            missed = predictors.difference(ordered, predictors.ordered(words, bits), bits)
            residuals.put_tokens(pool, contexts, group, missed)
        elif record.op == PLAIN:
            contexts = residuals.plain_contexts(record, group, piece)
            residuals.put_plain(pool, record, contexts, part.view("<u4"), piece)
        elif residuals.pool_of(record) == "wide":
            guess, _ = values.predicted(number, piece)
            bits = 16 if record.op == CAST else 32
            actual = predictors.ordered(part, 16) if record.op == CAST else part.view("<u4")
            missed = predictors.difference(actual, guess, bits)
            residuals.put_tokens(pool, residuals.wide_contexts(record, piece), group, missed)
        else:
            guess, fractions = values.predicted(number, piece)
            contexts = residuals.code_contexts(record, fractions, piece)
            residuals.put_codes(pool, contexts, group, part.astype(np.int16) - guess)
