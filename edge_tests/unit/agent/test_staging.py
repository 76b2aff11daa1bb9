"""Room for inputs of requests that wait: places never overlap, outlive readers, follow each other in runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from agent.limits import ARENA_KEEP_BYTES, MAX_RUNS, MAX_STAGED_BYTES, RUN_BYTES
from agent.staging import Place, Staged, Staging, joined


@pytest.fixture
def staging() -> Iterator[Staging]:
    staging = Staging.create()
    yield staging
    staging.close()


def test_the_room_is_bounded(staging: Staging) -> None:
    whole = staging.take(MAX_STAGED_BYTES)
    assert whole is not None
    assert whole.start == 0
    assert whole.room.size == MAX_STAGED_BYTES
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


def staged(staging: Staging, kind: str, rows: int, value: float) -> Staged:
    size = rows * 64 * 4
    place = staging.take(size, kind)
    assert place is not None
    inputs = Staged(place)
    inputs["x"] = place.room.view(np.float32).reshape(rows, 64)
    inputs["x"][:] = value
    return inputs


def test_what_arrives_in_order_lies_as_one_array(staging: Staging) -> None:
    """Other kinds and single places between them do not part a run."""
    several = []
    for number in range(5):
        several.append(staged(staging, "a", 1 + number % 2, number))
        staged(staging, "b", 1, -1)
        staging.take(1000)
    whole = joined(several)
    assert whole is not None
    assert whole["x"].tolist() == [[n] * 64 for n in (0, 1, 1, 2, 3, 3, 4)]
    assert whole.start == several[0].start
    part = joined(several[2:4])
    assert part is not None
    assert np.shares_memory(part["x"], several[2]["x"])
    assert whole.hold()
    for each in several:
        each.drop()
    assert len(staging.places) == 15  # the exchange reads them still
    whole.drop()
    assert len(staging.places) == 10
    assert not whole.hold()


def test_what_does_not_follow_each_other_is_not_joined(staging: Staging) -> None:
    first, second, third = (staged(staging, "a", 1, n) for n in range(3))
    other = staged(staging, "b", 1, 9)
    plain = {"x": first["x"].copy()}
    assert joined([first, third]) is None
    assert joined([second, first]) is None
    assert joined([third, other]) is None
    assert joined([first, plain]) is None
    assert joined([plain]) is None
    assert joined([first]) is first
    odd = staging.take(100, "odd")
    after = staging.take(100, "odd")
    assert odd is not None
    assert after is not None
    pair = [Staged(place) for place in (odd, after)]
    for each in pair:
        each["x"] = each.places[0].room.reshape(1, 100)
    assert joined(pair) is None  # 28 bytes between them


def test_the_next_batch_begins_where_there_is_most_room(staging: Staging) -> None:
    size = RUN_BYTES // 8
    starts, running = [], []
    for _ in range(4):  # batches of three, each laid while the one before it runs
        batch = [staging.take(size, "a") for _ in range(3)]
        assert all(batch)
        starts.append([place.start // size for place in batch])
        for place in batch:
            place.hold()
        for place in running:
            place.drop()
            place.drop()
        running = batch
    assert starts == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


def test_a_run_that_is_full_goes_on_elsewhere(staging: Staging) -> None:
    size = RUN_BYTES // 4
    starts = []
    for _ in range(9):
        place = staging.take(size, "a")
        assert place is not None
        starts.append(place.start // size)
    assert starts == list(range(9))


def test_with_more_kinds_than_runs_there_is_still_room(staging: Staging) -> None:
    places = [staging.take(1 << 20, kind) for kind in range(MAX_RUNS + 60)]
    assert sum(place is not None for place in places) == MAX_STAGED_BYTES >> 20


class AnyUse(RuleBasedStateMachine):
    """Whatever is taken, held and dropped, in any order."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.staging = Staging.create()
        self.held: dict[Place, int] = {}

    def teardown(self) -> None:
        self.staging.close()

    @rule(
        target=places,
        size=st.integers(1, MAX_STAGED_BYTES // 3),
        kind=st.sampled_from([None, None, "a", "b", "c", "d", "e"]),
    )
    def take(self, size: int, kind: str | None) -> Place | None:
        place = self.staging.take(size, kind)
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
        end = 0
        for place in self.staging.places:
            assert place.start >= end
            assert place.start % 64 == 0
            end = place.start + place.size
        assert end <= MAX_STAGED_BYTES


AnyUse.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase
