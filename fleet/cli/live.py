"""A rollout as people see it: the table, and the same table live while it is watched.

The live table goes to stderr and is as high as the terminal: devices that need attention come first. Without
a terminal every change is one line on stderr.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fleet.cli import documents, tables
from fleet.cli.session import line, plain
from sluice.api.v1 import rollouts_pb2

# What a person wants to see first when not everything fits.
_ORDER = {"failed": 0, "updating": 1, "waiting": 2, "aborted": 3, "done": 4}
_HEADER_LINES = 6  # of the terminal, for what stands above and below the devices

View = Callable[[rollouts_pb2.Rollout], None]


def summary(rollout: rollouts_pb2.Rollout) -> str:
    """Such as "rollout 7f3a  digits@2  running  1 updating, 2 done"."""
    counts = Counter(documents.device_rollout_state(entry.state) for entry in rollout.devices)
    states = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    state = documents.rollout_state(rollout.state)
    return f"rollout {rollout.id}  {rollout.model}@{rollout.version}  {state}  {states}".rstrip()


def rollout_parts(rollout: rollouts_pb2.Rollout, most: int | None = None) -> list[RenderableType]:
    """Summary, devices (at most `most`) and verdict."""
    devices = sorted(
        rollout.devices,
        key=lambda entry: (_ORDER.get(documents.device_rollout_state(entry.state), 9), entry.device_id),
    )
    shown = devices if most is None else devices[:most]
    parts: list[RenderableType] = [line(summary(rollout)), Text(), _devices(shown)]
    if len(shown) < len(devices):
        parts.append(line(f"and {len(devices) - len(shown)} more"))
    if rollout.verdict:
        parts += [Text(), line(rollout.verdict)]
    return parts


def _devices(devices: Sequence[rollouts_pb2.RolloutDevice]) -> RenderableType:
    rows = [
        (
            entry.device_id,
            documents.device_rollout_state(entry.state),
            documents.step(entry.step),
            str(entry.from_version or "-"),
            _fetched(entry),
            ": ".join(filter(None, (documents.reason(entry.reason), entry.message))),
        )
        for entry in devices
    ]
    return tables.Rows(("DEVICE*", "STATE", "STEP", "FROM", "FETCHED", "WHY*"), rows, right=("FROM",))


def _fetched(entry: rollouts_pb2.RolloutDevice) -> str:
    if not entry.fetch_total_bytes:
        return ""
    total = tables.size(entry.fetch_total_bytes)
    if entry.fetched_bytes >= entry.fetch_total_bytes:
        return total
    return f"{100 * entry.fetched_bytes // entry.fetch_total_bytes} % of {total}"


@contextmanager
def live_view() -> Iterator[View]:
    """Yields a function that shows each state of a rollout as it comes."""
    console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield _line_view()
        return
    with Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop") as live:

        def view(rollout: rollouts_pb2.Rollout) -> None:
            room = max(3, console.height - _HEADER_LINES)
            live.update(Group(*rollout_parts(rollout, room)), refresh=True)

        yield view


def _line_view() -> View:
    """Tells each change of a device in a line on stderr."""
    seen: dict[str, tuple[int, int]] = {}

    def view(rollout: rollouts_pb2.Rollout) -> None:
        for entry in rollout.devices:
            now = (entry.state, entry.step)
            if seen.get(entry.device_id) == now:
                continue
            seen[entry.device_id] = now
            words = (
                entry.device_id,
                documents.device_rollout_state(entry.state),
                documents.step(entry.step),
                _fetched(entry),
                documents.reason(entry.reason),
                entry.message,
            )
            click.echo(plain("  ".join(filter(None, words))), err=True)

    return view
