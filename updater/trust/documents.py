"""Signed metadata as values: read from bytes under their limits, written in one form, signed, checked.

A document is one `Metadata` of python-tuf: a root, targets (a delegated role is targets too), snapshot or
timestamp. Here is what both sides share; what the parts mean is in roles.py (offline) and online.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TypeVar, cast

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.limits import MAX_ROOT_BYTES, MAX_SNAPSHOT_BYTES, MAX_TARGETS_BYTES, MAX_TIMESTAMP_BYTES
from updater.trust.problems import trust_errors

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = Root.type, Targets.type, Snapshot.type, Timestamp.type
TOP_LEVEL = (ROOT, TIMESTAMP, SNAPSHOT, TARGETS)
_LIMITS = {ROOT: MAX_ROOT_BYTES, SNAPSHOT: MAX_SNAPSHOT_BYTES, TIMESTAMP: MAX_TIMESTAMP_BYTES}
_KINDS: dict[str, type[Signed]] = {ROOT: Root, SNAPSHOT: Snapshot, TIMESTAMP: Timestamp}

Document = Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]
_Kind = TypeVar("_Kind", Root, Targets, Snapshot, Timestamp)
Delegator = Root | Targets


@dataclass(frozen=True)
class Signatures:
    """How far a document is signed, for one role that must sign it.

    Attributes:
        role: whose keys: "root", or "the root before" when a new root needs the old one's keys too.
        threshold: signatures needed, of different keys.
        signed: keys that signed, by id.
        unsigned: keys that may sign and have not, by id.
    """

    role: str
    threshold: int
    signed: Mapping[str, Key]
    unsigned: Mapping[str, Key]

    @property
    def complete(self) -> bool:
        return len(self.signed) >= self.threshold

    @property
    def missing(self) -> int:
        return max(0, self.threshold - len(self.signed))


def limit_of(role: str) -> int:
    """The most bytes that a role's metadata may have."""
    return _LIMITS.get(role, MAX_TARGETS_BYTES)


def read(role: str, data: bytes) -> Document:
    """Parses a role's metadata; no signature is checked.

    Args:
        role: "root", "targets", "snapshot", "timestamp" or a delegated role's name.
        data: JSON.

    Raises SluiceError(METADATA_INVALID | LIMIT_EXCEEDED).
    """
    if len(data) > limit_of(role):
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"the {role} metadata has {len(data)} bytes; at most {limit_of(role)} are taken",
            hint="delegate some models to roles of their own: `sluice trust delegate`",
            obj=role,
        )
    with trust_errors(f"reading the {role} metadata", role):
        try:
            document = Metadata[Root].from_bytes(data)  # of any kind: looked at next
        except RecursionError as error:
            raise invalid(role, "is nested too deeply") from error
    if not isinstance(document.signed, _KINDS.get(role, Targets)):
        raise invalid(role, f"is of type {document.signed.type!r}")
    return document


def read_root(data: bytes) -> Metadata[Root]:
    """Parses a root. Raises SluiceError(METADATA_INVALID | LIMIT_EXCEEDED)."""
    return cast("Metadata[Root]", read(ROOT, data))


def read_targets(role: str, data: bytes) -> Metadata[Targets]:
    """Parses targets or a delegated role. Raises SluiceError(METADATA_INVALID | LIMIT_EXCEEDED)."""
    return cast("Metadata[Targets]", read(role, data))


def write(document: Document) -> bytes:
    """The bytes that are kept and sent."""
    return document.to_bytes(JSONSerializer(compact=True))


def sign(document: Document, signers: Iterable[Signer]) -> None:
    """Adds a signature of each signer. Raises SluiceError(KEY_UNAVAILABLE)."""
    for signer in signers:
        try:
            document.sign(signer, append=True)
        except UnsignedMetadataError as error:
            raise SluiceError(
                errors_pb2.KEY_UNAVAILABLE,
                f"the key {signer.public_key.keyid[:16]} did not sign: {error.__cause__ or error}",
                hint="is its device there and unlocked?",
                obj=signer.public_key.keyid,
            ) from error


def next_of(document: Metadata[_Kind], expires: datetime) -> Metadata[_Kind]:
    """A copy to be changed: the next version, without signatures."""
    signed = copy.deepcopy(document.signed)
    signed.version += 1
    signed.expires = expires
    return Metadata(signed)


def signatures(role: str, document: Document, delegator: Delegator, label: str = "") -> Signatures:
    """How far a document is signed by the keys that `delegator` names for a role."""
    with _no_such_role(role):
        found = delegator.get_verification_result(role, document.signed_bytes, document.signatures)
    return Signatures(label or role, found.threshold, found.signed, found.unsigned)


def root_signatures(document: Metadata[Root], before: Root | None) -> tuple[Signatures, ...]:
    """How far a root is signed: by its own keys, and by those of the root before, if there is one."""
    own = signatures(ROOT, document, document.signed)
    if before is None:
        return (own,)
    return (signatures(ROOT, document, before, "the root before"), own)


def require(needed: Iterable[Signatures], what: str) -> None:
    """Raises SluiceError(SIGNATURE_INVALID) unless every threshold is reached."""
    for item in needed:
        if not item.complete:
            raise SluiceError(
                errors_pb2.SIGNATURE_INVALID,
                f"{what} has {len(item.signed)} good signatures of {item.role}'s keys;"
                f" {item.threshold} are needed",
                hint="let more of the keys' owners sign it: `sluice trust sign`",
                obj=what,
            )


def in_days(days: float, now: datetime | None = None) -> datetime:
    """A date so many days from now, in whole seconds, as metadata keeps it."""
    start = now or datetime.now(timezone.utc)
    return (start + timedelta(days=days)).replace(microsecond=0)


def invalid(role: str, why: str, hint: str = "") -> SluiceError:
    """The error for metadata that contradicts itself or its neighbours."""
    return SluiceError(errors_pb2.METADATA_INVALID, f"the {role} metadata {why}", hint=hint, obj=role)


class _no_such_role:  # noqa: N801 - used as a verb
    """Turns python-tuf's ValueError for a role that is not delegated into METADATA_INVALID."""

    def __init__(self, role: str) -> None:
        self._role = role

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ValueError):
            hint = f"it needs the targets.json that delegates to it: put that beside {self._role}.json"
            raise invalid(self._role, f"is not delegated: {error}", hint) from error
