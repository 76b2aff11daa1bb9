"""The chain of audit records: how one is made from the one before, and how a run of them is checked. Pure.

A record is canonical JSON (updater/canonical.py). It has `sequence`, one more than its predecessor's, and
`previous`, the SHA-256 of its predecessor's bytes; the first follows START. A head, the sequence and digest
of the newest record, stands for everything before it: whoever kept one notices when records up to it are
changed, and when they are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet.limits import AUDIT_RECORD_BYTES
from sluice.api.v1 import errors_pb2
from updater import canonical
from updater.digests import PREFIX, digest_bytes, is_digest
from updater.errors import SluiceError

_HEAD = re.compile(r"([0-9]{1,16}):(.*)")


@dataclass(frozen=True)
class Head:
    """A record, named by its number and digest.

    Attributes:
        sequence: from 1; 0 for START.
        digest: of the record's bytes.
    """

    sequence: int
    digest: str

    def __str__(self) -> str:
        return f"{self.sequence}:{self.digest}"


START = Head(0, PREFIX + "0" * 64)


def parse_head(text: str) -> Head:
    """A head from its text, "57:sha256:…". Raises SluiceError(REQUEST_INVALID)."""
    match = _HEAD.fullmatch(text.strip())
    if match is None or not is_digest(match[2]):
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"not the head of an audit log: {text[:100]!r}",
            hint="it looks like 57:sha256:… and is printed by `sluice audit export` and `verify`",
            obj=text[:100],
        )
    return Head(int(match[1]), match[2])


def follow(head: Head, fields: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The record that comes after `head`, and its own head.

    Args:
        head: of the record before.
        fields: what the record says; neither `sequence` nor `previous`.
    """
    record = {**fields, "sequence": head.sequence + 1, "previous": head.digest}
    data = canonical.encode(record)
    if len(data) > AUDIT_RECORD_BYTES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"an audit record of {len(data)} bytes; at most {AUDIT_RECORD_BYTES} are kept",
        )
    return data, Head(head.sequence + 1, digest_bytes(data))


@dataclass(frozen=True)
class Verified:
    """What a run of records was found to be: whole and in order.

    Attributes:
        first: sequence of the first record; 0 when there is none.
        head: of the last; the head that it was to follow when there is none.
        proven: those of the heads given that lie in it.
    """

    first: int
    head: Head
    proven: tuple[Head, ...]


def verify(records: Iterable[bytes], *, after: Head | None = None, seen: Sequence[Head] = ()) -> Verified:
    """Checks a run of records, oldest first.

    Args:
        records: their bytes.
        after: the head that the first one must follow; None: START, unless the run begins later.
        seen: heads that somebody kept: each must be in the run, unless it is older than its beginning.

    Raises SluiceError(AUDIT_BROKEN) that says what is wrong and where.
    """
    head, first = after, 0
    wanted = {kept.sequence: kept for kept in (*seen, *((after,) if after is not None else ()))}
    proven: list[Head] = []
    for number, data in enumerate(records, 1):
        record = _parse(data, number)
        sequence, previous = record["sequence"], record["previous"]
        if head is None:
            # Older records may be kept elsewhere; the first one's word has to do for what came before it.
            head = START if sequence == 1 else Head(sequence - 1, previous)
        if sequence != head.sequence + 1:
            raise _broken(_gap(head.sequence, sequence, first), sequence)
        if previous != head.digest:
            raise _broken(
                f"record {sequence} does not follow record {head.sequence} as it is here: "
                f"one of the two was changed",
                sequence,
            )
        head = Head(sequence, digest_bytes(data))
        first = first or sequence
        kept = wanted.get(sequence)
        if kept is not None:
            if kept != head:
                raise _broken(f"record {sequence} is not the one that was there: it was rewritten", sequence)
            proven.append(kept)
    end = head if head is not None else START
    last = max(wanted, default=0)
    if last > end.sequence:
        raise _broken(
            f"the log ends at record {end.sequence}, and record {last} is known: its end is gone", last
        )
    return Verified(first, end, tuple(proven))


def _parse(data: bytes, number: int) -> dict[str, Any]:
    if len(data) > AUDIT_RECORD_BYTES:
        raise _broken(f"line {number} is longer than a record can be", number)
    try:
        record = canonical.decode(data, "record")
    except SluiceError as error:
        raise _broken(f"line {number} is not a record: {error.message}", number) from error
    if (
        not isinstance(record, dict)
        or type(record.get("sequence")) is not int
        or record["sequence"] < 1
        or not isinstance(record.get("previous"), str)
    ):
        raise _broken(f"line {number} is not a record: it has no sequence or no previous digest", number)
    return record


def _gap(before: int, sequence: int, first: int) -> str:
    if sequence <= before:
        what = "comes again" if first and sequence >= first else "comes too late"
        return f"record {sequence} {what} after record {before}: records were moved or repeated"
    if sequence == before + 2:
        return f"record {before + 1} is missing"
    return f"records {before + 1} to {sequence - 1} are missing"


def _broken(message: str, sequence: int) -> SluiceError:
    return SluiceError(
        errors_pb2.AUDIT_BROKEN,
        message,
        hint="keep this log and its copies as they are; docs/security.md, Audit, says what to do",
        obj=str(sequence),
    )
