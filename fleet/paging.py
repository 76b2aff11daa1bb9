"""Pages of lists: a size within limits, and a token that is the last key of the page before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fleet.limits import DEFAULT_PAGE, MAX_PAGE
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_MAX_TOKEN_CHARACTERS = 128
_Item = TypeVar("_Item")


def page_size(asked: int) -> int:
    """The number of rows for a request's page_size."""
    if asked > MAX_PAGE:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED, f"page_size is {asked}; at most {MAX_PAGE} are given", obj="page_size"
        )
    return asked or DEFAULT_PAGE


def cut_page(rows: list[_Item], size: int, key: Callable[[_Item], str]) -> tuple[list[_Item], str]:
    """One page and the token of the next, from up to `size` + 1 rows."""
    if len(rows) <= size:
        return rows, ""
    return rows[:size], key(rows[size - 1])


def text_token(token: str) -> str:
    """The key in a token of a list that is sorted by name."""
    if len(token) > _MAX_TOKEN_CHARACTERS:
        raise _malformed(token)
    return token


def number_token(token: str) -> int | None:
    """The key in a token of a list that is sorted by number; None for the first page."""
    if not token:
        return None
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise _malformed(token)
    return int(token)


def _malformed(token: str) -> SluiceError:
    return SluiceError(
        errors_pb2.REQUEST_INVALID,
        f"the page token is malformed: {token[:80]!r}",
        hint="pass next_page_token of the page before, unchanged",
        obj="page_token",
    )
