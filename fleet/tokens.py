"""Enrolment tokens: good once, for one name or any device, until they expire. Kept as hashes only.

A token has 256 bits of chance, so a plain SHA-256 is enough to keep it and nobody guesses one. Every function
takes a connection inside a transaction of fleet.database.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from fleet import tables
from fleet.clock import SECOND
from fleet.limits import MAX_TOKENS, TOKEN_KEEP_S
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.identity import Identity, Kind

_PREFIX = "slt_"
_MAX_CHARACTERS = 128


@dataclass(frozen=True)
class Purpose:
    """What a token is for.

    Attributes:
        kind: of the identity.
        name: of the identity; empty for any.
        role: of an operator whose certificate shall name it.
        labels: that the device gets.
    """

    kind: Kind
    name: str
    role: str
    labels: Mapping[str, str]


def create(connection: Connection, purpose: Purpose, expires_us: int, now_us: int) -> str:
    """A new token. Raises SluiceError(LIMIT_EXCEEDED)."""
    columns = tables.tokens.c
    connection.execute(delete(tables.tokens).where(columns.expires_us < now_us - int(TOKEN_KEEP_S * SECOND)))
    count = connection.execute(select(func.count()).where(columns.used_us == 0)).scalar_one()
    if count >= MAX_TOKENS:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"{count} tokens wait to be used; at most {MAX_TOKENS} may",
            hint="use those, or let them expire",
        )
    token = _PREFIX + secrets.token_urlsafe(32)
    connection.execute(
        insert(tables.tokens).values(
            digest=_digest(token),
            kind=purpose.kind.value,
            name=purpose.name,
            role=purpose.role,
            labels=json.dumps(dict(purpose.labels), sort_keys=True),
            expires_us=expires_us,
            used_us=0,
            used_by="",
            used_key=b"",
        )
    )
    return token


def redeem(
    connection: Connection,
    token: str,
    identity: Identity,
    public_key: bytes,
    labels: Mapping[str, str],
    now_us: int,
) -> Purpose:
    """Uses a token up for an identity and its enrolment key.

    The same identity with the same key may present it again, for its answer may have been lost. Raises
    SluiceError(TOKEN_INVALID) saying as much as the holder of a token may know.
    """
    columns = tables.tokens.c
    row = connection.execute(
        select(tables.tokens).where(columns.digest == _digest(token[:_MAX_CHARACTERS]))
    ).one_or_none()
    if row is None:
        raise _invalid("nobody knows this token", "was it copied whole? it begins with " + _PREFIX)
    if row.used_us and (row.used_by, row.used_key) != (identity.uri, public_key):
        raise _invalid(
            "this token was used already", "each token enrols one device or operator: make another"
        )
    if not row.used_us and now_us >= row.expires_us:
        raise _invalid("this token has expired", "make another with `sluice device token`")
    purpose = _purpose(row)
    role = identity.role.value if identity.role else ""
    if purpose.kind is not identity.kind or purpose.name not in ("", identity.name) or purpose.role != role:
        wanted = f"{purpose.kind.value}/{purpose.name or '*'}" + (f"/{purpose.role}" if purpose.role else "")
        raise _invalid(f"this token is for {wanted}, not for {identity}", "use it there, or make another")
    for key, value in purpose.labels.items():
        if labels.get(key, value) != value:
            raise _invalid(
                f"this token is bound to {key}={value} and the device says {key}={labels[key][:80]}",
                "correct the device's labels, or make a token for it",
            )
    connection.execute(
        update(tables.tokens)
        .where(columns.digest == row.digest)
        .values(used_us=row.used_us or now_us, used_by=identity.uri, used_key=public_key)
    )
    return purpose


def _purpose(row: Row[Any]) -> Purpose:
    return Purpose(Kind(row.kind), row.name, row.role, json.loads(row.labels))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _invalid(message: str, hint: str) -> SluiceError:
    return SluiceError(errors_pb2.TOKEN_INVALID, message, hint=hint)
