"""Requests and chains: what is taken, and that nothing else is."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import AttributeOID, NameOID

from edge_tests.harness import trust
from fleet import ca
from sluice.api.v1 import errors_pb2
from updater.certificates import (
    certificates,
    check_chain,
    check_signature,
    fingerprint,
    make_request,
    new_key,
    public_in,
    public_of,
    read_request,
    renew_time,
    to_pem,
)
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind
from updater.keyfile import FileKey, read_key

BOX = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box-7")
DAY = datetime.timedelta(days=1)


def test_a_request_names_an_identity_and_a_key() -> None:
    key = new_key()
    identity, public = read_request(make_request(key, BOX))
    assert identity == BOX
    assert public == key.public_key()


def test_every_flipped_bit_of_a_request_refuses_it() -> None:
    good = make_request(new_key(), BOX)
    for position in range(len(good) * 8):
        changed = bytearray(good)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(SluiceError) as caught:
            read_request(bytes(changed))
        assert caught.value.reason == errors_pb2.CERTIFICATE_INVALID, position


def test_every_shortened_or_lengthened_request_is_refused() -> None:
    good = make_request(new_key(), BOX)
    for changed in (*(good[:end] for end in range(len(good))), good + b"\0", good + good, b"x" * 5000):
        with pytest.raises(SluiceError, match="request"):
            read_request(changed)


def _uri(uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


Builder = x509.CertificateSigningRequestBuilder
_EMPTY = Builder().subject_name(x509.Name([]))
_NAMED = _EMPTY.add_extension(_uri(BOX.uri), critical=True)
_TWO = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(BOX.uri)] * 2)
_DNS = x509.SubjectAlternativeName(
    [x509.UniformResourceIdentifier(BOX.uri), x509.DNSName("control.sluice.internal")]
)
FIELDS: dict[str, Builder] = {
    "a subject": Builder()
    .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
    .add_extension(_uri(BOX.uri), critical=True),
    "no name": _EMPTY,
    "two URIs": _EMPTY.add_extension(_TWO, critical=True),
    "a DNS name beside": _EMPTY.add_extension(_DNS, critical=True),
    "a name that is not critical": _EMPTY.add_extension(_uri(BOX.uri), critical=False),
    "an authority's rights": _NAMED.add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    ),
    "an attribute": _NAMED.add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"secret"),
    "another scheme": _EMPTY.add_extension(_uri("https://fleet.test/device/box-7"), critical=True),
    "no kind": _EMPTY.add_extension(_uri("spiffe://fleet.test/box-7"), critical=True),
    "a path too long": _EMPTY.add_extension(_uri("spiffe://fleet.test/device/box-7/admin"), critical=True),
    "an escape": _EMPTY.add_extension(_uri("spiffe://fleet.test/device/box%2d7"), critical=True),
    "an unknown role": _EMPTY.add_extension(_uri("spiffe://fleet.test/operator/ana/root"), critical=True),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_request_that_asks_for_more_is_refused(field: str) -> None:
    request = FIELDS[field].sign(new_key(), hashes.SHA256())
    with pytest.raises(SluiceError) as caught:
        read_request(request.public_bytes(serialization.Encoding.DER))
    assert caught.value.reason == errors_pb2.CERTIFICATE_INVALID


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
        (ec.generate_private_key(ec.SECP256R1()), hashes.SHA384()),
        (ed25519.Ed25519PrivateKey.generate(), None),
    ],
)
def test_other_keys_and_hashes_are_refused(key: ec.EllipticCurvePrivateKey, algorithm: hashes.SHA256) -> None:
    request = _NAMED.sign(key, algorithm)
    with pytest.raises(SluiceError, match=r"P-256|SHA-256"):
        read_request(request.public_bytes(serialization.Encoding.DER))


def test_a_request_signed_by_another_key_is_refused() -> None:
    ours, theirs = (make_request(new_key(), BOX) for _ in range(2))
    # The signature is the last field; both have the same layout up to the length of their integers.
    spliced = ours[: ours.rindex(b"\x03")] + theirs[theirs.rindex(b"\x03") :]
    with pytest.raises(SluiceError):
        read_request(spliced)


def test_a_chain_proves_who_it_is() -> None:
    held = trust.issue(BOX)
    assert held.check(trust.now()) == BOX


def _self_signed() -> list[x509.Certificate]:
    key = new_key()
    now = trust.now()
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "me")]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(_uri(BOX.uri), critical=True)
        .sign(key, hashes.SHA256())
    )
    return [made]


def _of_another_authority(tmp_path: Path) -> list[x509.Certificate]:
    other = ca.create(tmp_path / "other", trust.TRUST_DOMAIN, trust.now())
    return certificates(trust.issue(BOX, by=other).chain)


def _without_intermediate() -> list[x509.Certificate]:
    return certificates(trust.issue(BOX).chain)[:1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: certificates(trust.issue(BOX, age_s=2 * 86_400).chain), errors_pb2.CERTIFICATE_EXPIRED),
        (lambda _: certificates(trust.issue(BOX, age_s=-2 * 86_400).chain), errors_pb2.CERTIFICATE_EXPIRED),
        (lambda _: _self_signed(), errors_pb2.CERTIFICATE_INVALID),
        (_of_another_authority, errors_pb2.CERTIFICATE_INVALID),
        (lambda _: _without_intermediate(), errors_pb2.CERTIFICATE_INVALID),
    ],
)
def test_other_chains_prove_nothing(
    make: Callable[[Path], list[x509.Certificate]], reason: int, tmp_path: Path
) -> None:
    with pytest.raises(SluiceError) as caught:
        check_chain(make(tmp_path), trust.issuer().roots, trust.now())
    assert caught.value.reason == reason
    assert caught.value.hint


def test_dates_tell_a_clock_that_is_behind_from_one_that_is_ahead() -> None:
    held = trust.issue(BOX)
    for years, says in ((-5, "behind"), (5, "ahead")):
        with pytest.raises(SluiceError) as caught:
            held.check(trust.now() + years * 365 * DAY)
        assert caught.value.reason == errors_pb2.CERTIFICATE_EXPIRED
        assert says in caught.value.hint


def test_a_key_of_another_certificate_is_noticed() -> None:
    one, other = trust.issue(BOX), trust.issue(BOX)
    with pytest.raises(SluiceError, match="another certificate"):
        Credentials(one.bundle, one.chain, other.key).check(trust.now())


def test_renewal_is_at_two_thirds_with_jitter() -> None:
    leaf = certificates(trust.issue(BOX).chain)[0]
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    parts = [(renew_time(leaf, value / 100) - leaf.not_valid_before_utc) / life for value in range(100)]
    assert min(parts) == pytest.approx(2 / 3 - 0.05)
    assert max(parts) < 2 / 3 + 0.05
    assert sum(parts) / len(parts) == pytest.approx(2 / 3, abs=0.001)


def test_fingerprints_are_of_keys() -> None:
    key = new_key()
    assert fingerprint(public_of(key)) == fingerprint(public_of(key))
    assert fingerprint(public_of(key)) != fingerprint(public_of(new_key()))
    leaf = certificates(trust.issue(BOX).chain)[0]
    assert len(fingerprint(public_in(leaf)).split("-")) == 8


def test_an_enrolment_key_stays_the_same_and_signs(tmp_path: Path) -> None:
    path = tmp_path / "identity" / "enrolment.key"
    key = FileKey.open(path)
    assert FileKey.open(path).public == key.public
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    check_signature(key.public, key.sign(b"data"), b"data")
    with pytest.raises(SluiceError) as caught:
        check_signature(key.public, key.sign(b"data"), b"date")
    assert caught.value.reason == errors_pb2.SIGNATURE_INVALID


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.key"
    FileKey.open(path)
    path.chmod(0o640)
    with pytest.raises(SluiceError, match="0640") as caught:
        read_key(path)
    assert caught.value.reason == errors_pb2.KEY_UNAVAILABLE
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("damage", [b"", b"{}", b"not a key", b'{"format": "sluice credentials v2"}'])
def test_damaged_files_are_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "file"
    path.touch(mode=0o600)
    path.write_bytes(damage)
    for read in (Credentials.load, read_key):
        with pytest.raises(SluiceError, match=str(path)) as caught:
            read(path)
        assert caught.value.reason == errors_pb2.KEY_UNAVAILABLE


def test_credentials_come_back_as_they_were_saved(tmp_path: Path) -> None:
    held = trust.issue(BOX)
    held.save(tmp_path / "credentials.json")
    assert Credentials.load(tmp_path / "credentials.json") == held
    assert (tmp_path / "credentials.json").stat().st_mode & 0o777 == 0o600


def test_too_many_certificates_are_refused() -> None:
    leaf = certificates(trust.issue(BOX).chain)[0]
    with pytest.raises(SluiceError, match="17 certificates"):
        certificates(to_pem([leaf] * 17))
