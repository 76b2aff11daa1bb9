"""An operator's profile: who they are and which control plane they speak to, in one directory.

`credentials.json` (key, certificate, bundle), `enrolment.key`, and `profile.json` with the addresses. The
directory is SLUICE_PROFILE, else ~/.config/sluice. A certificate lives a day, so whoever uses the profile
renews it in passing, at two thirds of its life or after any absence, with the enrolment key; two commands
that do so at once take turns by a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.certificates import identity_of, renew_time
from updater.credentials import Credentials
from updater.enrolment import Enroller
from updater.errors import SluiceError, os_errors
from updater.identity import Identity
from updater.keyfile import FileKey

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
class Profile:
    """One profile.

    Attributes:
        directory: where it lies.
        control: host:port of the control plane.
        enrolment: host:port where it gives certificates.
    """

    directory: Path
    control: str = ""
    enrolment: str = ""

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
            return cls(place, str(document["control"]), str(document["enrolment"]))
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

    def save(self, credentials: Credentials) -> None:
        """Keeps credentials and addresses."""
        credentials.save(self.directory / CREDENTIALS)
        document = {"control": self.control, "enrolment": self.enrolment}
        write_atomic(self.directory / ADDRESSES, (json.dumps(document, indent=1) + "\n").encode())

    def exists(self) -> bool:
        return (self.directory / CREDENTIALS).exists()

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
