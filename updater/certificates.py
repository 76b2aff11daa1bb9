"""Keys, certificate requests and certificates, as both sides of the wire need them. Pure.

A certificate that counts here is an X.509-SVID: an X.509 v3 certificate whose subject alternative name holds
exactly one URI, a SPIFFE ID (updater/identity.py). Keys are ECDSA on P-256, which every TLS library takes. A
certificate request is read strictly: of what somebody asks for, only the identity and the key count; anything
else in it (other names, extensions, a subject, attributes) refuses the request instead of being left out.

Where a chain must be proven outside of a TLS handshake, `check_chain` does it with the verifier of the
`cryptography` library; dates are looked at first, so that an expired certificate and a clock that is wrong
are told apart from a forged one.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.identity import Identity, parse

MAX_REQUEST_BYTES = 4096  # a request of ours has below 500
MAX_PEM_BYTES = 64 << 10  # of a chain or a bundle
MAX_CERTIFICATES = 16  # in one PEM text
RENEW_AT = 2 / 3  # of a certificate's life
RENEW_JITTER = 0.05  # of its life, to either side, so that a fleet does not renew in step

_ENROL_AGAIN = "enrol again, or ask who runs the certificate authority"


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(data: bytes) -> ec.EllipticCurvePrivateKey:
    """Raises SluiceError(KEY_UNAVAILABLE) unless it is an unencrypted private key on P-256."""
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise SluiceError(errors_pb2.KEY_UNAVAILABLE, f"not an unencrypted private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SluiceError(errors_pb2.KEY_UNAVAILABLE, "the private key is not an ECDSA key on P-256")
    return key


def public_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half of a key as DER (SubjectPublicKeyInfo)."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def public_in(certificate: x509.Certificate) -> bytes:
    """The public key of a certificate as DER (SubjectPublicKeyInfo)."""
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(public: bytes) -> str:
    """What people compare: SHA-256 of a public key's DER, 32 hex digits in groups of four.

    128 bits of it: enough against a second key with the same digits, and short enough to read out.
    """
    digits = hashlib.sha256(public).hexdigest()[:32]
    return "-".join(digits[start : start + 4] for start in range(0, 32, 4))


def load_public(public: bytes) -> ec.EllipticCurvePublicKey:
    """A P-256 public key from its DER. Raises SluiceError(CERTIFICATE_INVALID)."""
    try:
        key = serialization.load_der_public_key(public) if len(public) <= MAX_REQUEST_BYTES else None
    except (ValueError, TypeError) as error:
        raise _invalid(f"not a public key: {error}") from error
    except Exception as error:  # cryptography names UnsupportedAlgorithm in a module of its own
        raise _invalid(f"a public key of a kind that is not taken: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("the public key is not an ECDSA key on P-256")
    return key


def check_signature(public: bytes, signature: bytes, data: bytes) -> None:
    """Raises SluiceError(SIGNATURE_INVALID) unless the key signed exactly these bytes (ECDSA, SHA-256)."""
    try:
        load_public(public).verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise SluiceError(
            errors_pb2.SIGNATURE_INVALID,
            "the request is not signed by the enrolment key that it names",
            hint="the box holds another key than it enrolled with: enrol it again",
        ) from error


def make_request(key: ec.EllipticCurvePrivateKey, identity: Identity) -> bytes:
    """A certificate request (PKCS #10, DER) for an identity, signed by the key it is for."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def read_request(der: bytes) -> tuple[Identity, ec.EllipticCurvePublicKey]:
    """What a certificate request asks for: the identity and the key. Raises SluiceError(CERTIFICATE_INVALID).

    Taken only as `make_request` writes it: a subject, another name, extension or attribute refuses it.
    """
    if len(der) > MAX_REQUEST_BYTES:
        raise _invalid(f"the certificate request has {len(der)} bytes; at most {MAX_REQUEST_BYTES} are taken")
    try:
        request = x509.load_der_x509_csr(der)
        # The parser takes a signature with padding bits, which nobody has signed.
        if request.public_bytes(serialization.Encoding.DER) != der or not der.endswith(
            b"\0" + request.signature
        ):
            raise _invalid("the certificate request is not in canonical form")
        extensions = list(request.extensions)
        key = request.public_key()
        algorithm = request.signature_hash_algorithm
        attributes = len(request.attributes)
        subject = len(request.subject.rdns)
        signed = request.is_signature_valid
    except SluiceError:
        raise
    except Exception as error:  # the parser's errors have no common ancestor
        raise _invalid(f"the certificate request cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("the certificate request is not for an ECDSA key on P-256")
    if not isinstance(algorithm, hashes.SHA256) or not signed:
        raise _invalid("the certificate request is not signed by its own key (ECDSA with SHA-256)")
    if subject or attributes != 1 or len(extensions) != 1:
        raise _invalid("the certificate request asks for more than an identity")
    names = extensions[0].value
    if not isinstance(names, x509.SubjectAlternativeName) or len(names) != 1 or not extensions[0].critical:
        raise _invalid("the certificate request does not ask for exactly one name, critically")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _invalid("the name in the certificate request is no URI")
    return parse(uris[0]), key


def certificates(pem: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM text, in its order. Raises SluiceError(CERTIFICATE_INVALID); never empty."""
    if len(pem) > MAX_PEM_BYTES:
        raise _invalid(f"{len(pem)} bytes of certificates; at most {MAX_PEM_BYTES} are taken")
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise _invalid(f"certificates cannot be read: {error}") from error
    if len(found) > MAX_CERTIFICATES:
        raise _invalid(f"{len(found)} certificates in one file; at most {MAX_CERTIFICATES} are taken")
    return found


def to_pem(chain: Sequence[x509.Certificate]) -> bytes:
    """Certificates as one PEM text."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)


def identity_of(certificate: x509.Certificate) -> Identity:
    """The identity in a certificate: its one URI. Raises SluiceError(CERTIFICATE_INVALID)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise _invalid(f"the certificate has no readable names: {error}") from error
    if len(uris) != 1:
        raise _invalid(f"the certificate has {len(uris)} URIs; an identity is exactly one")
    return parse(uris[0])


def dns_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names in a certificate that `identity_of` could read."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def check_dates(certificate: x509.Certificate, now: datetime.datetime, what: str = "the certificate") -> None:
    """Raises SluiceError(CERTIFICATE_EXPIRED) saying on which side of its life `now` (aware) lies."""
    check_period(certificate.not_valid_before_utc, certificate.not_valid_after_utc, now, what)


def check_period(
    start: datetime.datetime, end: datetime.datetime, now: datetime.datetime, what: str = "the certificate"
) -> None:
    """As `check_dates`, for a certificate of which only the dates are at hand."""
    clock = now.strftime("%Y-%m-%d %H:%M:%S UTC")
    if now < start:
        since = start.strftime("%Y-%m-%d %H:%M:%S UTC")
        raise SluiceError(
            errors_pb2.CERTIFICATE_EXPIRED,
            f"{what} is valid from {since} and this machine's clock says {clock}",
            hint="the clock is probably behind: set it, e.g. by systemd-timesyncd",
        )
    if now >= end:
        until = end.strftime("%Y-%m-%d %H:%M:%S UTC")
        raise SluiceError(
            errors_pb2.CERTIFICATE_EXPIRED,
            f"{what} was valid until {until} and this machine's clock says {clock}",
            hint="renew it, or set the clock if it is ahead",
        )


def check_chain(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: datetime.datetime
) -> Identity:
    """The identity that a chain proves: leaf first, then what leads to one of the roots.

    Raises SluiceError(CERTIFICATE_EXPIRED | CERTIFICATE_INVALID).
    """
    leaf, *between = chain
    identity = identity_of(leaf)
    check_dates(leaf, now)
    for certificate in between:
        check_dates(certificate, now, "the certificate of the authority in between")
    try:
        verifier = PolicyBuilder().store(Store(list(roots))).time(now).build_client_verifier()
        verifier.verify(leaf, list(between))
    except VerificationError as error:
        raise _invalid(
            f"the certificate of {identity} does not lead to an authority of this trust bundle: {error}"
        ) from error
    return identity


def renew_time(certificate: x509.Certificate, random_value: float) -> datetime.datetime:
    """When to renew a certificate: at two thirds of its life, with jitter.

    Args:
        certificate: the one that is held.
        random_value: uniform in [0, 1).
    """
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    part = RENEW_AT + RENEW_JITTER * (2 * random_value - 1)
    return certificate.not_valid_before_utc + life * part


def _invalid(message: str) -> SluiceError:
    return SluiceError(errors_pb2.CERTIFICATE_INVALID, message, hint=_ENROL_AGAIN)
