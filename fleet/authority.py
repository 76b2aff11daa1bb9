"""The authority as the running control plane uses it: its own certificate, the bundle, and issuing.

`refresh`, called every AUTHORITY_REFRESH_S, takes what changed on disk (a rotation by the command line),
replaces the intermediate at two thirds of its life while the root's key is at hand, and renews the control
plane's own certificate, all without a restart: gRPC asks at each handshake for what is new. With another
authority's certificate (`server.json`, see ca.py) nothing is issued and only the file is followed.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from fleet import ca, log
from fleet.limits import INTERMEDIATE_LAST_S
from sluice.api.v1 import errors_pb2
from updater import keyfile
from updater.certificates import certificates, check_dates, key_to_pem, new_key, renew_time
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind

DIRECTORY = "ca"  # below DATA
NAME = "main"  # of this control plane in its identity: one machine, one name
_Stamp = tuple[tuple[str, int, int], ...]


def now() -> datetime.datetime:
    """The time by this machine's clock, aware."""
    return datetime.datetime.now(datetime.UTC)


class Authority:
    """What the control plane shows, trusts and issues.

    Args:
        directory: DATA/ca.
        life_s: of what is issued.

    Raises SluiceError(CONFIG_INVALID) when `sluice control init` was not run.
    """

    def __init__(self, directory: Path, life_s: float) -> None:
        self._directory = directory
        self._life_s = life_s
        self._stamp: _Stamp = ()
        self._issuer: ca.Issuer | None = None
        self._server = Credentials(b"")
        self._renew_at = now()
        self.trust_domain = ""
        self._told = False
        if not (directory / ca.ISSUER).exists() and not (directory / ca.SERVER).exists():
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                f"{directory} holds no certificate authority",
                hint=f"run `sluice control init --data {directory.parent}` first",
                obj=str(directory),
            )
        self.refresh()

    @property
    def bundle(self) -> bytes:
        """PEM of the authorities that callers are checked against."""
        return self._server.bundle

    def issue(self, identity: Identity, public: ec.EllipticCurvePublicKey) -> tuple[bytes, int]:
        """A certificate chain (PEM) and when it ends (microseconds since 1970).

        Raises SluiceError(ENROLMENT_REFUSED) where another authority issues.
        """
        if self._issuer is None:
            raise SluiceError(
                errors_pb2.ENROLMENT_REFUSED,
                "this control plane issues no certificates: another authority does",
                hint="name its files in the agent's configuration: control.certificate and control.key",
            )
        chain = self._issuer.issue(identity, public, self._life_s, now())
        return chain, int(certificates(chain)[0].not_valid_after_utc.timestamp() * 1e6)

    def refresh(self) -> None:
        """Takes what changed and renews what is due. Raises SluiceError; what was held then stays."""
        stamp = self._stamp_now()
        changed = stamp != self._stamp
        if changed:
            self._read()
            if self._stamp:
                log.event("authority_changed", trust_domain=self.trust_domain)
            self._stamp = stamp
        if self._issuer is not None and self._rotate_if_due(self._issuer):
            self._read()
            self._stamp = self._stamp_now()
            changed = True
        if self._issuer is not None and (changed or now() >= self._renew_at):
            self._renew(self._issuer)

    def server_credentials(self, *, verify: bool) -> grpc.ServerCredentials:
        """Credentials of a port that follow every change; with `verify` callers must show a certificate."""
        held: Credentials = self._server

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal held
            if held is self._server:
                return None
            held = self._server
            return _configuration(held)

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(held),
            fetch,  # type: ignore[arg-type]  # None says: as before
            require_client_authentication=verify,
        )
        return credentials

    def _read(self) -> None:
        if (self._directory / ca.SERVER).exists():
            server = Credentials.load(self._directory / ca.SERVER)
            leaf = certificates(server.chain)[0]
            self.trust_domain = ca.trust_domain_of_server(leaf)
            check_dates(leaf, now(), "the control plane's certificate")
            self._server = server
            return
        self._issuer = ca.load(self._directory)
        self.trust_domain = self._issuer.trust_domain

    def _rotate_if_due(self, issuer: ca.Issuer) -> bool:
        due = renew_time(issuer.certificate, 0.5)
        if ca.outlives_root(issuer):  # its end locks out who has not come back since, so as late as can be
            due = issuer.certificate.not_valid_after_utc - datetime.timedelta(seconds=INTERMEDIATE_LAST_S)
        if now() < due:
            return False
        path = self._directory / ca.ROOT_KEY
        if path.exists():
            ca.rotate_intermediate(self._directory, keyfile.read_key(path), now())
            log.event("intermediate_rotated")
            return True
        if not self._told:
            self._told = True
            ends = issuer.certificate.not_valid_after_utc
            log.warning(
                "intermediate_ends", on=f"{ends:%Y-%m-%d}", help="sluice control ca rotate --root-key FILE"
            )
        return False

    def _renew(self, issuer: ca.Issuer) -> None:
        key = new_key()
        identity = Identity(issuer.trust_domain, Kind.CONTROL, NAME)
        chain = issuer.issue(identity, key.public_key(), self._life_s, now())
        self._server = Credentials(issuer.bundle, chain, key_to_pem(key))
        self._renew_at = renew_time(certificates(chain)[0], 0.5)

    def _stamp_now(self) -> _Stamp:
        stamps = []
        for name in (ca.ISSUER, ca.SERVER):
            path = self._directory / name
            if path.exists():
                found = path.stat()
                stamps.append((name, found.st_mtime_ns, found.st_ino))
        return tuple(stamps)


def _configuration(held: Credentials) -> grpc.ServerCertificateConfiguration:
    pairs = [(held.key, held.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=held.bundle)
