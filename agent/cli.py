"""`sluice-agent`: runs the agent, and speaks to one that runs.

    sluice-agent run    [--config FILE] [--log-level LEVEL]
    sluice-agent status [--config FILE | --socket PATH] [--json] [--watch]
    sluice-agent doctor [--config FILE] [--json]
    sluice-agent enrol  [--config FILE] [--token TOKEN] [--json]
    sluice-agent revert [--config FILE | --socket PATH] [--json] MODEL

Results go to stdout, errors to stderr. With `--json` stdout is JSON, an error too, as `sluice` gives it.
Exit codes are those of updater/errors.py: 0 done, 2 wrong usage, others by the kind of failure. All of it is
in docs/agent-cli.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import agent.grpc_log  # noqa: F401 - before whatever imports gRPC
from agent import capabilities, documents, status_table
from agent import config as configuration
from agent.admin import AdminClient
from agent.config import DEFAULT_PATH
from agent.logs import set_up
from updater.errors import EXIT_FAILED, SluiceError

_WATCH_S = 0.5  # between two looks
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_EXIT_OUTPUT_CLOSED = 141  # 128 + SIGPIPE
_CLEAR = "\x1b[H\x1b[J"
_MARKS = {"ok": "ok   ", "fault": "FAULT", "absent": "-    "}


class _UsageError(Exception):
    """The command line is wrong; `usage` says how it is written."""

    def __init__(self, usage: str, message: str, command: str) -> None:
        super().__init__(message)
        self.usage = usage
        self.error = _error("USAGE", message, f"see `{command} --help`")


class _Parser(argparse.ArgumentParser):
    """argparse's, but wrong usage is an error like others."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raises _UsageError."""
        raise _UsageError(self.format_usage(), message, self.prog)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run_command(argv)
    except BrokenPipeError:  # the reader (head, less) has had enough
        # The interpreter flushes stdout once more at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_OUTPUT_CLOSED


def _run_command(argv: list[str]) -> int:
    try:
        options = parser().parse_args(argv)
        code: int = options.command(options)
        return code
    except _UsageError as wrong:
        sys.stderr.write(wrong.usage)
        error, code = wrong.error, _EXIT_USAGE
    except SluiceError as failed:
        error, code = failed.as_dict(), failed.exit_code
    except KeyboardInterrupt:
        error, code = _error("INTERRUPTED", "stopped by Ctrl-C"), _EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as defect:  # noqa: BLE001 - told with its traceback, as an error like others
        traceback.print_exc()
        why = f"a defect in sluice-agent: {type(defect).__name__}: {defect}"
        error, code = _error("INTERNAL", why, "report it with the lines above"), EXIT_FAILED
    sys.stderr.write(_plain(f"sluice-agent: {error['reason']}: {error['message']}\n"))
    if error["hint"]:
        sys.stderr.write(_plain(f"  help: {error['hint']}\n"))
    if "--json" in argv:  # looked for here, because an error can arise before the options are read
        _write_json({"error": error}, line="--watch" in argv)
    return code


def _error(reason: str, message: str, hint: str = "") -> dict[str, str]:
    return {"reason": reason, "message": message, "hint": hint, "object": ""}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_json(document: Mapping[str, Any], *, line: bool = False) -> None:
    _write(json.dumps(document, indent=None if line else 2, ensure_ascii=False) + "\n")


def _plain(text: str) -> str:
    """Without control characters: what models and runtimes say must not steer a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def parser() -> argparse.ArgumentParser:
    """All commands and options; docs/agent-cli.md describes each."""
    top = _Parser(
        prog="sluice-agent",
        description="The sluice agent: installs model updates and serves models on this box.",
    )
    top.add_argument("--version", action="version", version=f"sluice-agent {capabilities.agent_version()}")
    verbs = top.add_subparsers(required=True, metavar="COMMAND")
    run = _verb(verbs, "run", _run, "run the agent in the foreground")
    run.add_argument(
        "--log-level", choices=("debug", "info", "warning"), default="info", help="default: info"
    )
    status = _verb(verbs, "status", _status, "show what the running agent serves and does")
    status.add_argument("--watch", action="store_true", help="show it again twice a second until Ctrl-C")
    doctor = _verb(verbs, "doctor", _doctor, "check this box and say what to do about each fault")
    revert = _verb(verbs, "revert", _revert, "go back to a model's previous version and stay there")
    revert.add_argument("model", metavar="MODEL", help="the model's name")
    for verb in (status, revert):
        verb.add_argument(
            "--socket",
            type=Path,
            metavar="PATH",
            help="the agent's socket, instead of reading the configuration",
        )
    enrol = _verb(verbs, "enrol", _enrol, "get this box's first certificate, or another after a loss")
    enrol.add_argument(
        "--token",
        default="",
        help="from `sluice device token`; else control.token, else an operator approves",
    )
    for verb in (status, revert, doctor, enrol):
        verb.add_argument("--json", action="store_true", help="for programs: JSON on stdout, errors too")
    return top


def _verb(
    verbs: argparse._SubParsersAction[_Parser], name: str, command: object, what: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    verb.add_argument(
        "--config", type=Path, metavar="FILE", default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}"
    )
    verb.set_defaults(command=command)
    return verb


def _client(options: argparse.Namespace) -> AdminClient:
    socket = options.socket or configuration.load(options.config).admin_socket
    return AdminClient(socket)


def _run(options: argparse.Namespace) -> int:
    from agent.daemon import run  # heavy: the other commands start faster without it

    set_up(options.log_level)
    run(configuration.load(options.config))
    return 0


def _status(options: argparse.Namespace) -> int:
    client = _client(options)
    try:
        while True:
            status = client.status()
            if options.json:
                _write_json(documents.status(status), line=options.watch)
            else:
                text = _plain(status_table.render(status))
                _write(_screen(text) if options.watch and sys.stdout.isatty() else text)
            if not options.watch:
                return 0
            time.sleep(_WATCH_S)
    finally:
        client.close()


def _screen(text: str) -> str:
    """The text on a cleared terminal; what does not fit is cut, so that its top stays in view."""
    rows = max(2, shutil.get_terminal_size().lines)
    lines = text.splitlines()
    if len(lines) >= rows:
        lines[rows - 2 :] = ["…"]
    return _CLEAR + "\n".join(lines) + "\n"


def _doctor(options: argparse.Namespace) -> int:
    from agent.doctor import FAULT, examine

    findings = []
    for finding in examine(configuration.load(options.config)):
        findings.append(finding)
        if not options.json:
            _write(_plain(f"{_MARKS[finding.state]}  {finding.check}: {finding.detail}\n"))
            if finding.hint:
                _write(_plain(f"       help: {finding.hint}\n"))
    faults = [finding for finding in findings if finding.state == FAULT]
    if options.json:
        _write_json({"findings": [documents.finding(finding) for finding in findings]})
    else:
        _write({0: "no faults\n", 1: "1 fault\n"}.get(len(faults), f"{len(faults)} faults\n"))
    if not faults:
        return 0
    first = next((finding.error for finding in faults if finding.error is not None), None)
    return first.exit_code if first is not None else EXIT_FAILED


def _enrol(options: argparse.Namespace) -> int:
    from agent.identity import BoxIdentity

    box = BoxIdentity(configuration.load(options.config))
    if not options.json:
        _write(f"the fingerprint of this box is {box.fingerprint()}\n")
    identity = box.enrol(options.token or None)
    leaf = box.credentials.leaf
    assert leaf is not None
    until = leaf.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    if options.json:
        _write_json({"identity": identity.uri, "expire_time": until, "fingerprint": box.fingerprint()})
    else:
        _write(f"enrolled as {identity}, until {until}; the agent renews it by itself\n")
    return 0


def _revert(options: argparse.Namespace) -> int:
    client = _client(options)
    try:
        answer = client.revert(options.model)
    finally:
        client.close()
    if options.json:
        _write_json(documents.revert(options.model, answer))
    else:
        _write(
            f"{options.model} went back from version {answer.from_version} to {answer.to_version};"
            " it stays there until another version is rolled out\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
