"""The client's side of enrolment and renewal, for boxes and operators alike.

`signed_bytes` is what an enrolment key signs (proto/sluice/api/v1/identity.proto); `Enroller` asks for a
challenge, makes a new key and its request, signs, and checks what comes back against the bundle that comes
with it before anybody relies on it. The connection trusts only the bundle that is held already.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from types import TracebackType

import grpc

from sluice.api.v1 import errors_pb2, identity_pb2, identity_pb2_grpc
from updater.certificates import certificates, key_to_pem, make_request, new_key
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.identity import Identity
from updater.keyfile import SigningKey
from updater.limits import ENROLMENT_TIMEOUT_S
from updater.wire import from_rpc_error

ENROL = b"sluice enrol v1\n"
RENEW = b"sluice renew v1\n"


def signed_bytes(
    purpose: bytes, nonce: bytes, request: bytes, enrolment_key: bytes, counter: int | None = None
) -> bytes:
    """What the enrolment key signs: ENROL or RENEW, then the parts, each of a fixed length."""
    hashed = hashlib.sha256(request).digest() + hashlib.sha256(enrolment_key).digest()
    tail = b"" if counter is None else counter.to_bytes(8, "big")
    return purpose + nonce + hashed + tail


class Enroller:
    """Calls to one control plane's enrolment address. Use it as a context manager.

    Args:
        address: host:port of Enrolment.
        held: the bundle, and the counter of the last certificate.
        key: the enrolment key.
    """

    def __init__(self, address: str, held: Credentials, key: SigningKey) -> None:
        self._address = address
        self._held = held
        self._key = key
        self._channel = held.anonymous().channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = identity_pb2_grpc.EnrolmentStub(self._channel)

    def __enter__(self) -> Enroller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def trust_domain(self) -> str:
        """The control plane's trust domain. Raises SluiceError."""
        try:
            request = identity_pb2.GetBundleRequest()
            return self._stub.GetBundle(request, timeout=ENROLMENT_TIMEOUT_S).trust_domain
        except grpc.RpcError as error:
            raise from_rpc_error(error, "asking for the trust domain", self._address) from error

    def enrol(
        self, identity: Identity, *, token: str = "", labels: Mapping[str, str] | None = None
    ) -> Credentials:
        """First credentials.

        Raises SluiceError(ENROLMENT_PENDING | TOKEN_INVALID | … | CONTROL_UNREACHABLE).
        """
        new = new_key()
        request = make_request(new, identity)
        try:
            nonce = self._nonce()
            response = self._stub.Enrol(
                identity_pb2.EnrolRequest(
                    nonce=nonce,
                    request=request,
                    enrolment_key=self._key.public,
                    signature=self._key.sign(signed_bytes(ENROL, nonce, request, self._key.public)),
                    token=token,
                    labels=labels or {},
                ),
                timeout=ENROLMENT_TIMEOUT_S,
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"enrolling {identity}", self._address) from error
        return self._taken(response, key_to_pem(new), identity)

    def renew(self, identity: Identity) -> Credentials:
        """The next credentials. Raises SluiceError as Enrolment.Renew says, and CONTROL_UNREACHABLE."""
        new = new_key()
        request = make_request(new, identity)
        counter = self._held.counter
        try:
            nonce = self._nonce()
            signed = signed_bytes(RENEW, nonce, request, self._key.public, counter)
            response = self._stub.Renew(
                identity_pb2.RenewRequest(
                    nonce=nonce, request=request, signature=self._key.sign(signed), counter=counter
                ),
                timeout=ENROLMENT_TIMEOUT_S,
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"renewing the certificate of {identity}", self._address) from error
        return self._taken(response, key_to_pem(new), identity)

    def _nonce(self) -> bytes:
        return self._stub.Challenge(identity_pb2.ChallengeRequest(), timeout=ENROLMENT_TIMEOUT_S).nonce

    def _taken(
        self, response: identity_pb2.CertificateResponse, key: bytes, identity: Identity
    ) -> Credentials:
        found = Credentials(response.bundle, response.chain, key, response.counter, self._held.server_name)
        proven = found.check(datetime.datetime.now(datetime.timezone.utc))
        if proven != identity:
            raise SluiceError(
                errors_pb2.CERTIFICATE_INVALID, f"{identity} was given the certificate of {proven}"
            )
        certificates(found.bundle)
        return found
