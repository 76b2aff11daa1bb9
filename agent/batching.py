"""The driver of a scheduler: threads of the front come with one request each and leave with its answer.

There is no thread of its own. The thread that finds nobody leading becomes the leader: it takes the next
batch from the scheduler, has the worker run it, hands every member its part, and, once its own request is
answered, passes the lead to the thread whose request is next. With one client a request thus never changes
threads; with many, one thread at a time talks to the worker and the others sleep.

A batch that the model fails on is run again one by one, so that nobody fails for another's inputs. A model
whose outputs do not have the batch's size is not put together again.

Rules: every wait has a deadline; a follower that gives up never stops the others; the lead is always held by
a thread that is awake, or by nobody.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from agent.figures import Figures, Timing
from agent.limits import MAX_WAITING_ON_STALL, STALL_S
from agent.scheduling import Batch, Item, Policy, Priority, Scheduler, Shed
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class Overloaded(SluiceError):
    """LIMIT_EXCEEDED: the request was turned away; it may be worth trying again after `retry_s` seconds."""

    def __init__(self, message: str, *, obj: str, retry_s: float) -> None:
        hint = f"try again after {math.ceil(retry_s * 1000)} ms, or send fewer requests at a time"
        super().__init__(errors_pb2.LIMIT_EXCEEDED, message, hint=hint, obj=obj)
        self.retry_s = retry_s


class Runner(Protocol):
    """What runs batches: a worker."""

    figures: Figures

    def run(self, inputs: Sequence[Mapping[str, NDArray[Any]]], timeout_s: float) -> tuple[Arrays, Timing]:
        """Runs checked inputs, joined along the first dimension if they are several. Raises SluiceError."""

    def busy_s(self) -> float:
        """For how long the running request has been running, seconds; 0: none runs."""

    def timeout(self, why: str) -> SluiceError:
        """The error for a request that waited too long."""


class Kind(NamedTuple):
    """What decides which requests may go together.

    Attributes:
        key: equal ones may share a batch; None: it goes alone.
        samples: that the request holds.
        elements: of one of them.
    """

    key: Hashable
    samples: int
    elements: int


def kind_of(inputs: Mapping[str, NDArray[Any]]) -> Kind:
    """The kind of a request with these inputs, for a model that takes batches."""
    arrays = inputs.values()
    first = next(iter(arrays))
    if not first.ndim or any(array.shape[:1] != first.shape[:1] for array in arrays):
        return Kind(None, 1, 1)  # the model will say what it thinks of that, to this request alone
    samples = first.shape[0]
    return Kind(
        tuple([array.shape[1:] for array in arrays]), samples, sum(array.size for array in arrays) // samples
    )


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
        self.done = self.leads = False
        self.outputs: Arrays = {}
        self.timing = Timing()
        self.error: Exception | None = None


class Gate(Protocol):
    """What low-priority work waits for: host_load.HostLoad."""

    def admits(self) -> bool:
        """Whether it may begin."""

    def low_work(self, threads: int) -> AbstractContextManager[None]:
        """Around a run of it with so many threads."""


class Batcher:
    """The queue before one worker; safe to use from any thread.

    Attributes:
        gate: what low-priority requests wait for; None: nothing.
        threads: that one run uses, for the gate.

    Args:
        runner: the worker.
        name: of its model and version, for messages.
    """

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner = runner
        self._name = name
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._scheduler = Scheduler(Policy())
        self._pending: dict[int, _Pending] = {}
        self._led = False
        self.gate: Gate | None = None
        self.threads = 1

    @property
    def policy(self) -> Policy:
        return self._scheduler.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        with self._lock:
            self._scheduler.policy = policy

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
            batch = None if self._led or low else self._scheduler.run_now(item, now)
            if batch is not None:
                self._led = True
        if batch is not None:
            return self._run_now(inputs, deadline, still_wanted, batch)
        pending = _Pending(item, deadline, inputs, still_wanted)
        pending.wake.acquire()
        with self._lock:
            self._pending[item.number] = pending
            self._turn_away(self._scheduler.submit(item, now))
            self._turn_away_if_stalled()
            if not pending.done:
                if self._led:
                    self._arrived.notify()
                else:
                    self._led = pending.leads = True
        if not pending.leads and not pending.done:
            if not on_end(lambda: self._client_left(pending)):
                self._client_left(pending)
            self._follow(pending)
        if pending.leads:
            self._lead(pending)
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
    ) -> tuple[Arrays, Timing]:
        """The request that found the worker free: nobody else knows of it, so it needs no more than this."""
        ran = False
        try:
            if not still_wanted():
                raise self._runner.timeout("the client no longer waits for the answer")
            outputs, timing = self._runner.run([inputs], deadline - batch.began)
            ran = True
            self._runner.figures.ran(batch.samples, timing)
            return outputs, timing
        finally:
            with self._lock:
                self._scheduler.finished(time.monotonic(), ran=ran)
                self._pass_on()

    # A follower's thread.

    def _follow(self, pending: _Pending) -> None:
        """Until the request is answered, given up, or the thread is to lead."""
        item = pending.item
        while True:
            now = time.monotonic()
            until = item.deadline if now < item.deadline else pending.deadline
            if pending.wake.acquire(timeout=max(0.0, min(STALL_S, until - now))):
                return
            with self._lock:
                if pending.leads or pending.done:
                    continue  # the wake-up is on its way
                now = time.monotonic()
                if not self._scheduler.waits(item.number):
                    if now >= pending.deadline:
                        self._fail(pending, self._runner.timeout("no answer within the request's deadline"))
                        return
                elif now < item.deadline:
                    self._turn_away_if_stalled()
                else:
                    self._scheduler.cancel(item.number)
                    self._fail(pending, self._runner.timeout("the request waited for its turn too long"))
                    return

    def _client_left(self, pending: _Pending) -> None:
        with self._lock:
            if not pending.leads and self._scheduler.cancel(pending.item.number):
                self._fail(pending, self._runner.timeout("the client no longer waits for the answer"))

    # The leader's thread.

    def _lead(self, own: _Pending) -> None:
        while True:
            with self._lock:
                batch = self._next_batch(own)
                if batch is None:
                    return
                members = [self._pending[item.number] for item in batch.items]
            ran = False
            try:
                with self._noted(batch):
                    ran = self._run(members, batch)
            except Exception as error:
                log.exception("a defect while running a batch of %s", self._name)
                for member in members:
                    member.error = error
            finally:
                with self._lock:
                    self._scheduler.finished(time.monotonic(), ran=ran)
                    for member in members:
                        self._finish(member)

    def _next_batch(self, own: _Pending) -> Batch | None:
        """Under the lock; None: the lead was passed on, or nobody needs it."""
        while True:
            now = time.monotonic()
            for item in self._scheduler.expire(now):
                late = self._runner.timeout("the request waited for its turn too long")
                self._fail(self._pending[item.number], late)
            waiting = self._scheduler.waiting
            if not waiting:
                self._led = False
                return None
            if own.done:
                self._pass_on()
                return None
            if self.gate is not None:
                self._scheduler.hold_low = self._scheduler.low_waits and not self.gate.admits()
            batch = self._scheduler.take(now)
            if batch is not None:
                return batch
            until = self._scheduler.wake_at(now)
            self._arrived.wait(max(0.0, (now if until is None else until) - now))

    def _noted(self, batch: Batch) -> AbstractContextManager[None]:
        """Tells the gate of a run of low-priority requests alone."""
        if self.gate is None or any(item.priority is not Priority.LOW for item in batch.items):
            return nullcontext()
        return self.gate.low_work(self.threads)

    def _pass_on(self) -> None:
        """Under the lock: the lead goes to the thread of the request that is next, or to nobody."""
        waiting = self._scheduler.first
        if waiting is None:
            self._led = False
        else:
            heir = self._pending[waiting.number]
            heir.leads = True
            heir.wake.release()

    def _run(self, members: Sequence[_Pending], batch: Batch) -> bool:
        """Gives every member its part of the answer, or an error; whether the batch ran as one."""
        wanted = [member for member in members if member.still_wanted()]
        if len(wanted) < len(members):
            gone = self._runner.timeout("the client no longer waits for the answer")
            for member in members:
                if member not in wanted:
                    member.error = gone
        try:
            if len(wanted) == 1:
                self._run_one(wanted[0], batch.began)
            elif wanted and not self._run_together(wanted, batch.began):
                return False
        except SluiceError as error:
            if error.reason == errors_pb2.INPUT_INVALID and len(wanted) > 1:
                self._run_alone(wanted)  # one of them is at fault, and the others shall not fail for it
            else:
                for member in wanted:
                    member.error = error
            return False
        return bool(wanted)

    def _run_together(self, members: Sequence[_Pending], began: float) -> bool:
        inputs = [member.inputs for member in members]
        samples = sum(member.item.samples for member in members)
        outputs, timing = self._runner.run(inputs, max(map(_time_left, members)))
        split_at = time.monotonic()
        if any(not array.ndim or array.shape[0] != samples for array in outputs.values()):
            log.warning("%s answers a batch of %d with other sizes: it runs one by one", self._name, samples)
            self.policy = replace(self.policy, max_batch=1)
            self._run_alone(members)
            return False
        start = 0
        for member in members:
            end = start + member.item.samples
            member.outputs = {name: array[start:end] for name, array in outputs.items()}
            start = end
        timing.output_s = time.monotonic() - split_at
        self._runner.figures.ran(samples, timing)
        for member in members:
            member.timing = replace(timing, queue_s=began - member.item.arrived)
        return True

    def _run_alone(self, members: Sequence[_Pending]) -> None:
        for member in members:
            try:
                self._run_one(member, time.monotonic())
            except SluiceError as error:
                member.error = error

    def _run_one(self, member: _Pending, began: float) -> None:
        member.outputs, timing = self._runner.run([member.inputs], _time_left(member))
        self._runner.figures.ran(member.item.samples, timing)
        timing.queue_s += began - member.item.arrived
        member.timing = timing

    # Under the lock.

    def _turn_away_if_stalled(self) -> None:
        if self._runner.busy_s() > STALL_S:
            why = f"its running request takes over {STALL_S:g} s"
            self._turn_away(self._scheduler.trim(MAX_WAITING_ON_STALL, why))

    def _turn_away(self, shed: Sequence[Shed]) -> None:
        for each in shed:
            message = f"{self._name} is busy: {each.why}"
            error = Overloaded(message, obj=self._name, retry_s=each.retry_s)
            self._fail(self._pending[each.item.number], error)

    def _fail(self, pending: _Pending, error: Exception) -> None:
        pending.error = error
        self._finish(pending)

    def _finish(self, pending: _Pending) -> None:
        """The request needs nothing more; its thread is woken once."""
        if not pending.done:
            pending.done = True
            del self._pending[pending.item.number]
            if not pending.leads:
                pending.wake.release()


def _time_left(member: _Pending) -> float:
    return member.deadline - time.monotonic()
