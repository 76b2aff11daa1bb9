"""Which version a box may install: every combination of what it holds, what is desired and what is signed."""

from __future__ import annotations

import itertools

from updater.errors import SluiceError
from updater.trust.decision import Held, Named, decide

NUMBERS = range(5)  # 0: none


def digest(version: int) -> str:
    return f"sha256:{version:064x}"


def outcome(held: Held, version: int, wanted: str, named: Named | None) -> str:
    try:
        decide(held, "m", version, wanted, named)
    except SluiceError as error:
        return error.code
    return "accepted"


def test_every_combination() -> None:
    """A second, plainer account of the rules, over all small worlds."""
    seen: set[str] = set()
    worlds = itertools.product(NUMBERS, NUMBERS, NUMBERS, NUMBERS[1:], (None, "same", "other"), NUMBERS)
    for active, floor, previous, version, signed, allowed in worlds:
        if floor > active or (active == 0) != (floor == 0) or (previous and previous == active):
            continue
        held = Held(
            active=active,
            active_digest=digest(active) if active else "",
            floor=floor,
            previous_digest=digest(previous) if previous else "",
        )
        named = {
            None: None,
            "same": Named(digest(version), allowed),
            "other": Named(digest(99), allowed),
        }[signed]
        if version in (active, previous):
            expected = "accepted"  # its own: running it, or the way back
        elif signed != "same":
            expected = "VERSION_NOT_SIGNED"
        elif version > active or version >= floor:
            expected = "accepted"  # up, or down within the floor
        elif active <= allowed:
            expected = "accepted"  # down further: an operator signed for it
        else:
            expected = "VERSION_BELOW_FLOOR"
        got = outcome(held, version, digest(version), named)
        assert got == expected, (held, version, named)
        seen.add(got)
    assert seen == {"accepted", "VERSION_NOT_SIGNED", "VERSION_BELOW_FLOOR"}


def test_another_manifest_under_the_number_it_runs_is_another_version() -> None:
    held = Held(active=3, active_digest=digest(3), floor=1)
    assert outcome(held, 3, digest(77), None) == "VERSION_NOT_SIGNED"
    assert outcome(held, 3, digest(77), Named(digest(3))) == "VERSION_NOT_SIGNED"


def test_a_box_without_a_version_owns_none() -> None:
    assert outcome(Held(), 1, "", None) == "VERSION_NOT_SIGNED"


def test_the_permission_to_go_down_counts_only_up_to_its_version() -> None:
    """A later version with a higher floor is not undone by an old permission."""
    held = Held(active=10, active_digest=digest(10), floor=10)
    assert outcome(held, 5, digest(5), Named(digest(5), allowed_from=9)) == "VERSION_BELOW_FLOOR"
    assert outcome(held, 5, digest(5), Named(digest(5), allowed_from=10)) == "accepted"
