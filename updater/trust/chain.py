"""Explains a repository's signed metadata from its first root to the last version, in plain words.

The client stops at the first fault, as it must; this goes on and names each, for `sluice trust verify` and
for whoever has to mend it. Pure: it takes bytes and a time. It decides nothing: what a device accepts is
decided by client.py alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Targets

from updater.errors import SluiceError
from updater.trust.documents import (
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    Delegator,
    Document,
    Signatures,
    read,
    read_root,
    root_signatures,
    signatures,
)
from updater.trust.roles import allowed_from, delegated

SOON_DAYS = 30  # before its end a date is worth a word


@dataclass(frozen=True)
class Finding:
    """One sentence about one document.

    Attributes:
        role: whose document: "root", "targets", a delegated role, …
        version: of the document; 0 where it cannot be read.
        sound: False for a fault: devices refuse it, and what hangs on it.
        text: what is so, for people.
    """

    role: str
    version: int
    sound: bool
    text: str


def explain(roots: Sequence[bytes], others: Mapping[str, bytes], now: datetime) -> list[Finding]:
    """Findings about a whole repository, in the order in which a device looks at it.

    Args:
        roots: every root from the pinned one on.
        others: "timestamp", "snapshot", "targets" and each delegated role.
        now: the time to hold expiry against.
    """
    return list(_Chain(others, now).walk(roots))


class _Chain:
    def __init__(self, others: Mapping[str, bytes], now: datetime) -> None:
        self._others = others
        self._now = now

    def walk(self, roots: Sequence[bytes]) -> Iterator[Finding]:
        root: Root | None = None
        for index, data in enumerate(roots):
            try:
                document = read_root(data)
            except SluiceError as error:
                yield Finding(ROOT, 0, False, error.message)
                return
            yield from self._root(document, root, final=index == len(roots) - 1)
            root = document.signed
        if root is None:
            yield Finding(ROOT, 0, False, "there is no root: nothing can be verified")
            return
        timestamp = yield from self._document(TIMESTAMP, root, None)
        described = timestamp.signed.snapshot_meta if timestamp is not None else None
        snapshot = yield from self._document(SNAPSHOT, root, described)
        meta: Mapping[str, MetaFile] = snapshot.signed.meta if snapshot is not None else {}
        yield from self._targets(TARGETS, root, meta, set())

    def _root(self, document: Metadata[Root], before: Root | None, *, final: bool) -> Iterator[Finding]:
        root = document.signed
        needed = root_signatures(document, before)
        follows = before is None or root.version == before.version + 1
        sound = follows and all(item.complete for item in needed)
        text = "pinned; " if before is None else "follows " if follows else "does NOT follow "
        text += "" if before is None else f"version {before.version}; "
        text += "; ".join(_signed(item) for item in needed)
        if final:
            text += f"; {self._until(root.expires)}"
            sound = sound and root.expires > self._now
        yield Finding(ROOT, root.version, sound, text)
        if final:
            for name, role in root.roles.items():
                keys = ", ".join(keyid[:16] for keyid in role.keyids)
                yield Finding(ROOT, root.version, True, f"{name} is signed by {role.threshold} of: {keys}")

    def _document(
        self, role: str, delegator: Delegator, meta: MetaFile | None
    ) -> Any:  # a generator that returns the document, or None
        data = self._others.get(role)
        if data is None:
            yield Finding(role, 0, False, "is missing")
            return None
        try:
            document: Document = read(role, data)
        except SluiceError as error:
            yield Finding(role, 0, False, error.message)
            return None
        try:
            signed = signatures(role, document, delegator)
        except SluiceError as error:
            yield Finding(role, document.signed.version, False, error.message)
            return None
        sound, text = signed.complete, _signed(signed)
        if meta is not None:
            fits = document.signed.version == meta.version
            try:
                meta.verify_length_and_hashes(data)
            except RepositoryError:
                fits = False
            sound = sound and fits
            text += "" if fits else f"; is NOT the one that is listed (version {meta.version})"
        sound = sound and document.signed.expires > self._now
        yield Finding(role, document.signed.version, sound, f"{text}; {self._until(document.signed.expires)}")
        return document

    def _targets(
        self, role: str, delegator: Delegator, meta: Mapping[str, MetaFile], seen: set[str]
    ) -> Iterator[Finding]:
        if role in seen:
            return
        seen.add(role)
        listed = meta.get(f"{role}.json")
        if listed is None:
            yield Finding(role, 0, False, "is delegated, but the snapshot does not list it")
        document = yield from self._document(role, delegator, listed)
        if document is None:
            return
        targets: Targets = document.signed
        for path, target in targets.targets.items():
            allowed = allowed_from(target)
            extra = f"; devices at version {allowed} or below may go down to it" if allowed else ""
            text = f"names {path}: manifest sha256:{target.hashes.get('sha256', '?')}{extra}"
            yield Finding(role, targets.version, True, text)
        for name, child in delegated(targets).items():
            keys = ", ".join(keyid[:16] for keyid in child.keyids)
            models = ", ".join(path.removesuffix("/*") for path in child.paths or ())
            text = f"leaves {models} to {name}, signed by {child.threshold} of: {keys}"
            yield Finding(role, targets.version, True, text)
        for name in delegated(targets):
            yield from self._targets(name, targets, meta, seen)

    def _until(self, expires: datetime) -> str:
        days = (expires - self._now).days
        if expires <= self._now:
            return f"EXPIRED on {expires:%Y-%m-%d}"
        return f"good until {expires:%Y-%m-%d}" + (f", {days} days from now" if days <= SOON_DAYS else "")


def _signed(item: Signatures) -> str:
    good = "signed" if item.complete else "NOT signed"
    return f"{good} by {len(item.signed)} of the {item.threshold} keys that {item.role} needs"
