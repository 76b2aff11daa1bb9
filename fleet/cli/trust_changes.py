"""`sluice trust …`: the verbs that change who may sign, what, and how many must. Each has --dry-run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from securesystemslib.signer import Key
from tuf.api.metadata import Metadata

from fleet.cli.arguments import NAME, REF, VERSION, Ref
from fleet.cli.command import Command
from fleet.cli.passphrase import Passphrases
from fleet.cli.session import Session
from fleet.cli.trust_options import change, change_options, find_keyid, obtain_key, open_directory
from fleet.signing import Change
from fleet.trust_directory import TrustDirectory
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.trust import roles
from updater.trust.documents import ROOT, TARGETS
from updater.trust.keys import parse_public_key

_ROLE = "ROLE"
_DAYS = click.option("--days", type=click.FloatRange(1, 3650), help="How long it counts. Default 365.")


def _keys_change(
    role: str, *, add: Sequence[Key] = (), remove: Sequence[str] = (), threshold: int | None = None
) -> Mapping[str, Change]:
    """The change of one role's keys, in the document that names them."""
    top = role in (ROOT, TARGETS, roles.ONLINE)

    def apply(document: Metadata[Any], expires: datetime) -> Metadata[Any]:
        make = roles.change_root if top else roles.change_delegated
        return make(document, role, expires, add=add, remove=remove, threshold=threshold)

    return {ROOT if top else TARGETS: apply}


@click.command(
    "add-key",
    cls=Command,
    short_help="Let one more key sign for a role.",
    examples=[("A second signer for the root.", "sluice trust add-key root root-ada --threshold 2")],
)
@click.argument("role", metavar=_ROLE)
@click.argument("key", type=NAME)
@click.option("--threshold", type=click.IntRange(min=1), help="How many must sign from now on.")
@change_options
@click.pass_obj
def add_key(
    session: Session,
    role: str,
    key: str,
    threshold: int | None,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Let a key sign for a role: root, targets or a delegated one. A key that is not there is made."""
    place, phrases = open_directory(directory), Passphrases(passphrase_file)

    def make() -> Mapping[str, Change]:
        _no_surprise(place, key, dry_run)
        added = obtain_key(place, key, phrases).public
        return _keys_change(role, add=[added], threshold=threshold)

    change(session, place, phrases, make, offline=offline, dry_run=dry_run)


@click.command(
    "rotate",
    cls=Command,
    short_help="Replace a role's key by a new one.",
    examples=[
        ("Replace the root key by a new one.", "sluice trust rotate root root root-2027"),
        ("Take up the control plane's present key.", "sluice trust rotate online"),
    ],
)
@click.argument("role", metavar=_ROLE)
@click.argument("old", required=False)
@click.argument("new", type=NAME, required=False)
@change_options
@click.pass_obj
def rotate(
    session: Session,
    role: str,
    old: str | None,
    new: str | None,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Replace the key OLD of a role by NEW, which is made when it is not there.

    Devices follow by themselves, however long they were away. For the role online, NEW is the key that the
    control plane has now, and OLD every other.
    """
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    if role == roles.ONLINE and (old or new or offline):
        raise click.UsageError("sluice trust rotate online asks the control plane: leave the rest out")
    if role != roles.ONLINE and (not old or not new):
        raise click.UsageError("give the OLD key and the NEW one")

    def make() -> Mapping[str, Change]:
        if role == roles.ONLINE:
            with session.client() as client:
                return _online_change(place, parse_public_key(client.get_trust().online_key))
        assert old
        assert new
        _no_surprise(place, new, dry_run)
        gone = find_keyid(place, old)
        return _keys_change(role, add=[obtain_key(place, new, phrases).public], remove=[gone])

    change(session, place, phrases, make, offline=offline, dry_run=dry_run)


def _online_change(place: TrustDirectory, key: Key) -> Mapping[str, Change]:
    named = place.current_root().roles["timestamp"].keyids
    others = [keyid for keyid in named if keyid != key.keyid]
    return _keys_change(roles.ONLINE, add=[key], remove=others)


@click.command(
    "revoke",
    cls=Command,
    examples=[("A laptop with a key was stolen.", "sluice trust revoke targets-bob")],
)
@click.argument("key")
@change_options
@click.pass_obj
def revoke(
    session: Session,
    key: str,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Take a key out of every role. KEY is a name here, or the beginning of its id.

    What only this key signed is signed anew with the others. A role that would have too few keys left needs
    another first: `sluice trust rotate`.
    """
    place, phrases = open_directory(directory), Passphrases(passphrase_file)

    def make() -> Mapping[str, Change]:
        keyid = find_keyid(place, key)
        changes: dict[str, Change] = {}
        top = roles.roles_of(place.current_root(), keyid)
        if top:

            def from_root(document: Metadata[Any], expires: datetime) -> Metadata[Any]:
                for role in top:
                    document = roles.change_root(document, role, expires, remove=[keyid])
                return document

            changes[ROOT] = from_root
        held = roles.delegated(place.current_targets().signed).values()
        if any(keyid in role.keyids for role in held):
            changes[TARGETS] = lambda document, expires: roles.drop_delegated_key(document, keyid, expires)
        if not changes:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID, f"the key {key} signs for no role", hint="", obj=key
            )
        return changes

    change(session, place, phrases, make, offline=offline, dry_run=dry_run)


@click.command(
    "threshold", cls=Command, examples=[("Two people must sign.", "sluice trust threshold targets 2")]
)
@click.argument("role", metavar=_ROLE)
@click.argument("number", type=click.IntRange(min=1))
@change_options
@click.pass_obj
def threshold(
    session: Session,
    role: str,
    number: int,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Say how many of a role's keys must sign."""
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    change(
        session,
        place,
        phrases,
        lambda: _keys_change(role, threshold=number),
        offline=offline,
        dry_run=dry_run,
    )


@click.command(
    "delegate",
    cls=Command,
    examples=[
        (
            "A team signs its own models.",
            "sluice trust delegate vision --model detector --key vision-key",
        )
    ],
)
@click.argument("role", type=NAME)
@click.option("--model", "models", multiple=True, required=True, help="Model or pattern; may be repeated.")
@click.option("--key", "keys", type=NAME, multiple=True, required=True, help="Made when absent; repeatable.")
@click.option("--threshold", type=click.IntRange(min=1), default=1, show_default=True)
@change_options
@click.pass_obj
def delegate(
    session: Session,
    role: str,
    models: tuple[str, ...],
    keys: tuple[str, ...],
    threshold: int,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Leave some models to a role with keys of its own.

    It may sign versions of these models and nothing else. A role of this name that is there already is
    changed to this.
    """
    place, phrases = open_directory(directory), Passphrases(passphrase_file)

    def make() -> Mapping[str, Change]:
        for key in keys:
            _no_surprise(place, key, dry_run)
        who = roles.RoleKeys(tuple(obtain_key(place, key, phrases).public for key in keys), threshold)
        return {TARGETS: lambda document, expires: roles.delegate(document, role, who, models, expires)}

    change(session, place, phrases, make, offline=offline, dry_run=dry_run)


@click.command(
    "undelegate", cls=Command, examples=[("Take its models back.", "sluice trust undelegate vision")]
)
@click.argument("role", type=NAME)
@change_options
@click.pass_obj
def undelegate(
    session: Session,
    role: str,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Take a role's models back. Versions that it signed are accepted no more; boxes that run one keep it."""
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    changes: Mapping[str, Change] = {
        TARGETS: lambda document, expires: roles.undelegate(document, role, expires)
    }
    change(session, place, phrases, lambda: changes, offline=offline, dry_run=dry_run)


@click.command("renew", cls=Command, examples=[("Before dates run out.", "sluice trust renew root targets")])
@click.argument("role", nargs=-1, required=True)
@_DAYS
@change_options
@click.pass_obj
def renew(
    session: Session,
    role: tuple[str, ...],
    days: float | None,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Sign root, targets or delegated roles anew with a later date."""
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    changes: dict[str, Change] = dict.fromkeys(role, roles.renew)
    change(
        session, place, phrases, lambda: changes, offline=offline, dry_run=dry_run, days=days, expired=True
    )


@click.command(
    "allow",
    cls=Command,
    short_help="Let devices go down below their floor.",
    examples=[
        (
            "Version 9 is bad, its floor is 8: let boxes go down to 5.",
            "sluice trust allow detector@5 --from 9",
        )
    ],
)
@click.argument("ref", type=REF, metavar="NAME@V")
@click.option(
    "--from", "origin", type=VERSION, required=True, help="The highest version that devices may come from."
)
@change_options
@click.pass_obj
def allow(
    session: Session,
    ref: Ref,
    origin: int,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Let devices go down to a version below the floor of the one they run."""
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    number = _numbered(ref, "allow")
    change(
        session,
        place,
        phrases,
        lambda: {
            roles.role_for(place.current_targets().signed, ref.model): lambda document, expires: roles.allow(
                document, ref.model, number, origin, expires
            )
        },
        offline=offline,
        dry_run=dry_run,
    )


@click.command(
    "withdraw",
    cls=Command,
    examples=[("No device shall take up version 4.", "sluice trust withdraw detector@4")],
)
@click.argument("ref", type=REF, metavar="NAME@V")
@change_options
@click.pass_obj
def withdraw(
    session: Session,
    ref: Ref,
    directory: Path | None,
    passphrase_file: Path | None,
    offline: bool,
    dry_run: bool,
) -> None:
    """Take a version's signature back. Boxes that run it keep it; none takes it up any more."""
    place, phrases = open_directory(directory), Passphrases(passphrase_file)
    number = _numbered(ref, "withdraw")
    change(
        session,
        place,
        phrases,
        lambda: {
            roles.role_for(place.current_targets().signed, ref.model): lambda document, expires: (
                roles.drop_version(document, ref.model, number, expires)
            )
        },
        offline=offline,
        dry_run=dry_run,
    )


def _numbered(ref: Ref, verb: str) -> int:
    if not ref.version:
        raise click.UsageError(f"say which version: sluice trust {verb} {ref.model}@V")
    return ref.version


def _no_surprise(place: TrustDirectory, key: str, dry_run: bool) -> None:
    """A dry run makes no key: it says that one is missing."""
    if dry_run and not place.has_key(key):
        raise SluiceError(
            errors_pb2.KEY_UNAVAILABLE,
            f"there is no key {key} yet; without --dry-run it would be made",
            hint=f"make it first: sluice trust key new {key}",
            obj=key,
        )


CHANGES = (add_key, rotate, revoke, threshold, delegate, undelegate, renew, allow, withdraw)
