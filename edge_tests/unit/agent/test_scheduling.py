"""The scheduler: rules by example, and then any sequence of events against what must always hold."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from agent.breaker import Breaker
from agent.curve import Curves
from agent.limits import (
    BREAKER_ANSWERS,
    BREAKER_FIRST_S,
    COST_LATEST,
    CURVE_KEEP_S,
    HANDICAP_S,
    LEAST_QUEUE,
    MAX_LENGTH_CLASSES,
    MOST_RETRY_S,
    QUEUE_WAIT_S,
    SIZE_SEEN,
    WINDOW_BUSY_S,
    WINDOW_IDLE_S,
)
from agent.scheduling import Batch, Item, Policy, Priority, Scheduler

NUMBERS = itertools.count()
FAR = 1e9


def item(
    now: float = 0.0,
    *,
    key: str = "a",
    samples: int = 1,
    priority: Priority = Priority.NORMAL,
    deadline: float = FAR,
    elements: int = 8,
) -> Item:
    return Item(next(NUMBERS), key, samples, elements, priority, now, deadline)


def learned(policy: Policy, costs: dict[int, float], elements: int = 8) -> Scheduler:
    """A scheduler that knows what batches of these sizes cost, in seconds."""
    scheduler = Scheduler(policy)
    for samples, seconds in costs.items():
        for _ in range(SIZE_SEEN):
            scheduler.curves.learn(elements, samples, seconds, policy, 0.0)
    return scheduler


def run(scheduler: Scheduler, now: float, seconds: float = 0.001) -> Batch:
    batch = scheduler.take(now)
    assert batch is not None
    scheduler.finished(batch, now + seconds, ran=True)
    return batch


CHEAP = {1: 0.010, 2: 0.011, 4: 0.012, 8: 0.013}  # a fuller batch pays
DEAR = {1: 0.010, 2: 0.021, 4: 0.043, 8: 0.088}  # it does not


def test_nothing_waits_while_the_worker_is_free() -> None:
    scheduler = Scheduler(Policy(max_batch=8))
    first = item()
    assert scheduler.submit(first, 0.0) == []
    batch = scheduler.take(0.0)
    assert batch is not None
    assert batch.items == (first,)
    assert scheduler.take(0.0) is None


def test_what_queued_meanwhile_is_the_next_batch() -> None:
    scheduler = learned(Policy(max_batch=8), CHEAP)
    scheduler.submit(item(), 0.0)
    scheduler.take(0.0)
    waiting = [item(0.01) for _ in range(10)]
    for each in waiting:
        scheduler.submit(each, 0.01)
    scheduler.finished(scheduler.running[0], 0.02, ran=True)
    batch = scheduler.take(0.02)
    assert batch is not None
    assert batch.items == tuple(waiting[:8])


def test_a_model_that_batching_does_not_help_runs_one_by_one() -> None:
    scheduler = learned(Policy(max_batch=8), DEAR)
    for _ in range(4):
        scheduler.submit(item(), 0.0)
    assert [run(scheduler, 0.0).samples for _ in range(4)] == [1, 1, 1, 1]
    assert not learned(Policy(max_batch=1), CHEAP).curves.pays(8, 1, Policy(max_batch=1))


def test_sizes_are_explored_until_they_are_known() -> None:
    policy = Policy(max_batch=8, target_s=1.0)
    scheduler = Scheduler(policy)
    sizes = []
    for _ in range(60):
        while len(scheduler.waiting) < 8:
            scheduler.submit(item(), 0.0)
        batch = scheduler.take(0.0)
        assert batch is not None
        sizes.append(batch.samples)
        scheduler.finished(batch, DEAR[batch.samples], ran=True)
    assert sizes[: 4 * SIZE_SEEN] == [size for size in (1, 2, 4, 8) for _ in range(SIZE_SEEN)]
    assert set(sizes[4 * SIZE_SEEN :]) == {1}


def test_requests_of_many_samples_are_put_together_too() -> None:
    policy = Policy(max_batch=16)
    scheduler = learned(policy, {3: 0.010, 6: 0.011, 12: 0.012})
    for _ in range(4):
        scheduler.submit(item(samples=3), 0.0)
    assert run(scheduler, 0.0).samples == 12
    scheduler.submit(item(samples=100), 0.0)
    assert run(scheduler, 0.0).samples == 100  # larger than any batch: alone


def test_lengths_have_queues_and_curves_of_their_own() -> None:
    policy = Policy(max_batch=8)
    scheduler = learned(policy, CHEAP, elements=8)
    for samples, seconds in DEAR.items():
        for _ in range(SIZE_SEEN):
            scheduler.curves.learn(128, samples, seconds, policy, 0.0)
    for _ in range(4):
        scheduler.submit(item(key="short", elements=8), 0.0)
        scheduler.submit(item(key="long", elements=128), 0.0)
    batches = []
    while scheduler.waiting:
        batches.append(run(scheduler, 0.0))
    assert [(batch.items[0].key, batch.samples) for batch in batches] == [
        ("short", 4),
        *[("long", 1)] * 4,
    ]


def test_a_higher_priority_overtakes_but_not_for_ever() -> None:
    scheduler = Scheduler(Policy())
    low, high = item(0.0, priority=Priority.LOW), item(1.0, priority=Priority.HIGH)
    scheduler.submit(low, 0.0)
    scheduler.submit(high, 1.0)
    assert run(scheduler, 1.0).items == (high,)
    late = HANDICAP_S[Priority.LOW] + 0.1
    scheduler.submit(item(late, priority=Priority.HIGH), late)
    assert run(scheduler, late).items == (low,)


def test_a_full_queue_turns_the_lowest_priority_away_first() -> None:
    scheduler = learned(Policy(queue=2), {1: 0.5})
    low, normal = item(priority=Priority.LOW), item()
    scheduler.submit(low, 0.0)
    scheduler.submit(normal, 0.0)
    (shed,) = scheduler.submit(item(priority=Priority.HIGH), 0.0)
    assert shed.item == low
    assert 0.5 <= shed.retry_s <= MOST_RETRY_S
    again = item(priority=Priority.LOW)
    (shed,) = scheduler.submit(again, 0.0)
    assert shed.item == again


@pytest.mark.parametrize(("seconds", "most"), [(0.001, 100), (0.0099, 100), (0.012, 83), (0.5, LEAST_QUEUE)])
def test_a_burst_is_kept_if_it_will_have_run_soon(seconds: float, most: int) -> None:
    scheduler = Scheduler(Policy(queue=100))
    scheduler.submit(item(), 0.0)
    run(scheduler, 0.0, seconds)
    shed = [each for _ in range(150) for each in scheduler.submit(item(), 1.0)]
    assert len(scheduler.waiting) == most
    assert len(shed) == 150 - most


def test_before_anything_ran_a_short_queue_is_kept() -> None:
    scheduler = Scheduler(Policy())
    for _ in range(2 * LEAST_QUEUE):
        scheduler.submit(item(), 0.0)
    assert len(scheduler.waiting) == LEAST_QUEUE


WINDOW = Policy(max_batch=8, window_s=1.0)


def waiting_for_more(policy: Policy = WINDOW, *, gap_s: float = 0.001, load: float = 0.0) -> Scheduler:
    """Two requests of a model that batching helps, the second after `gap_s`, at 1.0."""
    scheduler = learned(policy, CHEAP)
    scheduler.load = load
    for now in (1.0 - gap_s, 1.0):
        scheduler.submit(item(1.0), now)
    return scheduler


def test_the_window_is_short_under_load_and_longer_below() -> None:
    for load, wait_s in ((0.9, WINDOW_BUSY_S), (0.8, WINDOW_BUSY_S), (0.0, WINDOW_IDLE_S), (0.4, 0.0125)):
        scheduler = waiting_for_more(load=load)
        assert scheduler.take(1.0) is None
        assert scheduler.wake_at(1.0) == pytest.approx(1.0 + wait_s)
        assert scheduler.take(1.0 + wait_s) is not None
    assert waiting_for_more(replace(WINDOW, window_s=0.003)).wake_at(1.0) == pytest.approx(1.003)


def test_nothing_waits_for_more_where_it_is_of_no_use() -> None:
    assert waiting_for_more(Policy(max_batch=8)).take(1.0)  # no window
    assert waiting_for_more(replace(WINDOW, max_batch=2)).take(1.0)  # full
    assert waiting_for_more(replace(WINDOW, preferred=(2,))).take(1.0)  # good enough
    assert waiting_for_more(gap_s=0.5).take(1.0)  # nobody is to be expected in time
    scheduler = learned(WINDOW, DEAR)
    for _ in range(2):
        scheduler.submit(item(1.0), 1.0)
    assert scheduler.take(1.0)  # a fuller batch does not pay


def test_the_window_ends_in_time_for_the_deadline() -> None:
    scheduler = waiting_for_more()
    scheduler.submit(item(1.0, deadline=1.016), 1.0)
    wake = scheduler.wake_at(1.0)
    assert wake is not None
    assert wake == pytest.approx(1.016 - CHEAP[4])
    assert scheduler.take(wake)


def test_deadlines_and_cancellation() -> None:
    scheduler = Scheduler(Policy())
    soon, later, gone = item(deadline=1.0), item(deadline=2.0), item()
    for each in (soon, later, gone):
        scheduler.submit(each, 0.0)
    assert scheduler.expire(0.5) == []
    assert scheduler.expire(1.0) == [soon]
    assert scheduler.cancel(gone.number)
    assert not scheduler.cancel(gone.number)
    assert scheduler.waiting == (later,)


def test_the_controller_halves_and_doubles() -> None:
    curves, policy = Curves(), Policy(max_batch=16, target_s=0.1)
    for samples, seconds, limit in ((16, 0.13, 8), (8, 0.13, 4), (4, 0.10, 4), (4, 0.07, 8), (4, 0.07, 8)):
        curves.learn(8, samples, seconds, policy, 0.0)
        assert curves._lengths[(8).bit_length()].limit == limit
    for _ in range(9):
        curves.learn(8, 1, 1.0, policy, 0.0)
    assert curves._lengths[(8).bit_length()].limit == 1


def test_what_was_not_seen_for_long_is_forgotten_and_classes_are_bounded() -> None:
    curves, policy = Curves(), Policy(max_batch=8)
    for samples, seconds in DEAR.items():
        for _ in range(SIZE_SEEN):
            curves.learn(8, samples, seconds, policy, 0.0)
    assert curves.batch_size(8, policy) == 1
    for _ in range(SIZE_SEEN):
        curves.learn(8, 1, DEAR[1], policy, CURVE_KEEP_S + 1)
    assert curves.batch_size(8, policy) == 2
    for power in range(MAX_LENGTH_CLASSES + 20):
        curves.learn(1 << power, 1, 0.1, policy, 0.0)
    assert len(curves._lengths) == MAX_LENGTH_CLASSES


def test_the_breaker_opens_probes_and_closes() -> None:
    breaker, bound_s = Breaker(), 0.1
    for number in range(BREAKER_ANSWERS):
        assert breaker.refuses(number, 0.0, bound_s) == 0
        breaker.note(number, 0.2 if number % 3 else 0.01, 0.0, bound_s)
    assert breaker.refuses(100, 0.0, bound_s) == BREAKER_FIRST_S
    breaker.note(99, 0.01, 0.5, bound_s)  # was let in before: says nothing about now
    assert breaker.refuses(100, 0.5, bound_s) > 0
    assert breaker.refuses(101, BREAKER_FIRST_S, bound_s) == 0  # the probe
    assert breaker.refuses(102, BREAKER_FIRST_S, bound_s) > 0
    breaker.note(101, 0.2, 1.5, bound_s)  # late: twice as long now
    assert breaker.refuses(103, 1.5, bound_s) == 2 * BREAKER_FIRST_S
    assert breaker.refuses(104, 4.0, bound_s) == 0
    breaker.forget(104)  # cancelled: another may be the probe
    assert breaker.refuses(105, 4.0, bound_s) == 0
    breaker.note(105, 0.01, 4.0, bound_s)
    assert breaker.refuses(106, 4.0, bound_s) == breaker.refuses(107, 4.0, bound_s) == 0
    assert Breaker().refuses(1, 0.0, 0.0) == 0


def test_requests_are_turned_away_while_the_breaker_is_open() -> None:
    scheduler = Scheduler(Policy(breaker_s=0.1))
    for _ in range(BREAKER_ANSWERS):
        scheduler.submit(item(0.0), 0.0)
        run(scheduler, 0.0, 0.5)
    (shed,) = scheduler.submit(item(0.5), 0.5)
    assert shed.retry_s == pytest.approx(BREAKER_FIRST_S)
    assert scheduler.waiting == ()
    assert scheduler.submit(item(2.0), 2.0) == []


class AnyEvents(RuleBasedStateMachine):
    """Any order of events. Every request leaves once, in time, in a batch that is allowed."""

    numbers = Bundle("numbers")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.policy = Policy(max_batch=8, window_s=0.02, queue=6, target_s=0.05, preferred=(4,))
        self.scheduler = Scheduler(self.policy)
        self.alive: dict[int, Item] = {}
        self.count = 0
        self.overtaken: dict[int, float] = {}

    @rule(
        target=numbers,
        key=st.sampled_from("ab"),
        samples=st.integers(1, 12),
        priority=st.sampled_from(Priority),
        patience=st.sampled_from([0.001, 0.05, 10.0]),
    )
    def submit(self, key: str, samples: int, priority: Priority, patience: float) -> int:
        self.count += 1
        length = 8 if key == "a" else 800
        made = Item(self.count, key, samples, length, priority, self.now, self.now + patience)
        self.alive[made.number] = made
        before = self.scheduler.waiting
        for shed in self.scheduler.submit(made, self.now):
            del self.alive[shed.item.number]
            assert all(shed.item.priority >= other.priority for other in (*before, made))
            assert shed.retry_s > 0
        return made.number

    @rule(workers=st.integers(1, 3))
    def workers_come_and_go(self, workers: int) -> None:
        self.scheduler.workers = workers

    @rule(numbers=st.lists(st.integers(1, 50), max_size=2))
    def cancel(self, numbers: list[int]) -> None:
        running = self.scheduler.running
        for number in numbers:
            waits = number in {each.number for each in self.scheduler.waiting}
            assert self.scheduler.cancel(number) == waits
            if waits:
                del self.alive[number]
        assert self.scheduler.running == running

    @rule(target=numbers, seconds=st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.3, 3.0]))
    def time_passes(self, seconds: float) -> object:
        self.now += seconds
        for late in self.scheduler.expire(self.now):
            assert late.deadline <= self.now
            del self.alive[late.number]
        return multiple()

    @rule()
    def take(self) -> None:
        before, running = self.scheduler.waiting, self.scheduler.running
        wake = self.scheduler.wake_at(self.now)
        batch = self.scheduler.take(self.now)
        if batch is None:
            if len(running) < self.scheduler.workers and before:  # only the window keeps them
                assert wake is not None
                assert self.now < wake <= min(each.arrived for each in before) + WINDOW_IDLE_S + 1e-9
                assert wake <= min(each.deadline for each in before if each.key == before[0].key)
            return
        assert len(running) < self.scheduler.workers
        assert self.scheduler.running == (*running, batch)
        assert batch.items[0] == before[0]
        assert len({each.key for each in batch.items}) == 1
        assert len(batch.items) == 1 or batch.samples <= self.policy.max_batch
        for chosen in batch.items:
            del self.alive[chosen.number]
        for other in self.scheduler.waiting:  # nobody who came after one's handicap was over is taken before
            if other.key != batch.items[0].key or len(batch.items) == 1:
                head = batch.items[0]
                assert head.arrived <= other.arrived + HANDICAP_S[other.priority]

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.07]), ran=st.booleans(), which=st.integers(0, 2))
    def finish(self, seconds: float, ran: bool, which: int) -> None:
        running = self.scheduler.running
        if running:
            batch = running[which % len(running)]
            self.now += seconds
            self.scheduler.finished(batch, self.now, ran=ran)
            assert self.scheduler.running == tuple(each for each in running if each is not batch)
            assert 0 <= self.scheduler.load <= 1

    @rule(most=st.integers(0, 6))
    def trim(self, most: int) -> None:
        for shed in self.scheduler.trim(most, "stalled"):
            del self.alive[shed.item.number]
        assert len(self.scheduler.waiting) <= most

    @invariant()
    def nobody_is_lost_and_the_queue_is_bounded(self) -> None:
        assert {each.number for each in self.scheduler.waiting} == set(self.alive)
        assert len(self.scheduler.waiting) <= self.policy.queue
        assert list(self.scheduler.waiting) == sorted(
            self.scheduler.waiting, key=lambda each: (each.rank, each.number)
        )
        assert 0 <= self.scheduler.load <= 1


AnyEvents.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestAnyEvents = AnyEvents.TestCase


class Simulation:
    """Requests at random times before workers of simulated time; `stall_s`: the box stands still once."""

    def __init__(
        self, costs: dict[int, float], share: float, *, stall_s: float = 0.0, workers: int = 1, seed: int = 1
    ) -> None:
        """Args: `costs` of one request by its elements, each as frequent; `share` of the capacity offered."""
        rng = random.Random(seed)
        self.scheduler = Scheduler(Policy(), workers)
        mean_s = sum(costs.values()) / len(costs)
        rate = share * workers / mean_s
        self.offered: list[Item] = []
        self.shed: list[tuple[Item, float]] = []
        self.waits: dict[Priority, list[float]] = {priority: [] for priority in Priority}
        ends: list[tuple[float, int, Batch]] = []
        now, arrival, stalled = 0.0, 0.0, False
        while len(self.offered) < 4000 or ends:
            if len(self.offered) < 4000 and (not ends or arrival <= ends[0][0]):
                now = arrival
                arrival += rng.expovariate(rate)
                priority = rng.choice([Priority.HIGH, Priority.NORMAL, Priority.LOW])
                made = item(now, elements=rng.choice(list(costs)), priority=priority)
                self.offered.append(made)
                self.shed += [(each.item, each.retry_s) for each in self.scheduler.submit(made, now)]
            else:
                now, _, batch = heapq.heappop(ends)
                self.scheduler.finished(batch, now, ran=True)
            while (batch := self.scheduler.take(now)) is not None:
                took_s = sum(costs[each.elements] for each in batch.items)
                if stall_s and len(self.offered) > 2000 and not stalled:
                    took_s, stalled = took_s + stall_s, True
                for each in batch.items:
                    self.waits[each.priority].append(now - each.arrived)
                heapq.heappush(ends, (now + took_s, id(batch), batch))


LENGTHS = {16: 0.002, 128: 0.012}  # seconds for a request of so many elements


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("costs", [{8: 0.003}, LENGTHS])
def test_at_80_percent_of_the_capacity_nothing_is_turned_away(costs: dict[int, float], workers: int) -> None:
    """Not even where the box stood still for a while, and with lengths of very different cost."""
    for seed in range(3):
        for stall_s in (0.0, 0.3):
            seen = Simulation(costs, 0.8, stall_s=stall_s, workers=workers, seed=seed)
            assert seen.shed == []
            worst = max(max(waits) for waits in seen.waits.values())
            assert worst < stall_s + HANDICAP_S[Priority.LOW]


def test_one_batch_that_was_held_up_does_not_change_what_requests_are_thought_to_cost() -> None:
    scheduler = Scheduler(Policy())
    for number in range(20):
        scheduler.submit(item(), 0.0)
        run(scheduler, 0.0, 2.0 if number == 15 else 0.003)
    for _ in range(LEAST_QUEUE * 2):
        assert scheduler.submit(item(), 0.0) == []
    assert scheduler.wait_s() == pytest.approx(LEAST_QUEUE * 2 * 0.003)
    for _ in range(COST_LATEST):  # but what stays so counts
        run(scheduler, 0.0, 0.1)
    assert scheduler.submit(item(), 0.0) != []


def test_150_percent_turns_the_lowest_priority_away_and_says_when_to_come_again() -> None:
    seen = Simulation(LENGTHS, 1.5)
    by_priority = dict.fromkeys(Priority, 0)
    for shed, retry_s in seen.shed:
        by_priority[shed.priority] += 1
        assert 0.1 < retry_s < MOST_RETRY_S
    assert 0.25 < len(seen.shed) / len(seen.offered) < 0.4
    assert by_priority[Priority.HIGH] == 0
    assert by_priority[Priority.LOW] > 10 * by_priority[Priority.NORMAL]
    assert max(seen.waits[Priority.HIGH]) < QUEUE_WAIT_S + HANDICAP_S[Priority.NORMAL]
