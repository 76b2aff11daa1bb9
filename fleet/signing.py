"""Signing: an operator's changes to signed metadata, from what is published to what is published next.

In order: `refresh` verifies what is published into the directory; `plan` makes the changed documents and says
in plain words what changes (a dry run ends here); `apply` signs them with the keys at hand, and with them
what a change would otherwise leave unsigned; `publish` sends what is complete. What lacks signatures waits in
the directory for other signers.

Rules: nothing is signed over metadata that was not verified from this operator's own root; publishing may be
repeated, and brings a control plane that was restored from a backup what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from securesystemslib.signer import Key
from tuf.api.metadata import Metadata

from fleet.trust_directory import ROOT_DAYS, TARGETS_DAYS, Signed, TrustDirectory
from sluice.api.v1 import errors_pb2, trust_pb2
from updater.errors import SluiceError
from updater.manifest import Manifest
from updater.trust.client import TrustClient
from updater.trust.documents import ROOT, TARGETS, Document, in_days, read, read_root, read_targets, write
from updater.trust.keys import Passphrase
from updater.trust.roles import (
    RoleKeys,
    add_version,
    delegated,
    describe,
    make_root,
    make_targets,
    renew,
    role_for,
)


class MetadataStore(Protocol):
    """Where signed metadata is published: a control plane over the network, or one on this machine."""

    def get_trust(self) -> trust_pb2.GetTrustResponse:
        """How far trust is set up there, and the online key."""
        ...

    def get_metadata(self, role: str, version: int | None = None) -> bytes:
        """One role's signed metadata, not verified; empty where there is none."""
        ...

    def publish_metadata(
        self, metadata: Sequence[tuple[str, bytes]], *, replace_root: bool = False
    ) -> object:
        """Publishes signed metadata, roots by version. Safe to repeat."""
        ...


_NEVER_EXPIRED = datetime.fromtimestamp(0, UTC)  # no date lies before this

# One document's change: takes the newest and the date that the next counts until.
Change = Callable[[Metadata[Any], datetime], Metadata[Any]]


@dataclass(frozen=True)
class Planned:
    """One document that changes.

    Attributes:
        role: whose.
        after: without signatures.
        lines: what changes, for people.
    """

    role: str
    after: Metadata[Any]
    lines: list[str]


class Signing:
    """One operator at work.

    Args:
        directory: the operator's.
        client: the control plane; None to stay on this machine.
        passphrase: asked for each sealed key that signs.
    """

    def __init__(
        self, directory: TrustDirectory, client: MetadataStore | None, passphrase: Passphrase
    ) -> None:
        self.directory = directory
        self._client = client
        self._passphrase = passphrase

    def _fetch(self, role: str, version: int | None) -> Iterable[bytes] | None:
        assert self._client is not None
        data = self._client.get_metadata(role, version)
        return (data,) if data else None

    def refresh(self, *, expired: bool = False) -> TrustClient | None:
        """Verifies what is published, delegated roles too. None where nothing is, or without a control plane.

        With `expired` dates are not looked at, for whoever signs anew what has run out; signatures and
        numbers are.

        Raises SluiceError as `TrustClient.refresh`.
        """
        if (
            self._client is None
            or not self.directory.is_set_up()
            or not self._client.get_trust().root_version
        ):
            return None
        trust = self.directory.client(self._fetch, (lambda _: _NEVER_EXPIRED) if expired else None)
        trust.refresh()
        trust.load_delegated()
        self.directory.drop_published()
        return trust

    def plan(self, changes: Mapping[str, Change], days: float | None = None) -> list[Planned]:
        """What the documents would be, and what that changes; nothing is written.

        Args:
            changes: by role.
            days: that the changed documents count; None for the default of their kind.
        """
        planned = []
        for role, change in changes.items():
            before = self.directory.current(role)
            expires = in_days(days or (ROOT_DAYS if role == ROOT else TARGETS_DAYS))
            after = change(before, expires)
            known = self.directory.published(role)
            after.signed.version = known.signed.version + 1 if known is not None else before.signed.version
            planned.append(Planned(role, after, describe(before, after)))
        return planned

    def set_up(
        self, root: RoleKeys, targets: RoleKeys, online: Key, *, replace_root: bool = False
    ) -> tuple[list[Planned], list[Signed]]:
        """The first root and targets of a chain: signed, pinned here when complete, and published.

        Args:
            root: who signs the root from now on.
            targets: who signs versions.
            online: the control plane's key.
            replace_root: begin a new chain in place of the one that is known here. What was signed stays
                named, under a number above the old one, so that no device takes it for a rollback.

        Raises SluiceError as `publish`.
        """
        before = self.directory.published_bytes(TARGETS) if replace_root else None
        until = in_days(TARGETS_DAYS)
        made = make_targets(until) if before is None else renew(read_targets(TARGETS, before), until)
        first = make_root(root, targets, online, in_days(ROOT_DAYS))
        planned = [
            Planned(ROOT, first, describe(None, first)),
            Planned(TARGETS, made, describe(None, made)),
        ]
        if replace_root:
            self.directory.forget()
        signed = self.apply(planned)
        if all(item.complete for item in signed):
            self.directory.pin(write(self.directory.pending()[ROOT]))
            if self._client is not None:
                self.publish(replace_root=replace_root)
        return planned, signed

    def apply(self, planned: Iterable[Planned]) -> list[Signed]:
        """Keeps the changed documents pending, and signs all that is pending.

        Raises SluiceError(KEY_UNAVAILABLE) when a key cannot be opened.
        """
        for item in planned:
            self.directory.put(item.role, item.after)
        self._add_dependants()
        return [
            self.directory.sign(role, document, self._passphrase)
            for role, document in self.directory.pending().items()
        ]

    def _add_dependants(self) -> None:
        """Documents that a pending one leaves without enough signatures come anew, under a new number."""
        expires = in_days(TARGETS_DAYS)
        pending = self.directory.pending()
        if ROOT in pending and TARGETS not in pending:
            targets = self.directory.published(TARGETS)
            if targets is not None and not all(
                item.complete for item in self.directory.needed(TARGETS, targets)
            ):
                self.directory.put(TARGETS, renew(targets, expires))
        if TARGETS not in self.directory.pending():
            return
        for name in delegated(self.directory.current_targets().signed):
            if name in self.directory.pending():
                continue
            known = self.directory.published(name)
            if known is None:
                self.directory.put(name, make_targets(expires))
            elif not self._complete(name, known):
                self.directory.put(name, renew(known, expires))

    def _complete(self, role: str, document: Document) -> bool:
        return all(item.complete for item in self.directory.needed(role, document))

    def publish(self, *, replace_root: bool = False) -> list[Signed]:
        """Sends everything that is complete and newer than what is published.

        Returns what is still waiting for signatures. Raises SluiceError as `ControlClient.publish_metadata`.
        """
        if self._client is None:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID, "publishing needs a control plane", hint="leave --offline out"
            )
        ready, waiting = self._ready(self._client, replace_root=replace_root)
        if ready:
            self._client.publish_metadata(ready, replace_root=replace_root)
            for role, data in ready:
                if role == ROOT and not self.directory.is_set_up():
                    self.directory.pin(data)
            self.refresh()
        return waiting

    def _ready(
        self, client: MetadataStore, *, replace_root: bool
    ) -> tuple[list[tuple[str, bytes]], list[Signed]]:
        ready: list[tuple[str, bytes]] = []
        waiting: list[Signed] = []
        theirs = 0 if replace_root else client.get_trust().root_version
        pending = self.directory.pending()
        ready += [(ROOT, data) for data in self.directory.roots() if read_root(data).signed.version > theirs]
        roles = []
        if TARGETS in pending or self.directory.published(TARGETS) is not None:
            roles = [TARGETS, *delegated(self.directory.current_targets().signed)]
        if ROOT in pending:
            roles = [ROOT, *roles]
        for role in roles:
            if any(item.role == ROOT for item in waiting):
                break  # the keys of everything else follow from it
            mine = pending.get(role) or self.directory.published(role)
            if mine is None:
                continue
            state = Signed(role, mine.signed.version, self.directory.needed(role, mine), ())
            data = write(mine)
            if not state.complete:
                waiting.append(state)
            elif role == ROOT:
                if mine.signed.version > theirs and (ROOT, data) not in ready:
                    ready.append((role, data))
            else:
                published = client.get_metadata(role)
                if not published or read(role, published).signed.version < mine.signed.version:
                    ready.append((role, data))
        if any(self._holds_back(item.role) for item in waiting):
            ready = [(role, data) for role, data in ready if role != TARGETS]
        return ready, waiting

    def _holds_back(self, role: str) -> bool:
        """Whether targets that leave models to a role cannot be published before that role has signed.

        Devices take a delegation only together with something that its keys signed.
        """
        if role in (ROOT, TARGETS):
            return False
        known = self.directory.published(role)
        return known is None or not self._complete(role, known)

    # Versions.

    def sign_version(self, manifest: Manifest) -> list[tuple[str, bytes]]:
        """Names a version in signed metadata; returns that, to be published together with the version.

        What is published is verified first. Nothing is returned for a version that is named with this content
        already.

        Raises SluiceError(KEY_UNAVAILABLE) when no key here may sign the model,
        SluiceError(SIGNATURE_INVALID) when further signers must sign, and as `refresh`.
        """
        trust = self.refresh()
        named = trust.version(manifest.model, manifest.version) if trust is not None else None
        if named is not None and named.digest == manifest.digest:
            return []
        name = f"{manifest.model}@{manifest.version}"
        role = role_for(self.directory.current_targets().signed, manifest.model)
        if not self.directory.may_sign(role):
            raise SluiceError(
                errors_pb2.KEY_UNAVAILABLE,
                f"no key in {self.directory.path} may sign {name}: {role} signs it",
                hint="`sluice trust verify` shows whose keys do; SLUICE_TRUST names another directory",
                obj=name,
            )
        length = len(manifest.to_bytes())

        def change(document: Metadata[Any], expires: datetime) -> Metadata[Any]:
            return add_version(document, manifest.model, manifest.version, manifest.digest, length, expires)

        (planned,) = self.plan({role: change})
        self.directory.put(role, planned.after)
        signed = self.directory.sign(role, planned.after, self._passphrase)
        if not signed.complete:
            path = self.directory.pending_path(role)
            raise SluiceError(
                errors_pb2.SIGNATURE_INVALID,
                f"{name} needs signatures of other keys of {role}:"
                f" {sum(item.missing for item in signed.needed)} more",
                hint=f"let them run `sluice trust sign {path}`, then `sluice trust publish`, then push again",
                obj=name,
            )
        self.directory.drop(role)  # either it is published with the version, or signed anew
        return [(role, write(planned.after))]
