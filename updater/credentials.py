"""What somebody holds to call the control plane: key, certificate chain, trust bundle, renewal counter.

All of it lies in one file of mode 0600 that is replaced atomically, because the parts belong together: a key
without its certificate, or a counter that is behind, would cost an enrolment. From credentials come the
channels of gRPC: the server is known by a fixed name in its certificate (`SERVER_NAME`), which the authority
gives to nobody but the control plane; so addresses may change, and no public authority counts.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from sluice.api.v1 import errors_pb2
from updater import keyfile
from updater.certificates import (
    certificates,
    check_chain,
    key_from_pem,
    public_in,
    public_of,
)
from updater.errors import SluiceError
from updater.identity import Identity

SERVER_NAME = "control.sluice.internal"  # DNS name in the certificate of every control plane
MAX_CREDENTIALS_BYTES = 256 << 10
_FORMAT = "sluice credentials v1"


@dataclass(frozen=True)
class Credentials:
    """One set of credentials.

    Attributes:
        bundle: PEM of the authorities that are trusted.
        chain: PEM of the certificate and what leads to the bundle; empty before enrolment.
        key: PEM of the certificate's private key; empty before enrolment.
        counter: of the next renewal, see proto/sluice/api/v1/identity.proto.
        server_name: DNS name that the control plane's certificate must carry.
    """

    bundle: bytes
    chain: bytes = b""
    key: bytes = b""
    counter: int = 0
    server_name: str = SERVER_NAME

    @property
    def leaf(self) -> x509.Certificate | None:
        """The certificate itself; None before enrolment. Raises SluiceError(CERTIFICATE_INVALID)."""
        return certificates(self.chain)[0] if self.chain else None

    def check(self, now: datetime.datetime) -> Identity:
        """Whose they are, with chain, dates and key proven against the bundle.

        Raises SluiceError(UNAUTHENTICATED | CERTIFICATE_INVALID | CERTIFICATE_EXPIRED | KEY_UNAVAILABLE).
        """
        if not self.chain:
            raise SluiceError(errors_pb2.UNAUTHENTICATED, "no certificate yet", hint="enrol first")
        chain = certificates(self.chain)
        if public_of(key_from_pem(self.key)) != public_in(chain[0]):
            raise SluiceError(errors_pb2.KEY_UNAVAILABLE, "the private key belongs to another certificate")
        return check_chain(chain, certificates(self.bundle), now)

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """A channel that shows the certificate, or none before enrolment, and trusts only the bundle."""
        secure = grpc.ssl_channel_credentials(self.bundle, self.key or None, self.chain or None)
        return grpc.secure_channel(address, secure, [*options, *name_options(self.server_name)])

    def anonymous(self) -> Credentials:
        """The same trust without a certificate: for enrolment and renewal."""
        return Credentials(self.bundle, counter=self.counter, server_name=self.server_name)

    def save(self, path: Path) -> None:
        """Replaces the file, durably. Raises SluiceError(IO_FAILED | DISK_FULL)."""
        document = {
            "format": _FORMAT,
            "bundle": self.bundle.decode("ascii"),
            "chain": self.chain.decode("ascii"),
            "key": self.key.decode("ascii"),
            "counter": self.counter,
            "server_name": self.server_name,
        }
        keyfile.write_secret(path, (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Credentials:
        """Raises SluiceError(KEY_UNAVAILABLE): none there, others may read them, or damaged."""
        data = keyfile.read_secret(path, MAX_CREDENTIALS_BYTES)
        try:
            document = json.loads(data)
            if document["format"] != _FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            texts = [document[name] for name in ("bundle", "chain", "key")]
            bundle, chain, key = (text.encode("ascii") for text in texts)
            return cls(bundle, chain, key, int(document["counter"]), str(document["server_name"]))
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeError) as error:
            raise SluiceError(
                errors_pb2.KEY_UNAVAILABLE,
                f"{path} does not hold credentials: {error}",
                hint="remove it and enrol again",
                obj=str(path),
            ) from error


def name_options(server_name: str) -> list[tuple[str, Any]]:
    """Options of a channel that expects this name in the server's certificate, whatever address it calls."""
    return [("grpc.ssl_target_name_override", server_name)]
