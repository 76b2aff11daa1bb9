"""What a swap's state machine asks for, done: each action of swap.Do with real files, workers and slots.

An action that fails raises; whoever called turns that into the machine's `Failed`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agent import cascading
from agent.installer import Prepared
from agent.judging import Outcomes
from agent.limits import DRAIN_S, PHASES_KEPT
from agent.memory import Memory, estimate
from agent.shadow import Shadow
from agent.slots import Installed, Slots, soaked
from agent.state import Update
from agent.swap import Checked, Do, Done, Event, Failure, Phase, Side, Swap
from agent.turning import Turner, close_soon, committed
from agent.worker import Worker
from sluice.api.v1 import sync_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)

Step = Callable[[sync_pb2.UpdateStep.ValueType], None]
_STEPS: Mapping[Do, sync_pb2.UpdateStep.ValueType] = {
    Do.CHECK: sync_pb2.UPDATE_STEP_VERIFYING,
    Do.STOP_OLD: sync_pb2.UPDATE_STEP_WARMING_UP,
    Do.START: sync_pb2.UPDATE_STEP_WARMING_UP,
    Do.SHADOW: sync_pb2.UPDATE_STEP_SHADOWING,
    Do.COMMIT: sync_pb2.UPDATE_STEP_ACTIVATING,
}
# Answered with Done once they return; checking answers with what it found, draining when it is through.
_ANSWERED = frozenset(
    {
        Do.STOP_OLD,
        Do.START,
        Do.WARM,
        Do.PROVE,
        Do.COMMIT,
        Do.TURN,
        Do.UNDO,
        Do.SETTLE,
        Do.GO_BACK,
        Do.RESTORE,
    }
)


@dataclass(eq=False)
class Run:
    """One swap, with the things that its values stand for."""

    swap: Swap
    installed: Installed
    before: Slots
    old: Worker | None
    baseline: Outcomes | None
    prepared: Prepared | None = None  # None: its soak goes on after a restart
    update: Update | None = None
    step: Step = lambda _step: None
    digests: tuple[str, ...] = ()
    new: Worker | None = None
    shadow: Shadow | None = None
    deaths: int = 0  # of the new worker's processes, as far as they were told
    error: SluiceError | None = None  # why the last thing failed
    told: bool = True  # whoever began it hears of its end by `ended`
    guard: threading.Lock = field(default_factory=threading.Lock)  # of `abort`
    aborted: bool = False
    passed: deque[tuple[Phase, float]] = field(default_factory=lambda: deque(maxlen=PHASES_KEPT))  # seconds
    answers: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)  # of what took a thread

    @property
    def model(self) -> str:
        return self.swap.plan.model


class Actions:
    """Does what is asked for one run at a time, under its model's lock.

    Args:
        turner: commits and turns.
        available: memory that may be taken, bytes.
        wake: called when an answer lies in `Run.answers`.
    """

    def __init__(self, turner: Turner, available: Callable[[], int], wake: Callable[[], None]) -> None:
        self._turner = turner
        self._state = turner.state
        self._router = turner.router
        self._available = available
        self._wake = wake
        self._ways: Mapping[Do, Callable[[Run], Event | None]] = {
            Do.CHECK: self._check,
            Do.STOP_OLD: self._stop_old,
            Do.START: self._start,
            Do.WARM: self._warm,
            Do.PROVE: self._prove,
            Do.SHADOW: self._shadow,
            Do.MIRROR: self._mirror,
            Do.END_SHADOW: self._end_shadow,
            Do.COMMIT: self._commit,
            Do.TURN: self._turn,
            Do.UNDO: self._undo,
            Do.DRAIN: self._drain,
            Do.SETTLE: self._settle,
            Do.GO_BACK: self._go_back,
            Do.RESTORE: self._restore,
            Do.CLOSE_NEW: self._close_new,
            Do.CLOSE_OLD: self._close_old,
            Do.HAND_OVER: self._hand_over,
        }

    def perform(self, run: Run, action: Do) -> Event | None:
        """Does one thing; returns the answer, if it has one. Raises SluiceError."""
        phase = run.swap.phase
        if action in _STEPS:
            run.step(_STEPS[action])
        answer = self._ways[action](run)
        return Done(phase) if answer is None and action in _ANSWERED else answer

    def _check(self, run: Run) -> Event:
        assert run.prepared is not None
        run.digests = self._turner.starter.verify(run.model, run.prepared)
        return Checked(self._memory(run))

    def _stop_old(self, run: Run) -> None:
        assert run.old is not None
        log.warning(
            "%s stops until version %d is there: both do not fit", run.old.spec, run.installed.version
        )
        self._router.expect_restart(run.old, True)  # requests wait for the turn
        run.old.close(DRAIN_S)

    def _start(self, run: Run) -> None:
        assert run.prepared is not None
        run.new = self._turner.starter.start(
            run.model,
            run.prepared,
            run.digests,
            lambda worker: self._started(run, worker),
            beside=run.swap.serving is Side.OLD,
        )

    def _warm(self, run: Run) -> None:
        assert run.new is not None
        self._turner.starter.warm_up(run.new)

    def _prove(self, run: Run) -> None:
        assert run.new is not None
        assert run.prepared is not None
        self._turner.starter.prove(run.new, run.prepared)
        cascading.check(run.new, self._router)

    def _shadow(self, run: Run) -> None:
        assert run.new is not None
        run.shadow = Shadow(run.new, run.swap.plan.terms.shadow)
        for worker in self._answering(run):
            if worker is not run.new:
                worker.shadow = run.shadow

    def _mirror(self, run: Run) -> None:
        assert run.new is not None
        assert run.old is not None
        run.shadow = Shadow(run.old, run.swap.plan.terms.shadow)
        run.new.shadow = run.shadow

    def _end_shadow(self, run: Run) -> None:
        assert run.shadow is not None
        for worker in self._answering(run):
            if worker.shadow is run.shadow:  # else a newer version is in shadow by now
                worker.shadow = None
        run.shadow.close()
        log.info("%s beside version %d: %s", run.swap.plan.name, run.swap.plan.old, run.shadow.seen())

    def _commit(self, run: Run) -> None:
        run.before = self._state.slots(run.model)
        self._state.save(committed(run.before, run.installed), run.update)

    def _undo(self, run: Run) -> None:
        self._state.save(run.before)

    def _settle(self, run: Run) -> None:
        self._state.save(soaked(self._state.slots(run.model)))

    def _go_back(self, run: Run) -> None:
        why = None if run.swap.asked else run.swap.failure
        self._turner.go_back(self._state.slots(run.model), None if why is None else error_of(why, run))

    def _close_new(self, run: Run) -> None:
        if run.new is not None:
            run.new.close(0)

    def _close_old(self, run: Run) -> None:
        previous = self._router.drop_previous(run.model)
        close_soon([] if previous is None else [previous])

    def _hand_over(self, run: Run) -> None:
        if run.old is not None:
            self._router.report_death(run.old)

    def _started(self, run: Run, worker: Worker) -> None:
        """In the start of the new worker, before it loads: from now on `Swaps.abort` can end it."""
        run.new = worker
        if run.aborted:
            worker.close(0)

    def _memory(self, run: Run) -> Memory:
        assert run.prepared is not None
        new, old = _size(run.prepared), 0
        active = run.before.active
        if run.old is not None and active is not None:
            try:
                manifest = self._turner.installer.load_manifest(active, run.model)
                old = sum(
                    file.size for file in manifest.variant(active.variant).files if file.role != "golden"
                )
            except SluiceError as error:
                log.warning("the size of %s@%d is not known: %s", run.model, active.version, error)
        held = 0 if run.old is None else run.old.resident_bytes() // len(run.old.instances)
        needed = estimate(new, old, held) * self._turner.starter.instances(run.prepared)
        return Memory(needed, self._available())

    def _answering(self, run: Run) -> list[Worker]:
        """The workers that answer, or may: a restart puts another into a worker's place."""
        serving = self._router.serving(run.model)
        found = (run.old, run.new, None if serving is None else serving.active)
        return [worker for worker in found if worker is not None]

    def _turn(self, run: Run) -> None:
        assert run.new is not None
        serving = self._router.serving(run.model)
        if serving is not None:
            run.old = serving.active
            run.baseline = serving.active.figures.latest()
        run.deaths = run.new.deaths
        self._turner.turn(run.model, run.installed, run.new)
        gap_s = run.swap.gap(time.monotonic())
        if gap_s:
            self._turner.note_gap(run.model, gap_s)
            log.warning("nothing answered for %s during %.3f s", run.model, gap_s)
        if run.swap.stopped:
            self._router.drop_previous(run.model)  # it has ended already
        log.info("%s answers now", run.swap.plan.name)

    def _drain(self, run: Run) -> None:
        previous = self._router.drop_previous(run.model)

        def drain() -> None:
            if previous is not None:
                previous.close(DRAIN_S)
            run.answers.put(Done(Phase.DRAINING))
            self._wake()

        threading.Thread(target=drain, name=f"drain-{run.model}", daemon=True).start()

    def _restore(self, run: Run) -> None:
        active = self._state.slots(run.model).active
        assert active is not None
        worker = self._turner.bring_up(run.model, active)
        try:
            self._turner.turn(run.model, active, worker)
        except SluiceError:
            worker.close(0)
            raise
        self._router.drop_previous(run.model)
        gap_s = run.swap.gap(time.monotonic())
        self._turner.note_gap(run.model, gap_s)
        log.warning("%s@%d answers again, after %.3f s", run.model, active.version, gap_s)


def error_of(failure: Failure, run: Run) -> SluiceError:
    """A failure of the machine as the error that others see."""
    return SluiceError(failure.reason, failure.message, hint=failure.hint, obj=run.swap.plan.name)


def _size(prepared: Prepared) -> int:
    return sum(file.size for file in prepared.variant.files if file.role != "golden")
