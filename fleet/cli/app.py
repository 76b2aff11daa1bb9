"""The tree of commands: `sluice` and its nouns."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from fleet.cli import control_ca, control_init  # noqa: F401 - they add their verbs
from fleet.cli.approximate import approximate
from fleet.cli.audit import audit
from fleet.cli.command import Root
from fleet.cli.control import control
from fleet.cli.delta import delta
from fleet.cli.device import device
from fleet.cli.model import model
from fleet.cli.operator import operator
from fleet.cli.rollout import rollout
from fleet.cli.trust import trust


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        try:
            found = version("sluice")
        except PackageNotFoundError:
            found = "(not installed)"
        click.echo(f"sluice {found}, Python {platform.python_version()}")
        ctx.exit()


@click.group(
    "sluice",
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    examples=[
        (
            "Set a control plane up on this machine, and start it.",
            "sluice control init\nsluice control serve",
        ),
        (
            "Publish a model file, then bring it to every device and watch.",
            "sluice model push detector.onnx --name detector\nsluice rollout start detector --watch",
        ),
        ("See what a delta would cost; no server needed.", "sluice delta describe old.onnx new.onnx"),
    ],
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
)
def cli() -> None:
    """Ship model updates to edge boxes as bit-exact deltas.

    A model has versions; a rollout brings one to devices; each device gets only what changed. Every command
    talks to the control plane, except `delta`, which works on local files. Exit codes and JSON are in
    docs/cli.md.
    """


delta.add_command(approximate)
for noun in (control, model, delta, rollout, device, operator, audit, trust):
    cli.add_command(noun)
