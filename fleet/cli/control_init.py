"""`sluice control init` and `admit`, `sluice control ca`: trust on the control machine itself.

They work on the data directory, beside a running control plane too: it takes up what they write.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.cli.admission import ROLE
from fleet.cli.command import Group
from fleet.cli.control import DATA, control, default_data
from fleet.cli.session import Session, line
from fleet.client import DEFAULT_ADDRESS, check_address
from fleet.profile import Profile
from updater.addresses import next_port
from updater.credentials import SERVER_NAME
from updater.identity import Role

# What `init` does and says after the identities stand: the root of the signing keys joins here.
Step = Callable[[Session, Path, Profile], list[str]]
STEPS: list[Step] = []


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "admin"


@control.command(
    "init",
    examples=[
        ("Authority, first operator and profile, on the control machine.", "sluice control init"),
        (
            "For a fleet that reaches this machine as control.example.",
            "sluice control init --trust-domain example --control control.example:8470",
        ),
        (
            "With certificates from another authority, e.g. SPIRE.",
            "sluice control init --certificate svid.pem --key svid.key --bundle bundle.pem",
        ),
    ],
)
@DATA
@click.option(
    "--trust-domain", default="", help="Of every identity; cannot be changed later. Default: the host's name."
)
@click.option(
    "--operator",
    "name",
    default="",
    help="Your name as the first operator, an admin. Default: your user name.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path, exists=True),
    help="Another authority's, for this control plane.",
)
@click.option("--key", type=click.Path(path_type=Path, exists=True), help="Its private key.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), help="The authorities to trust.")
@click.pass_obj
def init(
    session: Session,
    data: Path | None,
    trust_domain: str,
    name: str,
    certificate: Path | None,
    key: Path | None,
    bundle: Path | None,
) -> None:
    """Set up who is trusted, once.

    Makes the certificate authority, the first operator (an admin) and your profile.
    """
    from fleet import initialise

    place = data or default_data()
    address = check_address(session.control or DEFAULT_ADDRESS)
    profile = Profile(Profile.open().directory, address, next_port(address))
    given = [option for option in (certificate, key, bundle) if option is not None]
    if certificate and key and bundle:
        made = initialise.adopt(place, certificate, key, bundle)
        steps = [
            "another authority issues: each box needs control.certificate, control.key and control.bundle"
            + _server_name_advice(made.server_names),
            "operators, you too, make their profile with `sluice operator adopt`",
            "start the control plane: sluice control serve" + _data_option(data),
        ]
    elif given:
        raise click.UsageError("--certificate, --key and --bundle belong together")
    else:
        domain = trust_domain or initialise.default_trust_domain()
        made = initialise.initialise(place, domain, name or _user(), profile)
        steps = [
            f"take {made.root_key} off this machine (it is needed only to rotate) and keep it safe",
            "start the control plane: sluice control serve" + _data_option(data),
            f"give each box {made.bundle} as control.bundle, and a token: sluice device token",
        ]
    for step in STEPS:
        steps += step(session, place, profile)
    document = {
        "trust_domain": made.trust_domain,
        "data": str(place),
        "bundle": str(made.bundle),
        "root_key": str(made.root_key) if made.root_key else "",
        "root_fingerprint": made.root_fingerprint,
        "profile": str(profile.directory) if not given else "",
        "next": steps,
    }
    lines = [f"trust domain {made.trust_domain}, state in {place}"]
    if not given:
        lines.append(f"you are {profile.identity().uri}; your profile is {profile.directory}")
    lines += ["", "next:", *(f"  {number}. {text}" for number, text in enumerate(steps, 1))]
    session.result(document, *(line(text) for text in lines))


@control.command(
    "admit", examples=[("When every admin's profile is lost.", "sluice control admit ana --role admin")]
)
@DATA
@click.argument("name", metavar="NAME")
@click.option("--role", type=ROLE, default=Role.ADMIN.value, show_default=True, help="What they may do.")
@click.pass_obj
def admit(session: Session, data: Path | None, name: str, role: str) -> None:
    """Make an operator's token without being one.

    On the control machine, for when every admin's profile is lost.
    """
    from fleet import initialise

    token = initialise.admit(data or default_data(), name, Role(role))
    session.result(
        {"token": token},
        line(token),
        line(f"good once, for an hour: sluice operator enrol {name} --role {role} --token ... --bundle FILE"),
    )


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
    ],
)
@DATA
@ROOT_KEY
@click.option("--root", is_flag=True, help="Make a new root too, trusted beside the old ones.")
@click.pass_obj
def rotate(session: Session, data: Path | None, root_key: Path | None, root: bool) -> None:
    """Replace the intermediate, or also the root.

    A running control plane takes it up within seconds; boxes hear of a new root when they renew. Those that
    were away longer come back by the old root, which the new one carries a certificate of.
    """
    from fleet import ca

    directory = _directory(data)
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

    Certificates that lead only to it are refused from now on; connections that stand were checked when they
    were made, so restart the control plane if its key was stolen.
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


def _server_name_advice(names: tuple[str, ...]) -> str:
    if SERVER_NAME in names:
        return ""
    if not names:
        return (
            "; its certificate has no DNS name, which boxes and operators need to know it by: have one added"
        )
    return f', and control.server_name = "{names[0]}"'


def _data_option(data: Path | None) -> str:
    return f" --data {data}" if data else ""
