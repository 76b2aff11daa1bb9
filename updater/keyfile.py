"""Long-lived signing keys, behind an interface that a TPM or another token can fill as well.

`SigningKey` can say its public half and sign, and never gives the private half away; an enrolment key needs
no more. `FileKey` keeps the key in a file that only its owner may read, written atomically before it is first
used, so that no power cut leaves a box whose key the control plane knows and the box does not.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.certificates import key_from_pem, key_to_pem, new_key, public_of
from updater.errors import SluiceError, os_errors

MAX_KEY_BYTES = 16 << 10
_FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class SigningKey(Protocol):
    """A private key on P-256 that signs and stays where it is."""

    @property
    def public(self) -> bytes:
        """The public half, DER (SubjectPublicKeyInfo)."""
        ...

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, DER."""
        ...


class FileKey:
    """A `SigningKey` in a file of mode 0600.

    Args:
        key: the private key, as read.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = public_of(key)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    @classmethod
    def open(cls, path: Path) -> FileKey:
        """The key at `path`; a new one when there is none.

        Raises SluiceError(KEY_UNAVAILABLE | IO_FAILED).
        """
        if not path.exists():
            write_secret(path, key_to_pem(new_key()))
        return cls(read_key(path))


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key from a file with strict modes. Raises SluiceError(KEY_UNAVAILABLE | IO_FAILED)."""
    try:
        return key_from_pem(read_secret(path))
    except SluiceError as error:
        error.obj = str(path)
        if str(path) not in error.message:
            error.message = f"{path}: {error.message}"
        raise


def read_secret(path: Path, most_bytes: int = MAX_KEY_BYTES) -> bytes:
    """A secret file's content. Raises SluiceError(KEY_UNAVAILABLE) if others may read it or it is missing."""
    with os_errors("reading", path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SluiceError(errors_pb2.KEY_UNAVAILABLE, f"{path} does not exist", obj=str(path)) from error
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
            mode = os.fstat(descriptor).st_mode
            if mode & _FOR_OTHERS:
                raise SluiceError(
                    errors_pb2.KEY_UNAVAILABLE,
                    f"{path} may be read or written by others (mode {stat.S_IMODE(mode):04o})",
                    hint=f"chmod 600 {path}; if somebody may have read it, make a new key",
                    obj=str(path),
                )
            data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise SluiceError(errors_pb2.KEY_UNAVAILABLE, f"{path} is too long for a key", obj=str(path))
    return data


def write_secret(path: Path, data: bytes) -> None:
    """Writes a file that only its owner may read, in a directory that is made so if it is missing.

    What root makes below another user's directory belongs to that user, whose service has to read it.
    """
    directory = path.parent
    if not directory.exists():
        with os_errors("creating the directory", directory):
            directory.mkdir(parents=True, mode=0o700)
            _give_to_owner_of(directory.parent, directory)
    write_atomic(path, data, mode=0o600)
    with os_errors("giving away", path):
        _give_to_owner_of(directory, path)


def _give_to_owner_of(directory: Path, path: Path) -> None:
    owner = directory.stat()
    if os.geteuid() == 0 and (owner.st_uid, owner.st_gid) != (0, 0):
        os.chown(path, owner.st_uid, owner.st_gid)
