"""What every `sluice trust` command takes; how a change is shown, signed and published."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.text import Text

from fleet.cli.passphrase import Passphrases
from fleet.cli.session import Session, line
from fleet.client import ControlClient
from fleet.signing import Change, Planned, Signing
from fleet.trust_directory import Signed, TrustDirectory
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.trust.documents import ROOT, TARGETS
from updater.trust.keys import KeyFile, new_key

_Command = TypeVar("_Command", bound=Callable[..., Any])
VARIABLE = "SLUICE_TRUST"


def default_directory() -> Path:
    """Where an operator's keys and metadata lie unless told otherwise."""
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "sluice" / "trust"


def directory_option(command: _Command) -> _Command:
    """--dir."""
    option = click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        envvar=VARIABLE,
        help=f"Keys and signed metadata. Default ~/.config/sluice/trust; environment {VARIABLE}.",
    )
    return option(command)


def trust_option(command: _Command) -> _Command:
    """--trust, where --dir would not be understood."""
    option = click.option(
        "--trust",
        "trust_directory",
        type=click.Path(path_type=Path, file_okay=False),
        envvar=VARIABLE,
        help=f"Keys that sign, see `sluice trust`. Default ~/.config/sluice/trust; environment {VARIABLE}.",
    )
    return option(command)


def passphrase_option(command: _Command) -> _Command:
    """--passphrase-file."""
    option = click.option(
        "--passphrase-file",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Its first line opens the keys. Default: SLUICE_PASSPHRASE_FILE, SLUICE_PASSPHRASE, or asked.",
    )
    return option(command)


def offline_option(command: _Command) -> _Command:
    """--offline."""
    option = click.option(
        "--offline", is_flag=True, help="Stay on this machine; `sluice trust publish` sends it later."
    )
    return option(command)


def change_options(command: _Command) -> _Command:
    """Those of every command that changes signed metadata."""
    dry_run = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
    return directory_option(passphrase_option(offline_option(dry_run(command))))


def open_directory(path: Path | None) -> TrustDirectory:
    """The trust directory that is meant."""
    return TrustDirectory(path or default_directory())


def signing_for(client: ControlClient, path: Path | None, passphrase_file: Path | None) -> Signing | None:
    """Who signs versions for this control plane; None where trust is not set up there.

    Raises SluiceError(KEY_UNAVAILABLE) when it is, and there are no keys here.
    """
    if not client.get_trust().root_version:
        return None
    directory = open_directory(path)
    if not directory.is_set_up():
        raise SluiceError(
            errors_pb2.KEY_UNAVAILABLE,
            f"this control plane takes only signed versions, and {directory.path} is no trust directory",
            hint="name it with --trust or SLUICE_TRUST, or get the root and `sluice trust join`",
            obj=str(directory.path),
        )
    return Signing(directory, client, Passphrases(passphrase_file))


def obtain_key(directory: TrustDirectory, name: str, passphrases: Passphrases) -> KeyFile:
    """The key of this name, made when there is none."""
    if directory.has_key(name):
        return directory.key(name)
    key = new_key(name, passphrases.new(name))
    directory.add_key(key)
    return key


def find_keyid(directory: TrustDirectory, text: str) -> str:
    """The id of a key given by its name here, or by the beginning of its id (8 digits or more).

    Raises SluiceError(KEY_UNAVAILABLE).
    """
    keys = directory.keys()
    known = {key.name: key.public.keyid for key in keys}
    if text in known:
        return known[text]
    root, targets = directory.current_root(), directory.current_targets().signed
    ids = {*root.keys, *(targets.delegations.keys if targets.delegations is not None else ())}
    found = sorted(keyid for keyid in ids if len(text) >= 8 and keyid.startswith(text))
    if len(found) == 1:
        return str(found[0])
    raise SluiceError(
        errors_pb2.KEY_UNAVAILABLE,
        f"{text[:80]!r} is the name of no key here, and {len(found)} keys in use begin so",
        hint="`sluice trust verify` shows the keys in use, `sluice trust key list` those here",
        obj=text[:80],
    )


def change(
    session: Session,
    directory: TrustDirectory,
    passphrases: Passphrases,
    make: Callable[[], Mapping[str, Change]],
    *,
    offline: bool,
    dry_run: bool,
    days: float | None = None,
    expired: bool = False,
) -> None:
    """Fetches what is published, shows the change, signs it and publishes what is complete.

    With `expired` what is published may have run out.
    """
    with nullcontext() if offline else session.client() as client:
        signing = Signing(directory, client, passphrases)
        signing.refresh(expired=expired)
        planned = signing.plan(make(), days)
        if dry_run:
            show(session, planned, [], published=False, dry_run=True)
            return
        signed = signing.apply(planned)
        waiting = [item for item in signed if not item.complete]
        if client is not None and len(waiting) < len(signed):
            waiting = signing.publish()
    show(session, planned, signed, published=not offline and not waiting, directory=directory)


def show(
    session: Session,
    planned: Sequence[Planned],
    signed: Sequence[Signed],
    *,
    published: bool,
    dry_run: bool = False,
    directory: TrustDirectory | None = None,
) -> None:
    """The outcome of a change."""
    document = {
        "trust": {
            "changes": [
                {"role": item.role, "version": item.after.signed.version, "what": item.lines}
                for item in planned
            ],
            "dry_run": dry_run,
            "published": published,
            "signed": [signed_document(item) for item in signed],
        }
    }
    lines: list[Text] = []
    for item in planned:
        lines.append(line(f"{item.role}:", "bold"))
        lines += [line(f"  {text}") for text in item.lines]
    if dry_run:
        lines.append(line("nothing was changed: this was a dry run"))
    for state in signed:
        lines.append(line(signed_text(state)))
        if not state.complete and directory is not None:
            path = directory.pending_path(state.role)
            beside = "" if state.role in (ROOT, TARGETS) else ", the targets.json there beside it"
            lines.append(
                line(f"  let the others run `sluice trust sign {path}`{beside}, then `sluice trust publish`")
            )
    if published:
        lines.append(line("published: devices see it with their next fetch"))
    elif not dry_run and all(state.complete for state in signed):
        lines.append(line("next: sluice trust publish"))
    session.result(document, *lines)


def signed_document(state: Signed) -> dict[str, Any]:
    """The JSON form of how far a document is."""
    return {
        "role": state.role,
        "version": state.version,
        "complete": state.complete,
        "signed_by": list(state.by),
        "missing": {item.role: item.missing for item in state.needed if item.missing},
    }


def signed_text(state: Signed) -> str:
    """The same in a line."""
    by = f"signed with {', '.join(state.by)}" if state.by else "signed by no key here"
    missing = ", ".join(f"{item.missing} more of {item.role}'s keys" for item in state.needed if item.missing)
    return f"{state.role} version {state.version}: {by}" + (f"; lacks {missing}" if missing else "")
