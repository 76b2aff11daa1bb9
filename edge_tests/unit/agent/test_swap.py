"""The swap's state machine: every sequence of events against what must always hold, then rules by example."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.judging import Gates, Likeness, Outcomes, ShadowTerms, Times, times_of
from agent.memory import Memory
from agent.swap import (
    AFTER_COMMIT,
    BEFORE_COMMIT,
    ENDS,
    Abort,
    Checked,
    CrashLooped,
    Deadlines,
    Died,
    Do,
    Done,
    Event,
    Failed,
    Failure,
    GoBack,
    Phase,
    Plan,
    Side,
    Swap,
    Terms,
    Tick,
    advance,
    begin,
    resume,
)
from sluice.api.v1 import errors_pb2

WHY = Failure(errors_pb2.WORKER_DIED, "it died")
ROOM, NO_ROOM = Memory(10, 100), Memory(100, 10)
DEADLINES = Deadlines(checking=5, stopping=5, starting=5, warming=5, proving=5, draining=5, restoring=5)
FAST, SLOW = Times(0.010, 0.010), Times(0.015, 0.030)
GOOD = Tick(Likeness(compared=100), Outcomes(100, 0, FAST), Outcomes(100, 0, FAST))
UNLIKE = Tick(Likeness(compared=100, mismatched=100))
FAILING = Tick(new=Outcomes(100, 90, FAST), old=Outcomes(100, 0, FAST))
# What only the driver can know how it ended: the machine has no deadline for these.
WRITES = {Phase.COMMITTING, Phase.TURNING, Phase.UNDOING, Phase.SETTLING, Phase.REVERTING}
ANSWERED = {*WRITES, *BEFORE_COMMIT, Phase.DRAINING, Phase.RESTORING} - {Phase.SHADOWING}
MOST_STEPS = 14  # from any state to an end, when every deadline passes


def plan(
    *,
    old_serves: bool = True,
    can_go_back: bool = True,
    keep_warm: bool = True,
    stop_first: bool = False,
    share: float = 0.0,
) -> Plan:
    terms = Terms(
        ShadowTerms(share=share, seconds=60, requests=100),
        Gates(),
        soak_s=30,
        keep_warm=keep_warm,
        stop_first=stop_first,
    )
    return Plan("m", 2, 1 if old_serves else 0, old_serves, can_go_back, terms, DEADLINES)


PLANS = [
    plan(old_serves=serves, can_go_back=back, keep_warm=warm, stop_first=stop, share=share)
    for serves, back, warm, stop in itertools.product((True, False), repeat=4)
    for share in (0.0, 0.5)
    if back or not serves  # what serves is what a revert goes back to
]


@dataclass(frozen=True)
class World:
    """What the driver's doing makes of the box: the slots, the router, the workers."""

    slots: Side
    router: Side
    new_lives: bool = False
    copying: bool = False
    commits: int = 0
    undo_failed: bool = False
    handed_over: bool = False

    def answered(self, phase: Phase, *, done: bool) -> World:
        """The driver answers: what it was asked for has happened, or has not."""
        if phase is Phase.UNDOING and not done:
            return replace(self, undo_failed=True)
        if not done:
            return self
        return {
            Phase.STARTING: replace(self, new_lives=True),
            Phase.COMMITTING: replace(self, slots=Side.NEW, commits=self.commits + 1),
            Phase.TURNING: replace(self, router=Side.NEW),
            Phase.UNDOING: replace(self, slots=Side.OLD),
            Phase.REVERTING: replace(self, slots=Side.OLD, router=Side.OLD),
            Phase.RESTORING: replace(self, router=Side.OLD),
        }.get(phase, self)

    def do(self, actions: tuple[Do, ...]) -> World:
        world = self
        for action in actions:
            if action is Do.STOP_OLD:
                world = replace(world, router=Side.NONE)
            elif action is Do.CLOSE_NEW:
                assert world.router is not Side.NEW, "what answers is never closed"
                world = replace(world, new_lives=False)
            elif action is Do.SHADOW:
                assert world.new_lives
                world = replace(world, copying=True)
            elif action is Do.MIRROR:
                assert world.router is Side.NEW
                assert not world.copying
                world = replace(world, copying=True)
            elif action is Do.END_SHADOW:
                assert world.copying
                world = replace(world, copying=False)
            elif action is Do.COMMIT:
                assert world.new_lives, "only what was loaded is committed"
                assert world.commits == 0, "there is one commit"
            elif action is Do.GO_BACK:
                assert world.commits == 1 or world.slots is Side.NEW
            elif action is Do.HAND_OVER:
                world = replace(world, handed_over=True)
        return world


def events(swap: Swap) -> Iterator[tuple[Event, float]]:
    """Everything that can come next, with the time; answers of passed phases too."""
    late = swap.since + (swap.left(swap.since) or 0.0)
    for phase in (Phase.STARTING, Phase.COMMITTING, Phase.REVERTING):
        if phase is not swap.phase:
            yield Done(phase), swap.since
            yield Failed(phase, WHY), swap.since
    if swap.phase is Phase.CHECKING:
        yield Checked(ROOM), swap.since
        yield Checked(NO_ROOM), swap.since
    elif swap.phase in ANSWERED:
        yield Done(swap.phase), swap.since
    if swap.phase in ANSWERED:
        yield Failed(swap.phase, WHY), swap.since
    for seen in (Tick(), GOOD, UNLIKE, FAILING):
        yield seen, swap.since
        yield seen, late
    for event in (Died(WHY), CrashLooped(WHY), Abort(), GoBack()):
        yield event, swap.since


def holds(swap: Swap, world: World) -> None:
    """What must hold in every state."""
    first = swap.plan
    assert swap.serving is world.router
    if first.old_serves and world.router is Side.NONE:
        assert first.terms.stop_first
        assert swap.stopped
        assert swap.phase is not Phase.ABANDONED
        assert world.handed_over == (swap.phase is Phase.STRANDED)
    assert world.copying == (swap.phase is Phase.SHADOWING or swap.mirroring)
    assert swap.phase in AFTER_COMMIT or not swap.mirroring
    assert world.commits <= 1
    if world.router is Side.NEW:
        assert world.slots is Side.NEW
    if swap.phase is Phase.COMMITTED:
        assert (world.slots, world.router) == (Side.NEW, Side.NEW)
    if swap.phase is Phase.REVERTED:
        assert (world.slots, world.router) == (Side.OLD, Side.OLD)
        assert first.can_go_back
        assert swap.asked or swap.failure is not None
    if swap.phase is Phase.ABANDONED:
        assert world.router is (Side.OLD if first.old_serves else Side.NONE)
        assert not world.new_lives
        assert swap.aborted or swap.failure is not None
        assert world.slots is Side.OLD or world.undo_failed
    if swap.phase is Phase.STRANDED:
        assert swap.aborted or swap.failure is not None
        assert (world.router is Side.NEW) != world.handed_over


def step(swap: Swap, world: World, event: Event, now: float) -> tuple[Swap, World]:
    if isinstance(event, Done | Failed) and event.phase is swap.phase:
        world = world.answered(swap.phase, done=isinstance(event, Done))
    swap, actions = advance(swap, event, now)
    return swap, world.do(actions)


def name(wanted: Plan) -> str:
    terms = wanted.terms
    flags = (wanted.old_serves, wanted.can_go_back, terms.keep_warm, terms.stop_first, terms.shadow.share > 0)
    words = ("serves", "back", "warm", "stop", "shadow")
    return "-".join(word for word, flag in zip(words, flags, strict=True) if flag) or "none"


@pytest.mark.parametrize("wanted", PLANS, ids=name)
def test_every_sequence_of_events(wanted: Plan) -> None:
    """All reachable states, with times counted from the beginning of their phase."""
    swap, actions = begin(wanted, 0.0)
    assert actions == (Do.CHECK,)
    start = (swap, World(Side.OLD, swap.serving))
    seen, frontier, ends = {start}, [start], set()
    while frontier:
        swap, world = frontier.pop()
        holds(swap, world)
        if swap.ended:
            ends.add(swap.phase)
            assert all(advance(swap, event, now) == (swap, ()) for event, now in events(swap))
            continue
        ends_in_time(swap, world)
        for event, now in events(swap):
            following, after = step(swap, world, event, now)
            gap = None if following.gap_since is None else 0.0
            state = (replace(following, since=0.0, gap_s=0.0, gap_since=gap), after)
            if state not in seen:
                seen.add(state)
                frontier.append(state)
    expected = ENDS - {Phase.REVERTED} if not wanted.can_go_back else ENDS
    assert ends == expected, "every end can be reached"


def ends_in_time(swap: Swap, world: World) -> None:
    """However often things fail: writes answer, for the rest their deadlines pass."""
    for done in (True, False):
        at, now = (swap, world), swap.since
        for _ in range(MOST_STEPS):
            if at[0].ended:
                break
            left = at[0].left(now)
            if left is None:
                always = at[0].phase is Phase.SETTLING  # a disk that stays full would keep it soaking
                ok = done or always
                at = step(*at, Done(at[0].phase) if ok else Failed(at[0].phase, WHY), now)
            else:
                now += max(left, 0.0)
                at = step(*at, Tick(), now)
        assert at[0].ended, at


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PLANS),
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 50), st.integers(0, 200), st.integers(0, 200))),
)
def test_any_figures_at_any_time(wanted: Plan, choices: list[tuple[int, float, int, int]]) -> None:
    swap, _ = begin(wanted, 0.0)
    world, now = World(Side.OLD, swap.serving), 0.0
    for which, seconds, many, few in choices:
        now += seconds
        seen = Tick(
            Likeness(many, min(few, many), few, times=times_of([seconds / 10]), previous=FAST),
            Outcomes(many, min(few, many), times_of([seconds / 10])),
            Outcomes(few, 0, FAST),
        )
        offered: list[Event] = [seen, *(event for event, _ in events(swap))]
        swap, world = step(swap, world, offered[which % len(offered)], now)
        holds(swap, world)
        assert swap.gap(now) <= now


def go(swap: Swap, *steps: tuple[Event, float]) -> tuple[Swap, tuple[Do, ...]]:
    actions: tuple[Do, ...] = ()
    for event, now in steps:
        swap, actions = advance(swap, event, now)
    return swap, actions


def proven(wanted: Plan, memory: Memory = ROOM) -> tuple[Swap, tuple[Do, ...]]:
    """One second a phase, until the golden inputs were answered."""
    swap, actions = go(begin(wanted, 0.0)[0], (Checked(memory), 1.0))
    now = 1.0
    while swap.phase in (Phase.STOPPING, Phase.STARTING, Phase.WARMING, Phase.PROVING):
        now += 1.0
        swap, actions = advance(swap, Done(swap.phase), now)
    return swap, actions


def soaking(wanted: Plan, memory: Memory = ROOM) -> Swap:
    swap, _ = proven(wanted, memory)
    now = swap.since + 1
    swap, _ = go(swap, (Done(Phase.COMMITTING), now), (Done(Phase.TURNING), now + 1))
    return swap


def test_no_room_is_refused_with_what_helps() -> None:
    swap, actions = go(begin(plan(), 0.0)[0], (Checked(Memory(300 << 20, 200 << 20)), 1.0))
    assert (swap.phase, actions, swap.serving) == (Phase.ABANDONED, (), Side.OLD)
    assert swap.failure is not None
    assert swap.failure.reason == errors_pb2.MEMORY_SHORT
    assert "needs about 300 MiB beside version 1; 200 MiB are available" in swap.failure.message
    assert "stop-then-start" in swap.failure.hint


def test_memory_to_be_left_free_counts() -> None:
    kept = replace(plan(), terms=replace(plan().terms, reserve_bytes=91))
    assert go(begin(kept, 0.0)[0], (Checked(ROOM), 1.0))[0].phase is Phase.ABANDONED
    alone = replace(kept, old_serves=False)
    assert go(begin(alone, 0.0)[0], (Checked(NO_ROOM), 1.0))[0].phase is Phase.STARTING  # nothing beside it


def test_the_gap_of_stop_then_start_is_measured() -> None:
    swap = soaking(plan(stop_first=True, share=0.5), NO_ROOM)  # no shadow: nobody answers beside it
    assert swap.phase is Phase.SOAKING
    assert swap.gap_s == 6.0  # from 1 to 7: stopping, starting, warming, proving, committing, turning
    assert swap.gap(1000.0) == 6.0


def test_the_gap_ends_when_the_old_version_is_started_again() -> None:
    swap, _ = go(begin(plan(stop_first=True), 0.0)[0], (Checked(NO_ROOM), 1.0), (Done(Phase.STOPPING), 2.0))
    swap, actions = go(swap, (Failed(Phase.STARTING, WHY), 5.0))
    assert (swap.phase, actions) == (Phase.RESTORING, (Do.CLOSE_NEW, Do.RESTORE))
    swap, _ = go(swap, (Done(Phase.RESTORING), 9.0))
    assert (swap.phase, swap.gap_s, swap.failure) == (Phase.ABANDONED, 8.0, WHY)


def test_a_shadow_ends_with_enough_that_is_alike() -> None:
    swap, actions = proven(plan(share=0.1))
    assert (swap.phase, actions) == (Phase.SHADOWING, (Do.SHADOW,))
    assert go(swap, (Tick(Likeness(compared=99)), 10.0)) == (swap, ())
    swap, actions = go(swap, (Tick(Likeness(compared=100)), 10.0))
    assert (swap.phase, actions) == (Phase.COMMITTING, (Do.END_SHADOW, Do.COMMIT))


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (Likeness(compared=60, mismatched=4, worst="y: cosine 0.3"), "4 of 60 live requests got another"),
        (Likeness(compared=50, unanswered=10), "it failed 10 of 60 live requests"),
        (Likeness(compared=100, times=SLOW, previous=FAST), "took up to 30.0 ms"),
    ],
)
def test_a_shadow_that_is_unlike_is_given_up(seen: Likeness, says: str) -> None:
    swap, actions = go(proven(plan(share=0.1))[0], (Tick(seen), 10.0))
    assert (swap.phase, actions) == (Phase.ABANDONED, (Do.END_SHADOW, Do.CLOSE_NEW))
    assert swap.failure is not None
    assert swap.failure.reason == errors_pb2.SHADOW_MISMATCH
    assert says in swap.failure.message


def test_a_shadow_without_traffic_goes_on_at_its_end() -> None:
    swap, _ = proven(plan(share=0.1))
    few = Tick(Likeness(compared=3, mismatched=3))
    assert go(swap, (few, swap.since + 59))[0].phase is Phase.SHADOWING
    assert go(swap, (few, swap.since + 60))[0].phase is Phase.COMMITTING


@pytest.mark.parametrize(
    ("new", "old", "says"),
    [
        (Outcomes(100, 11, FAST), Outcomes(100, 5, FAST), "11 of its latest 100 requests failed"),
        (Outcomes(100, 51, FAST), None, "51 of its latest 100 requests failed"),
        (Outcomes(200, 0, SLOW), Outcomes(200, 0, FAST), "took up to 30.0 ms"),
    ],
)
def test_a_soak_that_fails_goes_back(new: Outcomes, old: Outcomes | None, says: str) -> None:
    swap, actions = go(soaking(plan()), (Tick(new=new, old=old), 10.0))
    assert (swap.phase, actions) == (Phase.REVERTING, (Do.GO_BACK,))
    assert swap.failure is not None
    assert swap.failure.reason == errors_pb2.SOAK_FAILED
    assert says in swap.failure.message


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (Outcomes(49, 49, SLOW), Outcomes(200, 0, FAST)),  # too few
        (Outcomes(100, 10, FAST), Outcomes(100, 5, FAST)),  # not beyond what is allowed
        (Outcomes(100, 50, FAST), Outcomes(3, 0, FAST)),  # nothing to compare with
        (Outcomes(200, 0, SLOW), Outcomes(3, 0, FAST)),
        (Outcomes(199, 0, SLOW), Outcomes(200, 0, FAST)),  # too few for a verdict on time
        (Outcomes(200, 0, SLOW), Outcomes(199, 0, FAST)),
        (Outcomes(200, 0, Times(0.005, 0.0059)), Outcomes(200, 0, Times(0.001, 0.001))),  # by too little
        (Outcomes(200, 0, Times(0.011, 0.9)), Outcomes(200, 0, FAST)),  # a burst: most are as fast as before
    ],
)
def test_a_soak_goes_on(new: Outcomes, old: Outcomes | None) -> None:
    swap = soaking(plan())
    assert go(swap, (Tick(new=new, old=old), 10.0)) == (swap, ())


def test_a_soak_after_a_shadow_goes_on_comparing() -> None:
    swap, actions = proven(plan(share=0.1))
    swap, actions = go(swap, (GOOD, 7.0), (Done(Phase.COMMITTING), 7.0), (Done(Phase.TURNING), 7.0))
    assert (swap.phase, actions, swap.mirroring) == (Phase.SOAKING, (Do.MIRROR,), True)
    assert go(swap, (Tick(Likeness(compared=49, mismatched=49, unanswered=99)), 8.0)) == (swap, ())
    back, actions = go(swap, (Tick(Likeness(compared=50, mismatched=3, worst="y: cosine 0.1")), 8.0))
    assert (back.phase, actions) == (Phase.REVERTING, (Do.END_SHADOW, Do.GO_BACK))
    assert back.failure is not None
    assert "3 of 50 live requests got another answer" in back.failure.message
    over, _ = go(swap, (GOOD, 37.0))
    assert over.mirroring
    assert go(over, (Done(Phase.SETTLING), 37.0))[1] == (Do.END_SHADOW, Do.CLOSE_OLD)


def test_gates_can_be_switched_off() -> None:
    terms = replace(plan().terms, gates=Gates(error_share=1.0, latency_ratio=0.0))
    swap = soaking(replace(plan(), terms=terms))
    worst = Tick(new=Outcomes(1000, 1000, SLOW), old=Outcomes(1000, 0, FAST))
    assert go(swap, (worst, 10.0)) == (swap, ())


def test_a_worker_that_died_in_the_soak_begins_it_anew() -> None:
    swap = soaking(plan())
    swap, _ = go(swap, (Died(WHY), swap.since + 29))
    assert go(swap, (GOOD, swap.since + 29))[0].phase is Phase.SOAKING
    swap, actions = go(swap, (GOOD, swap.since + 30))
    assert (swap.phase, actions) == (Phase.SETTLING, (Do.SETTLE,))
    swap, actions = go(swap, (Done(Phase.SETTLING), swap.since))
    assert (swap.phase, actions) == (Phase.COMMITTED, (Do.CLOSE_OLD,))


def test_kept_on_disk_only_the_old_worker_ends_before_the_soak() -> None:
    swap = soaking(plan(keep_warm=False))
    assert swap.phase is Phase.DRAINING
    for event, now in ((Done(Phase.DRAINING), swap.since), (Tick(), swap.since + 5)):
        assert go(swap, (event, now))[0].phase is Phase.SOAKING


def test_a_newer_version_ends_it_at_any_step() -> None:
    for wanted in PLANS:
        swap, _ = begin(wanted, 0.0)
        for event in (Checked(ROOM), *itertools.repeat(None, 6)):
            if swap.phase in BEFORE_COMMIT:
                assert go(swap, (Abort(), 9.0))[0].aborted
            swap, _ = go(swap, (event or (GOOD if swap.phase is Phase.SHADOWING else Done(swap.phase)), 1.0))
        assert swap.phase in AFTER_COMMIT
        assert go(swap, (Abort(), 9.0))[0].phase is Phase.SUPERSEDED


def test_an_administrator_who_cannot_go_back_leaves_the_soak_on() -> None:
    swap, actions = go(soaking(plan()), (GoBack(), 10.0))
    assert (swap.phase, actions) == (Phase.REVERTING, (Do.GO_BACK,))
    assert go(swap, (Failed(Phase.REVERTING, WHY), 11.0))[0].phase is Phase.SOAKING


def test_a_soak_goes_on_after_a_restart_of_the_agent() -> None:
    swap = resume(plan(), 5.0)
    assert (swap.phase, swap.serving) == (Phase.SOAKING, Side.NEW)
    assert go(swap, (CrashLooped(WHY), 6.0))[1] == (Do.GO_BACK,)
