"""Progress of work that takes long: a bar on stderr, when that is a terminal and the work lasts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fleet.cli.session import plain

SHOW_AFTER_S = 0.3  # shorter work shows no bar, so that nothing flickers

Step = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@contextmanager
def progress_bar() -> Iterator[Step]:
    """Yields a function to report progress to; it draws one bar for each `what`."""
    console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda _what, _done, _total: None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    begun = time.monotonic()
    tasks = {}

    def step(what: str, done: int, total: int) -> None:
        if time.monotonic() - begun < SHOW_AFTER_S:
            return
        bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(plain(what)[:28], total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield step
    finally:
        bar.stop()
