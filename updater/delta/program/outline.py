"""What each part of a program writes and costs, for those who look at a delta."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from updater.delta import faults
from updater.delta.program import residuals
from updater.delta.program.body import Opened, open_body
from updater.delta.program.operands import ReadBase
from updater.delta.program.reader import Reader
from updater.delta.program.records import NAMES, SPARSE, Record


@dataclass(frozen=True)
class Part:
    """A record, or bytes between records (operation "").

    Attributes:
        at: in the block.
        length: bytes written.
        operation: what predicts them.
        base_offset: where in the base; -1 if nowhere.
        cost: bytes of the program: its symbols, and its share of what lies beside them.
    """

    at: int
    length: int
    operation: str
    base_offset: int
    cost: float


def outline(read: ReadBase, data: bytes, offset: int, length: int) -> list[Part]:
    """The parts of a program in the order of the target. Raises SluiceError(DELTA_INVALID)."""
    try:
        with np.errstate(all="ignore"):
            return list(_parts(open_body(data, offset, length), read))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise faults.invalid(f"a program at byte {offset} of the target does not run: {error}") from error


def _weight(record: Record) -> int:
    return record.changed if record.residual == SPARSE else record.count


def _parts(opened: Opened, read: ReadBase) -> Iterator[Part]:
    costs = Reader(opened, read).costs()
    totals: dict[str, int] = {}
    for record in opened.records:
        for name in residuals.pools_of(record):
            totals[name] = totals.get(name, 0) + _weight(record)
    packed = opened.packed
    rates = {  # of what lies beside the symbols
        name: (len(packed.tables[name]) + packed.raw_sizes[name]) / max(1, total)
        for name, total in totals.items()
    }
    own = opened.record_bytes / max(1, len(opened.records))
    between = opened.place.length - sum(record.length for record in opened.records)
    rate = len(opened.skeleton) / max(1, between)
    end = 0
    for number, record in enumerate(opened.records):
        if not record.length:
            continue
        if record.at > end:
            yield Part(end, record.at - end, "", -1, (record.at - end) * rate)
        beside = sum(_weight(record) * rates[name] for name in residuals.pools_of(record))
        cost = own + beside + costs.get(number, 0.0)
        yield Part(record.at, record.length, NAMES[record.op], record.base, cost)
        end = record.at + record.length
    if end < opened.place.length:
        yield Part(end, opened.place.length - end, "", -1, (opened.place.length - end) * rate)
