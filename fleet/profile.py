"""An operator's profile: who they are and which control plane they speak to, in one directory.

`credentials.json` (key, certificate, bundle), `enrolment.key`, and `profile.json` with the addresses. The
directory is SLUICE_PROFILE, else ~/.config/sluice. A certificate lives a day, so whoever uses the profile
renews it in passing, at two thirds of its life or after any absence, with the enrolment key; two commands
that do so at once take turns by a lock. With another authority's files (`sluice operator adopt`) nothing is
renewed here.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.certificates import identity_of, renew_time
from updater.credentials import Credentials
from updater.enrolment import Enroller
from updater.errors import SluiceError, os_errors
from updater.identity import Identity
from updater.keyfile import FileKey, read_secret

CREDENTIALS = "credentials.json"
ENROLMENT_KEY = "enrolment.key"
ADDRESSES = "profile.json"


def default_directory() -> Path:
    """SLUICE_PROFILE, else the user's configuration directory."""
    named = os.environ.get("SLUICE_PROFILE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "sluice"


@dataclass(frozen=True)
class Files:
    """Paths of another authority's files, and the DNS name in the control plane's certificate."""

    certificate: str
    key: str
    bundle: str
    server_name: str


@dataclass(frozen=True)
class Profile:
    """One profile.

    Attributes:
        directory: where it lies.
        control: host:port of the control plane.
        enrolment: host:port where it gives certificates.
        files: of another authority, which are read anew each time; None: the control plane issues.
    """

    directory: Path
    control: str = ""
    enrolment: str = ""
    files: Files | None = None

    @classmethod
    def open(cls, directory: Path | None = None) -> Profile:
        """The profile in a directory; without addresses when there is none.

        Raises SluiceError(CONFIG_INVALID).
        """
        place = directory or default_directory()
        path = place / ADDRESSES
        if not path.exists():
            return cls(place)
        try:
            document = json.loads(path.read_text("utf-8"))
            files = Files(**document["files"]) if document.get("files") else None
            return cls(place, str(document["control"]), str(document["enrolment"]), files)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                f"{path} cannot be read: {error}",
                hint="enrol again with `sluice operator enrol`",
                obj=str(path),
            ) from error

    def key(self) -> FileKey:
        """The enrolment key, made on first use."""
        return FileKey.open(self.directory / ENROLMENT_KEY)

    def save(self, credentials: Credentials | None = None) -> None:
        """Keeps the addresses, and credentials that the control plane has issued."""
        if credentials is not None:
            credentials.save(self.directory / CREDENTIALS)
        document: dict[str, Any] = {"control": self.control, "enrolment": self.enrolment}
        if self.files is not None:
            document |= {"files": asdict(self.files)}
        with os_errors("creating the profile", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(self.directory / ADDRESSES, (json.dumps(document, indent=1) + "\n").encode())

    def exists(self) -> bool:
        return any((self.directory / name).exists() for name in (CREDENTIALS, ADDRESSES))

    def identity(self) -> Identity:
        """Whose profile it is. Raises SluiceError(UNAUTHENTICATED | …)."""
        leaf = self._held().leaf
        assert leaf is not None
        return identity_of(leaf)

    def credentials(self) -> Credentials:
        """What to call with, renewed if that is due.

        A renewal that fails is no matter while the certificate lasts. Raises SluiceError(UNAUTHENTICATED)
        without a profile, and what renewing raised once the certificate is over.
        """
        held = self._held()
        leaf = held.leaf
        assert leaf is not None
        now = datetime.now(UTC)
        if self.files is not None:
            return held
        if now < renew_time(leaf, random.random()):  # noqa: S311 - spreads load, guards nothing
            return held
        try:
            return self._renewed(held)
        except SluiceError:
            if now < leaf.not_valid_after_utc:
                return held
            raise

    def _renewed(self, held: Credentials) -> Credentials:
        with self._lock():
            newest = self._held()
            if newest != held:
                return newest  # another command was first
            with Enroller(self.enrolment, held, self.key()) as enroller:
                found = enroller.renew(self.identity())
            found.save(self.directory / CREDENTIALS)
            return found

    def _held(self) -> Credentials:
        if self.files is not None:
            with os_errors("reading", self.files.certificate):
                chain = Path(self.files.certificate).read_bytes()
                bundle = Path(self.files.bundle).read_bytes()
            key = read_secret(Path(self.files.key))
            return Credentials(bundle, chain, key, server_name=self.files.server_name)
        if not self.exists():
            raise SluiceError(
                errors_pb2.UNAUTHENTICATED,
                f"{self.directory} holds no certificate for you",
                hint="on the control machine: `sluice control init`; elsewhere, with a token from an admin: "
                "`sluice operator enrol`; another directory: SLUICE_PROFILE",
                obj=str(self.directory),
            )
        held = Credentials.load(self.directory / CREDENTIALS)
        if not held.chain:
            raise SluiceError(errors_pb2.UNAUTHENTICATED, "you are not enrolled yet", obj=str(self.directory))
        return held

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self.directory / "lock"
        with os_errors("opening the lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
