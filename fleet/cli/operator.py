"""`sluice operator`: who may use `sluice`, and how this person comes to a certificate."""

from __future__ import annotations

from pathlib import Path

import click

from fleet.cli import roles
from fleet.cli.admission import ROLE, add_verbs
from fleet.cli.command import Group
from fleet.cli.session import Session, line
from fleet.client import DEFAULT_ADDRESS, check_address
from fleet.profile import Profile
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, fingerprint
from updater.credentials import Credentials
from updater.enrolment import Enroller
from updater.errors import SluiceError, os_errors
from updater.identity import Identity, Kind, Role


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
        raise SluiceError(
            errors_pb2.STATE_LOCKED,
            f"{profile.directory} holds a profile already",
            hint="name another directory in SLUICE_PROFILE, or move that one away",
            obj=str(profile.directory),
        )
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


@operator.command("whoami", examples=[("", "sluice operator whoami")])
@click.pass_obj
def whoami(session: Session) -> None:
    """Show whose profile this is, and until when its certificate lasts."""
    profile = Profile.open()
    profile.credentials()  # renewed if that is due
    _show(session, profile)


def next_port(address: str) -> str:
    """Where certificates are given unless told otherwise: the port after the control plane's."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}" if port.isdigit() and int(port) < 65_535 else address


def _show(session: Session, profile: Profile) -> None:
    leaf = profile.credentials().leaf
    assert leaf is not None
    until = leaf.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {
        "identity": profile.identity().uri,
        "expire_time": until,
        "fingerprint": fingerprint(profile.key().public),
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
