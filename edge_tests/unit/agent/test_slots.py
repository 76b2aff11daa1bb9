from __future__ import annotations

import itertools

import pytest

from agent import slots as moves
from agent.slots import Installed, Slots
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

VERSIONS = [None, *(Installed(n, f"sha256:{n:064d}", "v", "onnxruntime") for n in (1, 2, 3))]


def every_slots() -> list[Slots]:
    """Every combination that the rules allow."""
    return [
        Slots("m", active, previous, staged, soaking, pinned)
        for active, previous, staged in itertools.product(VERSIONS, repeat=3)
        for soaking, pinned in itertools.product((False, True), repeat=2)
        if active is not None or (previous is None and not soaking and not pinned)
        if previous is None or previous != active
    ]


def steps(slots: Slots) -> list[Slots]:
    """All that can follow in one transaction."""
    after = [moves.unstage(slots), moves.soaked(slots), moves.unpin(slots)]
    after += [moves.stage(slots, version) for version in VERSIONS if version is not None]
    if slots.staged is not None:
        after.append(moves.commit(slots))
    if slots.active is not None and slots.previous is not None:
        after += [moves.revert(slots, pin=False), moves.revert(slots, pin=True)]
    return after


def test_whatever_the_move_the_box_serves_old_or_new() -> None:
    for before in every_slots():
        for after in steps(before):
            if before.active is not None:
                assert after.active in (before.active, before.staged, before.previous)
                assert after.active is not None
            assert after.previous is None or after.previous != after.active
            assert after.model == before.model


def test_only_commit_makes_staged_active() -> None:
    for before in every_slots():
        for after in steps(before):
            if after.active != before.active:
                committed = before.staged is not None and after == moves.commit(before)
                reverted = before.previous is not None and after.active == before.previous
                assert committed or reverted


def test_commit_keeps_what_served_as_previous() -> None:
    for before in every_slots():
        if before.staged is None:
            with pytest.raises(SluiceError) as caught:
                moves.commit(before)
            assert caught.value.reason == errors_pb2.INTERNAL
            continue
        after = moves.commit(before)
        assert after.active == before.staged
        assert after.staged is None
        assert after.soaking
        if before.active == before.staged:
            assert after.previous == before.previous
        else:
            assert after.previous == before.active


def test_revert_cannot_be_repeated() -> None:
    for before in every_slots():
        if before.active is None:
            with pytest.raises(SluiceError) as caught:
                moves.revert(before, pin=True)
            assert caught.value.reason == errors_pb2.MODEL_NOT_SERVING
        elif before.previous is None:
            with pytest.raises(SluiceError) as caught:
                moves.revert(before, pin=True)
            assert caught.value.reason == errors_pb2.NO_PREVIOUS_VERSION
        else:
            after = moves.revert(before, pin=True)
            assert after.pinned
            with pytest.raises(SluiceError):
                moves.revert(after, pin=False)


def test_held_names_every_slot() -> None:
    first, second, third = VERSIONS[1:]
    assert Slots("m", first, second, third).held == (first, second, third)
    assert Slots("m").held == ()
