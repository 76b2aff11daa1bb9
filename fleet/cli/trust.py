"""`sluice trust`: set up who signs models, sign, publish, and explain what is signed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click

from fleet.cli.arguments import NAME
from fleet.cli.command import Group
from fleet.cli.passphrase import Passphrases
from fleet.cli.session import Session, line
from fleet.cli.trust_changes import CHANGES
from fleet.cli.trust_keys import key
from fleet.cli.trust_options import (
    directory_option,
    obtain_key,
    offline_option,
    open_directory,
    passphrase_option,
    show,
    signed_document,
    signed_text,
)
from fleet.signing import Signing
from fleet.trust_directory import TrustDirectory
from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors
from updater.trust import roles
from updater.trust.chain import Finding, explain
from updater.trust.client import TrustClient
from updater.trust.documents import (
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    read,
    read_targets,
    write,
)
from updater.trust.keys import fingerprint, parse_key_file, parse_public_key

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("trust", cls=Group)
def trust() -> None:
    """Sign models, and say who may.

    Two kinds of keys lie on operators' machines, each sealed with a passphrase: root keys say which keys
    count, targets keys sign versions. The control plane's own key says which device gets which version now.
    """


@trust.command(
    "init",
    short_help="Make keys and the first root, and publish it.",
    examples=[
        ("One operator, one root and one targets key.", "sluice trust init"),
        (
            "Two people for the root; Bob's public half was taken in before.",
            "sluice trust init --root-key ada --root-key bob --root-threshold 2",
        ),
    ],
)
@click.option("--root-key", "root_keys", type=NAME, multiple=True, help="Default: root. Made when absent.")
@click.option("--targets-key", "targets_keys", type=NAME, multiple=True, help="Default: targets.")
@click.option("--root-threshold", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--targets-threshold", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--online", type=_FILE, help="The control plane's public key. Default: it is asked.")
@click.option(
    "--replace", is_flag=True, help="Begin a new chain: the keys of the old one are lost or stolen."
)
@directory_option
@passphrase_option
@offline_option
@click.pass_obj
def init(
    session: Session,
    root_keys: tuple[str, ...],
    targets_keys: tuple[str, ...],
    root_threshold: int,
    targets_threshold: int,
    online: Path | None,
    replace: bool,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
) -> None:
    """Make keys and the first root, and publish it.

    From then on the control plane refuses versions that are not signed, and every device on which the root is
    pinned does too.
    """
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    if offline and online is None:
        raise click.UsageError("with --offline, give the control plane's public key: --online FILE")
    if place.is_set_up() and not replace:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{place.path} is set up already",
            hint="`sluice trust rotate` replaces keys; --replace begins anew where root keys are lost",
            obj=str(place.path),
        )
    names = (root_keys or ("root",), targets_keys or ("targets",))
    with session.client() as client:
        if not offline and client.get_trust().root_version and not replace:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                "this control plane has a root already",
                hint="use the directory of whoever set it up; --replace begins anew where root keys are lost",
            )
        if online is not None:
            with os_errors("reading", online):
                third = parse_key_file(online.read_bytes(), roles.ONLINE).public
        else:
            third = parse_public_key(client.get_trust().online_key)
        who, what = (tuple(obtain_key(place, name, phrases).public for name in wanted) for wanted in names)
        planned, signed = Signing(place, None if offline else client, phrases).set_up(
            roles.RoleKeys(who, root_threshold),
            roles.RoleKeys(what, targets_threshold),
            third,
            replace_root=replace,
        )
    published = not offline and all(item.complete for item in signed)
    show(session, planned, signed, published=published, directory=place)
    if not session.json:
        session.write(_next_steps(place))


def _next_steps(place: TrustDirectory) -> str:
    return (
        f"keys: {place.path / 'keys'} - back them up, root keys away from this machine\n"
        f"devices: put {place.root_path} on each as the file that trust.root of agent.toml names\n"
        "versions: sluice model push signs them from now on\n"
    )


@trust.command(
    "join",
    short_help="Trust a root that another operator made.",
    examples=[("With the root that the first operator handed over.", "sluice trust join root.json")],
)
@click.argument("root", type=_FILE)
@directory_option
@click.pass_obj
def join(session: Session, root: Path, directory: Path | None) -> None:
    """Trust a root that another operator made, on this operator's machine.

    Take the file from somebody you know, not from the control plane: everything verified here hangs on it.
    """
    place = open_directory(directory)
    if place.is_set_up():
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{place.path} trusts a root already",
            hint="name another directory with --dir",
            obj=str(place.path),
        )
    with os_errors("reading", root):
        data = root.read_bytes()
    TrustClient(place.path / "published", data, lambda _role, _version: None)  # refuses what is none
    place.pin(data)
    with session.client() as client:
        Signing(place, client, _unasked).refresh()
    version = place.current_root().version
    session.result(
        {"trust": {"root_version": version}},
        line(f"{place.path} trusts this fleet's root, now at version {version}"),
        line("next: sluice trust verify"),
    )


@trust.command(
    "verify",
    short_help="Explain the chain to each version, and its faults.",
    examples=[("What is published.", "sluice trust verify")],
)
@directory_option
@offline_option
@click.pass_obj
def verify(session: Session, directory: Path | None, offline: bool) -> None:
    """Explain the chain from the pinned root to each version, and every fault in it."""
    place = open_directory(directory)
    if not place.is_set_up():
        place.client(lambda _role, _version: None)  # raises, and says what to do
    fault: SluiceError | None = None
    if offline:
        others = {role: data for role in (TIMESTAMP, SNAPSHOT) if (data := place.published_bytes(role))}
        findings = explain(place.roots(), {**others, **_targets(place.published_bytes)}, datetime.now(UTC))
    else:
        with session.client() as client:
            try:
                Signing(place, client, _unasked).refresh()
            except SluiceError as error:
                fault = error
            names = (TIMESTAMP, SNAPSHOT)
            found = {role: data for role in names if (data := client.get_metadata(role))}
            findings = explain(place.roots(), {**found, **_targets(client.get_metadata)}, datetime.now(UTC))
    faults = [item for item in findings if not item.sound]
    lines = [line(_sentence(item), "" if item.sound else "bold") for item in findings]
    if fault is not None:
        lines.append(line(f"a device would refuse this: {fault}", "bold"))
    sound = not faults and fault is None
    lines.append(line("the chain is sound" if sound else f"{len(faults)} faults"))
    session.result(
        {
            "trust": {
                "sound": sound,
                "findings": [
                    {"role": item.role, "version": item.version, "sound": item.sound, "what": item.text}
                    for item in findings
                ],
                "refusal": fault.as_dict() if fault is not None else None,
            }
        },
        *lines,
    )
    if not sound:
        raise click.exceptions.Exit(fault.exit_code if fault is not None else 1)


def _unasked(name: str) -> str:
    raise AssertionError(f"verifying opens no key, {name} neither")


def _targets(get: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """Targets and delegated roles, from a function by role."""
    top = get(TARGETS)
    if not top:
        return {}
    try:
        names = list(roles.delegated(read_targets(TARGETS, top).signed))
    except SluiceError:
        names = []  # `explain` names the fault
    return {TARGETS: top, **{name: data for name in names if (data := get(name))}}


def _sentence(item: Finding) -> str:
    version = f" {item.version}" if item.version else ""
    return f"{'ok   ' if item.sound else 'FAULT'}  {item.role}{version}: {item.text}"


@trust.command(
    "sign",
    short_help="Sign metadata that another operator prepared.",
    examples=[("A root that another operator prepared.", "sluice trust sign root.json")],
)
@click.argument("file", type=_FILE)
@click.option("--yes", is_flag=True, help="Do not ask.")
@directory_option
@passphrase_option
@click.pass_obj
def sign(
    session: Session, file: Path, yes: bool, directory: Path | None, passphrase_file: Path | None
) -> None:
    """Add this operator's signatures to metadata that another prepared.

    FILE is named after its role. What it changes is shown first; the file is written with the signatures, to
    be sent back or on. For a role that was delegated just now, put the targets.json that does so beside it.
    """
    place = open_directory(directory)
    role = file.stem
    beside = file.with_name(f"{TARGETS}.json")
    if role not in (ROOT, TARGETS) and beside != place.pending_path(TARGETS) and beside.is_file():
        with os_errors("reading", beside):
            delegating = read(TARGETS, beside.read_bytes())
        if place.published_bytes(TARGETS) != write(delegating):
            for text in roles.describe(place.published(TARGETS), delegating):
                session.note(f"{TARGETS}: {text}")
            place.take(TARGETS, delegating)
    with os_errors("reading", file):
        document = read(role, file.read_bytes())
    before = place.published(role)
    for text in roles.describe(before, document):
        session.note(f"{role}: {text}")
    if not yes:
        click.confirm("sign this?", abort=True, err=True)
    state = place.sign(role, document, Passphrases(passphrase_file))
    with os_errors("reading", place.pending_path(role)):
        data = place.pending_path(role).read_bytes()
    if file.resolve() != place.pending_path(role).resolve():
        write_atomic(file, data)
    session.result(
        {"trust": {"signed": [signed_document(state)], "file": str(file)}},
        line(signed_text(state)),
        line(
            "next: sluice trust publish" if state.complete else f"next: pass {file} on to the other signers"
        ),
    )


@trust.command(
    "publish",
    short_help="Send everything that is signed and not published.",
    examples=[("After signing.", "sluice trust publish")],
)
@click.option("--replace", is_flag=True, help="The first root begins a new chain, see init.")
@directory_option
@click.pass_obj
def publish(session: Session, replace: bool, directory: Path | None) -> None:
    """Send everything that is complete and newer than what is published.

    Also brings a control plane that was restored from a backup what it lacks.
    """
    place = open_directory(directory)
    with session.client() as client:
        waiting = Signing(place, client, _unasked).publish(replace_root=replace)
        version = client.get_trust().root_version
    lines = [line(f"{signed_text(item)}; not published") for item in waiting]
    session.result(
        {"trust": {"root_version": version, "waiting": [signed_document(item) for item in waiting]}},
        *lines,
        line(f"published; the newest root is version {version}"),
    )


@trust.command(
    "root", examples=[("For the image of new devices.", "sluice trust root -o /etc/sluice/root.json")]
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@directory_option
@click.pass_obj
def root_(session: Session, output: Path, directory: Path | None) -> None:
    """Write the newest root, to be pinned on devices."""
    place = open_directory(directory)
    known = place.roots()
    if not known:
        place.client(lambda _role, _version: None)  # raises, and says what to do
    write_atomic(output, known[-1])
    root = place.current_root()
    keys = ", ".join(fingerprint(root.keys[keyid]) for keyid in root.roles[ROOT].keyids)
    session.result(
        {"trust": {"root_version": root.version, "file": str(output)}},
        line(f"wrote root version {root.version} to {output}; its keys: {keys}"),
    )


trust.add_command(key)
for verb in CHANGES:
    trust.add_command(verb)
