"""Who calls: the identity that mutual TLS has proven, as handlers see it.

gRPC hands over the peer's certificate only after the handshake accepted it, so its chain is checked already;
what is read here is the one URI in it and its dates. Revocation, and authorities that count no longer, are
decided in authentication.py, roles where calls are authorised.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from cryptography import x509
from grpc import aio

from fleet.limits import MAX_READ_CERTIFICATES, MAX_READ_CHAINS
from sluice.api.v1 import errors_pb2
from updater.certificates import identity_of
from updater.errors import SluiceError
from updater.identity import Identity

PEM_CERTIFICATE = "x509_pem_cert"  # gRPC's name for the peer's leaf certificate
PEM_CHAIN = "x509_pem_cert_chain"  # and for what the peer sent with it


@dataclass(frozen=True)
class Caller:
    """Who a certificate stands for, and for how long.

    Attributes:
        identity: from its one URI.
        start: when it begins, aware.
        end: when it ends, aware.
        leaf: the certificate itself, PEM.
        between: what was sent with it, PEM.
    """

    identity: Identity
    start: datetime.datetime
    end: datetime.datetime
    leaf: bytes = field(default=b"", repr=False)
    between: bytes = field(default=b"", repr=False)


def caller_of(context: aio.ServicerContext[Any, Any]) -> Identity | None:
    """Who calls; None without a certificate. Raises SluiceError(CERTIFICATE_INVALID)."""
    found = read_caller(context)
    return None if found is None else found.identity


def read_caller(context: aio.ServicerContext[Any, Any]) -> Caller | None:
    """Who calls, and for how long; None without a certificate. Raises SluiceError(CERTIFICATE_INVALID)."""
    shown = context.auth_context()
    leaf = next(iter(shown.get(PEM_CERTIFICATE, ())), None)
    if leaf is None:
        return None
    return replace(_read(leaf), between=_once(b"".join(shown.get(PEM_CHAIN, ()))))


@lru_cache(MAX_READ_CERTIFICATES)
def _read(pem: bytes) -> Caller:
    certificate = _certificate(pem)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Caller(identity_of(certificate), start, end, leaf=pem)


@lru_cache(MAX_READ_CHAINS)
def _once(pem: bytes) -> bytes:
    """The same text in one place: a fleet's certificates lead through few authorities."""
    return pem


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise SluiceError(
            errors_pb2.CERTIFICATE_INVALID,
            f"the caller's certificate cannot be read: {error}",
            hint="enrol again, or ask who runs the certificate authority",
        ) from error
