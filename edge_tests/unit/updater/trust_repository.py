"""A repository in memory for tests of trust: real keys, real metadata, and a way to serve something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Metadata

from updater.trust import roles
from updater.trust.client import TrustClient
from updater.trust.documents import (
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    in_days,
    read_root,
    read_targets,
    sign,
    write,
)
from updater.trust.repository import Repository, publish, with_online

MODEL = "detector"
START = datetime(2026, 1, 1, tzinfo=UTC)


def digest_of(version: int, content: int = 0) -> str:
    return f"sha256:{version:032x}{content:032x}"


class Simulator:
    """What operators and a control plane do, and what an attacker between them and a device may do.

    Attributes:
        now: the time there; devices have a clock of their own.
        served: overrides by (role, version or None for the newest): bytes, pieces, or None for nothing.
    """

    def __init__(self, *, root_keys: int = 1, targets_keys: int = 1, targets_threshold: int = 1) -> None:
        self.now = START
        self.roots = [CryptoSigner.generate_ed25519() for _ in range(root_keys)]
        self.signers = [CryptoSigner.generate_ed25519() for _ in range(targets_keys)]
        self.online = CryptoSigner.generate_ed25519()
        self.delegated: dict[str, Signer] = {}
        self.repository = Repository()
        self.history: dict[tuple[str, int], bytes] = {}
        self.served: dict[tuple[str, int | None], Any] = {}
        self.fetched: list[tuple[str, int | None]] = []
        keys = tuple(signer.public_key for signer in self.roots)
        root = roles.make_root(
            roles.RoleKeys(keys, len(keys)),
            roles.RoleKeys(tuple(signer.public_key for signer in self.signers), targets_threshold),
            self.online.public_key,
            self.until(365),
        )
        sign(root, self.roots)
        targets = roles.make_targets(self.until(365))
        sign(targets, self.signers[:targets_threshold])
        self.publish((ROOT, write(root)), (TARGETS, write(targets)))
        self.pinned = write(root)

    def until(self, days: float) -> datetime:
        return in_days(days, self.now)

    def publish(self, *submitted: tuple[str, bytes]) -> None:
        published = publish(
            self.repository, submitted, online_keyid=self.online.public_key.keyid, now=self.now
        )
        self.repository = published.repository
        for version, data in published.roots.items():
            self.history[ROOT, version] = data
        for role, data in published.roles.items():
            self.history[role, read_targets(role, data).signed.version] = data
        self.resign()

    def resign(self) -> None:
        """Snapshot and timestamp anew, at this time."""
        self.repository = with_online(
            self.repository, self.online, int(self.now.timestamp() * 1000), self.until(7)
        )
        assert self.repository.online is not None
        for role, document in (
            (SNAPSHOT, self.repository.online.snapshot),
            (TIMESTAMP, self.repository.online.timestamp),
        ):
            self.history[role, document.signed.version] = write(document)  # type: ignore[arg-type]

    def targets(self, role: str = TARGETS) -> Metadata[Any]:
        return read_targets(role, self.repository.targets[role])

    def root(self) -> Metadata[Any]:
        assert self.repository.root is not None
        return read_root(self.repository.root)

    def push(self, version: int, content: int = 0) -> None:
        """Signs and publishes a version of MODEL."""
        after = roles.add_version(
            self.targets(), MODEL, version, digest_of(version, content), 100, self.until(365)
        )
        sign(after, self.signers)
        self.publish((TARGETS, write(after)))

    def others(self) -> dict[str, bytes]:
        """The newest metadata of every role but the root."""
        online = self.repository.online
        assert online is not None
        signed = {SNAPSHOT: write(online.snapshot), TIMESTAMP: write(online.timestamp)}
        return {**self.repository.targets, **signed}

    def pass_days(self, days: float) -> None:
        self.now += timedelta(days=days)
        self.resign()

    # The device's side.

    def newest(self) -> dict[str, int]:
        return {role: max(v for r, v in self.history if r == role) for role, _ in self.history}

    def fetch(self, role: str, version: int | None) -> Iterable[bytes] | None:
        self.fetched.append((role, version))
        if (role, version) in self.served:
            given = self.served[role, version]
            return (given,) if isinstance(given, bytes) else given
        number = version if version is not None else self.newest()[role]
        data = self.history.get((role, number))
        return (data,) if data is not None else None

    def device(self, directory: Path, clock: Callable[[], datetime] | None = None) -> TrustClient:
        """A device with the first root; its clock shows this simulator's time unless told otherwise."""
        return TrustClient(
            directory, self.pinned, self.fetch, lambda _root: clock() if clock is not None else self.now
        )

    def state(self) -> tuple[Repository, dict[tuple[str, int], bytes]]:
        """All that is published, to be served again later."""
        return replace(self.repository), dict(self.history)
