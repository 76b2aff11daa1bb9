"""The driver of a scheduler: threads of the front come with one request each and leave with its answer.

There is no thread of its own. A thread that finds a worker free takes it and leads: it takes the next batch
from the scheduler, has the worker run it, hands every member its part, and, once its own request is answered,
passes the worker to the thread whose request is next, or leaves it free. With one client a request thus never
changes threads; with many, as many threads as there are workers talk to them and the others sleep.

A batch that the model fails on is run again one by one, so that nobody fails for another's inputs. A model
whose outputs do not have the batch's size is not put together again.

Rules: every wait has a deadline; a follower that gives up never stops the others; a worker is always held by
a thread that is awake, or is free; where requests wait though a worker is free, for a fuller batch or for the
gate, one thread waits with it for what comes first. A worker that ended is handed to nobody any more, but for
the last one, whose `run` says what became of it.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from agent.batch_terms import Arrays, Gate, Kind, Overloaded, Runner, kind_of
from agent.figures import Timing
from agent.limits import MAX_WAITING_ON_STALL, STALL_S
from agent.scheduling import Batch, Item, Policy, Priority, Scheduler, Shed
from agent.staging import Staged
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)


class _Pending:
    """One request: what its thread and the leader share, under the batcher's lock."""

    __slots__ = (
        "deadline",
        "done",
        "error",
        "inputs",
        "item",
        "leads",
        "outputs",
        "still_wanted",
        "timing",
        "wake",
    )

    def __init__(
        self,
        item: Item,
        deadline: float,
        inputs: Mapping[str, NDArray[Any]],
        still_wanted: Callable[[], bool],
    ) -> None:
        self.item = item
        self.deadline = deadline
        self.inputs = inputs
        self.still_wanted = still_wanted
        self.wake = threading.Lock()  # held while there is nothing to do
        self.done = False
        self.leads: Runner | None = None  # the worker that its thread has
        self.outputs: Arrays = {}
        self.timing = Timing()
        self.error: Exception | None = None


class Batcher:
    """The queue before the workers of one version; safe to use from any thread.

    Attributes:
        gate: what low-priority requests wait for; None: nothing.
        threads: that one run uses, for the gate.

    Args:
        name: of the model and version, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._runners: list[Runner] = []
        self._free: list[Runner] = []  # of those; the one that ran last is taken first
        self._released: dict[Runner, threading.Event] = {}  # those that threads are to let go of
        self._lingers = False  # a thread with a worker waits for what comes first
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._scheduler = Scheduler(Policy())
        self._pending: dict[int, _Pending] = {}
        self.gate: Gate | None = None
        self.threads = 1

    @property
    def policy(self) -> Policy:
        return self._scheduler.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        with self._lock:
            self._scheduler.policy = policy

    def add(self, runner: Runner) -> None:
        """One more worker."""
        with self._lock:
            self._runners.append(runner)
            self._free.append(runner)
            self._count_workers()
            self._engage()

    def remove(self, runner: Runner) -> None:
        """The worker ended; the last one stays."""
        with self._lock:
            self._drop(runner)

    def retire(self, runner: Runner, timeout_s: float) -> bool:
        """Gives the worker nothing more, and waits for what it runs; false if that took over `timeout_s`.

        The last one stays, and the answer is then false at once.
        """
        with self._lock:
            if runner not in self._runners:
                return True  # it ended
            if len(self._runners) == 1:
                return False
            held = runner not in self._free
            self._drop(runner)
            if not held:
                return True
            released = self._released[runner] = threading.Event()
            self._count_workers()
            self._arrived.notify_all()  # it may be with the thread that waits for a fuller batch
        return released.wait(timeout_s)

    def inherit(self, other: Batcher) -> None:
        """Goes on with another's policy and what it learned: this worker takes that one's place."""
        with self._lock:
            self._scheduler.inherit(other._scheduler)
            self.gate, self.threads = other.gate, other.threads

    def infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        deadline: float,
        *,
        kind: Kind | None = None,
        priority: Priority = Priority.NORMAL,
        patience_s: float = math.inf,
        still_wanted: Callable[[], bool] = lambda: True,
        on_end: Callable[[Callable[[], None]], bool] = lambda _callback: True,
    ) -> tuple[Arrays, Timing]:
        """One request.

        Args:
            inputs: as `Worker.check` returned them.
            deadline: for the answer (time.monotonic).
            kind: of the inputs, where the caller knows it.
            priority: see scheduling.Priority.
            patience_s: after how long in the queue it leaves without having run, seconds.
            still_wanted: asked before it runs; if false it is not run.
            on_end: given a callback to be called when the client has gone away; false: it has already.

        Returns:
            The outputs, views of nothing that changes, and where the time went (without encoding).

        Raises:
            SluiceError: what `Worker.run` raises, Overloaded, WORKER_TIMEOUT.
        """
        now = time.monotonic()
        item = self._item(kind, inputs, now, priority, min(deadline, now + patience_s))
        low = self.gate is not None and priority is Priority.LOW  # it waits for the gate with all others
        with self._lock:
            runner = None if low else self._take_free()
            batch = None if runner is None else self._scheduler.run_now(item, now)
            if batch is None and runner is not None:
                self._free.append(runner)
        if batch is not None and runner is not None:
            return self._run_now(inputs, deadline, still_wanted, batch, runner)
        pending = _Pending(item, deadline, inputs, still_wanted)
        pending.wake.acquire()
        with self._lock:
            self._pending[item.number] = pending
            self._turn_away(self._scheduler.submit(item, now))
            self._turn_away_if_stalled()
            if not pending.done:
                if self._lingers:
                    self._arrived.notify()
                else:
                    pending.leads = self._take_free()
        if pending.leads is not None:
            self._lead(pending)
        if not pending.done:
            if not on_end(lambda: self._client_left(pending)):
                self._client_left(pending)
            self._follow(pending)
            while pending.leads is not None:
                self._lead(pending)
                self._follow(pending)
        if pending.error is not None:
            raise pending.error
        return pending.outputs, pending.timing

    def _item(
        self,
        kind: Kind | None,
        inputs: Mapping[str, NDArray[Any]],
        now: float,
        priority: Priority,
        deadline: float,
    ) -> Item:
        number = next(self._numbers)
        if self._scheduler.policy.max_batch <= 1:
            return Item(number, number, 1, 1, priority, now, deadline)
        key, samples, elements = kind or kind_of(inputs)
        return Item(number, number if key is None else key, samples, elements, priority, now, deadline)

    def _run_now(
        self,
        inputs: Mapping[str, NDArray[Any]],
        deadline: float,
        still_wanted: Callable[[], bool],
        batch: Batch,
        runner: Runner,
    ) -> tuple[Arrays, Timing]:
        """The request that found a worker free: nobody else knows of it, so it needs no more than this."""
        ran = False
        try:
            if not still_wanted():
                raise runner.timeout("the client no longer waits for the answer")
            outputs, timing = runner.run([inputs], deadline - batch.began)
            ran = True
            runner.figures.ran(batch.samples, timing)
            return outputs, timing
        finally:
            with self._lock:
                self._scheduler.finished(batch, time.monotonic(), ran=ran)
                self._pass_on(runner)

    # A follower's thread.

    def _follow(self, pending: _Pending) -> None:
        """Until the request is answered, given up, or the thread is to lead."""
        item = pending.item
        while not pending.done:
            now = time.monotonic()
            until = item.deadline if now < item.deadline else pending.deadline
            if pending.wake.acquire(timeout=max(0.0, min(STALL_S, until - now))):
                return
            with self._lock:
                if pending.leads is not None or pending.done:
                    continue  # the wake-up is on its way
                now = time.monotonic()
                if not self._scheduler.waits(item.number):
                    if now >= pending.deadline:
                        self._fail(pending, self._timeout("no answer within the request's deadline"))
                        return
                elif now < item.deadline:
                    self._turn_away_if_stalled()
                else:
                    self._scheduler.cancel(item.number)
                    self._fail(pending, self._timeout("the request waited for its turn too long"))
                    return

    def _client_left(self, pending: _Pending) -> None:
        with self._lock:
            if pending.leads is None and self._scheduler.cancel(pending.item.number):
                self._fail(pending, self._timeout("the client no longer waits for the answer"))

    # The leader's thread.

    def _lead(self, own: _Pending) -> None:
        """Runs batches on the worker that the thread has, until it has passed that on."""
        while True:
            with self._lock:
                batch = self._next_batch(own)
                if batch is None:
                    return
                runner = own.leads
                assert runner is not None
                members = [self._pending[item.number] for item in batch.items]
            ran = False
            try:
                with self._noted(batch):
                    ran = self._run(members, batch, runner)
            except Exception as error:
                log.exception("a defect while running a batch of %s", self._name)
                for member in members:
                    member.error = error
            finally:
                with self._lock:
                    self._scheduler.finished(batch, time.monotonic(), ran=ran)
                    for member in members:
                        self._finish(member)

    def _next_batch(self, own: _Pending) -> Batch | None:
        """Under the lock; None: the worker was passed on, or left free. The thread's own request may then be
        in another's batch, or wait for another worker.
        """
        while True:
            runner = own.leads
            assert runner is not None
            now = time.monotonic()
            for item in self._scheduler.expire(now):
                self._fail(
                    self._pending[item.number], self._timeout("the request waited for its turn too long")
                )
            if own.done or not self._scheduler.waiting or not self._runs(runner):
                own.leads = None
                self._pass_on(runner)
                return None
            if self.gate is not None:
                self._scheduler.hold_low = self._scheduler.low_waits and not self.gate.admits()
            batch = self._scheduler.take(now)
            if batch is not None:
                self._engage()
                return batch
            if self._lingers:  # one is enough
                own.leads = None
                self._free.append(runner)
                return None
            until = self._scheduler.wake_at(now)
            self._lingers = True
            try:
                self._arrived.wait(max(0.0, (now if until is None else until) - now))
            finally:
                self._lingers = False

    def _noted(self, batch: Batch) -> AbstractContextManager[None]:
        """Tells the gate of a run of low-priority requests alone."""
        if self.gate is None or any(item.priority is not Priority.LOW for item in batch.items):
            return nullcontext()
        return self.gate.low_work(self.threads)

    def _pass_on(self, runner: Runner) -> None:
        """Under the lock: the worker goes to the thread of the request that is next, or to nobody."""
        if self._runs(runner):
            self._free.append(runner)
        elif runner in self._released:
            self._released.pop(runner).set()
            self._count_workers()
        self._engage()

    def _engage(self) -> None:
        """Under the lock: has threads of waiting requests lead, as long as workers are free."""
        if self._free and not self._lingers:
            for item in self._scheduler.waiting:
                heir = self._pending[item.number]
                if heir.leads is None:
                    heir.leads = self._take_free()
                    if heir.leads is None:
                        return
                    heir.wake.release()

    def _run(self, members: Sequence[_Pending], batch: Batch, runner: Runner) -> bool:
        """Gives every member its part of the answer, or an error; whether the batch ran as one."""
        wanted = [member for member in members if member.still_wanted()]
        if len(wanted) < len(members):
            gone = self._timeout("the client no longer waits for the answer")
            for member in members:
                if member not in wanted:
                    member.error = gone
        try:
            if len(wanted) == 1:
                self._run_one(wanted[0], batch.began, runner)
            elif wanted and not self._run_together(wanted, batch.began, runner):
                return False
        except SluiceError as error:
            if error.reason == errors_pb2.INPUT_INVALID and len(wanted) > 1:
                self._run_alone(
                    wanted, runner
                )  # one of them is at fault, and the others shall not fail for it
            else:
                for member in wanted:
                    member.error = error
            return False
        return bool(wanted)

    def _run_together(self, members: Sequence[_Pending], began: float, runner: Runner) -> bool:
        members = sorted(members, key=_place)  # as their inputs lie, so that they need not be moved
        inputs = [member.inputs for member in members]
        samples = sum(member.item.samples for member in members)
        outputs, timing = runner.run(inputs, max(map(_time_left, members)))
        split_at = time.monotonic()
        if any(not array.ndim or array.shape[0] != samples for array in outputs.values()):
            log.warning("%s answers a batch of %d with other sizes: it runs one by one", self._name, samples)
            self.policy = replace(self.policy, max_batch=1)
            self._run_alone(members, runner)
            return False
        start = 0
        for member in members:
            end = start + member.item.samples
            member.outputs = {name: array[start:end] for name, array in outputs.items()}
            start = end
        timing.output_s = time.monotonic() - split_at
        runner.figures.ran(samples, timing)
        for member in members:
            member.timing = replace(timing, queue_s=began - member.item.arrived)
        return True

    def _run_alone(self, members: Sequence[_Pending], runner: Runner) -> None:
        for member in members:
            try:
                self._run_one(member, time.monotonic(), runner)
            except SluiceError as error:
                member.error = error

    def _run_one(self, member: _Pending, began: float, runner: Runner) -> None:
        member.outputs, timing = runner.run([member.inputs], _time_left(member))
        runner.figures.ran(member.item.samples, timing)
        timing.queue_s += began - member.item.arrived
        member.timing = timing

    # Under the lock.

    def _take_free(self) -> Runner | None:
        """A free worker, which is then the caller's."""
        while self._free:
            runner = self._free.pop()
            if self._runs(runner):
                return runner
        return None

    def _runs(self, runner: Runner) -> bool:
        """Whether the worker is to be given to anyone; one that ended is not, but for the last."""
        if runner.ended:
            self._drop(runner)
        return runner in self._runners

    def _drop(self, runner: Runner) -> None:
        if len(self._runners) > 1 and runner in self._runners:
            self._runners.remove(runner)
            if runner in self._free:
                self._free.remove(runner)
            self._count_workers()

    def _count_workers(self) -> None:
        self._scheduler.workers = len(self._runners) + len(self._released)

    def _turn_away_if_stalled(self) -> None:
        if min(runner.busy_s() for runner in self._runners) > STALL_S:
            why = f"its running request takes over {STALL_S:g} s"
            self._turn_away(self._scheduler.trim(MAX_WAITING_ON_STALL, why))

    def _turn_away(self, shed: Sequence[Shed]) -> None:
        for each in shed:
            message = f"{self._name} is busy: {each.why}"
            error = Overloaded(message, obj=self._name, retry_s=each.retry_s)
            self._fail(self._pending[each.item.number], error)

    def _timeout(self, why: str) -> SluiceError:
        return self._runners[0].timeout(why)

    def _fail(self, pending: _Pending, error: Exception) -> None:
        pending.error = error
        self._finish(pending)

    def _finish(self, pending: _Pending) -> None:
        """The request needs nothing more; its thread is woken once."""
        if not pending.done:
            pending.done = True
            del self._pending[pending.item.number]
            if pending.leads is None:
                pending.wake.release()
            elif self._lingers:
                self._arrived.notify()  # it may be the one that waits


def _place(member: _Pending) -> int:
    """Where its inputs lie, if they are staged."""
    return member.inputs.start if isinstance(member.inputs, Staged) else -1


def _time_left(member: _Pending) -> float:
    return member.deadline - time.monotonic()
