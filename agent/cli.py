"""`sluice-agent`: runs the agent, and speaks to one that runs.

    sluice-agent run    [--config FILE] [--log-level LEVEL]
    sluice-agent status [--config FILE | --socket PATH] [--json] [--watch]
    sluice-agent doctor [--config FILE] [--json]
    sluice-agent revert [--config FILE | --socket PATH] [--json] MODEL

Results go to stdout, errors to stderr. Exit codes are those of updater/errors.py: 0 done, 2 wrong usage,
others by the kind of failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import json_format

from agent import capabilities, status_table
from agent import config as configuration
from agent.admin import AdminClient
from agent.config import DEFAULT_PATH
from agent.logs import set_up
from updater.errors import EXIT_FAILED, SluiceError

_WATCH_S = 1.0  # between two looks
_INTERRUPTED = 130  # as shells give it for Ctrl-C
_CLEAR = "\x1b[H\x1b[J"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        return code
    except SluiceError as error:
        if options.json:
            sys.stderr.write(json.dumps({"error": error.as_dict()}) + "\n")
        else:
            sys.stderr.write(f"sluice-agent: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has had enough
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice-agent",
        description="The sluice agent: installs model updates and serves models on this box.",
    )
    parser.add_argument("--version", action="version", version=f"sluice-agent {capabilities.agent_version()}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _verb(verbs, "run", _run, "run the agent in the foreground")
    run.add_argument(
        "--log-level", choices=("debug", "info", "warning"), default="info", help="default: info"
    )
    status = _verb(verbs, "status", _status, "show what the running agent serves and does")
    status.add_argument("--watch", action="store_true", help="show it again every second until Ctrl-C")
    _verb(verbs, "doctor", _doctor, "check this box and say what to do about each fault")
    revert = _verb(verbs, "revert", _revert, "go back to a model's previous version and stay there")
    revert.add_argument("model", help="the model's name")
    for verb in (status, revert):
        verb.add_argument(
            "--socket", type=Path, help="the agent's socket, instead of reading the configuration"
        )
    for verb in (status, revert, verbs.choices["doctor"]):
        verb.add_argument("--json", action="store_true", help="for programs")
    run.set_defaults(json=False)
    return parser


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: object, what: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    verb.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}")
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
                text = json_format.MessageToJson(status, indent=None if options.watch else 2) + "\n"
            else:
                text = status_table.render(status)
            if options.watch and not options.json:
                text = (_CLEAR if sys.stdout.isatty() else "") + text
            sys.stdout.write(text)
            sys.stdout.flush()
            if not options.watch:
                return 0
            time.sleep(_WATCH_S)
    finally:
        client.close()


def _doctor(options: argparse.Namespace) -> int:
    from agent.doctor import examine

    findings = []
    for finding in examine(configuration.load(options.config)):
        findings.append(finding)
        if not options.json:
            sys.stdout.write(f"{'ok   ' if finding.ok else 'FAULT'}  {finding.check}: {finding.detail}\n")
            if finding.advice:
                sys.stdout.write(f"       what helps: {finding.advice}\n")
            sys.stdout.flush()
    faults = [finding for finding in findings if not finding.ok]
    if options.json:
        rows = [
            {
                "check": finding.check,
                "ok": finding.ok,
                "detail": finding.detail,
                "advice": finding.advice,
                "reason": finding.error.code if finding.error else "",
            }
            for finding in findings
        ]
        sys.stdout.write(json.dumps({"findings": rows}, indent=2) + "\n")
    else:
        sys.stdout.write(f"{len(faults)} faults\n" if faults else "no faults\n")
    if not faults:
        return 0
    first = next((finding.error for finding in faults if finding.error is not None), None)
    return first.exit_code if first is not None else EXIT_FAILED


def _revert(options: argparse.Namespace) -> int:
    client = _client(options)
    try:
        answer = client.revert(options.model)
    finally:
        client.close()
    if options.json:
        sys.stdout.write(json_format.MessageToJson(answer) + "\n")
    else:
        sys.stdout.write(
            f"{options.model} went back from version {answer.from_version} to {answer.to_version};"
            " it stays there until another version is rolled out\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
