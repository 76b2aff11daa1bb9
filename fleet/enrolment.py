"""How identities get certificates: proofs are checked, then rows decide (identities.py), then one is issued.

What a request must prove, in order: its nonce is ours and unused; the certificate request is well-formed and
signed by the new key; the enrolment key signed nonce, request and itself. Only then is the database asked.
"""

from __future__ import annotations

import time

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection

from fleet import devices, identities, log
from fleet.authentication import Callers
from fleet.authority import Authority
from fleet.clock import now_us, to_timestamp
from fleet.database import Database
from fleet.nonces import Nonces
from sluice.api.v1 import devices_pb2, errors_pb2, identity_pb2
from updater.certificates import check_signature, load_public, read_request
from updater.enrolment import ENROL, RENEW, signed_bytes
from updater.errors import SluiceError
from updater.identity import Identity, Kind


class Enrolments:
    """Enrolment and revocation over one control plane."""

    def __init__(self, database: Database, authority: Authority, callers: Callers) -> None:
        self._database = database
        self._authority = authority
        self._callers = callers
        self._nonces = Nonces()

    def challenge(self) -> identity_pb2.ChallengeResponse:
        """A nonce."""
        return identity_pb2.ChallengeResponse(
            nonce=self._nonces.make(time.monotonic()), server_time=to_timestamp(now_us())
        )

    async def enrol(self, request: identity_pb2.EnrolRequest) -> identity_pb2.CertificateResponse:
        """Raises SluiceError as Enrolment.Enrol says."""
        self._nonces.use(request.nonce, time.monotonic())
        identity, public = self._read(request.request)
        devices.check_labels(request.labels)
        load_public(request.enrolment_key)
        check_signature(
            request.enrolment_key,
            request.signature,
            signed_bytes(ENROL, request.nonce, request.request, request.enrolment_key),
        )

        def work(connection: Connection) -> identities.Outcome:
            outcome = identities.enrol(
                connection,
                identity,
                request.enrolment_key,
                request.token,
                dict(request.labels),
                lambda: self._authority.issue(identity, public),
                now_us(),
            )
            if outcome.chain and identity.kind is Kind.DEVICE:
                devices.enrolled(connection, identity.name, identities.labels_of(connection, identity.name))
            return outcome

        return await self._answer(identity, await self._database.write(work))

    async def renew(self, request: identity_pb2.RenewRequest) -> identity_pb2.CertificateResponse:
        """Raises SluiceError as Enrolment.Renew says."""
        self._nonces.use(request.nonce, time.monotonic())
        identity, public = self._read(request.request)

        def check(enrolment_key: bytes) -> None:
            data = signed_bytes(RENEW, request.nonce, request.request, enrolment_key, request.counter)
            check_signature(enrolment_key, request.signature, data)

        def work(connection: Connection) -> identities.Outcome:
            return identities.renew(
                connection,
                identity,
                request.counter,
                check,
                lambda: self._authority.issue(identity, public),
                now_us(),
            )

        return await self._answer(identity, await self._database.write(work))

    async def approve(self, kind: Kind, name: str, fingerprint: str) -> identity_pb2.Identity:
        """Accepts who waits. Raises SluiceError(DEVICE_UNKNOWN | IDENTITY_CONFLICT)."""

        def work(connection: Connection) -> tuple[identity_pb2.Identity, bool]:
            replaced = identities.approve(connection, kind, name, fingerprint)
            if kind is Kind.DEVICE:
                devices.set_state(connection, name, devices_pb2.DEVICE_STATE_ACCEPTED)
            return identities.get(connection, kind, name), replaced

        found, _ = await self._database.write(work)
        await self._void_anew(kind, name)
        log.event("identity_approved", kind=kind.value, name=name, fingerprint=found.fingerprint)
        return found

    async def reject(self, kind: Kind, name: str) -> identity_pb2.Identity:
        """Refuses who waits. Raises SluiceError(DEVICE_UNKNOWN | IDENTITY_CONFLICT)."""

        def work(connection: Connection) -> identity_pb2.Identity:
            identities.reject(connection, kind, name)
            return identities.get(connection, kind, name)

        found = await self._database.write(work)
        log.event("identity_rejected", kind=kind.value, name=name)
        return found

    async def revoke(self, kind: Kind, name: str) -> identity_pb2.Identity:
        """Puts an identity out, at once."""

        def work(connection: Connection) -> identity_pb2.Identity:
            identities.revoke(connection, kind, name, now_us())
            if kind is Kind.DEVICE:
                devices.set_state(connection, name, devices_pb2.DEVICE_STATE_REVOKED)
            return identities.get(connection, kind, name)

        found = await self._database.write(work)
        ended = await self._void_anew(kind, name)
        log.event("identity_revoked", kind=kind.value, name=name, streams=ended)
        return found

    async def _void_anew(self, kind: Kind, name: str) -> int:
        """Brings what is void in memory up to the database for one identity; says how many streams ended."""
        void = await self._database.read(lambda c: identities.void(c, 0))
        return self._callers.revoke(kind, name, void.get((kind.value, name), 0))

    def _read(self, request: bytes) -> tuple[Identity, ec.EllipticCurvePublicKey]:
        identity, public = read_request(request)
        if identity.trust_domain != self._authority.trust_domain:
            raise SluiceError(
                errors_pb2.CERTIFICATE_INVALID,
                f"{identity} is not of the trust domain {self._authority.trust_domain}",
                hint="the trust bundle that the box was given belongs to another fleet",
                obj=str(identity),
            )
        if identity.kind is Kind.CONTROL:
            raise SluiceError(
                errors_pb2.CERTIFICATE_INVALID,
                "a control plane's certificate is not given over the wire",
                obj=str(identity),
            )
        return identity, public

    async def _answer(
        self, identity: Identity, outcome: identities.Outcome
    ) -> identity_pb2.CertificateResponse:
        if outcome.error is not None:
            raise outcome.error
        if outcome.voided:
            await self._void_anew(identity.kind, identity.name)
        log.event("certificate_issued", identity=identity, counter=outcome.counter)
        return identity_pb2.CertificateResponse(
            chain=outcome.chain,
            bundle=self._authority.bundle,
            counter=outcome.counter,
            server_time=to_timestamp(now_us()),
        )
