"""`sluice audit`: list, export, verify."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fleet import client_access
from fleet.audit_chain import Head, Verified, parse_head, verify
from fleet.cli import heads, tables
from fleet.cli.command import Group
from fleet.cli.session import Session, line
from fleet.limits import AUDIT_RECORD_BYTES
from updater.atomic import replace_atomic
from updater.errors import os_errors

DEFAULT_NEWEST = 100
_ABOUT = ("id", "name", "model", "version")  # of a request: shown without their keys


@click.group("audit", cls=Group)
def audit() -> None:
    """See who changed what, and check that the record of it is whole."""


@audit.command(
    "list",
    examples=[
        ("What happened lately.", "sluice audit list"),
        ("Who was turned away.", "sluice audit list --denied --newest 1000"),
    ],
)
@click.option(
    "--newest",
    type=click.IntRange(1, 1_000_000),
    default=DEFAULT_NEWEST,
    show_default=True,
    help="So many records.",
)
@click.option("--denied", is_flag=True, help="Only calls that were turned away.")
@click.pass_obj
def list_(session: Session, newest: int, denied: bool) -> None:
    """List the newest records: changes with outcomes, and denials."""
    with session.client() as client:
        records = [json.loads(data) for data in client_access.read_audit(client, newest=newest)]
    if denied:
        records = [record for record in records if record.get("event") == "denied"]
    rows = list(_rows(records))
    shown = tables.Rows(("TIME", "WHO", "WHAT", "ON~", "OUTCOME"), rows) if rows else line("nothing")
    session.result({"records": records}, shown)


def _rows(records: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A row for each event; a call and its outcome are one."""
    outcomes = {record["call"]: record["outcome"] for record in records if record.get("event") == "outcome"}
    listed = {record["sequence"] for record in records if record.get("event") == "call"}
    for record in records:
        event, outcome = record.get("event"), str(record.get("outcome", ""))
        if event == "outcome" and record["call"] in listed:
            continue
        if event == "call" and not outcome:  # that of an enrolment has its own
            outcome = outcomes.get(record["sequence"], "unknown")
        if "count" in record:
            outcome = f"denied {record['count']} times"
        who = _who(str(record.get("caller") or record.get("address") or "-"))
        on = _who(str(record.get("object") or _brief(record.get("request")) or record.get("message", "")))
        if event == "outcome":
            on = f"record {record['call']}"  # the call itself is older than what was asked for
        what = str(record.get("method") or event).rpartition(".")[2]
        yield str(record["time"])[5:19].replace("T", " "), who, what, on, outcome


def _who(caller: str) -> str:
    """Such as "operator/ann": trust domain and role are left to the record itself."""
    return "/".join(caller.split("/")[3:5]) if caller.startswith("spiffe://") else caller


def _brief(request: Any) -> str:
    """Such as "pi-7 set=site=mill": what it is about first, for the end may be cut."""
    if not isinstance(request, dict):
        return str(request or "")
    about = [str(request[key]) for key in _ABOUT if key in request]
    return " ".join([*about, *(f"{key}={_value(request[key])}" for key in request if key not in _ABOUT)])[
        :120
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_value, value))
    return (
        json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if isinstance(value, dict)
        else str(value)
    )


@audit.command("export", examples=[("All of it, to a file.", "sluice audit export -o audit.jsonl")])
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write."
)
@click.pass_obj
def export(session: Session, output: Path) -> None:
    """Write every record that is held to a file, checked on the way.

    The head that it prints stands for all of them: kept elsewhere, it shows later whether records up to it
    were removed or rewritten.
    """
    partial = output.with_name(output.name + ".partial")
    with session.client() as client:
        kept = heads.seen(client.address)

        def written() -> Iterator[bytes]:
            with os_errors("writing", partial), partial.open("wb") as file:
                for data in client_access.read_audit(client):
                    file.write(data + b"\n")
                    yield data
                file.flush()
                os.fsync(file.fileno())

        try:
            found = verify(written(), seen=[kept] if kept else [])
            replace_atomic(partial, output)
        finally:
            partial.unlink(missing_ok=True)
        if found.first:
            heads.remember(client.address, found.head)
    text = f"{_count(found)} to {output}\nhead {found.head}"
    session.result({"output": str(output), **_document(found)}, line(text))


@audit.command(
    "verify",
    examples=[
        ("The log of the control plane, against what was seen before.", "sluice audit verify"),
        ("An exported file, with no server.", "sluice audit verify audit.jsonl --head 57:sha256:1ed8…"),
    ],
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option(
    "--head", "known", multiple=True, metavar="HEAD", help="A head that must be in it; may be repeated."
)
@click.option("--after", metavar="HEAD", help="The head that its first record must follow.")
@click.option(
    "--restored",
    is_flag=True,
    help="The log was restored from a backup: begin anew with what it holds, and forget what was seen.",
)
@click.pass_obj
def verify_(
    session: Session, file: Path | None, known: tuple[str, ...], after: str | None, restored: bool
) -> None:
    """Check that no record is missing, changed or moved.

    Without FILE the control plane's log is read, and the newest head that this user has seen of it must still
    be in it. What lies behind the newest head known cannot be missed: keep the one this prints.
    """
    wanted = [parse_head(text) for text in known]
    start = parse_head(after) if after is not None else None
    if file is not None:
        with _lines(file) as records:
            found = verify(records, after=start, seen=wanted)
    else:
        with session.client() as client:
            kept = None if restored else heads.seen(client.address)
            found = verify(
                client_access.read_audit(client), after=start, seen=[*wanted, *([kept] if kept else [])]
            )
            if found.first:
                heads.remember(client.address, found.head)
    text = f"{_count(found)}: none is missing or changed\nhead {found.head}"
    if found.proven:
        text += f"\nknown before: {', '.join(str(head.sequence) for head in found.proven)}"
    session.result(_document(found), line(text))


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[bytes]]:
    """A file's lines; one that is longer than a record is cut, and then no record."""
    with os_errors("reading", path), path.open("rb") as file:
        yield (data.rstrip(b"\n") for data in iter(lambda: file.readline(AUDIT_RECORD_BYTES + 2), b""))


def _count(found: Verified) -> str:
    return f"records {found.first} to {found.head.sequence}" if found.first else "no records"


def _document(found: Verified) -> dict[str, Any]:
    proven: tuple[Head, ...] = found.proven
    return {
        "first": found.first,
        "last": found.head.sequence,
        "head": str(found.head),
        "known": [str(head) for head in proven],
    }
