"""The driver of swaps: does what the state machine of swap.py asks for, and tells it how that went.

Steps up to the golden inputs run in the caller's thread. What takes long by itself, shadow and soak, is
looked at by one thread, which lives only while there is something to look at; so a shadow holds up no other
model.

Rules: a swap is driven under its model's lock; a worker that is not in the router is closed before the swap
ends; `abort` may come from any thread at any time and needs no lock: it has effect up to the commit and none
after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent import update_limits as limits
from agent.control import CancelledError
from agent.installer import Prepared
from agent.judging import Likeness, Outcomes
from agent.limits import DRAIN_S, EXIT_S
from agent.memory import available_bytes
from agent.slots import Slots
from agent.state import Update
from agent.swap import (
    BEFORE_COMMIT,
    Abort,
    CrashLooped,
    Deadlines,
    Died,
    Do,
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
from agent.swap_actions import Actions, Run, Step, error_of
from agent.turning import Turner, committed
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)

_ENDING_S = DRAIN_S + 4 * EXIT_S  # for a worker to be drained and to end, however unwilling
_CHECKS = 6  # inferences of the golden check and of the proof of batches, each within the load deadline


@dataclass(frozen=True)
class Seen:
    """A swap at one moment, for `sluice-agent status`.

    Attributes:
        swap: its state.
        now: when (time.monotonic).
        likeness: of the shadow; None when there is none.
        new: outcomes of the soaking version; None before its soak.
        old: of the version before it.
        passed: the phases that it has been through, and the seconds that each took.
    """

    swap: Swap
    now: float
    likeness: Likeness | None
    new: Outcomes | None
    old: Outcomes | None
    passed: tuple[tuple[Phase, float], ...] = ()


class Swaps:
    """Swaps of all models. Methods may be called from any thread.

    Args:
        turner: commits and turns.
        load_deadline_s: see AgentConfig.
        changed: called when the reported state changed.
        available: memory that may be taken, bytes.
    """

    def __init__(
        self,
        turner: Turner,
        *,
        load_deadline_s: float,
        changed: Callable[[], None],
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._turner = turner
        self._state = turner.state
        self._router = turner.router
        self._changed = changed
        self._wake = threading.Event()
        self._actions = Actions(turner, available, self._wake.set)
        self._deadlines = Deadlines(
            checking=limits.LOOP_HANG_S,
            stopping=_ENDING_S,
            starting=load_deadline_s,
            warming=load_deadline_s,
            proving=_CHECKS * load_deadline_s,
            draining=_ENDING_S,
            restoring=limits.LOOP_HANG_S + (2 + _CHECKS) * load_deadline_s,
        )
        self._ended: Callable[[str, SluiceError | CancelledError | None], None] = lambda _model, _error: None
        self._changing: dict[str, Run] = {}  # before their commit
        self._soaking: dict[str, Run] = {}
        self._last: dict[str, Seen] = {}  # of each model the swap that ended last
        self._stopped = False
        self._guard = threading.Lock()  # of the thread
        self._thread: threading.Thread | None = None

    def on_end(self, ended: Callable[[str, SluiceError | CancelledError | None], None]) -> None:
        """Has `ended(model, error)` called when a swap ends for which `begin` returned False.

        It is called with the model's lock held; no error: the version was activated.
        """
        self._ended = ended

    def begin(self, model: str, prepared: Prepared, update: Update, terms: Terms, step: Step) -> bool:
        """Begins a swap, under the model's lock.

        Args:
            model: its name.
            prepared: the version.
            update: its record, written with the slots.
            terms: what it must keep to.
            step: told about each step.

        Returns:
            Whether the version is active; if not, it is in shadow, and `ended` will be called.

        Raises SluiceError or CancelledError when it was given up; what served then serves.
        """
        self.end(model)
        before = self._state.slots(model)
        serving = self._router.serving(model)
        old = serving.active if serving is not None and serving.ready else None
        after = committed(before, prepared.installed)
        plan = Plan(
            model,
            prepared.installed.version,
            old=old.version if old is not None else 0,
            old_serves=old is not None,
            can_go_back=after.previous is not None,
            terms=terms,
            deadlines=self._deadlines,
        )
        swap, actions = begin(plan, time.monotonic())
        baseline = old.figures.latest() if old is not None else None
        run = Run(swap, prepared.installed, before, old, baseline, prepared, update, step)
        self._changing[model] = run
        self._do(run, actions)
        self._file(run)
        if run.swap.phase is Phase.SHADOWING:
            run.told = False
            return False
        error = _why(run)
        if error is not None:
            raise error
        return True

    def resume(self, model: str, terms: Terms) -> None:
        """The active version was committed before the agent started and soaks still; under the lock."""
        slots, serving = self._state.slots(model), self._router.serving(model)
        if slots.active is None or serving is None:
            return
        back = slots.previous
        plan = Plan(
            model,
            slots.active.version,
            old=back.version if back is not None else 0,
            old_serves=False,
            can_go_back=back is not None,
            terms=terms,
            deadlines=self._deadlines,
        )
        run = Run(resume(plan, time.monotonic()), slots.active, slots, None, None, new=serving.active)
        run.deaths = serving.active.deaths
        self._file(run)

    def abort(self, model: str, unless: str = "") -> None:
        """Gives up a swap before its commit, but not one to the version with this manifest digest.

        Returns at once; the swap ends in its own thread, or in the one that looks at it.
        """
        run = self._changing.get(model)
        if run is None or run.installed.manifest_digest == unless:
            return
        with run.guard:
            if run.swap.phase not in BEFORE_COMMIT or run.aborted:
                return
            run.aborted = True  # from here it cannot be committed
        log.info("the change to %s is given up: it is no longer wanted", run.swap.plan.name)
        if run.new is not None:
            threading.Thread(target=run.new.close, args=(0,), name=f"abort-{run.model}", daemon=True).start()
        self._wake.set()

    def end(self, model: str) -> None:
        """Ends a swap that waits in shadow; under the model's lock."""
        run = self._changing.get(model)
        if run is not None:
            self._advance(run, Abort())
            self._file(run)

    def forget(self, model: str) -> None:
        """The model is not served any more: its soak is not judged; under the model's lock."""
        run = self._soaking.pop(model, None)
        if run is not None:
            self._advance(run, Abort())

    def go_back(self, slots: Slots, error: SluiceError | None) -> tuple[int, int]:
        """As `Turner.go_back`, and ends the soak; under the model's lock."""
        run = self._soaking.get(slots.model)
        if run is None or slots.active != run.installed:
            left, taken = self._turner.go_back(slots, error)
            self._note_return(slots.model, left, taken, error)
            self._changed()
            return left, taken
        assert slots.active is not None
        assert slots.previous is not None
        run.error = None
        why = _failure(error)
        self._advance(run, GoBack() if why is None else CrashLooped(why))
        self._file(run)
        if run.swap.phase is not Phase.REVERTED:
            raise run.error or SluiceError(errors_pb2.INTERNAL, f"{run.swap.plan.name} could not be left")
        return slots.active.version, slots.previous.version

    def _note_return(self, model: str, left: int, taken: int, error: SluiceError | None) -> None:
        """The box went back from a version whose swap had ended: what is shown of it ends so, too."""
        now, last = time.monotonic(), self._last.get(model)
        if last is None or last.swap.plan.version != left:  # it was there when the agent started
            plan = Plan(
                model,
                left,
                old=taken,
                old_serves=False,
                can_go_back=True,
                terms=Terms(),
                deadlines=self._deadlines,
            )
            last = Seen(resume(plan, now), now, None, None, None)
        swap = replace(
            last.swap,
            phase=Phase.REVERTED,
            since=now,
            serving=Side.OLD,
            failure=_failure(error),
            asked=error is None,
        )
        self._last[model] = replace(last, swap=swap, now=now)

    def seen(self) -> list[Seen]:
        """All swaps as they are, by model; of a model without one, the last that ended."""
        now = time.monotonic()
        found = [_seen(run, now) for run in (*self._changing.values(), *self._soaking.values())]
        models = {seen.swap.plan.model for seen in found}
        found += [replace(last, now=now) for model, last in list(self._last.items()) if model not in models]
        return sorted(found, key=lambda seen: (seen.swap.plan.model, seen.swap.plan.version))

    def close(self) -> None:
        """The agent ends: swaps before their commit are given up, soaks go on at the next start."""
        self._stopped = True
        self._wake.set()
        for model in list(self._changing):
            self.abort(model)
        thread = self._thread
        if thread is not None:
            thread.join(EXIT_S)
        for run in (*self._changing.values(), *self._soaking.values()):
            if run.shadow is not None:
                run.shadow.close()
            if run.new is not None and run.swap.phase in BEFORE_COMMIT:
                run.new.close(0)

    # Driving.

    def _advance(self, run: Run, event: Event) -> None:
        with run.guard:
            if run.aborted and run.swap.phase in BEFORE_COMMIT:
                event = Abort()
            before, now = run.swap, time.monotonic()
            run.swap, actions = advance(before, event, now)
            if run.swap.phase is not before.phase:
                run.passed.append((before.phase, now - before.since))
        self._do(run, actions)

    def _do(self, run: Run, actions: tuple[Do, ...]) -> None:
        """What is asked for, until nothing more is."""
        answer: Event | None = None
        for action in actions:
            phase = run.swap.phase
            if action is Do.GO_BACK:
                self.end(run.model)  # a newer version in shadow beside one that fails
            try:
                answer = self._actions.perform(run, action) or answer
            except SluiceError as error:
                answer = self._note(run, phase, error)
            except Exception as error:
                log.exception("a defect while %s %s", phase.value, run.swap.plan.name)
                why = f"{phase.value} {run.swap.plan.name}: {error!r}"
                answer = self._note(run, phase, SluiceError(errors_pb2.INTERNAL, why))
        if answer is not None:
            self._advance(run, answer)

    def _note(self, run: Run, phase: Phase, error: SluiceError) -> Event:
        run.error = error
        return Failed(phase, Failure(error.reason, error.message, error.hint))

    def _file(self, run: Run) -> None:
        """Keeps the run where it belongs now, and tells of its end."""
        model, phase = run.model, run.swap.phase
        before = phase in BEFORE_COMMIT
        if not before and self._changing.get(model) is run:
            del self._changing[model]
        if not before and not run.swap.ended:
            earlier = self._soaking.get(model)
            self._soaking[model] = run
            if earlier is not None and earlier is not run:
                self._advance(earlier, Abort())
        elif run.swap.ended and self._soaking.get(model) is run:
            del self._soaking[model]
            self._soak_ended(run)
        if not run.told and not before:
            run.told = True
            self._ended(model, _why(run))
        if run.swap.ended:
            self._last[model] = _seen(run, time.monotonic())
        else:
            self._look_after()
        self._changed()

    def _soak_ended(self, run: Run) -> None:
        if run.swap.phase is Phase.COMMITTED:
            log.info("%s has proven itself for %g s", run.swap.plan.name, run.swap.plan.terms.soak_s)
        elif run.swap.phase is Phase.STRANDED and run.swap.failure is not None:
            fate = run.error or "there is nothing to go back to"
            why = f"{run.swap.failure.message}; going back failed: {fate}"
            failure = SluiceError(run.swap.failure.reason, why, obj=run.swap.plan.name)
            log.error("%s", failure)
            record = self._turner.failure_record(run.model, run.installed, failure, final=True)
            try:
                self._state.save_update(record)
            except SluiceError as error:
                log.warning("that cannot be written down: %s", error)

    # Looking.

    def _look_after(self) -> None:
        """Has the thread look at what is under way."""
        with self._guard:
            self._wake.set()
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._watch, name="swaps", daemon=True)
                self._thread.start()

    def _watch(self) -> None:
        while not self._stopped:
            self._wake.clear()
            try:
                wait_s = self._look()
            except Exception:
                log.exception("a defect in looking at changes of version; going on")
                wait_s = limits.SWAP_LOOK_MOST_S
            with self._guard:
                if wait_s is None and not self._wake.is_set():
                    self._thread = None
                    return
            self._wake.wait(limits.SOAK_LOOK_S if wait_s is None else wait_s)

    def _look(self) -> float | None:
        """One look at everything; returns the seconds until the next, None when nothing is under way."""
        waits: list[float] = []
        for run in (*self._changing.values(), *self._soaking.values()):
            lock = self._turner.lock(run.model)
            if not lock.acquire(blocking=False):
                waits.append(limits.SHADOW_LOOK_S)  # whoever holds it drives it, or ends it
                continue
            try:
                if run in (self._changing.get(run.model), self._soaking.get(run.model)):
                    waits.append(self._look_at(run))
            finally:
                lock.release()
        return min(waits) if waits else None

    def _look_at(self, run: Run) -> float:
        phase = run.swap.phase
        for event in self._news(run):
            self._advance(run, event)
        if run.swap.phase is not phase:
            self._file(run)
        left = run.swap.left(time.monotonic())
        most = limits.SHADOW_LOOK_S if run.swap.phase is Phase.SHADOWING else limits.SOAK_LOOK_S
        return max(limits.SWAP_LOOK_LEAST_S, min(most, most if left is None else left))

    def _news(self, run: Run) -> list[Event]:
        """What happened to a run that waits."""
        assert run.new is not None
        if run.swap.phase is Phase.SHADOWING:
            assert run.shadow is not None
            if not run.new.alive or run.new.deaths:
                why = f"the worker of {run.swap.plan.name} died in shadow"
                return [Died(Failure(errors_pb2.WORKER_DIED, why))]
            return [Tick(run.shadow.seen())]
        found: list[Event] = []
        while not run.answers.empty():
            found.append(run.answers.get())
        serving = self._router.serving(run.model)
        if serving is None or serving.active.version != run.installed.version:
            return [Abort()]
        if serving.active is not run.new or not serving.ready or run.new.deaths > run.deaths:
            run.new, run.deaths = serving.active, serving.active.deaths
            found.append(Died(Failure(errors_pb2.WORKER_DIED, f"the worker of {run.swap.plan.name} died")))
        likeness = run.shadow.seen() if run.swap.mirroring and run.shadow is not None else None
        return [*found, Tick(likeness, run.new.figures.latest(), run.baseline)]


def _seen(run: Run, now: float) -> Seen:
    likeness = run.shadow.seen() if run.shadow is not None else None
    soaks = run.swap.phase not in BEFORE_COMMIT and run.new is not None
    new = run.new.figures.latest() if soaks and run.new is not None else None
    return Seen(run.swap, now, likeness, new, run.baseline, tuple(run.passed))


def _failure(error: SluiceError | None) -> Failure | None:
    return None if error is None else Failure(error.reason, error.message, error.hint)


def _why(run: Run) -> SluiceError | CancelledError | None:
    """Why the version is not active; None: it is."""
    swap = run.swap
    if swap.phase in (Phase.ABANDONED, Phase.STRANDED) and swap.aborted:
        return CancelledError(swap.plan.name)
    if swap.phase in (Phase.ABANDONED, Phase.STRANDED) and swap.failure is not None:
        known = run.error is not None and run.error.message == swap.failure.message
        return run.error if known else error_of(swap.failure, run)
    return None
