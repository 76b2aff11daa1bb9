"""The embedded certificate authority: a root, an intermediate that issues, and their rotation.

Files below DATA/ca, each written atomically with strict modes: `root.key` (needed only for rotation: it may
lie elsewhere), `issuer.json` (the intermediate's key, its chain and the trust bundle, together because they
change together) and `bundle.pem` (the bundle once more, for people to hand out). With `server.json` in place
of the others another authority stands in: it holds the control plane's own certificate and that authority's
bundle, and nothing is issued here.

What rotation keeps: everybody who trusts any root of the bundle can still check every certificate. A new
intermediate is signed by the newest root. A new root is also signed by the one before (a cross certificate,
which travels in every chain), so a box that was away since before the rotation reaches the old root that it
knows, renews, and is given the new bundle then. Old roots leave the bundle only by `drop_root`.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet.limits import BACKDATE_MOST_S, BACKDATE_PART, INTERMEDIATE_LIFE_S, ROOT_LIFE_S
from sluice.api.v1 import errors_pb2
from updater import keyfile
from updater.atomic import write_atomic
from updater.certificates import (
    certificates,
    check_dates,
    fingerprint,
    identity_of,
    key_from_pem,
    key_to_pem,
    new_key,
    public_in,
    public_of,
    to_pem,
)
from updater.credentials import SERVER_NAME, Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind

ROOT_KEY = "root.key"
ISSUER = "issuer.json"
SERVER = "server.json"
BUNDLE = "bundle.pem"
_SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
_AUTHENTICATES = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True)
class Issuer:
    """What issues at one moment.

    Attributes:
        key: the intermediate's private key.
        chain: the intermediate, then cross certificates.
        roots: the trust bundle, the newest root first.
        trust_domain: of every identity that is issued.
    """

    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    trust_domain: str

    @property
    def certificate(self) -> x509.Certificate:
        """The intermediate's own."""
        return self.chain[0]

    @property
    def bundle(self) -> bytes:
        """The trust bundle as PEM."""
        return to_pem(self.roots)

    def issue(
        self,
        identity: Identity,
        public: ec.EllipticCurvePublicKey,
        life_s: float,
        now: datetime.datetime,
    ) -> bytes:
        """A certificate for an identity, with its chain, as PEM.

        Of a control plane it also carries SERVER_NAME and serves; any other only authenticates a client.
        Its life ends with the intermediate's at the latest. Raises SluiceError(CERTIFICATE_INVALID) for an
        identity of another trust domain, CERTIFICATE_EXPIRED when the intermediate's time is over.
        """
        if identity.trust_domain != self.trust_domain:
            raise SluiceError(
                errors_pb2.CERTIFICATE_INVALID,
                f"{identity} is not of the trust domain {self.trust_domain}",
                obj=str(identity),
            )
        check_dates(self.certificate, now, "the certificate of the issuing authority")
        serves = identity.kind is Kind.CONTROL
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        if serves:
            names.append(x509.DNSName(SERVER_NAME))
        usage = ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH
        end = min(now + datetime.timedelta(seconds=life_s), self.certificate.not_valid_after_utc)
        backdate = datetime.timedelta(seconds=min(BACKDATE_MOST_S, life_s * BACKDATE_PART))
        leaf = (
            _builder(self.certificate.subject, x509.Name([]), public, now - backdate, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_AUTHENTICATES, critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(_authority_of(self.key), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return to_pem([leaf, *self.chain])


def create(directory: Path, trust_domain: str, now: datetime.datetime) -> Issuer:
    """Makes root and intermediate. Raises SluiceError(STATE_LOCKED) when there is an authority already.

    A root's key that lies there alone is taken: of a creation that ended half way, or brought back to a
    machine that lost the rest. Its root has the same name and key as before, so who trusts the one trusts the
    other.
    """
    Identity(trust_domain, Kind.CONTROL, "check")  # raises when no identity could have this trust domain
    if exists(directory):
        raise SluiceError(
            errors_pb2.STATE_LOCKED,
            f"{directory} holds a certificate authority already",
            hint="rotate it with `sluice control ca rotate`; removing it would lock every device out",
            obj=str(directory),
        )
    path = directory / ROOT_KEY
    root_key = keyfile.read_key(path) if path.exists() else new_key()
    root = _root(root_key, trust_domain, now)
    if not path.exists():
        keyfile.write_secret(path, key_to_pem(root_key))
    return _new_issuer(directory, root_key, (root,), (), trust_domain, now)


def exists(directory: Path) -> bool:
    """Whether there is an authority, embedded or another's."""
    return any((directory / name).exists() for name in (ISSUER, SERVER))


def load(directory: Path) -> Issuer:
    """What issues now. Raises SluiceError(KEY_UNAVAILABLE | CERTIFICATE_INVALID)."""
    held = Credentials.load(directory / ISSUER)
    chain = tuple(certificates(held.chain))
    return Issuer(key_from_pem(held.key), chain, tuple(certificates(held.bundle)), trust_domain_of(chain[0]))


def rotate_intermediate(
    directory: Path, root_key: ec.EllipticCurvePrivateKey, now: datetime.datetime
) -> Issuer:
    """A new intermediate below the newest root.

    Raises SluiceError(KEY_UNAVAILABLE) for another root's key.
    """
    issuer = load(directory)
    if not _belongs(root_key, issuer.roots[0]):
        raise SluiceError(
            errors_pb2.KEY_UNAVAILABLE,
            "this is not the key of the newest root",
            hint=f"the newest root is {root_fingerprint(issuer.roots[0])}",
        )
    return _new_issuer(directory, root_key, issuer.roots, issuer.chain[1:], issuer.trust_domain, now)


def rotate_root(directory: Path, old_key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> Issuer:
    """A new root, cross-signed by the newest one so far, and an intermediate below it.

    Raises SluiceError(KEY_UNAVAILABLE) when `old_key` is not of the newest root.
    """
    issuer = load(directory)
    old = issuer.roots[0]
    if not _belongs(old_key, old):
        raise SluiceError(errors_pb2.KEY_UNAVAILABLE, "this is not the key of the newest root")
    key = new_key()
    root = _root(key, issuer.trust_domain, now)
    cross = (
        _authority(old.subject, root.subject, key, now, old.not_valid_after_utc, issuer.trust_domain, None)
        .add_extension(_authority_of(old_key), critical=False)
        .sign(old_key, hashes.SHA256())
    )
    # The old key first, under another name: until the new issuer stands, it is still the one that counts.
    keyfile.write_secret(directory / f"{ROOT_KEY}.{root_fingerprint(old)[:9]}", key_to_pem(old_key))
    keyfile.write_secret(directory / ROOT_KEY, key_to_pem(key))
    crosses = (cross, *issuer.chain[1:])
    return _new_issuer(directory, key, (root, *issuer.roots), crosses, issuer.trust_domain, now)


def replace_root(directory: Path, now: datetime.datetime) -> Issuer:
    """A new root beside the newest one, whose key is lost and cannot vouch for it.

    The intermediate goes on issuing, so that everybody who trusts the old root still comes in, and takes the
    new one along when they renew. Whoever has not when the intermediate ends must be given the bundle by
    other means.

    Raises SluiceError(REQUEST_INVALID) when the key is there.
    """
    issuer = load(directory)
    path = directory / ROOT_KEY
    key = keyfile.read_key(path) if path.exists() else new_key()
    if _belongs(key, issuer.roots[0]):
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{path} is the key of the newest root: it is not lost",
            hint="leave --key-lost out, and the old root vouches for the new one",
            obj=str(path),
        )
    root = _root(key, issuer.trust_domain, now)
    if not path.exists():
        keyfile.write_secret(path, key_to_pem(key))
    replaced = replace(issuer, roots=(root, *issuer.roots))
    _save(directory, replaced)
    return replaced


def outlives_root(issuer: Issuer) -> bool:
    """Whether the intermediate is of an older root than the newest: after `replace_root`."""
    return issuer.certificate.issuer != issuer.roots[0].subject


def drop_root(directory: Path, which: str) -> Issuer:
    """Takes a root out of the bundle, by the start of its fingerprint; cross certificates from it stay.

    Raises SluiceError(REQUEST_INVALID) when it is unknown, ambiguous, or the newest.
    """
    issuer = load(directory)
    found = [root for root in issuer.roots if root_fingerprint(root).startswith(which)]
    if len(found) != 1 or found[0] is issuer.roots[0]:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{which!r} is not the fingerprint of exactly one older root",
            hint="older roots: " + (", ".join(map(root_fingerprint, issuer.roots[1:])) or "none"),
        )
    kept = replace(issuer, roots=tuple(root for root in issuer.roots if root is not found[0]))
    _save(directory, kept)
    return kept


def adopt(directory: Path, server: Credentials, now: datetime.datetime) -> str:
    """Takes another authority's certificate for the control plane; returns the trust domain.

    Raises SluiceError(CERTIFICATE_INVALID | CERTIFICATE_EXPIRED | KEY_UNAVAILABLE) when it does not fit.
    """
    leaf = server.leaf
    if leaf is None:
        raise SluiceError(errors_pb2.CERTIFICATE_INVALID, "the certificate file is empty")
    check_dates(leaf, now, "the control plane's certificate")
    domain = trust_domain_of_server(leaf)
    if public_of(key_from_pem(server.key)) != public_in(leaf):
        raise SluiceError(errors_pb2.KEY_UNAVAILABLE, "the private key belongs to another certificate")
    certificates(server.bundle)
    server.save(directory / SERVER)
    write_atomic(directory / BUNDLE, server.bundle)
    return domain


def trust_domain_of_server(leaf: x509.Certificate) -> str:
    """The trust domain of a control plane's certificate. Raises SluiceError(CERTIFICATE_INVALID)."""
    identity = identity_of(leaf)
    if identity.kind is not Kind.CONTROL:
        raise SluiceError(
            errors_pb2.CERTIFICATE_INVALID,
            f"{identity} is no control plane",
            hint="its certificate needs the URI spiffe://<trust domain>/control/<name>",
            obj=str(identity),
        )
    return identity.trust_domain


def trust_domain_of(authority: x509.Certificate) -> str:
    """The trust domain of an authority's certificate. Raises SluiceError(CERTIFICATE_INVALID)."""
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise SluiceError(errors_pb2.CERTIFICATE_INVALID, f"no authority of ours: {error}") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0].removeprefix("spiffe://") if uris else ""


def root_fingerprint(root: x509.Certificate) -> str:
    """What people compare: the fingerprint of a root's key."""
    return fingerprint(public_in(root))


def _new_issuer(
    directory: Path,
    root_key: ec.EllipticCurvePrivateKey,
    roots: tuple[x509.Certificate, ...],
    crosses: tuple[x509.Certificate, ...],
    trust_domain: str,
    now: datetime.datetime,
) -> Issuer:
    key = new_key()
    root = roots[0]
    end = min(now + datetime.timedelta(seconds=INTERMEDIATE_LIFE_S), root.not_valid_after_utc)
    name = _name(trust_domain, "issuer", key)
    certificate = (
        _authority(root.subject, name, key, now, end, trust_domain, 0)
        .add_extension(_authority_of(root_key), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    issuer = Issuer(key, (certificate, *crosses), roots, trust_domain)
    _save(directory, issuer)
    return issuer


def _save(directory: Path, issuer: Issuer) -> None:
    Credentials(issuer.bundle, to_pem(issuer.chain), key_to_pem(issuer.key)).save(directory / ISSUER)
    hand_out(directory, issuer)


def hand_out(directory: Path, issuer: Issuer) -> None:
    """Writes bundle.pem where it is not what the issuer says: a process may have been killed between."""
    path = directory / BUNDLE
    if not path.exists() or path.read_bytes() != issuer.bundle:
        write_atomic(path, issuer.bundle)


def _root(key: ec.EllipticCurvePrivateKey, trust_domain: str, now: datetime.datetime) -> x509.Certificate:
    name = _name(trust_domain, "root", key)
    end = now + datetime.timedelta(seconds=ROOT_LIFE_S)
    builder = _authority(name, name, key, now, end, trust_domain, None)
    return builder.add_extension(_authority_of(key), critical=False).sign(key, hashes.SHA256())


def _name(trust_domain: str, what: str, key: ec.EllipticCurvePrivateKey) -> x509.Name:
    """A subject that differs for each key, so that chains are found by name without ambiguity."""
    text = f"sluice {what} {fingerprint(public_of(key))[:9]}"
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )


def _authority(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    end: datetime.datetime,
    trust_domain: str,
    path_length: int | None,
) -> x509.CertificateBuilder:
    start = now - datetime.timedelta(seconds=BACKDATE_MOST_S)
    uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")
    return (
        _builder(issuer, subject, key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_SIGNS, critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _authority_of(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _belongs(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bool:
    return public_of(key) == public_in(certificate)
