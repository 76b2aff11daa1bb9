"""`sluice control init` and `admit`: trust on the control machine itself.

`init` makes, in order: the certificate authority, the first operator with a profile, and the signing keys
with the first root. Everything is on disk whole before the next begins, and what is there stays: run again,
after whatever end, it makes what is missing and says what there is.
"""

from __future__ import annotations

import getpass
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet.cli import trust_setup
from fleet.cli.admission import ROLE
from fleet.cli.control import DATA, control, default_data
from fleet.cli.passphrase import Passphrases
from fleet.cli.session import Session, line
from fleet.cli.trust_options import open_directory, passphrase_option, trust_option
from fleet.client import DEFAULT_ADDRESS, check_address
from fleet.profile import Profile
from fleet.trust_directory import TrustDirectory
from sluice.api.v1 import errors_pb2
from updater.addresses import next_port
from updater.credentials import SERVER_NAME
from updater.errors import SluiceError, os_errors
from updater.identity import Role

if TYPE_CHECKING:  # heavy, and only needed on a control machine
    from fleet.initialise import Initialised


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "admin"


@control.command(
    "init",
    short_help="Set up who is trusted: authority, first operator, signing keys.",
    examples=[
        ("Everything on the control machine.", "sluice control init"),
        (
            "For a fleet that reaches this machine as control.example.",
            "sluice control init --trust-domain example --control control.example:8470",
        ),
        (
            "With signing keys made elsewhere, by `sluice trust init` there.",
            "sluice control init --keys-elsewhere",
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
    "--keys-elsewhere",
    is_flag=True,
    help="Make no signing keys here: they are made on another machine, by `sluice trust init` there.",
)
@trust_option
@passphrase_option
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
    keys_elsewhere: bool,
    trust_directory: Path | None,
    passphrase_file: Path | None,
    certificate: Path | None,
    key: Path | None,
    bundle: Path | None,
) -> None:
    """Set up who is trusted: authority, first operator, signing keys.

    Makes the certificate authority, you as the first operator (an admin) with a profile, and the keys that
    sign versions, sealed with passphrases, with the first root. Run it again whenever it was interrupted: it
    makes what is missing, and says what there is.
    """
    from fleet import ca, initialise
    from fleet.authority import DIRECTORY
    from fleet.data_lock import data_locked
    from fleet.local_trust import local_trust, write_online_key

    place = data or default_data()
    address = check_address(session.control or DEFAULT_ADDRESS)
    profile = Profile(Profile.open().directory, address, next_port(address))
    given = [option for option in (certificate, key, bundle) if option is not None]
    if given and len(given) != 3:
        raise click.UsageError("--certificate, --key and --bundle belong together")
    operator = name or _user()
    if not given:
        initialise.check(place, trust_domain, operator, profile)
    keys, phrases = open_directory(trust_directory), Passphrases(passphrase_file)
    with os_errors("creating the data directory", place):
        place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = False
        try:
            stack.enter_context(data_locked(place))
        except SluiceError as error:
            if error.reason != errors_pb2.STATE_LOCKED or not ca.exists(place / DIRECTORY):
                raise
            running = True  # it takes up what is made; what it holds in memory goes through it
        store = stack.enter_context(local_trust(place))
        standing = None if keys_elsewhere else trust_setup.standing(keys, store)
        if standing is trust_setup.Standing.NEW:
            trust_setup.ask(keys, phrases)
        if certificate and key and bundle:
            made = initialise.adopt(place, certificate, key, bundle)
        else:
            made = initialise.initialise(place, trust_domain, operator, profile)
        parts = list(made.made)
        if standing in (trust_setup.Standing.NEW, trust_setup.Standing.SIGNED):
            with ExitStack() as calling:
                target = calling.enter_context(session.client()) if running else store
                trust_setup.finish(keys, target, phrases, standing)
            parts.append("signing")
        begun = bool(store.get_trust().root_version)
        online = write_online_key(place) if keys_elsewhere and not begun else None
    steps = _authority_steps(made, data, "" if running else address, issuing=not given)
    steps += _signing_steps(keys, standing, online)
    steps.append(_box_step(made, keys, standing, issuing=not given))
    document = {
        "trust_domain": made.trust_domain,
        "data": str(place),
        "bundle": str(made.bundle),
        "root_key": str(made.root_key) if made.root_key else "",
        "root_fingerprint": made.root_fingerprint,
        "profile": "" if given else str(profile.directory),
        "trust": str(keys.path) if keys.is_set_up() and not keys_elsewhere else "",
        "made": parts,
        "next": steps,
    }
    lines = [f"trust domain {made.trust_domain}, state in {place}"]
    if not given:
        lines.append(f"you are {profile.identity().uri}; your profile is {profile.directory}")
    if document["trust"]:
        lines.append(f"versions are signed with the keys in {keys.path}")
    if not parts:
        lines.append("all of it was there already")
    lines += ["", "next:", *(f"  {number}. {text}" for number, text in enumerate(steps, 1))]
    session.result(document, *(line(text) for text in lines))


def _authority_steps(made: Initialised, data: Path | None, address: str, *, issuing: bool) -> list[str]:
    """What to do about the authority, and to start the control plane at `address`; empty: it runs."""
    steps = []
    if made.root_key:
        steps.append(f"take {made.root_key} off this machine (it is needed only to rotate) and keep it safe")
    if address:
        where = f" --data {data}" if data else ""
        where += f" --listen {address}" if address != DEFAULT_ADDRESS else ""
        steps.append(f"start the control plane: sluice control serve{where}")
    if not issuing:
        steps.append("operators, you too, make their profile with `sluice operator adopt`")
    return steps


def _signing_steps(
    keys: TrustDirectory, standing: trust_setup.Standing | None, online: Path | None
) -> list[str]:
    """What to do about the signing keys."""
    if online is not None:
        text = "where the signing keys shall lie, as an admin, once it runs: sluice trust init"
        return [f"{text} (its online key is in {online}; --online and --offline begin from that)"]
    if standing is None:
        return []  # they are at work already
    if standing is trust_setup.Standing.ELSEWHERE:
        return ["versions are signed by other operators: get their root.json, and `sluice trust join` it"]
    root, place = keys.path / "keys" / f"{trust_setup.ROOT_KEY}.json", keys.path / "keys"
    steps = []
    if keys.has_key(trust_setup.ROOT_KEY):
        steps.append(f"back up {place}, then take {root} off this machine: only changes of keys need it")
    return steps


def _box_step(
    made: Initialised, keys: TrustDirectory, standing: trust_setup.Standing | None, *, issuing: bool
) -> str:
    """What each box is given."""
    known = standing is not None and keys.is_set_up()
    root = f"{keys.root_path} as trust.root" if known else "root.json of the signing keys as trust.root"
    if issuing:
        return f"give each box {made.bundle} as control.bundle, {root}, and a token: sluice device token"
    return (
        f"another authority issues: each box needs control.certificate, control.key, control.bundle, {root}"
        + _server_name_advice(made.server_names)
    )


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


def _server_name_advice(names: tuple[str, ...]) -> str:
    if SERVER_NAME in names:
        return ""
    if not names:
        return (
            "; its certificate has no DNS name, which boxes and operators need to know it by: have one added"
        )
    return f'; and control.server_name = "{names[0]}"'
