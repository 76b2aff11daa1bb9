"""Key files: sealed, plain, held elsewhere, or public only; and everything that is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from updater.errors import SluiceError
from updater.trust import keys
from updater.trust.keys import external_key, new_key, parse_public_key, read_key_file


@pytest.fixture(autouse=True)
def _cheap_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_COST", 2)


def unavailable(work: object) -> str:
    assert callable(work)
    with pytest.raises(SluiceError) as caught:
        work()
    assert caught.value.code == "KEY_UNAVAILABLE"
    return caught.value.message


def unasked(name: str) -> str:
    raise AssertionError(f"asked for {name}")


def test_a_sealed_key_signs_with_its_passphrase_only(tmp_path: Path) -> None:
    path = tmp_path / "ada.json"
    made = new_key("ada", "open the door")
    made.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in path.read_bytes()
    found = read_key_file(path)
    signer = found.signer(lambda name: {"ada": "open the door"}[name])
    made.public.verify_signature(signer.sign(b"data"), b"data")
    assert "passphrase is wrong" in unavailable(lambda: found.signer(lambda _: "open barley"))


def test_the_seal_is_bound_to_the_name(tmp_path: Path) -> None:
    path = tmp_path / "ada.json"
    new_key("ada", "x" * 12).write(path)
    path.write_text(path.read_text().replace('"name": "ada"', '"name": "bob"'))
    assert "passphrase is wrong" in unavailable(lambda: read_key_file(path).signer(lambda _: "x"))


def test_a_private_half_does_not_pass_for_another_public_one(tmp_path: Path) -> None:
    one, other = new_key("a", None), new_key("b", None)
    path = tmp_path / "a.json"
    keys.KeyFile("a", other.public, one.signing).write(path)
    assert "malformed" in unavailable(lambda: read_key_file(path).signer(unasked))


def test_others_must_not_be_able_to_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    new_key("a", None).write(path)
    path.chmod(0o640)
    assert "can be read by others" in unavailable(lambda: read_key_file(path))


def test_a_public_half_goes_round_and_signs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    made = new_key("a", None)
    made.public_only().write(path)
    found = read_key_file(path)
    assert found.public == made.public
    assert not found.can_sign
    assert "only its public half" in unavailable(lambda: found.signer(unasked))
    assert parse_public_key(json.dumps(keys.key_dict(made.public))) == made.public


def test_a_signer_elsewhere_is_opened_by_its_uri(tmp_path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

    file = tmp_path / "token.pem"
    file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    made = external_key("token", f"file2:{file}", public)
    made.public.verify_signature(made.signer(unasked).sign(b"data"), b"data")
    file.unlink()
    assert "its signer refused" in unavailable(lambda: made.signer(unasked))
    assert "not a public key" in unavailable(lambda: external_key("token", "hsm:", b"nonsense"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 100_000,
        '{"schema": 2}',
        '{"schema": 1, "name": "a", "public": {}, "signing": {}}',
        '{"schema": 1, "name": "a", "public": null, "signing": {}}',
        "x" * (keys.MAX_KEY_FILE_BYTES + 1),
    ],
    ids=range(8),
)
def test_a_broken_file_is_told_as_that(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "malformed" in unavailable(lambda: read_key_file(path))
    unavailable(lambda: parse_public_key(text))


def test_a_missing_file_and_an_empty_passphrase(tmp_path: Path) -> None:
    assert "there is no key file" in unavailable(lambda: read_key_file(tmp_path / "a.json"))
    for short in ("", "eleven char"):
        assert "12 to 1024 characters" in unavailable(lambda short=short: new_key("a", short))


def test_a_seal_may_not_ask_for_all_of_the_memory(tmp_path: Path) -> None:
    made = new_key("a", "x" * 12)
    path = tmp_path / "a.json"
    keys.KeyFile("a", made.public, {"sealed": {**made.signing["sealed"], "n": 1 << 40}}).write(path)
    assert "does not know" in unavailable(lambda: read_key_file(path).signer(lambda _: "x"))
