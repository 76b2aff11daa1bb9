"""What people see: tables and texts that fit 80 columns. Sizes are decimal (1 kB = 1000 B)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table
from rich.text import Text

from fleet.cli.session import plain

_STYLES = {
    "succeeded": "green",
    "done": "green",
    "online": "green",
    "running": "cyan",
    "updating": "cyan",
    "failed": "red",
    "unhealthy": "red",
    "aborted": "yellow",
    "retired": "yellow",
    "offline": "yellow",
}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table without rules.

    Args:
        columns: the headings. One that ends in "*" gives way first: it is folded when the terminal is narrow.
        rows: a text for each column.
        right: headings of columns set flush right.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for column in columns:
        heading = column.removesuffix("*")
        wide = column.endswith("*")
        made.add_column(
            Text(heading),
            justify="right" if heading in right else "left",
            overflow="fold",
            no_wrap=False,
            min_width=None if wide else len(heading),
            ratio=None,
        )
    for row in rows:
        made.add_row(*(Text(plain(cell), style=_STYLES.get(cell, "")) for cell in row))
    return made


def details(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line; empty values are left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(Text(name, style="dim"), Text(plain(value)))
    return grid


def size(count: int) -> str:
    """Such as "0 B", "999 B", "1.0 kB", "22.8 MB"."""
    if count < 1000:
        return f"{count} B"
    value = count / 1000
    units = ["TB", "GB", "MB", "kB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop()
    return f"{value:.1f} {units[-1]}"


def age(stamp: Timestamp, now: float | None = None) -> str:
    """How long ago, in its largest unit: "3 min ago"; "" when unset."""
    if not stamp.seconds:
        return ""
    seconds = int((now if now is not None else time.time()) - stamp.seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{max(0, seconds)} s ago"


def duration(seconds: int) -> str:
    """Such as "90 s", "15 min", "1 h"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def pairs(values: Mapping[str, object]) -> str:
    """Such as "a=1 b=2"."""
    return " ".join(f"{key}={value}" for key, value in sorted(values.items()))


def short_digest(digest: str) -> str:
    """The first 12 hex digits."""
    return digest.removeprefix("sha256:")[:12]


def share(part: int, whole: int) -> str:
    """Such as "4.1 %" of the whole; "" when there is none."""
    return f"{100 * part / whole:.1f} %" if whole else ""
