"""Which of the versions that a box holds are loaded beside the active one, to be asked for by number. Pure.

The active version's option "versions" says it, in the words of Triton's version policy: "latest:3" (the
newest three, the active one among them), "all" (whatever the disk holds), or numbers ("1,4"). Without the
option it is the active version, and its predecessor while that is kept warm.

Rules: the active version is always loaded; a version newer than it never is, because it was gone back from
or is not activated yet; at most MAX_VERSIONS_LOADED of a model are loaded, the newest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from agent.limits import MAX_VERSIONS_LOADED

ALL = "all"
_LATEST = re.compile(r"latest:([1-9][0-9]{0,2})")
_NUMBER = re.compile(r"[1-9][0-9]{0,15}")


@dataclass(frozen=True)
class VersionPolicy:
    """Exactly one of the attributes says something.

    Attributes:
        latest: how many of the newest versions; 0: not so.
        every: all that are held.
        specific: these.
    """

    latest: int = 0
    every: bool = False
    specific: tuple[int, ...] = ()


def parse(text: str) -> VersionPolicy | None:
    """The policy that an option's text says; None if it is none."""
    if text == ALL:
        return VersionPolicy(every=True)
    latest = _LATEST.fullmatch(text)
    if latest:
        return VersionPolicy(latest=int(latest[1]))
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) <= MAX_VERSIONS_LOADED and all(_NUMBER.fullmatch(number) for number in numbers):
        return VersionPolicy(specific=tuple(sorted({int(number) for number in numbers})))
    return None


def chosen(policy: VersionPolicy | None, active: int, held: Iterable[int]) -> tuple[int, ...]:
    """The versions to load beside the active one, newest first.

    Args:
        policy: of the active version.
        active: its number.
        held: versions whose files the box has.
    """
    if policy is None:
        return ()
    older = sorted({version for version in held if version < active}, reverse=True)
    if policy.specific:
        older = [version for version in older if version in policy.specific]
    most = MAX_VERSIONS_LOADED if not policy.latest else min(policy.latest, MAX_VERSIONS_LOADED)
    return tuple(older[: most - 1])


def pinned(policy: VersionPolicy | None, active: int, held: Iterable[int]) -> tuple[int, ...]:
    """Versions held that must stay on the disk; what "all" names, the disk's own rules decide."""
    return () if policy is None or policy.every else chosen(policy, active, held)
