"""`sluice device`: list, show, label; token, pending, approve, reject, revoke are in admission.py."""

from __future__ import annotations

import click
from rich.console import RenderableType
from rich.text import Text

from fleet.cli import documents, tables
from fleet.cli.admission import LIFE, add_verbs, make_token
from fleet.cli.arguments import PAIR, unique
from fleet.cli.command import Group
from fleet.cli.session import Session, line
from sluice.api.v1 import devices_pb2, sync_pb2


@click.group("device", cls=Group)
def device() -> None:
    """Let devices in, look at them, label them, put them out."""


@device.command(
    "list",
    examples=[
        ("All devices.", "sluice device list"),
        ("Those at one site.", "sluice device list --label site=harbour"),
        ("Ids only, for a script.", "sluice device list --json | jq -r '.devices[].id'"),
    ],
)
@click.option("--label", type=PAIR, multiple=True, help="Only devices with this label; may be repeated.")
@click.pass_obj
def list_(session: Session, label: tuple[tuple[str, str], ...]) -> None:
    """List the devices, what they run and whether they are online."""
    wanted = unique(label, "--label")
    with session.client() as client:
        devices = list(client.list_devices(wanted))
    rows = [
        (
            found.id,
            _link(found),
            " ".join(_models(found)) or "-",
            tables.age(found.last_seen_time),
            tables.pairs(found.labels),
        )
        for found in devices
    ]
    shown: RenderableType = tables.Rows(("DEVICE*", "LINK", "MODELS*", "SEEN", "LABELS*"), rows)
    if not devices:
        shown = line(
            "no device has these labels"
            if wanted
            else "no devices yet; one joins when its agent connects: sluice-agent run --config agent.toml"
        )
    session.result({"devices": [documents.device(found) for found in devices]}, shown)


def _link(found: devices_pb2.Device) -> str:
    """Whether it is there; one that was put out says so instead."""
    if found.state == devices_pb2.DEVICE_STATE_REVOKED:
        return documents.device_state(found.state)
    return "online" if found.online else "offline"


def _models(found: devices_pb2.Device) -> list[str]:
    """What a device runs, each with its drift: "m@2", "m@1>2 fetching", "m@1 (pinned, wants 3)"."""
    wanted = {entry.model: entry.version for entry in found.desired.models}
    texts = [_model_text(entry, wanted.pop(entry.model, 0)) for entry in found.reported.models]
    return texts + [f"{model}@- (wants {version})" for model, version in wanted.items()]


def _model_text(entry: sync_pb2.ReportedModel, wanted: int) -> str:
    text = f"{entry.model}@{entry.active_version or '-'}"
    if entry.target_version and entry.target_version != entry.active_version:
        return text + f">{entry.target_version} {documents.step(entry.step)}".rstrip()
    notes = []
    if entry.active_version and not entry.healthy:
        notes.append("unhealthy")
    if entry.pinned_version:
        notes.append("pinned")
    failed = entry.failure.version if entry.HasField("failure") else 0
    why = f": {documents.reason(entry.failure.reason)}" if failed else ""
    if wanted and wanted != entry.active_version:
        notes.append(f"wants {wanted}{why if failed == wanted else ''}")
    elif failed and failed != entry.active_version:
        notes.append(f"not {failed}{why}")  # a rollout gave it up, and wants what runs
    return f"{text} ({', '.join(notes)})" if notes else text


@device.command("show", examples=[("One device in full.", "sluice device show pi-harbour-07")])
@click.argument("device_id", metavar="ID")
@click.pass_obj
def show(session: Session, device_id: str) -> None:
    """Show one device: what it is, what it should run and what it runs."""
    with session.client() as client:
        found = client.get_device(device_id)
    session.result({"device": documents.device(found)}, *_device_text(found))


def _device_text(found: devices_pb2.Device) -> list[RenderableType]:
    can = found.capabilities
    runtimes = ", ".join(f"{runtime.name} {runtime.version}" for runtime in can.runtimes)
    link = "online" if found.online else f"offline, last seen {tables.age(found.last_seen_time) or 'never'}"
    parts: list[RenderableType] = [
        tables.details(
            (
                ("device", found.id),
                ("link", link),
                ("state", documents.device_state(found.state)),
                ("labels", tables.pairs(found.labels)),
                ("agent", found.agent_version),
                ("board", f"{can.board} ({can.architecture})" if can.board else can.architecture),
                (
                    "cpu, memory",
                    f"{can.cpu_count} cores, {tables.size(can.memory_bytes)}" if can.cpu_count else "",
                ),
                ("runtimes", runtimes),
            )
        )
    ]
    wanted = {entry.model: entry.version for entry in found.desired.models}
    reported = {entry.model: entry for entry in found.reported.models}
    rows = []
    for name in sorted({*wanted, *reported}):
        entry = reported.get(name, sync_pb2.ReportedModel())
        rows.append(
            (
                name,
                str(wanted.get(name, "-")),
                str(entry.active_version or "-"),
                "" if not entry.active_version else "yes" if entry.healthy else "no",
                entry.variant,
                str(entry.previous_version or "-"),
                documents.step(entry.step),
            )
        )
    if rows:
        heads = ("MODEL*", "DESIRED", "ACTIVE", "HEALTHY", "VARIANT*", "PREVIOUS", "STEP")
        parts += [Text(), tables.Rows(heads, rows, right=("DESIRED", "ACTIVE", "PREVIOUS"))]
    for entry in found.reported.models:
        if entry.HasField("failure"):
            failure = entry.failure
            fate = "given up" if failure.final else f"attempt {failure.attempts}, trying on"
            what = f"{entry.model}@{failure.version}: {documents.reason(failure.reason)} ({fate})"
            parts += [Text(), line(f"{what}: {failure.message}", style="red")]
        if entry.pinned_version:
            parts += [Text(), line(f"{entry.model} is pinned to version {entry.pinned_version} on the box")]
    return parts


@device.command(
    "label",
    examples=[
        ("Set two labels and remove one.", "sluice device label pi-07 site=harbour ring=canary old-"),
    ],
)
@click.argument("device_id", metavar="ID")
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@click.pass_obj
def label(session: Session, device_id: str, changes: tuple[str, ...]) -> None:
    """Set labels (key=value) and remove them (key-) on a device.

    Rollouts choose devices by label. These win over the labels in the agent's own configuration.
    """
    wanted: dict[str, str] = {}
    removed: list[str] = []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals and change.endswith("-"):
            key = change[:-1]
            removed.append(key)
        elif equals:
            wanted[key] = value
        if not key or (not equals and not change.endswith("-")):
            raise click.UsageError(f"{change!r} is neither key=value nor key- (which removes)")
    both = sorted(set(wanted) & set(removed))
    if both or len(wanted) + len(removed) != len(changes):
        raise click.UsageError("a label is named more than once" + (f": {', '.join(both)}" if both else ""))
    with session.client() as client:
        found = client.label_device(device_id, wanted, removed)
    session.result(
        {"device": documents.device(found)}, line(f"{found.id}: {tables.pairs(found.labels) or 'no labels'}")
    )


@device.command(
    "token",
    examples=[
        ("For one box, whatever its id, labelled by site.", "sluice device token --label site=harbour"),
        ("For a box that was re-imaged.", "sluice device token pi-harbour-07"),
    ],
)
@click.argument("device_id", metavar="[ID]", default="")
@click.option("--label", type=PAIR, multiple=True, help="The box gets this label; may be repeated.")
@LIFE
@click.pass_obj
def token(session: Session, device_id: str, label: tuple[tuple[str, str], ...], life: int) -> None:
    """Make a token that enrols one box once.

    It is shown this once; the control plane keeps only its hash.
    """
    use = "sluice-agent enrol --token {token}"
    make_token(session, "device", device_id, life, use, labels=unique(label, "--label"))


add_verbs(device, "device")
