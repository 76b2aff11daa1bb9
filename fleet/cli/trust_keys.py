"""`sluice trust key`: make, take in, hand out and list keys."""

from __future__ import annotations

from pathlib import Path

import click

from fleet.cli import tables
from fleet.cli.arguments import NAME
from fleet.cli.command import Group
from fleet.cli.passphrase import Passphrases
from fleet.cli.session import Session, line
from fleet.cli.trust_options import directory_option, open_directory, passphrase_option
from updater.atomic import write_atomic
from updater.errors import os_errors
from updater.trust.keys import KeyFile, external_key, fingerprint, key_dict, new_key, parse_key_file

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_HOW = {
    "sealed": "file, sealed",
    "plain": "file, NOT sealed",
    "uri": "another signer",
    "public": "public half only",
}


@click.group("key", cls=Group)
def key() -> None:
    """Make keys, exchange their public halves, list them."""


def _document(found: KeyFile) -> dict[str, object]:
    return {"name": found.name, "kind": found.kind, "public": key_dict(found.public)}


@key.command("new", examples=[("A key for a second root signer.", "sluice trust key new root-ada")])
@click.argument("name", type=NAME)
@directory_option
@passphrase_option
@click.pass_obj
def new(session: Session, name: str, directory: Path | None, passphrase_file: Path | None) -> None:
    """Make an ed25519 key, sealed with a passphrase."""
    made = new_key(name, Passphrases(passphrase_file).new(name))
    open_directory(directory).add_key(made)
    session.result(
        {"key": _document(made)},
        line(f"made the key {name}, fingerprint {fingerprint(made.public)}"),
        line("back its file up: nobody can make it again"),
    )


@key.command(
    "import",
    examples=[
        ("Somebody else's public half.", "sluice trust key import root-bob bob.pub"),
        (
            "A key in a hardware token.",
            "sluice trust key import hsm --uri 'hsm:2?label=root' --public root.pem",
        ),
    ],
)
@click.argument("name", type=NAME)
@click.argument("file", type=_FILE, required=False)
@click.option(
    "--uri", help="Signer of the securesystemslib kind: hsm:, awskms:, gcpkms:, azurekms:, file2: …"
)
@click.option("--public", type=_FILE, help="The public half as PEM, with --uri.")
@directory_option
@click.pass_obj
def import_(
    session: Session,
    name: str,
    file: Path | None,
    uri: str | None,
    public: Path | None,
    directory: Path | None,
) -> None:
    """Take in a public half, or a key that another signer holds."""
    if (file is None) == (uri is None) or (uri is None) != (public is None):
        raise click.UsageError("give FILE from `sluice trust key export`, or --uri with --public")
    path = file or public
    assert path is not None
    with os_errors("reading", path):
        data = path.read_bytes()
    if uri is not None:
        taken = external_key(name, uri, data)
    else:
        taken = KeyFile(name, parse_key_file(data, name).public, {})
    open_directory(directory).add_key(taken)
    session.result(
        {"key": _document(taken)},
        line(f"took in the key {name}, fingerprint {fingerprint(taken.public)}"),
        line("compare the fingerprint with its owner before a root names it"),
    )


@key.command("export", examples=[("For another operator.", "sluice trust key export root-ada -o ada.pub")])
@click.argument("name", type=NAME)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@directory_option
@click.pass_obj
def export(session: Session, name: str, output: Path, directory: Path | None) -> None:
    """Write a key's public half to a file for others."""
    found = open_directory(directory).key(name).public_only()
    write_atomic(output, found.to_bytes())
    session.result(
        {"key": _document(found), "file": str(output)},
        line(f"wrote the public half of {name} to {output}, fingerprint {fingerprint(found.public)}"),
    )


@key.command("list", examples=[("All of them.", "sluice trust key list")])
@directory_option
@click.pass_obj
def list_(session: Session, directory: Path | None) -> None:
    """List the keys here."""
    found = open_directory(directory).keys()
    rows = [
        (item.name, fingerprint(item.public), item.public.scheme, _HOW.get(item.kind, item.kind))
        for item in found
    ]
    shown = tables.Rows(("NAME", "FINGERPRINT", "SCHEME", "PRIVATE HALF*"), rows)
    empty = line("no keys yet; `sluice trust init` makes them")
    session.result({"keys": [_document(item) for item in found]}, shown if found else empty)
