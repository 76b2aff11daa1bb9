"""Starts dead active workers, and processes of theirs, again, and notices when that does not help.

A version of several processes that loses one goes on with the others, and a new one takes the lost one's
place; a version that has none left gets a new worker. All deaths of a version count together.

The first restart comes at once, so that a crash costs only the requests that were running; further ones wait
with backoff and jitter. So many deaths within so long (`LoopRule`) are a crash loop: it is reported
once, so that the box can go back to the previous version; meanwhile restarts go on, slowly, without end,
because a box that has nothing to go back to must not need a visit. A version that lived for the window
without a death ends the loop. A start that fails counts as a death; a process that was ended for the memory
that it held (renewing.py) does not, and is started again at once.

`after_death` decides and is pure; `Supervisor` waits and starts. One thread for each worker or process that
is being started again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.instance import Instance
from agent.limits import (
    CRASH_LOOP_DEATHS,
    CRASH_LOOP_WINDOW_S,
    RESTART_FIRST_S,
    RESTART_LOAD_S,
    RESTART_MOST_S,
    RESTART_WAIT_S,
)
from agent.retry import jittered
from agent.router import Router
from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from updater.errors import SluiceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopRule:
    """What is a loop.

    Attributes:
        deaths: so many of them.
        window_s: within so long, seconds.
    """

    deaths: int = CRASH_LOOP_DEATHS
    window_s: float = CRASH_LOOP_WINDOW_S


CRASH_LOOP = LoopRule()  # unless the configuration says otherwise


@dataclass(frozen=True)
class History:
    """What is remembered of one version's deaths.

    Attributes:
        deaths: their times within the window (time.monotonic), oldest first.
        looping: a crash loop was found and has not ended.
    """

    deaths: tuple[float, ...] = ()
    looping: bool = False


@dataclass(frozen=True)
class Decision:
    """What follows from a death.

    Attributes:
        history: to be remembered.
        wait_s: before the restart, seconds.
        report: a crash loop begins here.
    """

    history: History
    wait_s: float
    report: bool


def after_death(
    history: History, now: float, lived_s: float, random_value: float, rule: LoopRule
) -> Decision:
    """The answer to a death.

    Args:
        history: of this version.
        now: time.monotonic.
        lived_s: how long the version had been without a death; 0 when it failed to start.
        random_value: uniform in [0, 1), for the jitter.
        rule: when it is a loop.
    """
    if lived_s >= rule.window_s:
        history = History()
    recent = tuple(death for death in history.deaths if now - death < rule.window_s)
    deaths = (*recent, now)[-rule.deaths :]
    if history.looping or len(deaths) >= rule.deaths:
        wait_s = jittered(RESTART_MOST_S, RESTART_MOST_S, 1, random_value)
        return Decision(History(deaths, looping=True), wait_s, report=not history.looping)
    wait_s = (
        0.0 if len(deaths) == 1 else jittered(RESTART_FIRST_S, RESTART_MOST_S, len(deaths) - 1, random_value)
    )
    return Decision(History(deaths), wait_s, report=False)


class Supervisor:
    """Keeps the active workers of a router running.

    Args:
        router: whose active workers to watch.
        on_crash_loop: called with the model's name, in a thread of this class, once for each crash loop.
        rule: when it is a crash loop.
        start: starts a worker in a dead one's place; `Worker.start` but for tests of failing starts.
    """

    def __init__(
        self,
        router: Router,
        on_crash_loop: Callable[[str], None],
        *,
        rule: LoopRule = CRASH_LOOP,
        start: Callable[[WorkerSpec, float], Worker] = Worker.start,
    ) -> None:
        self._router = router
        self._on_crash_loop = on_crash_loop
        self._rule = rule
        self._start = start
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._histories: dict[str, tuple[int, History]] = {}  # model -> version, its history
        self._threads: set[threading.Thread] = set()
        router.watch(self._died, self._lost)

    def stop(self, timeout_s: float) -> None:
        """Starts nothing more; waits up to `timeout_s` for what is being started, which is then closed."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _died(self, worker: Worker) -> None:
        """In the watching thread of the process that was its last."""
        self._begin(worker, lambda: self._recover(worker))

    def _lost(self, worker: Worker, instance: Instance) -> None:
        """In the watching thread of a process whose version goes on without it."""
        self._begin(worker, lambda: self._refill(worker, instance))

    def _begin(self, worker: Worker, work: Callable[[], None]) -> None:
        """Does it in a thread, unless nothing is to be started any more."""

        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"restart-{worker.spec}", daemon=True)
        with self._lock:
            if self._stopping.is_set():
                return
            self._threads.add(thread)
            thread.start()  # while locked: `stop` joins what it finds here

    def _recover(self, dead: Worker) -> None:
        """Restarts until there is a worker in the dead one's place, or the model was turned to another."""
        ended = any(instance.outgrown for instance in dead.instances)  # for what it held: it did not die
        if ended and self._router.expect_restart(dead, True) and self._restart(dead):
            return
        lived_s = time.monotonic() - dead.ready_at
        while not self._stopping.is_set():
            decision = self._decide(dead, lived_s)
            soon = decision.wait_s < RESTART_WAIT_S
            if not self._router.expect_restart(dead, soon):
                return
            if decision.report:
                self._report(dead)
            if self._stopping.wait(decision.wait_s) or not self._router.expect_restart(dead, soon):
                return
            if self._restart(dead):
                return
            lived_s = 0.0

    def _refill(self, worker: Worker, lost: Instance) -> None:
        """Until another has the lost process's place, or the worker has died or answers no more."""
        lived_s = time.monotonic() - lost.ready_at
        at_once = lost.outgrown  # it did not die
        while worker.alive and self._router.is_active(worker):
            if at_once:
                at_once = False
            elif self._wait(worker, self._decide(worker, lived_s)):
                return
            try:
                if worker.alive and self._router.is_active(worker) and worker.refill(lost, RESTART_LOAD_S):
                    log.warning("a process of worker %s was started again", worker.spec)
                return
            except SluiceError as error:
                log.warning("starting a process of %s again failed: %s", worker.spec, error)
                lived_s = 0.0

    def _wait(self, worker: Worker, decision: Decision) -> bool:
        """Reports what is to be reported, waits, and says whether nothing is to be started any more."""
        if decision.report:
            self._report(worker)
        return self._stopping.wait(decision.wait_s)

    def _decide(self, dead: Worker, lived_s: float) -> Decision:
        with self._lock:
            version, history = self._histories.get(dead.model, (dead.version, History()))
            if version != dead.version:
                history = History()
            now = time.monotonic()
            if history.deaths:  # of another of its processes, while this one lived
                lived_s = min(lived_s, now - history.deaths[-1])
            decision = after_death(history, now, lived_s, random.random(), self._rule)  # noqa: S311 - jitter
            self._histories[dead.model] = (dead.version, decision.history)
        return decision

    def _restart(self, dead: Worker) -> bool:
        """Whether there is nothing more to do."""
        try:
            fresh = self._start(dead.spec, RESTART_LOAD_S)
        except SluiceError as error:
            log.warning("restarting %s failed: %s", dead.spec, error)
            return False
        if self._stopping.is_set() or not self._router.replace(dead, fresh):
            fresh.close(0)
        else:
            log.warning("worker %s was started again (process %d)", fresh.spec, fresh.pid)
        return True

    def _report(self, dead: Worker) -> None:
        log.error(
            "%s is in a crash loop: %d deaths within %g s", dead.spec, self._rule.deaths, self._rule.window_s
        )
        try:
            self._on_crash_loop(dead.model)
        except Exception:
            log.exception("reacting to the crash loop of %s failed; restarts go on", dead.spec)
