"""`sluice rollout`: start, watch, abort, list, show."""

from __future__ import annotations

import click
from rich.console import RenderableType
from rich.text import Text

from fleet.cli import documents, tables
from fleet.cli.arguments import DURATION, NAME, PAIR, REF, Ref, unique
from fleet.cli.command import Group
from fleet.cli.live import live_view, rollout_parts
from fleet.cli.session import Session, interruptible, line
from fleet.client import ControlClient
from sluice.api.v1 import devices_pb2, errors_pb2, rollouts_pb2
from updater.errors import EXIT_OF_STATUS, STATUS_OF_REASON, SluiceError

# A rollout that did not succeed ends `watch` as a model that boxes refused does.
EXIT_NOT_SUCCEEDED = EXIT_OF_STATUS[STATUS_OF_REASON[errors_pb2.MODEL_LOAD_FAILED]]
MAX_WHY_CHARACTERS = 500


@click.group("rollout", cls=Group)
def rollout() -> None:
    """Bring a version to devices and follow it."""


@rollout.command(
    "start",
    examples=[
        ("The latest version to every device; stay until it ends.", "sluice rollout start detector --watch"),
        ("Version 3 to the canaries first.", "sluice rollout start detector@3 --label ring=canary"),
        (
            "Two devices, half an hour, no failure allowed.",
            "sluice rollout start detector --device pi-1 --device pi-2 --deadline 30m",
        ),
    ],
)
@click.argument("ref", type=REF, metavar=REF.name)
@click.option("--device", "devices", multiple=True, metavar="ID", help="Only this device; may be repeated.")
@click.option("--label", type=PAIR, multiple=True, help="Only devices with this label; may be repeated.")
@click.option(
    "--deadline",
    type=DURATION,
    default="1h",
    show_default=True,
    help="A device silent or unfinished for longer has failed; the soak, a minute by default, counts too.",
)
@click.option(
    "--max-failed",
    type=click.IntRange(0, 100),
    default=0,
    show_default=True,
    metavar="PERCENT",
    help="More failed devices than this fail the rollout.",
)
@click.option("--watch", "stay", is_flag=True, help="Follow it until it ends, as `rollout watch` does.")
@click.pass_obj
def start(
    session: Session,
    ref: Ref,
    devices: tuple[str, ...],
    label: tuple[tuple[str, str], ...],
    deadline: int,
    max_failed: int,
    stay: bool,
) -> None:
    """Bring a version to devices: all accepted ones, or those chosen.

    Without a version it is the latest. Devices fetch only what changed, check it, switch, and go back by
    themselves when the new version fails. Several --label must all match.
    """
    selector = devices_pb2.Selector(device_ids=devices, labels=unique(label, "--label"))
    phase = rollouts_pb2.Phase(selector=selector, deadline_s=deadline, max_failed_percent=max_failed)
    with session.client() as client:
        version = ref.get(client).version if ref.alias else ref.version
        begun = client.create_rollout(ref.model, version, [phase])
        if stay:
            session.note(f"rollout {begun.id} of {begun.model}@{begun.version} has begun")
            _follow(session, client, begun.id)
            return
    count = len(begun.devices)
    session.result(
        {"rollout": documents.rollout(begun)},
        line(f"rollout {begun.id}: {begun.model}@{begun.version} to {count} device{'s' * (count != 1)}"),
        line(f"next: sluice rollout watch {begun.id}"),
    )


@rollout.command("watch", examples=[("Follow a rollout until it ends.", "sluice rollout watch 7f3a")])
@click.argument("rollout_id", metavar="ID")
@click.pass_obj
def watch(session: Session, rollout_id: str) -> None:
    """Follow a rollout until it ends.

    On a terminal the table is live; elsewhere each change is a line on stderr. Ends with 0 when the rollout
    succeeded and with 9 when it failed or was aborted. Ctrl-C stops watching, not the rollout.
    """
    with session.client() as client:
        _follow(session, client, rollout_id)


def _follow(session: Session, client: ControlClient, rollout_id: str) -> None:
    advice = f"the rollout goes on; watch it again: sluice rollout watch {rollout_id}"
    last: rollouts_pb2.Rollout | None = None
    with interruptible(advice), live_view() as view:
        for last in client.watch_rollout(rollout_id):
            view(last)
    if last is None:
        raise SluiceError(errors_pb2.INTERNAL, f"the watch of rollout {rollout_id} ended without a state")
    session.result({"rollout": documents.rollout(last)}, *rollout_parts(last))
    if last.state != rollouts_pb2.ROLLOUT_STATE_SUCCEEDED:
        raise click.exceptions.Exit(EXIT_NOT_SUCCEEDED)


@rollout.command(
    "abort",
    examples=[
        ("Stop here; devices that moved stay.", "sluice rollout abort 7f3a"),
        ("Stop, and send the moved devices back.", 'sluice rollout abort 7f3a --revert --why "too slow"'),
    ],
)
@click.argument("rollout_id", metavar="ID")
@click.option("--revert", is_flag=True, help="Send devices it moved back to the version they had.")
@click.option("--why", default="", metavar="TEXT", help="Kept in the verdict.")
@click.pass_obj
def abort(session: Session, rollout_id: str, revert: bool, why: str) -> None:
    """End a running rollout."""
    if len(why) > MAX_WHY_CHARACTERS:
        raise click.UsageError(f"--why has {len(why)} characters; at most {MAX_WHY_CHARACTERS} are kept")
    with session.client() as client:
        ended = client.abort_rollout(rollout_id, revert=revert, why=why)
    back = "devices that it moved are sent back" if revert else "devices that it moved keep the version"
    session.result({"rollout": documents.rollout(ended)}, line(f"rollout {ended.id} is aborted; {back}"))


@rollout.command(
    "list",
    examples=[
        ("All rollouts, newest first.", "sluice rollout list"),
        ("Those of one model.", "sluice rollout list --model detector"),
    ],
)
@click.option("--model", type=NAME, help="Only rollouts of this model.")
@click.pass_obj
def list_(session: Session, model: str | None) -> None:
    """List rollouts, newest first."""
    with session.client() as client:
        found = list(client.list_rollouts(model or ""))
    rows = [
        (
            entry.id,
            f"{entry.model}@{entry.version}",
            documents.rollout_state(entry.state),
            tables.age(entry.create_time),
            entry.verdict,
        )
        for entry in found
    ]
    shown: RenderableType = tables.Rows(("ROLLOUT", "VERSION*", "STATE", "BEGUN", "VERDICT*"), rows)
    if not found:
        shown = line("no rollouts yet; start one: sluice rollout start NAME --watch")
    session.result({"rollouts": [documents.rollout(entry, devices=False) for entry in found]}, shown)


@rollout.command(
    "show", examples=[("Which devices are done, and why others failed.", "sluice rollout show 7f3a")]
)
@click.argument("rollout_id", metavar="ID")
@click.pass_obj
def show(session: Session, rollout_id: str) -> None:
    """Show a rollout with all its devices."""
    with session.client() as client:
        found = client.get_rollout(rollout_id)
    phase = found.phases[0] if found.phases else rollouts_pb2.Phase()
    head = tables.details(
        (
            ("begun", f"{documents.time_text(found.create_time)} ({tables.age(found.create_time)})"),
            ("ended", documents.time_text(found.end_time) or ""),
            ("devices", ", ".join(phase.selector.device_ids) or tables.pairs(phase.selector.labels) or "all"),
            ("deadline", tables.duration(phase.deadline_s) if phase.deadline_s else ""),
            ("max failed", f"{phase.max_failed_percent} %"),
        )
    )
    session.result({"rollout": documents.rollout(found)}, head, Text(), *rollout_parts(found))
