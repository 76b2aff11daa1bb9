"""One run of `sluice`: its global options, and the only places where it writes.

Rules: results go to stdout, everything else (errors, progress, notes) to stderr. With `--json` stdout is
exactly one JSON document, an error too: `{"error": {"reason", "message", "hint", "object"}}`. Without a
terminal there is no colour, no progress bar and no cutting to a width: `grep` and `awk` see whole lines.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError
from rich.console import Console, Group, RenderableType
from rich.text import Text

from fleet.cli.advice import advise
from fleet.client import DEFAULT_ADDRESS, ClientLimits, ControlClient
from fleet.profile import Profile
from updater.errors import SluiceError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_OUTPUT_CLOSED = 141  # 128 + SIGPIPE
UNLIMITED_WIDTH = 4096  # columns, when stdout is no terminal


class Interrupted(Exception):
    """Ctrl-C, with a sentence on what stays and how to go on."""


@dataclass
class Session:
    """The global options of one run, and its output."""

    control: str = ""  # the profile's, else DEFAULT_ADDRESS
    timeout: float = field(default_factory=lambda: ClientLimits().timeout_s)
    json: bool = False
    debug: bool = False

    def client(self) -> ControlClient:
        """A connection to the control plane; use it as a context manager."""
        address = self.control or Profile.open().control or DEFAULT_ADDRESS
        return ControlClient(address, ClientLimits(timeout_s=self.timeout))

    def result(self, document: Mapping[str, Any], *human: RenderableType) -> None:
        """Writes the outcome: the document with --json, else what is for people."""
        if self.json:
            self.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        else:
            self.write(render(Group(*human), sys.stdout))

    def note(self, text: str) -> None:
        """A line for people that is not the result."""
        click.echo(text, err=True)

    def write(self, text: str) -> None:
        """Writes to stdout; ends the run quietly when its reader has gone."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes stdout once more at its end: let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(EXIT_OUTPUT_CLOSED) from None

    def fail(self, error: Mapping[str, str], exit_code: int, *, usage: str = "") -> NoReturn:
        """Reports an error on stderr, with --json on stdout too, and ends with its exit code."""
        if self.debug:
            traceback.print_exc()
        lines = [f"sluice: {error['reason']}: {error['message']}"]
        if error["hint"]:
            lines.append(f"  help: {error['hint']}")
        click.echo(usage + plain("\n".join(lines), keep="\n"), err=True)
        if self.json:
            self.write(json.dumps({"error": dict(error)}, indent=2, ensure_ascii=False) + "\n")
        raise click.exceptions.Exit(exit_code)

    def report(self, error: BaseException) -> NoReturn:
        """Turns whatever ended a command into its message and exit code."""
        if isinstance(error, SluiceError):
            advise(error)
            self.fail(error.as_dict(), error.exit_code)
        if isinstance(error, NoArgsIsHelpError):
            usage = error.format_message() + "\n\n"
            self.fail(_error("USAGE", "a command is missing", ""), error.exit_code, usage=usage)
        if isinstance(error, click.UsageError):
            context = error.ctx
            hint = f"see `{context.command_path} --help`" if context is not None else "see `sluice --help`"
            usage = context.get_usage() + "\n" if context is not None else ""
            self.fail(_error("USAGE", error.format_message(), hint), error.exit_code, usage=usage)
        if isinstance(error, click.ClickException):
            self.fail(_error("USAGE", error.format_message(), ""), error.exit_code)
        if isinstance(error, Interrupted):
            self.fail(_error("INTERRUPTED", "stopped by Ctrl-C", str(error)), EXIT_INTERRUPTED)
        if isinstance(error, KeyboardInterrupt | click.Abort):
            self.fail(_error("INTERRUPTED", "stopped by Ctrl-C", ""), EXIT_INTERRUPTED)
        why = f"a defect in sluice: {type(error).__name__}: {error}"
        self.fail(_error("INTERNAL", why, "run it again with --debug and report what it prints"), 1)


@contextmanager
def interruptible(advice: str | Callable[[], str]) -> Iterator[None]:
    """Says on Ctrl-C what stays and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(advice if isinstance(advice, str) else advice()) from error


def render(what: RenderableType, stream: IO[str]) -> str:
    """The text of a table or a text for a stream: as wide as its terminal, or whole when it is none."""
    console = Console(
        file=stream,
        width=None if stream.isatty() else UNLIMITED_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as captured:
        console.print(what)
    return "".join(line.rstrip() + "\n" for line in captured.get().splitlines())


def plain(text: str, *, keep: str = "") -> str:
    """`text` without control characters: what comes from devices must not steer a terminal."""
    return "".join(
        character if character.isprintable() or character in keep else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def line(text: str, style: str = "") -> Text:
    """A line of plain text for `Session.result`."""
    return Text(plain(text), style=style, overflow="fold")


def _error(reason: str, message: str, hint: str) -> dict[str, str]:
    return {"reason": reason, "message": message, "hint": hint, "object": ""}
