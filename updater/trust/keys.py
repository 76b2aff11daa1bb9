"""Keys: made, sealed with a passphrase, kept in one small file each, and opened to sign.

A key file is JSON: the public half, and how to sign with it, which is one of
- "sealed": an ed25519 key encrypted under a passphrase (scrypt, then ChaCha20-Poly1305),
- "plain": the same, unencrypted, for the control plane's online key that must sign unattended,
- "uri": a securesystemslib signer, such as "hsm:2?label=…" or "awskms:…", which holds the key itself,
- nothing: only the public half, of somebody else's key.

Rules: a private half is never written but sealed or on request plain, always with mode 0600; opening a key
file that others can read is refused; a wrong passphrase is KEY_UNAVAILABLE, whatever else it could be.
"""

from __future__ import annotations

import base64
import json
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors
from updater.limits import (
    MAX_KEY_FILE_BYTES,
    MAX_PASSPHRASE_CHARACTERS,
    MIN_PASSPHRASE_CHARACTERS,
    SCRYPT_COST,
)

SCHEMA = 1
_SALT_BYTES = 16
_NONCE_BYTES = 12
_BLOCK = 8  # scrypt's r; with SCRYPT_COST it decides the memory
_MOST_COST = 1 << 20  # of a file that somebody else wrote: 1 GiB
_PRIVATE = 0o600

Passphrase = Callable[[str], str]  # asked with the key's name


@dataclass(frozen=True)
class KeyFile:
    """One key.

    Attributes:
        name: among its owner's keys.
        public: the half that is shown to everybody.
        signing: {"sealed": …}, {"plain": …}, {"uri": …} or empty.
    """

    name: str
    public: Key
    signing: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """How it signs: "sealed", "plain" or "uri"; "public" when it cannot here."""
        return next(iter(self.signing), "public")

    @property
    def can_sign(self) -> bool:
        return bool(self.signing)

    def to_bytes(self) -> bytes:
        value = {
            "name": self.name,
            "public": key_dict(self.public),
            "schema": SCHEMA,
            "signing": self.signing,
        }
        return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

    def public_only(self) -> KeyFile:
        """The same key without its private half, to hand to others."""
        return replace(self, signing={})

    def write(self, path: Path) -> None:
        """Writes the file. Raises SluiceError(IO_FAILED | DISK_FULL)."""
        write_atomic(path, self.to_bytes(), mode=_PRIVATE if self.signing else 0o644)

    def signer(self, passphrase: Passphrase) -> Signer:
        """Opens the private half.

        Args:
            passphrase: asked only for a sealed key.

        Raises SluiceError(KEY_UNAVAILABLE).
        """
        if "sealed" in self.signing:
            private = _unseal(self.signing["sealed"], passphrase(self.name), self.name)
            return _crypto_signer(private, self.public, self.name)
        if "plain" in self.signing:
            return _crypto_signer(str(self.signing["plain"]).encode(), self.public, self.name)
        if "uri" in self.signing:
            try:
                return Signer.from_priv_key_uri(
                    str(self.signing["uri"]), self.public, lambda _: passphrase(self.name)
                )
            except Exception as error:  # each kind of signer has errors of its own
                raise _unavailable(self.name, f"its signer refused: {error}") from error
        raise _unavailable(self.name, "only its public half is here", "sign on the machine that has the key")


def new_key(name: str, passphrase: str | None) -> KeyFile:
    """A new ed25519 key, sealed; with None plain."""
    signer = CryptoSigner.generate_ed25519()
    private = signer.private_bytes
    if passphrase is None:
        return KeyFile(name, signer.public_key, {"plain": private.decode()})
    return KeyFile(name, signer.public_key, {"sealed": _seal(private, passphrase, name)})


def external_key(name: str, uri: str, public_pem: bytes) -> KeyFile:
    """A key that another signer holds, by its URI and PEM. Raises SluiceError(KEY_UNAVAILABLE)."""
    try:
        public = SSlibKey.from_crypto(load_pem_public_key(public_pem))
    except (ValueError, TypeError) as error:
        raise _unavailable(name, f"not a public key: {error}", "give it as PEM") from error
    return KeyFile(name, public, {"uri": uri})


def read_key_file(path: Path) -> KeyFile:
    """Reads a key file. Raises SluiceError(KEY_UNAVAILABLE | IO_FAILED)."""
    name = path.stem
    if not path.is_file():
        raise _unavailable(name, f"there is no key file {path}", "`sluice trust key list` shows the keys")
    with os_errors("reading the key file", path):
        mode = stat.S_IMODE(path.stat().st_mode)
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    found = parse_key_file(data, name)
    if found.kind in ("sealed", "plain") and mode & 0o077:
        raise _unavailable(name, f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
    return found


def parse_key_file(data: bytes, name: str) -> KeyFile:
    """The key in a key file's bytes. Raises SluiceError(KEY_UNAVAILABLE)."""
    try:
        if len(data) > MAX_KEY_FILE_BYTES:
            raise ValueError(f"larger than {MAX_KEY_FILE_BYTES} bytes")
        value = json.loads(data)
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']}; this release reads {SCHEMA}")
        public, signing = dict(value["public"]), dict(value["signing"])
        if len(signing) > 1:
            raise ValueError("it says more than one way to sign")
        return KeyFile(str(value["name"]), Key.from_dict(public.pop("keyid"), public), signing)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unavailable(name, f"its file is malformed: {error}") from error


def parse_public_key(text: str) -> Key:
    """The public key in JSON, as `key_dict` makes it. Raises SluiceError(KEY_UNAVAILABLE)."""
    try:
        value = dict(json.loads(text))
        return Key.from_dict(str(value.pop("keyid")), value)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unavailable(
            "online", f"its public half cannot be read: {error}", "is sluice the same version there?"
        ) from error


def key_dict(key: Key) -> dict[str, Any]:
    """A public key with its id, as JSON has it."""
    return {"keyid": key.keyid, **key.to_dict()}


def fingerprint(key: Key) -> str:
    """What people compare: the first 16 hex digits of the key's id, in groups."""
    return " ".join(key.keyid[start : start + 4] for start in range(0, 16, 4))


def _crypto_signer(private: bytes, public: Key, name: str) -> Signer:
    try:
        return CryptoSigner(load_pem_private_key(private, None), public)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise _unavailable(name, f"its private half is malformed: {error}") from error


def check_passphrase(passphrase: str, name: str) -> None:
    """Refuses one that no key is sealed with. Raises SluiceError(KEY_UNAVAILABLE)."""
    if not MIN_PASSPHRASE_CHARACTERS <= len(passphrase) <= MAX_PASSPHRASE_CHARACTERS:
        raise _unavailable(
            name,
            f"a passphrase has {MIN_PASSPHRASE_CHARACTERS} to {MAX_PASSPHRASE_CHARACTERS} characters",
            "choose another; some words that have nothing to do with each other are easy to keep in mind",
        )


def _seal(private: bytes, passphrase: str, name: str) -> dict[str, Any]:
    check_passphrase(passphrase, name)
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    box = ChaCha20Poly1305(_stretched(passphrase, salt, SCRYPT_COST)).encrypt(nonce, private, name.encode())
    return {
        "box": base64.b64encode(box).decode(),
        "kdf": "scrypt",
        "n": SCRYPT_COST,
        "nonce": nonce.hex(),
        "salt": salt.hex(),
    }


def _unseal(sealed: Mapping[str, Any], passphrase: str, name: str) -> bytes:
    try:
        cost = int(sealed["n"])
        if sealed["kdf"] != "scrypt" or not 1 < cost <= _MOST_COST:
            raise _unavailable(name, "it is sealed in a way that this release does not know", "update sluice")
        key = _stretched(passphrase, bytes.fromhex(sealed["salt"]), cost)
        box = base64.b64decode(sealed["box"], validate=True)
        return ChaCha20Poly1305(key).decrypt(bytes.fromhex(sealed["nonce"]), box, name.encode())
    except InvalidTag as error:
        raise _unavailable(name, "the passphrase is wrong, or its file is damaged", "try again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unavailable(name, f"its file is malformed: {error}") from error


def _stretched(passphrase: str, salt: bytes, cost: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=cost, r=_BLOCK, p=1).derive(passphrase.encode())


def _unavailable(name: str, why: str, hint: str = "") -> SluiceError:
    return SluiceError(
        errors_pb2.KEY_UNAVAILABLE,
        f"the key {name} cannot be used: {why}",
        hint=hint or "restore it from your backup, or replace it: `sluice trust rotate`",
        obj=name,
    )
