"""An operator's trust directory: keys, the verified copy of what is published, and changes on their way
there.

    DIR/root.json     the root that this operator trusts to begin with, as on a device
    DIR/keys/         one file a key (updater.trust.keys)
    DIR/published/    the verified copy (updater.trust.client)
    DIR/pending/      changed metadata, signed in part or whole, that is not published yet

A change begins at the pending version of a document if there is one, else at the published one; its number is
always the published one's and one more, so that several changes become one version. `sign` adds the
signatures of every key here that may; what reaches its thresholds can be published, the rest waits for other
signers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Root, Targets

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors
from updater.manifest import is_name
from updater.trust.client import Fetch, TrustClient
from updater.trust.documents import (
    ROOT,
    TARGETS,
    Document,
    Signatures,
    read,
    read_root,
    read_targets,
    require,
    root_signatures,
    sign,
    signatures,
    write,
)
from updater.trust.keys import KeyFile, Passphrase, read_key_file

ROOT_DAYS = 365.0  # that a root counts
TARGETS_DAYS = 365.0  # that targets and delegated roles count
MAX_KEYS = 256  # in one directory


@dataclass(frozen=True)
class Signed:
    """How far a pending document is.

    Attributes:
        role: whose document.
        version: of the document.
        needed: each threshold that it must reach.
        by: names of the keys that signed just now.
    """

    role: str
    version: int
    needed: tuple[Signatures, ...]
    by: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return all(item.complete for item in self.needed)


class TrustDirectory:
    """One operator's directory. Nothing is created before something is written.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root_path = path / "root.json"
        self._keys = path / "keys"
        self._pending = path / "pending"
        self._published = path / "published"

    def is_set_up(self) -> bool:
        return self.root_path.is_file()

    # Keys.

    def keys(self) -> list[KeyFile]:
        """Every key here, by name. Raises SluiceError(KEY_UNAVAILABLE | IO_FAILED)."""
        if not self._keys.is_dir():
            return []
        with os_errors("listing the keys", self._keys):
            paths = sorted(self._keys.glob("*.json"))[:MAX_KEYS]
        return [read_key_file(path) for path in paths]

    def key(self, name: str) -> KeyFile:
        """One key by name. Raises SluiceError(KEY_UNAVAILABLE)."""
        return read_key_file(self._key_path(name))

    def has_key(self, name: str) -> bool:
        return self._key_path(name).is_file()

    def add_key(self, key: KeyFile) -> None:
        """Keeps a key. Raises SluiceError(REQUEST_INVALID) when the name is taken or none."""
        path = self._key_path(key.name)
        if path.exists():
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"there is a key {key.name} already",
                hint="choose another name; keys are never overwritten",
                obj=key.name,
            )
        self._make(self._keys)
        key.write(path)

    def _key_path(self, name: str) -> Path:
        if not is_name(name):
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"not a key's name: {name[:80]!r}",
                hint="1 to 64 of a-z 0-9 - _ . starting with a letter or digit",
                obj=name[:80],
            )
        return self._keys / f"{name}.json"

    # What is published.

    def pin(self, root: bytes) -> None:
        """Begins from a root."""
        read_root(root)
        self._make(self.path)
        write_atomic(self.root_path, root)

    def forget(self) -> None:
        """Forgets the chain, pinned and pending; keys stay."""
        for place in (self._pending, self._published, self._published / "root_history"):
            if place.is_dir():
                with os_errors("forgetting", place):
                    for file in place.glob("*.json"):
                        file.unlink()
        with os_errors("forgetting", self.root_path):
            self.root_path.unlink(missing_ok=True)

    def client(self, fetch: Fetch, clock: Callable[[Root], datetime] | None = None) -> TrustClient:
        """The verified copy; `clock` as `TrustClient` takes it.

        Raises SluiceError(KEY_UNAVAILABLE) before trust is set up.
        """
        if not self.is_set_up():
            raise SluiceError(
                errors_pb2.KEY_UNAVAILABLE,
                f"{self.path} is no trust directory",
                hint="`sluice trust init` makes one; --dir or SLUICE_TRUST names another",
                obj=str(self.path),
            )
        with os_errors("reading the pinned root", self.root_path):
            pinned = self.root_path.read_bytes()
        return TrustClient(self._published, pinned, fetch, clock)

    def _offline(self) -> TrustClient:
        return self.client(lambda _role, _version: None)

    def roots(self) -> list[bytes]:
        """Every root from the pinned one to the newest known; none before the first is signed."""
        return self._offline().roots() if self.is_set_up() else []

    def published(self, role: str) -> Document | None:
        """The verified copy of a document; None where there is none."""
        if role == ROOT:
            roots = self.roots()
            return read_root(roots[-1]) if roots else None
        data = self.published_bytes(role)
        return read(role, data) if data is not None else None

    def published_bytes(self, role: str) -> bytes | None:
        """The verified copy of targets or a delegated role as it was sent."""
        return self._offline().stored(role) if self.is_set_up() else None

    # Changes.

    def pending(self) -> dict[str, Document]:
        """Changed documents that are not published yet, the root first."""
        if not self._pending.is_dir():
            return {}
        with os_errors("reading pending metadata", self._pending):
            found = {path.stem: path.read_bytes() for path in self._pending.glob("*.json")}
        order = sorted(found, key=lambda role: (role != ROOT, role != TARGETS, role))
        return {role: read(role, found[role]) for role in order}

    def pending_path(self, role: str) -> Path:
        return self._pending / f"{role}.json"

    def current(self, role: str) -> Document:
        """The document to change: pending, else published. Raises SluiceError(METADATA_INVALID)."""
        found = self.pending().get(role) or self.published(role)
        if found is None:
            raise SluiceError(
                errors_pb2.METADATA_INVALID,
                f"there is no {role} metadata here",
                hint="`sluice trust verify` fetches what is published",
                obj=role,
            )
        return found

    def current_root(self) -> Root:
        """The newest root, pending or not."""
        return read_root(write(self.current(ROOT))).signed

    def current_targets(self, role: str = TARGETS) -> Metadata[Targets]:
        """The newest targets of a role, pending or not."""
        return read_targets(role, write(self.current(role)))

    def put(self, role: str, document: Metadata[Any]) -> None:
        """Keeps a changed document, numbered to follow the published one, without signatures."""
        before = self.published(role)
        if before is not None:
            document.signed.version = before.signed.version + 1
        document.signatures.clear()
        self._write_pending(role, document)

    def _write_pending(self, role: str, document: Metadata[Any]) -> None:
        self._make(self._pending)
        write_atomic(self.pending_path(role), write(document))

    def take(self, role: str, document: Document) -> None:
        """Keeps a document that another operator prepared, with its signatures.

        Raises SluiceError(SIGNATURE_INVALID | METADATA_ROLLED_BACK) unless it may follow what is published.
        """
        require(self.needed(role, document), role)
        before = self.published(role)
        if before is not None and document.signed.version <= before.signed.version:
            raise SluiceError(
                errors_pb2.METADATA_ROLLED_BACK,
                f"{role} version {document.signed.version} does not follow the published"
                f" {before.signed.version}",
                hint="ask for the newest",
                obj=role,
            )
        self._write_pending(role, document)

    def drop(self, role: str) -> None:
        """Forgets a pending change; absent ones are no error."""
        with os_errors("removing", self.pending_path(role)):
            self.pending_path(role).unlink(missing_ok=True)

    def drop_published(self) -> None:
        """Forgets pending documents that the verified copy has, or has gone beyond."""
        for role, document in self.pending().items():
            known = self.published(role)
            if known is not None and known.signed.version >= document.signed.version:
                self.drop(role)

    # Signing.

    def needed(self, role: str, document: Document) -> tuple[Signatures, ...]:
        """How far a document is signed, for each threshold that it must reach."""
        if role == ROOT:
            known = self.roots()
            before = read_root(known[-1]).signed if known else None
            return root_signatures(read_root(write(document)), before)
        if role == TARGETS:
            return (signatures(role, document, self.current_root()),)
        return (signatures(role, document, self.current_targets().signed),)

    def sign(self, role: str, document: Document, passphrase: Passphrase) -> Signed:
        """Adds the signatures of every key here that may sign and has not; what is signed is kept pending.

        Raises SluiceError(KEY_UNAVAILABLE) when a key cannot be opened.
        """
        by = []
        wanted = {keyid for item in self.needed(role, document) for keyid in item.unsigned}
        for key in self.keys():
            if key.public.keyid in wanted and key.can_sign:
                sign(document, [key.signer(passphrase)])
                by.append(key.name)
        self._write_pending(role, document)
        return Signed(role, document.signed.version, self.needed(role, document), tuple(by))

    def may_sign(self, role: str) -> bool:
        """Whether a key here may sign a role's document."""
        keys = {key.public.keyid for key in self.keys() if key.can_sign}
        return any(keys & {*item.signed, *item.unsigned} for item in self.needed(role, self.current(role)))

    def _make(self, path: Path) -> None:
        with os_errors("creating", path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
