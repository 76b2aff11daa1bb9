"""What each part of a program writes and costs, for those who look at a delta."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from updater.delta import faults
from updater.delta.program import residuals
from updater.delta.program.body import Opened, open_body
from updater.delta.program.records import NAMES, SPARSE, Record


@dataclass(frozen=True)
class Part:
    """A record, or bytes between records (operation "").

    Attributes:
        at: in the block.
        length: bytes written.
        operation: what predicts them.
        base_offset: where in the base; -1 if nowhere.
        cost: bytes of the program, those of pools split by elements.
    """

    at: int
    length: int
    operation: str
    base_offset: int
    cost: float


def outline(data: bytes, offset: int, length: int) -> list[Part]:
    """The parts of a program in the order of the target. Raises SluiceError(DELTA_INVALID)."""
    try:
        return list(_parts(open_body(data, offset, length)))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise faults.invalid(f"a program at byte {offset} of the target does not run: {error}") from error


def _pools(record: Record) -> tuple[str, ...]:
    name = residuals.pool_of(record)
    return (name, "sizes") if name == "gaps" else (name,) if name else ()


def _weight(record: Record) -> int:
    return record.changed if record.residual == SPARSE else record.count


def _parts(opened: Opened) -> Iterator[Part]:
    totals: dict[str, int] = {}
    for record in opened.records:
        for name in _pools(record):
            totals[name] = totals.get(name, 0) + _weight(record)
    rates = {name: sum(map(len, parts)) / max(1, totals.get(name, 0)) for name, parts in opened.pools.items()}
    own = opened.record_bytes / max(1, len(opened.records))
    between = opened.place.length - sum(record.length for record in opened.records)
    rate = len(opened.skeleton) / max(1, between)
    end = 0
    for record in opened.records:
        if not record.length:
            continue
        if record.at > end:
            yield Part(end, record.at - end, "", -1, (record.at - end) * rate)
        cost = own + sum(_weight(record) * rates.get(name, 0) for name in _pools(record))
        yield Part(record.at, record.length, NAMES[record.op], record.base, cost)
        end = record.at + record.length
    if end < opened.place.length:
        yield Part(end, opened.place.length - end, "", -1, (opened.place.length - end) * rate)
