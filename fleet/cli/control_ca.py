"""`sluice control ca`: look after the certificate authority, on the control machine.

The commands work on the data directory, beside a running control plane too: it takes up what they write.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.cli.command import Group
from fleet.cli.control import DATA, control, default_data
from fleet.cli.session import Session, line


@control.group("ca", cls=Group)
def authority() -> None:
    """Look after the certificate authority."""


ROOT_KEY = click.option(
    "--root-key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The newest root's private key. Default: root.key in the data directory.",
)


@authority.command("show", examples=[("", "sluice control ca show")])
@DATA
@click.pass_obj
def show(session: Session, data: Path | None) -> None:
    """Show the roots and the intermediate that issues."""
    _report(session, data, "")


@authority.command(
    "rotate",
    examples=[
        (
            "A new intermediate, with the root's key from a stick.",
            "sluice control ca rotate --root-key root.key",
        ),
        ("A new root as well. No box has to be touched.", "sluice control ca rotate --root"),
        ("The same when the root's key is lost.", "sluice control ca rotate --root --key-lost"),
    ],
)
@DATA
@ROOT_KEY
@click.option("--root", is_flag=True, help="Make a new root too, trusted beside the old ones.")
@click.option(
    "--key-lost",
    is_flag=True,
    help="With --root: the newest root's key is lost, so nothing vouches for the new one but this machine.",
)
@click.pass_obj
def rotate(session: Session, data: Path | None, root_key: Path | None, root: bool, key_lost: bool) -> None:
    """Replace the intermediate, or also the root.

    A running control plane takes it up within seconds; boxes hear of a new root when they renew. Those that
    were away longer come back by the old root, which the new one carries a certificate of.
    """
    from fleet import ca

    directory = _directory(data)
    if key_lost:
        if not root or root_key is not None:
            raise click.UsageError("--key-lost goes with --root, and without --root-key")
        issuer = ca.replace_root(directory, datetime.now(UTC))
        until = issuer.certificate.not_valid_after_utc
        _report(session, data, f"a new root; the old intermediate issues on until {until:%Y-%m-%d}")
        return
    key = _root_key(directory, root_key)
    now = datetime.now(UTC)
    (ca.rotate_root if root else ca.rotate_intermediate)(directory, key, now)
    _report(session, data, "a new root and intermediate" if root else "a new intermediate")


@authority.command(
    "drop", examples=[("When every box has renewed since the rotation.", "sluice control ca drop 1f0a-22c9")]
)
@DATA
@click.argument("fingerprint", metavar="FINGERPRINT")
@click.pass_obj
def drop(session: Session, data: Path | None, fingerprint: str) -> None:
    """Stop trusting an old root.

    Within a second a running control plane ends every call and stream whose certificate leads only to it, and
    takes no more. Boxes and operators renew with their enrolment keys and come back by themselves.
    """
    from fleet import ca

    ca.drop_root(_directory(data), fingerprint)
    _report(session, data, "dropped")


def _report(session: Session, data: Path | None, done: str) -> None:
    from fleet import ca

    issuer = ca.load(_directory(data))
    document = {
        "trust_domain": issuer.trust_domain,
        "roots": [
            {
                "fingerprint": ca.root_fingerprint(root),
                "expire_time": root.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            for root in issuer.roots
        ],
        "intermediate": {
            "fingerprint": ca.root_fingerprint(issuer.certificate),
            "expire_time": issuer.certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
    lines = [done] if done else []
    lines.append(f"trust domain {issuer.trust_domain}")
    lines += [
        f"root {ca.root_fingerprint(root)}, until {root.not_valid_after_utc:%Y-%m-%d}"
        for root in issuer.roots
    ]
    ends = issuer.certificate.not_valid_after_utc
    lines.append(f"intermediate {ca.root_fingerprint(issuer.certificate)}, until {ends:%Y-%m-%d}")
    session.result(document, *(line(text) for text in lines))


def _directory(data: Path | None) -> Path:
    from fleet.authority import DIRECTORY

    return (data or default_data()) / DIRECTORY


def _root_key(directory: Path, given: Path | None) -> ec.EllipticCurvePrivateKey:
    from fleet import ca
    from updater import keyfile

    return keyfile.read_key(given or directory / ca.ROOT_KEY)
