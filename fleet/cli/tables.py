"""What people see: tables and texts that fit 80 columns. Sizes are decimal (1 kB = 1000 B)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
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
    "revoked": "red",
}


_GAP = 2  # columns between columns


class Rows:
    """A table without rules, as wide as it needs to be and no wider than the terminal.

    Args:
        columns: the headings. When the terminal is narrow, one that ends in "*" is folded and one that ends
            in "~" is cut; the others are kept whole.
        rows: a text for each column.
        right: headings of columns set flush right.
    """

    def __init__(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
    ) -> None:
        self._columns = columns
        self._rows = [[plain(cell) for cell in row] for row in rows]
        self._right = right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [
            max([cell_len(column.rstrip("*~")), *(cell_len(row[index]) for row in self._rows)])
            for index, column in enumerate(self._columns)
        ]
        self._cut(widths, options.max_width)
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_edge=False)
        for column, width in zip(self._columns, widths, strict=True):
            heading = column.rstrip("*~")
            folded = column.endswith("*")
            table.add_column(
                Text(heading),
                justify="right" if heading in self._right else "left",
                overflow="fold" if folded else "ellipsis",
                no_wrap=not folded,
                min_width=len(heading) if folded else width,
                max_width=None if folded else width,
            )
        for row in self._rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        yield table

    def _cut(self, widths: list[int], room: int) -> None:
        """Takes from the columns that may be cut what is over the room, down to their headings."""
        over = sum(widths) + _GAP * (len(widths) - 1) - room
        for index, column in enumerate(self._columns):
            if column.endswith("~") and over > 0:
                least = len(column) - 1
                cut = min(over, max(0, widths[index] - least))
                widths[index] -= cut
                over -= cut


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
