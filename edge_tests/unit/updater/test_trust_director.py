"""Desired states signed by the online key: for one device, for a while, and nothing else passes for one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Root

from sluice.api.v1 import sync_pb2
from updater.errors import SluiceError
from updater.limits import MAX_STATEMENT_BYTES
from updater.trust import roles
from updater.trust.director import CONTEXT, read_desired, sign_desired
from updater.trust.documents import in_days

NOW = datetime(2026, 5, 1, tzinfo=UTC)
LIFE_S = 3600.0
ONLINE = CryptoSigner.generate_ed25519()
OFFLINE = CryptoSigner.generate_ed25519()


def root_of(online: Signer) -> Root:
    key = roles.RoleKeys((OFFLINE.public_key,))
    return roles.make_root(key, key, online.public_key, in_days(365, NOW)).signed


ROOT = root_of(ONLINE)


def state(generation: int = 7) -> sync_pb2.DesiredState:
    model = sync_pb2.DesiredModel(model="m", version=3, manifest_digest="sha256:" + "a" * 64)
    return sync_pb2.DesiredState(generation=generation, models=[model])


def proof(device: str = "box", signer: Signer = ONLINE) -> sync_pb2.DesiredProof:
    return sign_desired(device, state(), signer, NOW, LIFE_S)


def refusal(
    given: sync_pb2.DesiredProof, *, device: str = "box", root: Root = ROOT, now: datetime = NOW
) -> str:
    with pytest.raises(SluiceError) as caught:
        read_desired(given, root, device, now)
    return caught.value.code


def test_round_trip() -> None:
    statement = read_desired(proof(), ROOT, "box", NOW + timedelta(seconds=LIFE_S - 1))
    assert statement.desired == state()
    assert statement.issue_time.ToDatetime(UTC) == NOW


def test_another_devices_plan() -> None:
    assert refusal(proof("other")) == "METADATA_INVALID"


def test_after_its_time() -> None:
    assert refusal(proof(), now=NOW + timedelta(seconds=LIFE_S)) == "METADATA_EXPIRED"
    assert refusal(proof(), now=NOW + timedelta(days=3650)) == "METADATA_EXPIRED"


def test_a_clock_that_is_behind_does_not_stop_an_update() -> None:
    assert read_desired(proof(), ROOT, "box", NOW - timedelta(days=20_000)).desired == state()


def test_by_no_key_or_another() -> None:
    assert refusal(sync_pb2.DesiredProof()) == "SIGNATURE_INVALID"
    assert refusal(proof(signer=CryptoSigner.generate_ed25519())) == "SIGNATURE_INVALID"
    # The operators' keys say which versions exist, not who gets them.
    assert refusal(proof(signer=OFFLINE)) == "SIGNATURE_INVALID"


def test_by_a_key_that_was_rotated_away() -> None:
    assert refusal(proof(), root=root_of(CryptoSigner.generate_ed25519())) == "SIGNATURE_INVALID"


def test_the_same_signature_twice_is_one() -> None:
    second = CryptoSigner.generate_ed25519()
    root = root_of(ONLINE)
    root.add_key(second.public_key, "timestamp")
    root.roles["timestamp"].threshold = 2
    given = proof()
    given.signatures.append(given.signatures[0])
    assert refusal(given, root=root) == "SIGNATURE_INVALID"
    made = second.sign(CONTEXT + given.statement)
    given.signatures[1].key_id, given.signatures[1].signature = made.keyid, bytes.fromhex(made.signature)
    assert read_desired(given, root, "box", NOW).desired == state()


def test_a_signature_of_metadata_is_none_of_a_statement() -> None:
    given = proof()
    bare = ONLINE.sign(given.statement)  # without the context
    given.signatures[0].signature = bytes.fromhex(bare.signature)
    assert refusal(given) == "SIGNATURE_INVALID"


def test_sizes_have_limits() -> None:
    large = proof()
    large.statement = b"\0" * (MAX_STATEMENT_BYTES + 1)
    assert refusal(large) == "LIMIT_EXCEEDED"
    many = proof()
    many.signatures.extend([many.signatures[0]] * 64)
    assert refusal(many) == "LIMIT_EXCEEDED"


def test_signed_nonsense_is_told_as_that() -> None:
    made = ONLINE.sign(CONTEXT + b"\xff\xff")
    signature = sync_pb2.StatementSignature(key_id=made.keyid, signature=bytes.fromhex(made.signature))
    given = sync_pb2.DesiredProof(statement=b"\xff\xff", signatures=[signature])
    assert refusal(given) == "METADATA_INVALID"


def test_flipping_any_bit_of_a_proof_is_refused() -> None:
    data = proof().SerializeToString()
    for at in range(len(data)):
        mutated = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        try:
            given = sync_pb2.DesiredProof.FromString(mutated)
        except Exception:  # noqa: BLE001 - not even a message
            continue
        if given == proof():
            continue
        try:
            statement = read_desired(given, ROOT, "box", NOW)
        except SluiceError:
            continue
        assert statement.desired == state(), at
        assert given.statement == proof().statement, at
