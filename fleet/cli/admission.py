"""Verbs that devices and operators share: pending, approve, reject, revoke; and what makes tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import click
from rich.console import RenderableType

from fleet.cli import documents, tables
from fleet.cli.arguments import DURATION
from fleet.cli.command import Group
from fleet.cli.session import Session, line
from fleet.limits import TOKEN_LIFE_S
from sluice.api.v1 import identity_pb2
from updater.identity import Role

ROLE = click.Choice([role.value for role in Role])
LIFE = click.option(
    "--for",
    "life",
    type=DURATION,
    default=TOKEN_LIFE_S,
    show_default="1h",
    help="How long it is good, e.g. 2d; at most 30d.",
)


def add_verbs(group: Group, kind: str) -> None:
    """Adds the verbs to the noun of this kind: "device" or "operator"."""
    _add_pending(group, kind)
    a_kind = "an operator" if kind == "operator" else f"a {kind}"

    @group.command(
        "approve",
        examples=[
            (
                "Let in who waits, by the fingerprint that they themselves show.",
                f"sluice {kind} approve NAME --fingerprint 1f0a-...",
            )
        ],
    )
    @click.argument("name", metavar="NAME")
    @click.option(
        "--fingerprint",
        required=True,
        help="Of the enrolment key, as they show it (`sluice-agent doctor`, `sluice operator enrol`).",
    )
    @click.pass_obj
    def approve(session: Session, name: str, fingerprint: str) -> None:
        """Accept who waits, or a new key in place of the old one.

        Certificates of the key before count no longer from then on.
        """
        with session.client() as client:
            found = client.identities.approve(kind, name, fingerprint)
        role = f" as {found.role}" if found.role else ""
        session.result({"identity": documents.identity(found)}, line(f"{name} is accepted{role}"))

    @group.command(
        "reject",
        examples=[("Refuse who waits, or the other key of a conflict.", f"sluice {kind} reject NAME")],
    )
    @click.argument("name", metavar="NAME")
    @click.pass_obj
    def reject(session: Session, name: str) -> None:
        """Refuse who waits. It may ask again only with a token made for its name."""
        with session.client() as client:
            found = client.identities.reject(kind, name)
        session.result({"identity": documents.identity(found)}, line(f"the request of {name} is rejected"))

    @group.command(
        "revoke",
        short_help=f"Put {a_kind} out, at once.",
        examples=[("Put one out, at once.", f"sluice {kind} revoke NAME")],
    )
    @click.argument("name", metavar="NAME")
    @click.pass_obj
    def revoke(session: Session, name: str) -> None:
        """Put out, at once.

        Certificates count no longer, open streams end now. What a box has installed it goes on serving; it
        gets nothing new. To let it in again, make a token for its name, or approve its fingerprint.
        """
        with session.client() as client:
            found = client.identities.revoke(kind, name)
        text = f"{name} is revoked"
        if not found.fingerprint:
            text += f"; no {kind} of this name has enrolled here: is it spelled right?"
        session.result({"identity": documents.identity(found)}, line(text))


def make_token(
    session: Session,
    kind: str,
    name: str,
    life_s: int,
    use: str,
    *,
    role: str = "",
    labels: Mapping[str, str] | None = None,
) -> None:
    """Makes a token and shows it with the command that uses it: `use`, with {token} in it."""
    with session.client() as client:
        made = client.identities.token(kind, name, role=role, life_s=life_s, labels=labels)
    until = documents.time_text(made.expire_time)
    session.result(
        {"token": made.token, "expire_time": until},
        line(made.token),
        line(f"good once, until {until}; use it with:"),
        line("  " + use.format(token=made.token)),
    )


def _add_pending(group: Group, kind: str) -> None:
    everything = kind == "operator"
    name = "list" if everything else "pending"

    def pending(session: Session) -> None:
        with session.client() as client:
            found = list(client.identities.list(kind, attention=not everything))
        rows = [
            (entry.name, *((entry.role,) if everything else ()), *key)
            for entry in found
            for key in _keys(entry)
        ]
        roles = ("ROLE",) if everything else ()  # devices have none
        # Fingerprints are compared by eye: they stay in one piece.
        shown: RenderableType = tables.Rows(
            (kind.upper() + "*", *roles, "STATE", "FINGERPRINT", "NOTE*"), rows
        )
        if not found:
            shown = line("nobody" if everything else "no device waits")
        session.result({"identities": [documents.identity(entry) for entry in found]}, shown)

    pending.__doc__ = (
        "List operators, and who waits."
        if everything
        else "List devices that wait for you.\n\nTo be approved, in conflict, or with something to look into."
    )
    group.command(
        name, examples=[("Who there is." if everything else "Who waits.", f"sluice {kind} {name}")]
    )(click.pass_obj(pending))


def _keys(entry: identity_pb2.Identity) -> Iterator[tuple[str, str, str]]:
    """State, fingerprint and note of the key that holds a name, and of another that asks for it."""
    waits = "waits for approval" if entry.state == identity_pb2.IDENTITY_STATE_PENDING else ""
    yield str(documents.identity(entry)["state"]), entry.fingerprint or "-", entry.notice or waits
    if entry.conflict_fingerprint:
        yield "asks", entry.conflict_fingerprint, "another key for this name"
