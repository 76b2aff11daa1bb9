"""Room for inputs beside the running message: places never overlap, outlive readers, give memory back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from agent.arena import ARENA_BYTES, Arena
from agent.limits import ARENA_KEEP_BYTES, MAX_FRAME_PAYLOAD_BYTES, MAX_STAGED_BYTES
from agent.staging import Place, Staging


@pytest.fixture
def staging() -> Iterator[Staging]:
    arena = Arena.create()
    yield Staging(arena)
    arena.close()


def test_the_room_lies_behind_the_running_message_and_is_bounded(staging: Staging) -> None:
    whole = staging.take(MAX_STAGED_BYTES)
    assert whole is not None
    assert whole.start >= MAX_FRAME_PAYLOAD_BYTES
    assert whole.start + whole.size == ARENA_BYTES
    assert staging.take(1) is None
    whole.drop()
    assert staging.take(MAX_STAGED_BYTES + 1) is None
    assert staging.take(1) is not None


def test_a_place_is_free_only_when_nobody_holds_it(staging: Staging) -> None:
    first = staging.take(100)
    assert first is not None
    assert first.hold()
    first.drop()
    other = staging.take(100)
    assert other is not None
    assert other.start >= first.start + 100
    first.drop()
    assert not first.hold()
    again = staging.take(100)
    assert again is not None
    assert again.start == first.start


def test_memory_is_given_back_when_much_less_is_wanted(staging: Staging) -> None:
    def resident() -> int:
        return os.fstat(staging.arena.descriptor).st_blocks * 512

    for _ in range(3):
        large = staging.take(8 * ARENA_KEEP_BYTES)
        assert large is not None
        staging.arena.bytes[large.start : large.start + large.size] = 1
        large.drop()
        assert resident() >= large.size  # the next one may be as large
    small = staging.take(1000)
    assert small is not None
    assert resident() < ARENA_KEEP_BYTES
    assert not np.any(staging.arena.bytes[small.start : small.start + small.size])


class AnyUse(RuleBasedStateMachine):
    """Whatever is taken, held and dropped, in any order."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena.create()
        self.staging = Staging(self.arena)
        self.held: dict[Place, int] = {}

    def teardown(self) -> None:
        self.arena.close()

    @rule(target=places, size=st.integers(1, MAX_STAGED_BYTES // 3))
    def take(self, size: int) -> Place | None:
        place = self.staging.take(size)
        if place is None:
            assert sum(item.size for item in self.held) + size > MAX_STAGED_BYTES // 3
        else:
            self.held[place] = 1
        return place

    @rule(target=places, place=consumes(places))
    def hold(self, place: Place | None) -> Place | None:
        if place is not None:
            assert place.hold() == (place in self.held)
            if place in self.held:
                self.held[place] += 1
        return place

    @rule(target=places, place=consumes(places))
    def drop(self, place: Place | None) -> Place | None:
        if place in self.held:
            place.drop()
            self.held[place] -= 1
            if not self.held[place]:
                del self.held[place]
        return place

    @invariant()
    def nothing_overlaps(self) -> None:
        assert self.staging.places == sorted(self.held, key=lambda place: place.start)
        end = MAX_FRAME_PAYLOAD_BYTES
        for place in self.staging.places:
            assert place.start >= end
            assert place.start % 64 == 0
            end = place.start + place.size
        assert end <= ARENA_BYTES


AnyUse.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase
