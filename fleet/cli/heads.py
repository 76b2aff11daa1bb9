"""The newest head of each control plane's audit log that this user has seen, kept beside the user's state.

So a later `sluice audit verify` finds records gone or rewritten that an earlier one saw, without anybody
having to note a number.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fleet.audit_chain import Head, parse_head
from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors

MAX_BYTES = 1 << 20


def heads_file() -> Path:
    """Where they are kept."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "sluice" / "audit-heads.json"


def seen(address: str) -> Head | None:
    """The newest head seen of a control plane's log. Raises SluiceError(CONFIG_INVALID | IO_FAILED)."""
    found = _load().get(address)
    return None if found is None else parse_head(found)


def remember(address: str, head: Head) -> None:
    """Keeps a head that was verified."""
    heads = {**_load(), address: str(head)}
    path = heads_file()
    with os_errors("keeping the head of the audit log in", path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, json.dumps(heads, indent=2, sort_keys=True).encode() + b"\n", mode=0o600)


def _load() -> dict[str, str]:
    path = heads_file()
    try:
        with os_errors("reading the heads of audit logs", path), path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except SluiceError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    try:
        heads = json.loads(data)
    except ValueError:
        heads = None
    if not isinstance(heads, dict) or not all(isinstance(value, str) for value in heads.values()):
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"{path} does not hold the heads of audit logs",
            hint="restore it from a copy; without it, truncation that happened before now goes unnoticed",
            obj=str(path),
        )
    return heads
