"""The embedded authority: what it issues, and that rotation strands nobody."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509

from edge_tests.harness import trust
from fleet import ca
from fleet.authority import Authority
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, check_chain, key_to_pem, new_key
from updater.credentials import SERVER_NAME, Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind
from updater.keyfile import read_key

DAY = datetime.timedelta(days=1)
BOX = Identity("rotation.test", Kind.DEVICE, "box")
LIFE_S = 86_400.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    ca.create(tmp_path / "ca", "rotation.test", trust.now())
    return tmp_path / "ca"


def _chain(issuer: ca.Issuer, now: datetime.datetime | None = None) -> list[x509.Certificate]:
    return certificates(issuer.issue(BOX, new_key().public_key(), LIFE_S, now or trust.now()))


def test_keys_are_for_their_owner_alone(directory: Path) -> None:
    for name in (ca.ROOT_KEY, ca.ISSUER):
        assert (directory / name).stat().st_mode & 0o777 == 0o600
    assert ca.load(directory).bundle == (directory / ca.BUNDLE).read_bytes()


def test_a_second_authority_is_not_made_over_the_first(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(SluiceError) as caught:
        ca.create(directory, "rotation.test", trust.now())
    assert caught.value.reason == errors_pb2.STATE_LOCKED
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_only_a_control_plane_may_serve(directory: Path) -> None:
    issuer = ca.load(directory)
    for kind, serves in ((Kind.DEVICE, False), (Kind.OPERATOR, False), (Kind.CONTROL, True)):
        identity = Identity("rotation.test", kind, "x")
        leaf = certificates(issuer.issue(identity, new_key().public_key(), LIFE_S, trust.now()))[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ([SERVER_NAME] if serves else [])
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (x509.ExtendedKeyUsageOID.SERVER_AUTH in usage) is serves
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_other_trust_domains_are_refused(directory: Path) -> None:
    identity = Identity("elsewhere.test", Kind.DEVICE, "box")
    with pytest.raises(SluiceError, match="trust domain") as caught:
        ca.load(directory).issue(identity, new_key().public_key(), LIFE_S, trust.now())
    assert caught.value.reason == errors_pb2.CERTIFICATE_INVALID


def test_nothing_outlives_its_issuer(directory: Path) -> None:
    issuer = ca.load(directory)
    late = issuer.certificate.not_valid_after_utc - datetime.timedelta(hours=1)
    assert _chain(issuer, late)[0].not_valid_after_utc == issuer.certificate.not_valid_after_utc
    with pytest.raises(SluiceError) as caught:
        _chain(issuer, issuer.certificate.not_valid_after_utc + DAY)
    assert caught.value.reason == errors_pb2.CERTIFICATE_EXPIRED


def test_rotations_strand_nobody(directory: Path) -> None:
    first = ca.load(directory)
    old = _chain(first)
    issuers = [first]
    for number in range(4):
        key = read_key(directory / ca.ROOT_KEY)
        rotate = ca.rotate_root if number % 2 else ca.rotate_intermediate
        issuers.append(rotate(directory, key, trust.now()))
    newest = issuers[-1]
    assert len(newest.roots) == 3
    # Who still trusts only the first root checks the newest certificates, and the other way round.
    for issuer in issuers:
        assert check_chain(_chain(newest), issuer.roots, trust.now()) == BOX
        assert check_chain(_chain(issuer), newest.roots, trust.now()) == BOX
    assert check_chain(_chain(newest), newest.roots[:1], trust.now()) == BOX
    assert check_chain(old, newest.roots, trust.now()) == BOX


def test_a_dropped_root_counts_no_longer(directory: Path) -> None:
    first = ca.load(directory)
    ca.rotate_root(directory, read_key(directory / ca.ROOT_KEY), trust.now())
    gone = ca.root_fingerprint(first.roots[0])
    after = ca.drop_root(directory, gone[:9])
    with pytest.raises(SluiceError):
        check_chain(_chain(first), after.roots, trust.now())
    # A box that has not heard of it yet still reaches the control plane.
    assert check_chain(_chain(after), first.roots, trust.now()) == BOX
    with pytest.raises(SluiceError, match="exactly one older root"):
        ca.drop_root(directory, ca.root_fingerprint(after.roots[0]))


def test_rotation_needs_the_newest_roots_key(directory: Path) -> None:
    for rotate in (ca.rotate_intermediate, ca.rotate_root):
        with pytest.raises(SluiceError) as caught:
            rotate(directory, new_key(), trust.now())
        assert caught.value.reason == errors_pb2.KEY_UNAVAILABLE


def test_a_running_authority_takes_up_a_rotation(directory: Path) -> None:
    running = Authority(directory, LIFE_S)
    before = running.bundle
    ca.rotate_root(directory, read_key(directory / ca.ROOT_KEY), trust.now())
    running.refresh()
    assert running.bundle.startswith((directory / ca.BUNDLE).read_bytes())
    assert running.bundle.endswith(before)


def test_without_an_authority_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match="no certificate authority") as caught:
        Authority(tmp_path / "ca", LIFE_S)
    assert "sluice control init" in caught.value.hint


def test_another_authority_may_stand_in(tmp_path: Path, directory: Path) -> None:
    theirs = ca.load(directory)
    key = new_key()
    server = Identity("rotation.test", Kind.CONTROL, "eu-1")
    chain = theirs.issue(server, key.public_key(), LIFE_S, trust.now())
    held = Credentials(theirs.bundle, chain, key_to_pem(key))
    assert ca.adopt(tmp_path / "mine", held, trust.now()) == "rotation.test"
    running = Authority(tmp_path / "mine", LIFE_S)
    assert running.trust_domain == "rotation.test"
    with pytest.raises(SluiceError) as caught:
        running.issue(BOX, new_key().public_key())
    assert caught.value.reason == errors_pb2.ENROLMENT_REFUSED
    box = trust.issue(BOX, by=theirs)
    with pytest.raises(SluiceError, match="no control plane"):
        ca.adopt(tmp_path / "wrong", box, trust.now())
