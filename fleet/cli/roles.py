"""`sluice operator role` and `roles`: who among the operators may do what."""

from __future__ import annotations

import click

from fleet import client_access
from fleet.cli import documents, tables
from fleet.cli.command import Command
from fleet.cli.session import Session, line
from sluice.api.v1 import access_pb2
from updater.identity import Role


@click.command(
    "role",
    cls=Command,
    examples=[
        ("Let somebody look.", "sluice operator role ann viewer"),
        ("Take the entry away: what the certificate says counts again.", "sluice operator role ann --remove"),
    ],
)
@click.argument("name", metavar="NAME")
@click.argument("wanted", metavar="ROLE", type=click.Choice([role.value for role in Role]), required=False)
@click.option("--remove", is_flag=True, help="Remove the entry.")
@click.pass_obj
def role(session: Session, name: str, wanted: str | None, remove: bool) -> None:
    """Give an operator a role: viewer, publisher, operator or admin.

    Each may do what those before it may. Where the certificate names a role too, the lower one counts. It
    takes effect with the operator's next call.
    """
    if (wanted is None) is not remove:
        raise click.UsageError("give either a role or --remove")
    with session.client() as client:
        client_access.set_role(client, name, Role(wanted) if wanted is not None else None)
    text = f"{name} has no entry any more" if wanted is None else f"{name}: {wanted}"
    session.result({"operator": {"name": name, "role": wanted}}, line(text))


@click.command("roles", cls=Command, examples=[("Everybody with an entry.", "sluice operator roles")])
@click.pass_obj
def roles(session: Session) -> None:
    """List the operators that were given a role."""
    with session.client() as client:
        found = client_access.list_roles(client)
    entries = [
        {
            "name": entry.name,
            "role": access_pb2.Role.Name(entry.role).removeprefix("ROLE_").lower(),
            "change_time": documents.time_text(entry.change_time),
        }
        for entry in found
    ]
    rows = [
        (str(entry["name"]), str(entry["role"]), tables.age(row.change_time))
        for entry, row in zip(entries, found, strict=True)
    ]
    shown = tables.Rows(("OPERATOR*", "ROLE", "SET"), rows) if rows else line("no operator has an entry")
    session.result({"operators": entries}, shown)
