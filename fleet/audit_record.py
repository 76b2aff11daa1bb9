"""What an audit record says of a call: who, when, what was asked for, and how it ended. Pure.

A changing call has two records: one before anything happens (event "call") and one with its outcome (event
"outcome", `call` being the sequence of the first); a call without an outcome was cut off by the end of the
process. A call that was turned away has one (event "denied"). Fields without a value are left out.

Of a request, texts and lists are cut, bytes are given as their digest, and what the contract marks with
`debug_redact` is left out.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fleet.limits import AUDIT_LIST_ENTRIES, AUDIT_REQUEST_BYTES, AUDIT_TEXT_CHARACTERS
from updater import canonical
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.identity import Identity, Role

_MOST_DEPTH = 6  # levels of messages in a request


def caller_fields(identity: Identity | None, role: Role | None, address: str) -> dict[str, Any]:
    """Who calls, as every record has it."""
    return _filled(
        caller=identity.uri if identity is not None else "",
        role=role.value if role is not None else "",
        address=text(address),
    )


def started(version: int, now_us: int) -> dict[str, Any]:
    """The first record of each process."""
    return {"event": "started", "time": time_text(now_us), "format": version}


def call(who: Mapping[str, Any], method: str, request: Message | None, now_us: int) -> dict[str, Any]:
    """A changing call that is about to happen."""
    asked = {} if request is None else {"request": requested(request)}
    return {"event": "call", "time": time_text(now_us), "method": method, **who, **asked}


def outcome(sequence: int, method: str, code: str, message: str, now_us: int) -> dict[str, Any]:
    """How a recorded call ended: OK, a reason of errors.proto, or CANCELLED."""
    return {
        "event": "outcome",
        "time": time_text(now_us),
        "call": sequence,
        "method": method,
        "outcome": code,
        **_filled(message=text(message)),
    }


def denied(who: Mapping[str, Any], method: str, error: SluiceError, now_us: int) -> dict[str, Any]:
    """A call that was turned away."""
    return {
        "event": "denied",
        "time": time_text(now_us),
        "method": method,
        **who,
        "outcome": error.code,
        **_filled(message=text(error.message), object=text(error.obj)),
    }


def denied_more(who: Mapping[str, Any], count: int, now_us: int) -> dict[str, Any]:
    """Denials of one caller that came too fast to be recorded one by one."""
    return {"event": "denied", "time": time_text(now_us), **who, "count": count}


def requested(request: Message) -> Any:
    """A request as canonical JSON allows it, bounded."""
    value = _message(request, 0)
    if len(canonical.encode(value)) > AUDIT_REQUEST_BYTES:
        return {"cut": digest_bytes(request.SerializeToString(deterministic=True))}
    return value


def time_text(now_us: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    moment = datetime.datetime.fromtimestamp(now_us // 1_000_000, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{now_us % 1_000_000:06d}Z"


def text(value: str) -> str:
    """A text that may come from anybody, cut."""
    return value if len(value) <= AUDIT_TEXT_CHARACTERS else value[: AUDIT_TEXT_CHARACTERS - 1] + "…"


def _filled(**fields: str) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value}


def _message(message: Message, depth: int) -> dict[str, Any]:
    if depth >= _MOST_DEPTH:
        return {"cut": digest_bytes(message.SerializeToString(deterministic=True))}
    return {
        field.name: _field(field, value, depth)
        for field, value in message.ListFields()
        if not field.GetOptions().debug_redact and field.containing_type is not None
    }


def _field(field: FieldDescriptor, value: Any, depth: int) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return _list([f"{text(str(key))}={text(str(value[key]))}" for key in sorted(value)])
    if field.is_repeated:
        return _list([_value(field, item, depth) for item in value[: AUDIT_LIST_ENTRIES + 1]], len(value))
    return _value(field, value, depth)


def _list(items: list[Any], count: int | None = None) -> list[Any]:
    count = len(items) if count is None else count
    kept = items[:AUDIT_LIST_ENTRIES]
    return kept if count <= AUDIT_LIST_ENTRIES else [*kept, f"and {count - AUDIT_LIST_ENTRIES} more"]


def _value(field: FieldDescriptor, value: Any, depth: int) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return _message(value, depth + 1)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return digest_bytes(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else str(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= canonical.MAX_INTEGER:
        return value
    return text(str(value))
