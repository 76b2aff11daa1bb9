"""Tables of a benchmark: on the terminal and as a section of docs/benchmarks.md.

A section lies between two comments that name it; writing it again replaces it and leaves the others alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import rich.table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
HEAD = "# Benchmarks\n"


@dataclass(frozen=True)
class Table:
    """Rows under headings; columns are figures, set to the right, but for those that `text` names."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left")
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if index in self.text else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if index in self.text else "---:" for index in range(len(self.headings))]
        lines = [f"| {' | '.join(row)} |" for row in (self.headings, rule, *self.rows)]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's model name, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def machine() -> str:
    """What this ran on, for whoever reads the figures."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{processor()} ({platform.machine()}), {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, Linux {platform.release()}"
    )


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def section(title: str, command: str, notes: Sequence[str], tables: Sequence[Table]) -> str:
    """A section's Markdown: title, where and how it was measured, notes, tables."""
    measured = f"`{command}`, {today()}, on {machine()}."
    parts = [f"## {title}", measured, *notes, *(table.markdown().rstrip() for table in tables)]
    return "\n\n".join(parts) + "\n"


def with_section(document: str, name: str, body: str) -> str:
    """The document with the section replaced, or added at its end."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    block = f"{begin}\n{body}\n{end}"
    if begin in document and end in document:
        return document.partition(begin)[0] + block + document.partition(end)[2]
    return f"{document.rstrip()}\n\n{block}"


def write_section(name: str, body: str, path: Path = DOCUMENT) -> None:
    old = path.read_text("utf-8") if path.exists() else HEAD
    path.write_text(with_section(old, name, body), "utf-8")
