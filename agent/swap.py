"""One model's change of version, as a pure state machine: values in, values out, the clock given.

    checking -> starting -> warming -> proving -> [shadowing] -> committing -> turning -> [draining]
    -> soaking -> settling -> committed

*Checking* hashes the files and looks at the memory. Where two workers do not fit and the terms allow it, the
old one is ended first (*stopping*), which leaves a gap until the turn. *Proving* runs the golden inputs.
*Committing* writes the slots, the one commit point; *turning* turns the router. *Draining* ends the old
worker at once where it is not to be kept warm, else it stays until the soak has ended.

`begin` and `advance` return the new state and what is to be done; whoever does it answers with `Done` or
`Failed` of the same phase. `Tick` brings the time and what was seen, and ends phases that are over or past
their deadline. An answer of a phase that has passed is ignored.

Rules, whatever the order of events (edge_tests/unit/agent/test_swap.py explores them):
- Before the commit every failure leaves what served: at once, or started again (*restoring*) after a gap.
- There is one commit. After it the only way back is to the version that was active before (*reverting*), and
  only where there is one; a version that cannot go back stays, which is the end *stranded*.
- Every phase has a deadline, but those that write the slots (committing, turning, undoing, settling,
  reverting): they answer by themselves, and to guess their outcome would be to break the commit point.
- Nothing happens after an end.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from agent.judging import Gates, Likeness, Outcomes, ShadowTerms, judge_likeness, judge_mirror, judge_outcomes
from agent.memory import Memory
from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason


class Phase(enum.Enum):
    """Where a swap is."""

    CHECKING = "checking"
    STOPPING = "stopping"
    STARTING = "starting"
    WARMING = "warming"
    PROVING = "proving"
    SHADOWING = "shadowing"
    COMMITTING = "committing"
    TURNING = "turning"
    UNDOING = "undoing"  # the turn failed: the slots are written back
    DRAINING = "draining"
    SOAKING = "soaking"
    SETTLING = "settling"  # the soak is over: that is written
    REVERTING = "reverting"
    RESTORING = "restoring"
    # Ends.
    COMMITTED = "committed"
    REVERTED = "reverted"
    ABANDONED = "abandoned"  # before the commit; what served serves
    SUPERSEDED = "superseded"  # committed, and a newer change took over before the soak ended
    STRANDED = "stranded"  # going back, or starting what was stopped, failed


ENDS = frozenset({Phase.COMMITTED, Phase.REVERTED, Phase.ABANDONED, Phase.SUPERSEDED, Phase.STRANDED})
BEFORE_COMMIT = frozenset(
    {Phase.CHECKING, Phase.STOPPING, Phase.STARTING, Phase.WARMING, Phase.PROVING, Phase.SHADOWING}
)
AFTER_COMMIT = frozenset({Phase.DRAINING, Phase.SOAKING, Phase.SETTLING})


class Do(enum.Enum):
    """What the driver is to do; the first group is answered with Done or Failed of its phase."""

    CHECK = "hash the files, look at the memory; answered with Checked"
    STOP_OLD = "drain and end the old worker; it stays in the router, so that requests wait"
    START = "start a worker that loads the new version"
    WARM = "first inference"
    PROVE = "golden inputs"
    COMMIT = "write the slots"
    TURN = "turn the router to the new worker"
    UNDO = "write the slots as they were"
    DRAIN = "take the old worker out of the router, drain and end it"
    SETTLE = "write that the version has proven itself"
    GO_BACK = "the old version's worker, found or started; write the slots; turn the router"
    RESTORE = "start the old version again and turn the router to it"
    # No answer.
    SHADOW = "begin to copy live requests to the new worker"
    MIRROR = "copy live requests to the old worker, which is warm, and go on comparing"
    END_SHADOW = "copy no more"
    CLOSE_NEW = "end the new worker, whatever it does; a start under way fails"
    CLOSE_OLD = "drain and end the old worker that was kept warm"
    HAND_OVER = "leave the old version's worker to the supervisor, which starts it without end"


class Side(enum.Enum):
    """What answers requests."""

    NONE = "none"
    OLD = "old"
    NEW = "new"


@dataclass(frozen=True)
class Failure:
    """Why a swap did not come to its end."""

    reason: ErrorReason.ValueType
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Deadlines:
    """Longest time of each phase, seconds."""

    checking: float
    stopping: float
    starting: float
    warming: float
    proving: float
    draining: float
    restoring: float


@dataclass(frozen=True)
class Terms:
    """What the agent's configuration and the variant's options say of a swap.

    Attributes:
        shadow: how the new version answers beside the old one before it is activated.
        gates: what it must keep to.
        soak_s: how long after its activation, seconds.
        keep_warm: the old worker stays until the soak has ended; else its files alone do.
        stop_first: where two workers do not fit, the old one is ended first; else the swap is refused.
        reserve_bytes: memory to be left free.
    """

    shadow: ShadowTerms = field(default_factory=ShadowTerms)
    gates: Gates = field(default_factory=Gates)
    soak_s: float = 60.0
    keep_warm: bool = True
    stop_first: bool = False
    reserve_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """One swap; fixed when it begins.

    Attributes:
        model: whose.
        version: that is to answer.
        old: the version that is active before; 0 when there is none.
        old_serves: its worker answers now.
        can_go_back: after the commit there is a version to go back to.
        terms: of the version.
        deadlines: of the phases.
    """

    model: str
    version: int
    old: int
    old_serves: bool
    can_go_back: bool
    terms: Terms
    deadlines: Deadlines

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"


@dataclass(frozen=True)
class Swap:
    """The state of one swap.

    Attributes:
        plan: what it is to do.
        phase: where it is.
        since: when the phase began, or the soak anew (the clock given to `advance`).
        serving: what answers.
        stopped: the old worker was ended before the new one was there.
        gap_since: when requests began to wait for that; None when none wait.
        gap_s: how long they waited in all, seconds.
        memory: as found in checking.
        failure: why it did not, or will not, come to its end.
        aborted: by a newer change, an administrator, or the end of the agent.
        asked: the going back was asked for by an administrator.
        mirroring: the old worker answers a share of the live requests too, for comparison.
    """

    plan: Plan
    phase: Phase
    since: float
    serving: Side
    stopped: bool = False
    gap_since: float | None = None
    gap_s: float = 0.0
    memory: Memory | None = None
    failure: Failure | None = None
    aborted: bool = False
    asked: bool = False
    mirroring: bool = False

    @property
    def ended(self) -> bool:
        return self.phase in ENDS

    def gap(self, now: float) -> float:
        """Seconds in which nothing answered, so far."""
        return self.gap_s + (now - self.gap_since if self.gap_since is not None else 0.0)

    def left(self, now: float) -> float | None:
        """Seconds until the phase ends or is given up; None where nothing but its answer ends it."""
        limit = _limit(self)
        return None if limit is None else self.since + limit - now


@dataclass(frozen=True)
class Done:
    """What the phase asked for is done."""

    phase: Phase


@dataclass(frozen=True)
class Checked:
    """The files are whole, and this is the memory."""

    memory: Memory


@dataclass(frozen=True)
class Failed:
    """What the phase asked for failed."""

    phase: Phase
    failure: Failure


@dataclass(frozen=True)
class Tick:
    """Time passes. What was seen so far: in shadow, or in the soak, of the new version and the one before."""

    likeness: Likeness | None = None
    new: Outcomes | None = None
    old: Outcomes | None = None


@dataclass(frozen=True)
class Died:
    """The new version's worker ended. In the soak another is started in its place, by the supervisor."""

    failure: Failure


@dataclass(frozen=True)
class CrashLooped:
    """The new version's worker keeps dying."""

    failure: Failure


@dataclass(frozen=True)
class Abort:
    """A newer version is wanted, an administrator goes back, or the agent ends."""


@dataclass(frozen=True)
class GoBack:
    """An administrator asks for the version before."""


Event = Done | Checked | Failed | Tick | Died | CrashLooped | Abort | GoBack
Step = tuple[Swap, tuple[Do, ...]]


def begin(plan: Plan, now: float) -> Step:
    """A swap at its beginning."""
    serving = Side.OLD if plan.old_serves else Side.NONE
    return Swap(plan, Phase.CHECKING, now, serving), (Do.CHECK,)


def resume(plan: Plan, now: float) -> Swap:
    """A swap whose version was committed before the agent started: its soak begins anew."""
    return Swap(plan, Phase.SOAKING, now, Side.NEW)


def advance(swap: Swap, event: Event, now: float) -> Step:
    """What follows from an event; see the module's docstring."""
    if swap.ended:
        return swap, ()
    if isinstance(event, Tick):
        return _tick(swap, event, now)
    if isinstance(event, Checked):
        return _checked(swap, event.memory, now) if swap.phase is Phase.CHECKING else (swap, ())
    if isinstance(event, Done):
        return _done(swap, now) if event.phase is swap.phase else (swap, ())
    if isinstance(event, Failed):
        return _failed(swap, event.failure, now) if event.phase is swap.phase else (swap, ())
    if isinstance(event, Died):
        return _died(swap, event.failure, now)
    if isinstance(event, CrashLooped):
        return _go_back(swap, event.failure, now) if swap.phase in AFTER_COMMIT else (swap, ())
    if isinstance(event, GoBack) and swap.phase in AFTER_COMMIT:
        if not swap.plan.can_go_back:
            return swap, ()
        return _to(replace(swap, asked=True), Phase.REVERTING, now, Do.GO_BACK)
    return _abort(swap, now)


# What is done.


def _checked(swap: Swap, memory: Memory, now: float) -> Step:
    swap = replace(swap, memory=memory)
    terms = swap.plan.terms
    if not swap.plan.old_serves or memory.needed + terms.reserve_bytes <= memory.available:
        return _to(swap, Phase.STARTING, now, Do.START)
    if terms.stop_first:
        swap = replace(swap, serving=Side.NONE, stopped=True, gap_since=now)
        return _to(swap, Phase.STOPPING, now, Do.STOP_OLD)
    why = (
        f"a worker of {swap.plan.name} needs about {memory.needed >> 20} MiB beside version {swap.plan.old};"
        f" {memory.available >> 20} MiB are available, {terms.reserve_bytes >> 20} MiB of them reserved"
    )
    hint = 'free memory, or allow a gap with update.memory_short = "stop-then-start"'
    return _give_up(swap, Failure(errors_pb2.MEMORY_SHORT, why, hint), now)


def _done(swap: Swap, now: float) -> Step:
    phase, terms = swap.phase, swap.plan.terms
    if phase is Phase.STOPPING:
        return _to(swap, Phase.STARTING, now, Do.START)
    if phase is Phase.STARTING:
        return _to(swap, Phase.WARMING, now, Do.WARM)
    if phase is Phase.WARMING:
        return _to(swap, Phase.PROVING, now, Do.PROVE)
    if phase is Phase.PROVING:
        if terms.shadow.share > 0 and swap.serving is Side.OLD:
            return _to(swap, Phase.SHADOWING, now, Do.SHADOW)
        return _to(swap, Phase.COMMITTING, now, Do.COMMIT)
    if phase is Phase.COMMITTING:
        return _to(swap, Phase.TURNING, now, Do.TURN)
    if phase is Phase.TURNING:
        return _turned(_gap_ends(replace(swap, serving=Side.NEW), now), now)
    if phase is Phase.UNDOING:
        return _leave(swap, now)
    if phase is Phase.DRAINING:
        return _to(swap, Phase.SOAKING, now)
    if phase is Phase.SETTLING:
        return _to(swap, Phase.COMMITTED, now, Do.CLOSE_OLD)
    if phase is Phase.REVERTING:
        return _to(replace(swap, serving=Side.OLD), Phase.REVERTED, now)
    if phase is Phase.RESTORING:
        return _to(_gap_ends(replace(swap, serving=Side.OLD), now), Phase.ABANDONED, now)
    return swap, ()


def _turned(swap: Swap, now: float) -> Step:
    """The new version answers; what becomes of the old worker."""
    terms = swap.plan.terms
    if not swap.plan.old_serves or swap.stopped:
        return _to(swap, Phase.SOAKING, now)
    if not terms.keep_warm:
        return _to(swap, Phase.DRAINING, now, Do.DRAIN)
    if terms.shadow.share > 0:
        return _to(replace(swap, mirroring=True), Phase.SOAKING, now, Do.MIRROR)
    return _to(swap, Phase.SOAKING, now)


# What fails.


def _failed(swap: Swap, failure: Failure, now: float) -> Step:
    phase = swap.phase
    if phase in BEFORE_COMMIT or phase is Phase.COMMITTING:
        return _give_up(swap, failure, now)
    if phase is Phase.TURNING:
        return _to(replace(swap, failure=failure), Phase.UNDOING, now, Do.CLOSE_NEW, Do.UNDO)
    if phase is Phase.UNDOING:
        return _leave(swap, now)
    if phase in (Phase.DRAINING, Phase.SETTLING):
        return _to(swap, Phase.SOAKING, now)  # a soak that could not be written down runs once more
    if phase is Phase.REVERTING and swap.asked:
        return _to(replace(swap, asked=False), Phase.SOAKING, now)
    if phase is Phase.REVERTING:
        return _to(swap, Phase.STRANDED, now)
    if phase is Phase.RESTORING:
        return _to(swap, Phase.STRANDED, now, Do.HAND_OVER)
    return swap, ()


def _give_up(swap: Swap, failure: Failure | None, now: float, *, aborted: bool = False) -> Step:
    """Before the commit: what served goes on, or is started again."""
    end_shadow = (Do.END_SHADOW,) if swap.phase is Phase.SHADOWING else ()
    close_new = () if swap.phase in (Phase.CHECKING, Phase.STOPPING) else (Do.CLOSE_NEW,)
    swap, actions = _leave(replace(swap, failure=failure, aborted=aborted), now)
    return swap, (*end_shadow, *close_new, *actions)


def _leave(swap: Swap, now: float) -> Step:
    return _to(swap, Phase.RESTORING, now, Do.RESTORE) if swap.stopped else _to(swap, Phase.ABANDONED, now)


def _died(swap: Swap, failure: Failure, now: float) -> Step:
    if swap.phase in (Phase.STARTING, Phase.WARMING, Phase.PROVING, Phase.SHADOWING):
        return _give_up(swap, failure, now)
    if swap.phase is Phase.SOAKING:
        return replace(swap, since=now), ()  # what replaces it must prove itself for the whole time
    return swap, ()


def _go_back(swap: Swap, failure: Failure, now: float) -> Step:
    swap = replace(swap, failure=failure)
    if swap.plan.can_go_back:
        return _to(swap, Phase.REVERTING, now, Do.GO_BACK)
    return _to(swap, Phase.STRANDED, now)


def _abort(swap: Swap, now: float) -> Step:
    if swap.phase in BEFORE_COMMIT:
        return _give_up(swap, None, now, aborted=True)
    if swap.phase in AFTER_COMMIT:
        return _to(replace(swap, aborted=True), Phase.SUPERSEDED, now)
    return swap, ()  # its write is under way and answers soon


# Time.


def _tick(swap: Swap, seen: Tick, now: float) -> Step:
    left = swap.left(now)
    over = left is not None and left <= 0
    if swap.phase is Phase.SHADOWING:
        return _look_at_shadow(swap, seen.likeness or Likeness(), over, now)
    if swap.phase is Phase.SOAKING:
        terms = swap.plan.terms
        why = judge_outcomes(seen.new or Outcomes(), seen.old, terms.gates)
        if not why and swap.mirroring:
            why = judge_mirror(seen.likeness or Likeness(), terms.shadow, terms.gates)
        if why:
            hint = "what it fails on is in the agent's log"
            return _go_back(swap, Failure(errors_pb2.SOAK_FAILED, f"{swap.plan.name}: {why}", hint), now)
        return _to(swap, Phase.SETTLING, now, Do.SETTLE) if over else (swap, ())
    if not over:
        return swap, ()
    limit = _limit(swap)
    late = Failure(errors_pb2.WORKER_TIMEOUT, f"{swap.phase.value} {swap.plan.name} took over {limit:g} s")
    return _failed(swap, late, now)


def _look_at_shadow(swap: Swap, seen: Likeness, over: bool, now: float) -> Step:
    terms = swap.plan.terms
    done, why = judge_likeness(seen, terms.shadow, terms.gates, over=over)
    if why:
        hint = "compare both versions on such inputs, or widen the shadow's tolerance"
        return _give_up(swap, Failure(errors_pb2.SHADOW_MISMATCH, f"{swap.plan.name}: {why}", hint), now)
    if done:
        return _to(swap, Phase.COMMITTING, now, Do.END_SHADOW, Do.COMMIT)
    return swap, ()


def _limit(swap: Swap) -> float | None:
    """The phase's longest time, seconds."""
    if swap.phase is Phase.SHADOWING:
        return swap.plan.terms.shadow.seconds
    if swap.phase is Phase.SOAKING:
        return swap.plan.terms.soak_s
    limit: float | None = getattr(swap.plan.deadlines, swap.phase.value, None)
    return limit


def _gap_ends(swap: Swap, now: float) -> Swap:
    return replace(swap, gap_s=swap.gap(now), gap_since=None)


def _to(swap: Swap, phase: Phase, now: float, *actions: Do) -> Step:
    if swap.mirroring and phase not in AFTER_COMMIT:
        swap, actions = replace(swap, mirroring=False), (Do.END_SHADOW, *actions)
    return replace(swap, phase=phase, since=now), actions
