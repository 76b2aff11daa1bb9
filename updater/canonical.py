"""Canonical JSON: the one byte form of a manifest, so that equal content has an equal digest.

RFC 8785 (JSON Canonicalization Scheme) restricted to what manifests use: objects with ASCII keys, arrays,
strings, booleans and integers below 2^53. Floats and null are refused: their text forms differ between
writers, and a manifest has no use for them (fractions are decimal strings).
"""

from __future__ import annotations

import json
from typing import Any

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

MAX_INTEGER = (1 << 53) - 1
_MAX_DEPTH = 16  # levels of nesting


def encode(value: Any) -> bytes:
    """The canonical bytes of a value. Raises SluiceError(MANIFEST_INVALID) naming the place."""
    _check(value, "$", 0)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def decode(data: bytes, what: str) -> Any:
    """The value of canonical bytes; other forms of the same JSON are refused.

    Args:
        data: canonical JSON.
        what: what the bytes are, for the message: "manifest".

    Raises SluiceError(MANIFEST_INVALID).
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SluiceError(errors_pb2.MANIFEST_INVALID, f"the {what} is not JSON: {error}") from error
    if encode(value) != data:
        raise SluiceError(
            errors_pb2.MANIFEST_INVALID,
            f"the {what} is JSON, but not in canonical form (sorted keys, no spaces, no duplicates)",
            hint="write it with `sluice model push`",
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _check(value: Any, where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise SluiceError(errors_pb2.MANIFEST_INVALID, f"{where} is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise SluiceError(errors_pb2.MANIFEST_INVALID, f"{where} is beyond 2^53: {value}")
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise SluiceError(errors_pb2.MANIFEST_INVALID, f"{where} is not valid Unicode")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not key.isascii():
                raise SluiceError(errors_pb2.MANIFEST_INVALID, f"{where} has a non-ASCII key: {key!r}")
            _check(item, f"{where}.{key}", depth + 1)
    else:
        kind = "null" if value is None else type(value).__name__
        raise SluiceError(errors_pb2.MANIFEST_INVALID, f"{where} is {kind}: not allowed in canonical JSON")
