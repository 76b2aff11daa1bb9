"""`sluice operator`: role, roles."""

from __future__ import annotations

import click

from fleet.cli.command import Group
from fleet.cli.roles import role, roles


@click.group("operator", cls=Group)
def operator() -> None:
    """Say which operator may do what."""


for verb in (role, roles):
    operator.add_command(verb)
