"""Identities as rows: who may have certificates, and what was noticed about them.

Every function takes a connection inside a transaction of fleet.database. What must be remembered although the
caller is refused (a pending request, a conflict) is returned as an `Outcome`, for an exception would undo it.

Rules: the first key that asks for a name holds it. Another key gets it only from an operator, who approves by
its fingerprint or made a token for exactly this name; the certificates of the key before are void then. A key
in two boxes shows by the renewal counter: each answer moves it on, so one of the boxes is always behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, tuple_, update

from fleet import tables
from fleet.clock import SECOND, to_timestamp
from fleet.limits import (
    MAX_COUNTER,
    MAX_NAMED_IN_ERROR,
    MAX_PENDING_IDENTITIES,
    MAX_STORED_INTEGER,
    PENDING_KEEP_S,
    STALE_RENEWALS,
)
from fleet.tokens import Purpose, redeem
from sluice.api.v1 import errors_pb2, identity_pb2
from sluice.api.v1.identity_pb2 import (
    IDENTITY_STATE_ACCEPTED as ACCEPTED,
)
from sluice.api.v1.identity_pb2 import (
    IDENTITY_STATE_PENDING as PENDING,
)
from sluice.api.v1.identity_pb2 import (
    IDENTITY_STATE_REJECTED as REJECTED,
)
from sluice.api.v1.identity_pb2 import (
    IDENTITY_STATE_REVOKED as REVOKED,
)
from updater.certificates import fingerprint
from updater.errors import SluiceError
from updater.identity import Identity, Kind, Role

Issue = Callable[[], tuple[bytes, int]]  # makes a certificate: its chain, and when it ends (microseconds)
_TWO_BOXES = (
    "its key renews from two places: a cloned box, or a copy of its disk; revoke it and enrol both anew"
)
_OLD_COPY = "it renewed with an old counter: restored from an old copy of its disk, or cloned"


@dataclass(frozen=True)
class Outcome:
    """What became of a request: a certificate, or why there is none.

    Attributes:
        chain: PEM; empty when refused.
        counter: for the next renewal.
        error: why there is no certificate.
        voided: whether certificates that this identity had before count no longer.
    """

    chain: bytes = b""
    counter: int = 0
    error: SluiceError | None = None
    voided: bool = False


def enrol(
    connection: Connection,
    identity: Identity,
    public_key: bytes,
    token: str,
    labels: Mapping[str, str],
    issue: Issue,
    now_us: int,
) -> Outcome:
    """Takes a first request. Raises SluiceError(TOKEN_INVALID | LIMIT_EXCEEDED)."""
    purpose = redeem(connection, token, identity, public_key, labels, now_us) if token else None
    row = _find(connection, identity.kind.value, identity.name)
    if row is None:
        if purpose is None:
            _check_room(connection, now_us)
        _insert(connection, identity, public_key, ACCEPTED if purpose else PENDING, purpose, now_us)
        return (
            _issued(connection, identity, issue, now_us)
            if purpose
            else Outcome(error=_pending(identity, public_key))
        )
    named = purpose is not None and purpose.name == identity.name
    if public_key == row.public_key:
        if row.state == ACCEPTED:
            if (identity.role.value if identity.role else "") != row.role:
                return Outcome(error=_refused(identity, "it was accepted with another role"))
            return _issued(
                connection, identity, issue, now_us, stale=row.stale + 1 if row.counter and not named else 0
            )
        if row.state == PENDING and purpose is None:
            return Outcome(error=_pending(identity, public_key))
        if row.state != PENDING and not named:
            return Outcome(error=_refused(identity, _was(row.state)))
    if public_key == row.public_key or named:
        _accept(connection, identity, public_key, purpose, _void_until(row))
        outcome = _issued(connection, identity, issue, now_us)
        return Outcome(outcome.chain, outcome.counter, voided=True)
    if public_key == row.refused_key:
        return Outcome(error=_refused(identity, "an operator rejected this key"))
    _change(connection, identity, conflict_key=public_key, conflict_us=now_us)
    return Outcome(error=_conflict(identity, public_key))


def renew(
    connection: Connection,
    identity: Identity,
    counter: int,
    check: Callable[[bytes], None],
    issue: Issue,
    now_us: int,
) -> Outcome:
    """Takes a renewal; `check` raises unless the request is signed by the enrolment key that it is given."""
    row = _find(connection, identity.kind.value, identity.name)
    if row is None or not row.public_key:
        raise SluiceError(
            errors_pb2.UNAUTHENTICATED,
            f"{identity} is not enrolled here",
            hint="enrol it: with a token, or by an operator's approval",
            obj=str(identity),
        )
    check(row.public_key)
    if row.state == PENDING:
        return Outcome(error=_pending(identity, row.public_key))
    if row.state != ACCEPTED:
        return Outcome(error=_refused(identity, _was(row.state)))
    if (identity.role.value if identity.role else "") != row.role:
        return Outcome(error=_refused(identity, "it was accepted with another role"))
    if counter > MAX_COUNTER:
        raise SluiceError(errors_pb2.LIMIT_EXCEEDED, f"the counter is {counter}; the most is {MAX_COUNTER}")
    stale = 0 if counter >= row.counter else row.stale + 1
    notice = row.notice
    if counter < row.counter - 1:
        notice = _OLD_COPY
    elif stale >= STALE_RENEWALS:
        notice = _TWO_BOXES
    # A counter ahead of ours comes from a box that saw answers which this database lost: go on above it.
    return _issued(
        connection, identity, issue, now_us, stale=stale, notice=notice, counter=max(counter, row.counter)
    )


def admit(connection: Connection, identity: Identity, public_key: bytes, expires_us: int, now_us: int) -> int:
    """Writes down an identity that was given its first certificate directly; returns its counter."""
    connection.execute(delete(tables.identities).where(_is(identity.kind.value, identity.name)))
    _insert(connection, identity, public_key, ACCEPTED, None, now_us)
    return _issued(connection, identity, lambda: (b"", expires_us), now_us).counter


def approve(connection: Connection, kind: Kind, name: str, wanted: str) -> bool:
    """Accepts the key with this fingerprint; returns whether older certificates became void.

    Raises SluiceError(DEVICE_UNKNOWN | IDENTITY_CONFLICT).
    """
    row = _get(connection, kind, name)
    for key in (row.conflict_key, row.public_key, row.refused_key):
        if key and fingerprint(key) == wanted:
            replaced: bool = key != row.public_key
            void = _void_until(row) if replaced else row.void_until_us
            if row.state == REVOKED:
                void = row.expires_us
            connection.execute(
                update(tables.identities)
                .where(_is(kind.value, name))
                .values(
                    state=ACCEPTED,
                    public_key=key,
                    conflict_key=b"",
                    refused_key=b"",
                    conflict_us=0,
                    stale=0,
                    notice="",
                    void_until_us=void,
                )
            )
            return replaced
    waiting = row.conflict_key or row.public_key
    raise SluiceError(
        errors_pb2.IDENTITY_CONFLICT,
        f"{kind.value} {name} does not wait with the fingerprint {wanted[:80]!r}",
        hint=f"the one that waits has {fingerprint(waiting)}: compare it with what the box itself shows"
        if waiting
        else "nobody has asked yet: start the agent first",
        obj=name,
    )


def reject(connection: Connection, kind: Kind, name: str) -> None:
    """Refuses what waits: the other key of a conflict, else the pending identity itself.

    Raises SluiceError(DEVICE_UNKNOWN | IDENTITY_CONFLICT).
    """
    row = _get(connection, kind, name)
    where = update(tables.identities).where(_is(kind.value, name))
    if row.conflict_key:
        connection.execute(where.values(refused_key=row.conflict_key, conflict_key=b"", conflict_us=0))
    elif row.state in (PENDING, REJECTED):
        connection.execute(where.values(state=REJECTED))
    else:
        raise SluiceError(
            errors_pb2.IDENTITY_CONFLICT,
            f"{kind.value} {name} does not wait for anything",
            hint=f"to put it out: `sluice {kind.value} revoke {name}`",
            obj=name,
        )


def revoke(connection: Connection, kind: Kind, name: str, now_us: int) -> None:
    """Puts an identity out, known or not: all its certificates are void."""
    row = _find(connection, kind.value, name)
    if row is None:
        identity = Identity("unknown", kind, name)
        _insert(connection, identity, b"", REVOKED, None, now_us)
    connection.execute(
        update(tables.identities)
        .where(_is(kind.value, name))
        .values(state=REVOKED, void_until_us=MAX_STORED_INTEGER, conflict_key=b"", conflict_us=0)
    )


def get(connection: Connection, kind: Kind, name: str) -> identity_pb2.Identity:
    """One identity. Raises SluiceError(DEVICE_UNKNOWN)."""
    return _message(_get(connection, kind, name))


def page(
    connection: Connection, kind: str, after: tuple[str, str], limit: int, *, attention: bool
) -> list[identity_pb2.Identity]:
    """Identities behind `after`, by kind and name."""
    columns = tables.identities.c
    query = select(tables.identities).where(tuple_(columns.kind, columns.name) > after)
    if kind:
        query = query.where(columns.kind == kind)
    if attention:
        query = query.where(
            or_(columns.state == PENDING, func.length(columns.conflict_key) > 0, columns.notice != "")
        )
    rows = connection.execute(query.order_by(columns.kind, columns.name).limit(limit)).all()
    return [_message(row) for row in rows]


def void(connection: Connection, now_us: int) -> dict[tuple[str, str], int]:
    """Whose certificates are void, and until which end (microseconds), where that still matters."""
    columns = tables.identities.c
    rows = connection.execute(
        select(columns.kind, columns.name, columns.void_until_us).where(columns.void_until_us > now_us)
    )
    return {(row.kind, row.name): row.void_until_us for row in rows}


def is_accepted(connection: Connection, public_key: bytes) -> bool:
    """Whether an identity with this key was accepted."""
    columns = tables.identities.c
    query = select(func.count()).where(columns.public_key == public_key, columns.state == ACCEPTED)
    return bool(connection.execute(query).scalar_one())


def admins(connection: Connection, without: bytes = b"") -> list[str]:
    """Names of the admins who were accepted, so many as a message names, without the one who has this key."""
    columns = tables.identities.c
    rows = connection.execute(
        select(columns.name)
        .where(
            columns.kind == Kind.OPERATOR.value,
            columns.state == ACCEPTED,
            columns.role == Role.ADMIN.value,
            columns.public_key != without,
        )
        .order_by(columns.name)
        .limit(MAX_NAMED_IN_ERROR)
    )
    return [row.name for row in rows]


def labels_of(connection: Connection, device_id: str) -> dict[str, str]:
    """The labels that a device got by its token."""
    row = _find(connection, Kind.DEVICE.value, device_id)
    labels: dict[str, str] = json.loads(row.labels) if row is not None else {}
    return labels


def prune(connection: Connection, now_us: int) -> int:
    """Forgets those that waited too long; returns how many."""
    columns = tables.identities.c
    old = columns.created_us < now_us - int(PENDING_KEEP_S * SECOND)
    gone = connection.execute(delete(tables.identities).where(columns.state == PENDING, old))
    return int(gone.rowcount)


def _issued(
    connection: Connection,
    identity: Identity,
    issue: Issue,
    now_us: int,
    *,
    stale: int = 0,
    notice: str | None = None,
    counter: int | None = None,
) -> Outcome:
    row = _get(connection, identity.kind, identity.name)
    chain, expires_us = issue()
    number = (row.counter if counter is None else counter) + 1
    if notice is None:
        notice = _TWO_BOXES if stale >= STALE_RENEWALS else row.notice
    _change(
        connection,
        identity,
        counter=number,
        stale=stale,
        notice=notice,
        renewed_us=now_us,
        expires_us=max(expires_us, row.expires_us),
    )
    return Outcome(chain, number)


def _accept(
    connection: Connection, identity: Identity, public_key: bytes, purpose: Purpose | None, void_until_us: int
) -> None:
    _change(
        connection,
        identity,
        state=ACCEPTED,
        role=identity.role.value if identity.role else "",
        public_key=public_key,
        conflict_key=b"",
        refused_key=b"",
        conflict_us=0,
        stale=0,
        notice="",
        labels=json.dumps(dict(purpose.labels) if purpose else {}, sort_keys=True),
        void_until_us=void_until_us,
    )


def _insert(
    connection: Connection,
    identity: Identity,
    public_key: bytes,
    state: int,
    purpose: Purpose | None,
    now_us: int,
) -> None:
    connection.execute(
        insert(tables.identities).values(
            kind=identity.kind.value,
            name=identity.name,
            role=identity.role.value if identity.role else "",
            state=state,
            public_key=public_key,
            conflict_key=b"",
            refused_key=b"",
            conflict_us=0,
            counter=0,
            stale=0,
            notice="",
            labels=json.dumps(dict(purpose.labels) if purpose else {}, sort_keys=True),
            created_us=now_us,
            renewed_us=0,
            expires_us=0,
            void_until_us=0,
        )
    )


def _void_until(row: Row[Any]) -> int:
    """Up to which end certificates are void once this row's key is replaced."""
    return max(int(row.expires_us), int(row.void_until_us) if row.state != REVOKED else 0)


def _check_room(connection: Connection, now_us: int) -> None:
    prune(connection, now_us)
    columns = tables.identities.c
    count = connection.execute(select(func.count()).where(columns.state == PENDING)).scalar_one()
    if count >= MAX_PENDING_IDENTITIES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"{count} identities wait for approval already",
            hint="enrol with a token, or ask an operator to look at `sluice device pending`",
        )


def _is(kind: str, name: str) -> Any:
    columns = tables.identities.c
    return (columns.kind == kind) & (columns.name == name)


def _change(connection: Connection, identity: Identity, **values: Any) -> None:
    connection.execute(
        update(tables.identities).where(_is(identity.kind.value, identity.name)).values(**values)
    )


def _find(connection: Connection, kind: str, name: str) -> Row[Any] | None:
    return connection.execute(select(tables.identities).where(_is(kind, name))).one_or_none()


def _get(connection: Connection, kind: Kind, name: str) -> Row[Any]:
    row = _find(connection, kind.value, name)
    if row is None:
        raise SluiceError(
            errors_pb2.DEVICE_UNKNOWN,
            f"no {kind.value} {name[:80]!r} ever asked for a certificate here",
            hint="`sluice device pending` and `sluice operator list` show who did",
            obj=name[:80],
        )
    return row


def _message(row: Row[Any]) -> identity_pb2.Identity:
    message = identity_pb2.Identity(
        kind=row.kind,
        name=row.name,
        role=row.role,
        state=row.state,
        fingerprint=fingerprint(row.public_key) if row.public_key else "",
        conflict_fingerprint=fingerprint(row.conflict_key) if row.conflict_key else "",
        notice=row.notice,
        labels=json.loads(row.labels),
        create_time=to_timestamp(row.created_us),
        counter=row.counter,
    )
    for field, us in (
        ("conflict_time", row.conflict_us),
        ("renew_time", row.renewed_us),
        ("expire_time", row.expires_us),
    ):
        if us:
            getattr(message, field).CopyFrom(to_timestamp(us))
    return message


def _was(state: int) -> str:
    return "an operator rejected it" if state == REJECTED else "an operator revoked it"


def _pending(identity: Identity, public_key: bytes) -> SluiceError:
    mark = fingerprint(public_key)
    return SluiceError(
        errors_pb2.ENROLMENT_PENDING,
        f"{identity.kind.value} {identity.name} waits for an operator's approval; its fingerprint is {mark}",
        hint=f"an operator runs: sluice {identity.kind.value} approve {identity.name} --fingerprint {mark}",
        obj=identity.name,
    )


def _refused(identity: Identity, why: str) -> SluiceError:
    return SluiceError(
        errors_pb2.ENROLMENT_REFUSED,
        f"{identity.kind.value} {identity.name} gets no certificate: {why}",
        hint=f"an operator can let it in with a token made for this name: "
        f"sluice {identity.kind.value} token {identity.name}",
        obj=identity.name,
    )


def _conflict(identity: Identity, public_key: bytes) -> SluiceError:
    mark = fingerprint(public_key)
    return SluiceError(
        errors_pb2.IDENTITY_CONFLICT,
        f"{identity.kind.value} {identity.name} is enrolled with another key than this one ({mark})",
        hint=f"re-imaged? an operator runs: sluice {identity.kind.value} approve {identity.name} "
        f"--fingerprint {mark}; a second box with this id? give it another",
        obj=identity.name,
    )
