"""`sluice operator`: who may use `sluice`, and how this person comes to a certificate."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from fleet.cli import roles
from fleet.cli.admission import LIFE, ROLE, add_verbs, make_token
from fleet.cli.command import Group
from fleet.cli.session import Session, line
from fleet.client import DEFAULT_ADDRESS, check_address
from fleet.profile import Files, Profile
from sluice.api.v1 import errors_pb2
from updater.addresses import next_port
from updater.certificates import certificates, fingerprint
from updater.credentials import SERVER_NAME, Credentials
from updater.enrolment import Enroller
from updater.errors import SluiceError, os_errors
from updater.identity import Identity, Kind, Role

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group("operator", cls=Group)
def operator() -> None:
    """Let people in, and yourself."""


@operator.command(
    "enrol",
    examples=[
        (
            "With a token from an admin.",
            "sluice operator enrol ana --role publisher --token slt_... --bundle bundle.pem",
        )
    ],
)
@click.argument("name", metavar="NAME")
@click.option(
    "--token", default="", help="From `sluice operator token`. Without one an admin has to approve you."
)
@click.option("--role", type=ROLE, default="", help="As the token says.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="The authorities to trust: bundle.pem from the control machine.",
)
@click.option(
    "--enrolment", metavar="ADDR", default="", help="Where certificates are given. Default: the next port."
)
@click.pass_obj
def enrol(session: Session, name: str, token: str, role: str, bundle: Path, enrolment: str) -> None:
    """Get your first certificate, and make your profile.

    From then on `sluice` renews it by itself, after any absence.
    """
    control = check_address(session.control or DEFAULT_ADDRESS)
    profile = Profile(Profile.open().directory, control, enrolment or next_port(control))
    if profile.exists():
        raise _profile_exists(profile)
    with os_errors("reading", bundle):
        held = Credentials(bundle.read_bytes())
    certificates(held.bundle)
    key = profile.key()
    session.note(f"the fingerprint of your key is {fingerprint(key.public)}")
    with Enroller(profile.enrolment, held, key) as enroller:
        identity = Identity(enroller.trust_domain(), Kind.OPERATOR, name, Role(role) if role else None)
        found = enroller.enrol(identity, token=token)
    profile.save(found)
    _show(session, profile)


@operator.command(
    "token", examples=[("Let ana in as a publisher.", "sluice operator token ana --role publisher")]
)
@click.argument("name", metavar="NAME")
@click.option("--role", type=ROLE, default="", help="What the certificate lets them do.")
@LIFE
@click.pass_obj
def token(session: Session, name: str, role: str, life: int) -> None:
    """Make a token that enrols one operator once.

    It is shown this once; the control plane keeps only its hash.
    """
    option = f" --role {role}" if role else ""
    address = session.control or Profile.open().control or "ADDR"
    use = f"sluice operator enrol {name}{option} --token {{token}} --control {address} --bundle bundle.pem"
    make_token(session, "operator", name, life, use, role=role)


@operator.command(
    "adopt",
    examples=[
        (
            "With a certificate of another authority.",
            "sluice operator adopt --certificate my.pem --key my.key --bundle ca.pem",
        )
    ],
)
@click.option("--certificate", type=_FILE, required=True, help="Yours, PEM with its chain.")
@click.option("--key", type=_FILE, required=True, help="Its private key, mode 0600.")
@click.option("--bundle", type=_FILE, required=True, help="The authorities to trust.")
@click.option("--server-name", default=SERVER_NAME, help="DNS name in the control plane's certificate.")
@click.pass_obj
def adopt(session: Session, certificate: Path, key: Path, bundle: Path, server_name: str) -> None:
    """Make a profile of another authority's files.

    They are read anew by each command, and renewed by whoever gave them to you.
    """
    control = check_address(session.control or DEFAULT_ADDRESS)
    files = Files(str(certificate.resolve()), str(key.resolve()), str(bundle.resolve()), server_name)
    profile = Profile(Profile.open().directory, control, files=files)
    if profile.exists():
        raise _profile_exists(profile)
    profile.credentials().check(datetime.now(UTC))
    profile.save()
    _show(session, profile)


@operator.command("whoami", examples=[("", "sluice operator whoami")])
@click.pass_obj
def whoami(session: Session) -> None:
    """Show whose profile this is, and until when its certificate lasts."""
    profile = Profile.open()
    profile.credentials()  # renewed if that is due
    _show(session, profile)


def _profile_exists(profile: Profile) -> SluiceError:
    return SluiceError(
        errors_pb2.STATE_LOCKED,
        f"{profile.directory} holds a profile already",
        hint="name another directory in SLUICE_PROFILE, or move that one away",
        obj=str(profile.directory),
    )


def _show(session: Session, profile: Profile) -> None:
    leaf = profile.credentials().leaf
    assert leaf is not None
    until = leaf.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {
        "identity": profile.identity().uri,
        "expire_time": until,
        "fingerprint": "" if profile.files else fingerprint(profile.key().public),
        "control": profile.control,
        "profile": str(profile.directory),
    }
    session.result(
        document,
        line(f"{document['identity']}, until {until}"),
        line(f"profile {profile.directory}, control plane {profile.control}"),
    )


add_verbs(operator, "operator")
for verb in (roles.role, roles.roles):
    operator.add_command(verb)
