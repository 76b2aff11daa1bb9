"""Somebody who asks for a certificate, honestly or not: each part of the request can be replaced."""

from __future__ import annotations

from typing import Any, Self

import grpc

from edge_tests.harness import trust
from sluice.api.v1 import identity_pb2, identity_pb2_grpc, registry_pb2, registry_pb2_grpc
from updater.certificates import fingerprint, key_to_pem, make_request, new_key
from updater.credentials import Credentials
from updater.enrolment import ENROL, RENEW, signed_bytes
from updater.identity import Identity, Kind
from updater.keyfile import FileKey

CALL_S = 20.0


class Applicant:
    """Calls Enrolment of one control plane.

    Args:
        address: its enrolment address.
        identity: to ask for; by default the device "box".
        key: the enrolment key; by default a new one.
    """

    def __init__(
        self,
        address: str,
        identity: Identity | None = None,
        key: FileKey | None = None,
        bundle: bytes | None = None,
    ) -> None:
        self.identity = identity or Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box")
        self.key = key or FileKey(new_key())
        self.counter = 0
        self._channel = Credentials(bundle or trust.issuer().bundle).channel(address)
        self.stub = identity_pb2_grpc.EnrolmentStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key.public)

    def nonce(self) -> bytes:
        return self.stub.Challenge(identity_pb2.ChallengeRequest(), timeout=CALL_S).nonce

    def enrolment(self, *, token: str = "", labels: dict[str, str] | None = None) -> Any:
        """A good request, and the private key of the certificate that it is for."""
        self._new = new_key()
        request, nonce = make_request(self._new, self.identity), self.nonce()
        return identity_pb2.EnrolRequest(
            nonce=nonce,
            request=request,
            enrolment_key=self.key.public,
            signature=self.key.sign(signed_bytes(ENROL, nonce, request, self.key.public)),
            token=token,
            labels=labels or {},
        )

    def renewal(self, counter: int | None = None) -> Any:
        self._new = new_key()
        request, nonce = make_request(self._new, self.identity), self.nonce()
        number = self.counter if counter is None else counter
        signed = signed_bytes(RENEW, nonce, request, self.key.public, number)
        return identity_pb2.RenewRequest(
            nonce=nonce, request=request, signature=self.key.sign(signed), counter=number
        )

    def enrol(self, request: Any = None, **parts: Any) -> Credentials:
        """Raises grpc.RpcError."""
        return self._taken(self.stub.Enrol(request or self.enrolment(**parts), timeout=CALL_S))

    def renew(self, request: Any = None, **parts: Any) -> Credentials:
        """Raises grpc.RpcError."""
        return self._taken(self.stub.Renew(request or self.renewal(**parts), timeout=CALL_S))

    def _taken(self, response: identity_pb2.CertificateResponse) -> Credentials:
        self.counter = response.counter
        return Credentials(response.bundle, response.chain, key_to_pem(self._new), response.counter)


def let_in(address: str, held: Credentials) -> grpc.RpcError | None:
    """The error of a small call of whoever is not let in; None for who is, whatever they may do."""
    with held.channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            registry_pb2_grpc.RegistryStub(channel).ListModels(
                registry_pb2.ListModelsRequest(), timeout=CALL_S
            )
        except grpc.RpcError as error:
            return None if error.code() is grpc.StatusCode.PERMISSION_DENIED else error
    return None
