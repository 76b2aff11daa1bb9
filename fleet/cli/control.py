"""`sluice control`: the control plane itself."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from fleet.cli.command import Group
from fleet.cli.session import Session
from fleet.client import DEFAULT_ADDRESS
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


def default_data() -> Path:
    """Where the control plane keeps its state: the system's directory for root, else the user's."""
    if os.geteuid() == 0:
        return Path("/var/lib/sluice-control")
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "sluice-control"


DATA = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="SLUICE_DATA",
    help="Directory for the database, files and deltas; made when absent. Default "
    "/var/lib/sluice-control for root, else ~/.local/share/sluice-control.",
)


@click.group("control", cls=Group)
def control() -> None:
    """Set the control plane up and run it."""


@control.command(
    "serve",
    examples=[
        ("For this machine only, state in the default directory.", "sluice control serve"),
        (
            "For devices on the network.",
            "sluice control serve --data /srv/sluice --listen 0.0.0.0:8470",
        ),
    ],
)
@DATA
@click.option(
    "--listen",
    metavar="ADDR",
    default=DEFAULT_ADDRESS,
    show_default=True,
    envvar="SLUICE_LISTEN",
    help="Address to serve on, host:port; port 0 takes a free one.",
)
@click.option(
    "--enrol-listen",
    metavar="ADDR",
    default="",
    envvar="SLUICE_ENROL_LISTEN",
    help="Address where certificates are given, host:port. Default: the port after --listen's.",
)
@click.pass_obj
def serve(session: Session, data: Path | None, listen: str, enrol_listen: str) -> None:
    """Run the control plane until SIGTERM or Ctrl-C.

    One process with everything: registry, deltas, rollouts, devices. Its log goes to stderr; the address it
    serves on is written to DIR/address. Every caller must show a certificate; those who have none yet get one
    at the enrolment address. Run `sluice control init` once before.
    """
    try:
        from fleet.config import ControlConfig
        from fleet.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("fleet", "updater", "sluice"):
            raise
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"the control plane needs the package {error.name}, which is missing",
            hint="pip install 'sluice[control]'",
        ) from error
    config = ControlConfig(data=data or default_data(), listen=listen, enrol_listen=enrol_listen)
    if not session.json:
        run(config)
        return
    with contextlib.redirect_stdout(sys.stderr):  # its "listening on …" is for people
        run(config)
    session.result({"control": {"data": str(config.data), "listen": config.listen}})
