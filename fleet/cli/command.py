"""How every command of `sluice` is made: global options before or after the verb, examples in its help.

`Command` and `Group` replace click's: a command takes the global options too, shows its examples, and `Root`
ends every run through `Session.report`, so that an error has one form wherever it arises.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from fleet.cli.session import Session, plain
from fleet.client import DEFAULT_ADDRESS

WIDTH = 80


class Command(click.Command):
    """A verb.

    Args:
        examples: pairs of a remark and a command line, shown below the help.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **keywords: Any) -> None:
        keywords.setdefault("no_args_is_help", False)
        super().__init__(*args, **keywords)
        self.examples = tuple(examples)
        self.params.extend(global_options(visible=("json",)))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples)
        formatter.write_paragraph()
        formatter.write("--control, --timeout and --debug may stand here too: see `sluice --help`.\n")


class Group(click.Group):
    """A noun: its verbs are `Command`s."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order of their use, as defined."""
        return list(self.commands)

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples)


Group.group_class = Group


class Root(Group):
    """`sluice` itself."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.params.extend(global_options(visible=("control", "timeout", "json", "debug")))

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Runs one command line and exits with its code."""
        extra.pop("standalone_mode", None)
        argv = list(sys.argv[1:] if args is None else args)
        options = argv[: argv.index("--")] if "--" in argv else argv
        # A usage error can arise before the options are read; they decide how it is told.
        session = Session(json="--json" in options, debug="--debug" in options)
        sys.exit(_run(self, argv, prog_name or "sluice", session, extra))


def _run(root: Root, argv: list[str], name: str, session: Session, extra: dict[str, Any]) -> int:
    try:
        code = click.Group.main(root, argv, name, standalone_mode=False, obj=session, **extra)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        try:
            session.report(error)
        except click.exceptions.Exit as end:
            return end.exit_code
    return code if isinstance(code, int) else 0


def global_options(visible: Sequence[str]) -> list[click.Option]:
    """The options that may stand before or after the verb; the help shows those in `visible`."""
    at_root = "control" in visible

    def keep(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None and value is not False:
            setattr(ctx.ensure_object(Session), str(option.name), value)

    def option(*names: str, **keywords: Any) -> click.Option:
        name = names[0].removeprefix("--")
        return click.Option(
            names, callback=keep, expose_value=False, is_eager=True, hidden=name not in visible, **keywords
        )

    return [
        option(
            "--control",
            metavar="ADDR",
            envvar="SLUICE_CONTROL" if at_root else None,
            help=f"The control plane, host:port. Default: the profile's, else {DEFAULT_ADDRESS}; "
            "environment SLUICE_CONTROL.",
        ),
        option(
            "--timeout",
            type=click.FloatRange(min=0.1, max=86400),
            metavar="SECONDS",
            help="How long one call may take, retries included. Default 30.",
        ),
        option("--json", is_flag=True, help="Print one JSON document on stdout, errors too."),
        option("--debug", is_flag=True, help="Print the traceback of an error."),
    ]


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """The section that shows how a command is used; lines are kept as written."""
    if not examples:
        return
    with formatter.section("Examples"):
        for index, (remark, command) in enumerate(examples):
            if index:
                formatter.write_paragraph()
            formatter.write(f"  # {remark}\n")
            for text in command.splitlines():
                formatter.write(f"  {plain(text)}\n")
