"""Who calls: the identity that mutual TLS has proven, as handlers see it.

gRPC hands over the peer's certificate only after the handshake accepted it, so its chain and dates are
checked already; what is read here is the one URI in it. Revocation and roles are decided where calls are
authorised, not here.
"""

from __future__ import annotations

from typing import Any

from cryptography import x509
from grpc import aio

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.identity import Identity, parse

PEM_CERTIFICATE = "x509_pem_cert"  # gRPC's name for the peer's leaf certificate


def certificate_of(context: aio.ServicerContext[Any, Any]) -> x509.Certificate | None:
    """The certificate that the caller proved to hold; None when it showed none."""
    found = list(context.auth_context().get(PEM_CERTIFICATE, ()))
    if not found:
        return None
    try:
        return x509.load_pem_x509_certificate(found[0])
    except ValueError as error:
        raise _invalid(f"the caller's certificate cannot be read: {error}") from error


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


def caller_of(context: aio.ServicerContext[Any, Any]) -> Identity | None:
    """Who calls; None without a certificate. Raises SluiceError(CERTIFICATE_INVALID)."""
    certificate = certificate_of(context)
    return None if certificate is None else identity_of(certificate)


def _invalid(message: str) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_INVALID, message, hint="enrol again, or ask who runs the certificate authority"
    )
