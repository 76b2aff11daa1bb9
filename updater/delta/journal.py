"""The journal beside a partial target: how far it is whole, so that work resumes after a kill or a power cut.

It is written only after the target's bytes were forced to disk, and replaces the one before in one rename. A
journal that cannot be read, or that speaks of another file, means starting over; it is never an error. What
had arrived of the next block when a fetch was cut is kept beside it (the tail), so that a link that keeps
breaking still gets on.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from updater.atomic import write_atomic
from updater.errors import os_errors
from updater.limits import MAX_JOURNAL_BYTES

_VERSION = 1
_SEAL_BYTES = 32


@dataclass(frozen=True)
class Journal:
    """A point at which work can go on.

    Attributes:
        header: the delta's header, as fetched.
        delta_digest: the delta's digest if the caller knew it, else "".
        blocks: completed blocks.
        delta_offset: first byte of the delta after them.
        target_offset: bytes of the target that they wrote.
        prefix_digest: hex SHA-256 of those bytes.
    """

    header: bytes
    delta_digest: str
    blocks: int
    delta_offset: int
    target_offset: int
    prefix_digest: str


def journal_path(partial: Path) -> Path:
    """Where the journal of a partial target lies."""
    return partial.with_name(partial.name + ".journal")


def write_journal(partial: Path, journal: Journal) -> None:
    """Puts the journal in place durably. Raises SluiceError(DISK_FULL | IO_FAILED)."""
    fields = asdict(journal) | {"version": _VERSION, "header": base64.b64encode(journal.header).decode()}
    write_atomic(journal_path(partial), json.dumps(fields, sort_keys=True).encode())


def read_journal(partial: Path) -> Journal | None:
    """The journal of a partial target; None if none makes sense. Raises SluiceError(IO_FAILED)."""
    with os_errors("reading", journal_path(partial)):
        try:
            with journal_path(partial).open("rb") as file:
                data = file.read(MAX_JOURNAL_BYTES + 1)
        except FileNotFoundError:
            return None
    try:
        fields = json.loads(data)
        numbers = [fields[name] for name in ("blocks", "delta_offset", "target_offset")]
        texts = [fields[name] for name in ("delta_digest", "prefix_digest", "header")]
        sound = fields["version"] == _VERSION and all(type(n) is int and n >= 0 for n in numbers)
        if not sound or not all(isinstance(text, str) for text in texts):
            return None
        header = base64.b64decode(fields["header"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Journal(header, texts[0], numbers[0], numbers[1], numbers[2], texts[1])


def remove_journal(partial: Path) -> None:
    """Removes the journal and what was kept with it, if there is any. Raises SluiceError(IO_FAILED)."""
    for path in (journal_path(partial), tail_path(partial)):
        with os_errors("removing", path):
            path.unlink(missing_ok=True)


def tail_path(partial: Path) -> Path:
    """Where the part of a block lies that had arrived when a fetch was cut."""
    return partial.with_name(partial.name + ".tail")


def write_tail(partial: Path, journal: Journal, tail: bytes) -> None:
    """Keeps delta bytes behind the journal's last whole block, durably. Raises SluiceError."""
    write_atomic(tail_path(partial), _seal(journal, tail) + tail)


def read_tail(partial: Path, journal: Journal, most: int) -> bytes:
    """The bytes kept behind this journal's last block; none where they are another's or more than `most`.

    Raises SluiceError(IO_FAILED).
    """
    with os_errors("reading", tail_path(partial)):
        try:
            with tail_path(partial).open("rb") as file:
                data = file.read(_SEAL_BYTES + most + 1)
        except FileNotFoundError:
            return b""
    tail = data[_SEAL_BYTES:]
    return tail if len(tail) <= most and data[:_SEAL_BYTES] == _seal(journal, tail) else b""


def _seal(journal: Journal, tail: bytes) -> bytes:
    """Binds a tail to the delta and the place in it."""
    return hashlib.sha256(
        journal.header + f"{journal.delta_digest} {journal.delta_offset} ".encode() + tail
    ).digest()
