"""The agent's handle on one loaded version: its processes, the queue before them, and what is known of it.

`Worker.start` starts as many processes (instance.py) as the spec says, all of them loading at once, and
returns when all are ready. Clients' requests come through `queue` (batching.py), which gives the next batch
to any process that is free; `infer` goes past it, for checks.

A process that dies costs its own request. While others live, the version goes on with them: `on_loss` is
called, and `refill` starts another in the lost one's place. The version is dead, for good, when the last one
has ended: `on_death` is called, and another worker may take this one's place (`succeed`).

Rules: no process outlives its handle's `close`, none is left unreaped, and none outlives the agent.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.batching import Batcher
from agent.cascade import Cascade
from agent.figures import Figures, Timing
from agent.instance import Instance
from agent.limits import DRAIN_S
from agent.staging import Staged, Staging
from agent.version_policy import VersionPolicy
from agent.worker_spec import WorkerSpec
from runtimes.inputs import check_inputs, splits_by_sample
from runtimes.interface import InputInvalid, TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors

if TYPE_CHECKING:
    from agent.shadow import Shadow

log = logging.getLogger(__name__)


class Worker:
    """A version's running processes; made by `start`.

    Attributes:
        spec: what they were started with.
        runtime: the name of the runtime that loaded the model.
        accelerator: what it runs on, the first of the spec's that works.
        inputs: what the model wants.
        outputs: what it answers.
        staging: where requests put their inputs for any of the processes.
        figures: of its version's inferences.
        queue: where clients' requests wait for it.
        cache_s: for how long its answers may be given again to the same inputs, seconds; 0: never.
        versions: which others of its model are loaded beside it while it is active; None: none.
        cascade: whom it hands samples on to that it is unsure of; None: nobody.
        memory_limit: the most that one of its processes may hold of its own, bytes; 0: it is not looked at.
        base_bytes: what one held once it was checked; 0 before.
        renewals: how often a process was renewed for what it held (renewing.py).
        shadow: what takes copies of its requests and answers, for a version that may follow it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Starts the processes; `start` is the way to a worker that is ready."""
        self.spec = spec
        self.runtime = self.accelerator = ""
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.cache_s = 0.0
        self.cascade: Cascade | None = None
        self.versions: VersionPolicy | None = None
        self.shadow: Shadow | None = None
        self.memory_limit = self.base_bytes = self.renewals = 0
        self._any_batch = False
        self._lock = threading.RLock()  # guards what follows
        self._state = threading.Condition(self._lock)
        self._users = 0
        self._closing = False
        self._died = False
        self._deaths = 0
        self._past = [0, 0]  # requests and failures of processes that others took the place of
        self._callbacks: list[Callable[[Worker], None]] = []
        self._losses: list[Callable[[Worker, Instance], None]] = []
        with os_errors("making shared memory for", str(spec)):
            self.staging = Staging.create()
        self._instances: tuple[Instance, ...] = ()
        self._lost: list[Instance] = []  # of those, whose end was told
        self._leaving: tuple[Instance, ...] = ()  # others have their place, and they answer what they have
        self._starting = True
        self._figures = Figures()
        self.queue = Batcher(str(spec))
        try:
            for _ in range(spec.instances):
                self._instances = (*self._instances, Instance(spec, self.staging, self._ended))
        except BaseException:
            for instance in self._instances:
                instance.kill()
                instance.close()
            self.staging.close()
            raise

    @classmethod
    def start(
        cls, spec: WorkerSpec, deadline_s: float, started: Callable[[Worker], None] | None = None
    ) -> Worker:
        """Starts the processes and has them load the model.

        Args:
            spec: what to load.
            deadline_s: for all of it, seconds.
            started: given the worker before it has loaded anything: closing it makes the start fail.

        Raises:
            SluiceError: MODEL_LOAD_FAILED (the runtime refused the model, or a process died while loading
                it), OUT_OF_MEMORY (it was killed), RUNTIME_UNAVAILABLE, WORKER_TIMEOUT, WORKER_DIED (it died
                before it began to load) or IO_FAILED (no process could be started). No process is left
                behind.
        """
        worker = cls(spec)
        try:
            if started is not None:
                started(worker)
            worker._load(deadline_s)
        except BaseException:
            worker._closing = True
            for instance in worker._instances:
                instance.kill()
            worker.close(0)
            raise
        return worker

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def version(self) -> int:
        return self.spec.version

    @property
    def figures(self) -> Figures:
        return self._figures

    @figures.setter
    def figures(self, figures: Figures) -> None:
        self._figures = figures
        for instance in self._instances:
            instance.figures = figures

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Its processes, those that have ended and were not replaced yet among them."""
        return self._instances

    @property
    def alive(self) -> bool:
        """Whether a process runs and takes requests."""
        return not self._closing and any(not instance.ended for instance in self._instances)

    @property
    def deaths(self) -> int:
        """How many of its processes ended though nobody closed them."""
        return self._deaths

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._instances[0].pid

    @property
    def ready_at(self) -> float:
        """When the process that is ready for the shortest time became it (time.monotonic)."""
        return max(instance.ready_at for instance in self._instances)

    @property
    def requests(self) -> int:
        """Clients' requests sent to its processes: those before `checked` do not count."""
        return self._past[0] + sum(each.requests for each in (*self._instances, *self._leaving))

    @property
    def failures(self) -> int:
        """Those of them that were not answered, or whose inputs made the model fail."""
        return self._past[1] + sum(each.failures for each in (*self._instances, *self._leaving))

    def succeed(self, dead: Worker) -> None:
        """Goes on with figures, policy and learned batch sizes of a worker of the same version."""
        self.figures, self.cache_s, self.shadow = dead.figures, dead.cache_s, dead.shadow
        self.cascade, self.versions = dead.cascade, dead.versions
        self.memory_limit, self.base_bytes, self.renewals = dead.memory_limit, dead.base_bytes, dead.renewals
        self.queue.inherit(dead.queue)

    def checked(self) -> None:
        """What it was asked so far, warm-up and golden inputs, was no client's: counts from here, and its
        processes give way to no others any more.
        """
        self._past = [0, 0]
        for instance in self._instances:
            instance.requests = instance.failures = 0
            instance.take_share()
        self.base_bytes = max(instance.private_bytes() for instance in self._instances)

    def resident_bytes(self) -> int:
        """Physical memory that its processes use; 0 when they have ended."""
        return sum(instance.resident_bytes() for instance in self._instances)

    def on_death(self, callback: Callable[[Worker], None]) -> None:
        """Has `callback(worker)` called once when its last process ends though nobody closed it.

        It runs in a thread of the process's handle, or at once in the caller's if all are dead already. The
        same callback given twice counts once.
        """
        with self._state:
            if not self._died:
                if callback not in self._callbacks:
                    self._callbacks.append(callback)
                return
        callback(self)

    def on_loss(self, callback: Callable[[Worker, Instance], None]) -> None:
        """Has `callback(worker, instance)` called whenever a process ends by itself and others live on.

        It runs in a thread of the process's handle; at once in the caller's for those that are missing
        already. Given twice it is called once for each that ends, and again for those missing.
        """
        with self._state:
            if callback not in self._losses:
                self._losses.append(callback)
            missing = list(self._lost) if self.alive else []
        for instance in missing:
            callback(self, instance)

    def refill(self, lost: Instance, deadline_s: float) -> bool:
        """Starts a process in the place of one that ended; false when it has none here any more.

        Raises SluiceError as `start`; another attempt may follow then.
        """
        if not self.alive or lost not in self._instances:
            return False
        fresh = self._another(deadline_s)
        with self._state:
            fits = self.alive and lost in self._instances
            if fits:
                self._count_past(lost)
                self._lost.remove(lost)
                self._place(fresh, lost)
        if not fits:
            fresh.close()
        elif fresh.ended:  # before it had its place, so that nobody was told
            self._ended(fresh)
        return fits

    def renew(self, old: Instance, deadline_s: float, prove: Callable[[Instance], None]) -> bool:
        """Starts a process in the place of one that runs, which answers what it has and ends.

        Returns once it has ended; false when it has no place here any more, or ended by itself meanwhile.

        Args:
            old: the process.
            deadline_s: for the fresh one to load, seconds.
            prove: given that before it has the place.

        Raises SluiceError as `start`, and what `prove` raises; the old one then goes on.
        """
        if not self.alive or old not in self._instances:
            return False
        fresh = self._another(deadline_s)
        try:
            prove(fresh)
        except BaseException:
            fresh.close()
            raise
        fresh.requests = fresh.failures = 0
        with self._state:
            fits = self.alive and old in self._instances and old not in self._lost
            if fits:
                self.renewals += 1
                self._leaving = (*self._leaving, old)
                self._place(fresh, old)
        if not fits:
            fresh.close()
            return False
        if fresh.ended:
            self._ended(fresh)
        if not self.queue.retire(old, DRAIN_S):
            log.warning("worker %s (process %d) still runs a request and is ended", self.spec, old.pid)
        old.close()
        with self._state:
            self._count_past(old)
            self._leaving = tuple(each for each in self._leaving if each is not old)
        return True

    def end_outgrown(self, instance: Instance, why: str) -> None:
        """Ends a process that holds too much; another is started in its place, as after a death.

        Others of the version go on; what it runs is waited for if there are, and else fails.
        """
        with self._state:
            if not self.alive or instance not in self._instances or instance in self._lost:
                return
            self.renewals += 1
            instance.outgrown = True
        self.queue.retire(instance, DRAIN_S)
        instance.kill(why)
        instance.close()

    def _another(self, deadline_s: float) -> Instance:
        """One more process, loaded, without a place yet. Raises SluiceError as `start`."""
        fresh = Instance(self.spec, self.staging, self._ended)
        try:
            _load_all((fresh,), deadline_s)
        except BaseException:
            fresh.kill()
            fresh.close()
            raise
        return fresh

    def _place(self, fresh: Instance, old: Instance) -> None:
        """Under the lock."""
        fresh.figures = self._figures
        fresh.take_share()
        self._instances = tuple(fresh if each is old else each for each in self._instances)
        self.queue.add(fresh)

    def _count_past(self, instance: Instance) -> None:
        """Under the lock."""
        self._past = [self._past[0] + instance.requests, self._past[1] + instance.failures]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """`close` waits, up to its deadline, for blocks under this manager."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Counts one user; the router does this under its own lock."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """Undoes one `enter`."""
        with self._lock:
            self._users -= 1
            if self._closing and not self._users:
                self._state.notify_all()

    def check(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The inputs in the model's order, as `run` takes them. Raises SluiceError(INPUT_INVALID)."""
        try:
            return check_inputs(self.inputs, inputs, any_batch=self._any_batch)
        except InputInvalid as error:
            raise SluiceError(
                errors_pb2.INPUT_INVALID,
                f"{self.spec}: {error.message}",
                hint=error.hint,
                obj=str(self.spec),
            ) from error

    def infer(self, inputs: Mapping[str, NDArray[Any]], timeout_s: float) -> dict[str, NDArray[Any]]:
        """One inference past the queue: for checks of the worker itself.

        Args:
            inputs: an array for each of `self.inputs`, in its datatype and shape (see runtimes.Model.run).
            timeout_s: for waiting, running and answering, seconds.

        Returns:
            An array for each of `self.outputs`.

        Raises:
            SluiceError: as `check` and `run`.
        """
        with self.in_use():
            return self.run([self.check(inputs)], timeout_s)[0]

    def run(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], timeout_s: float
    ) -> tuple[dict[str, NDArray[Any]], Timing]:
        """Runs inputs past the queue, on the process that is least busy, as `Instance.run`.

        The caller counts itself as a user (`enter`, `in_use`). Raises SluiceError as that.
        """
        there = [instance for instance in self._instances if not instance.ended] or self._instances
        return min(there, key=Instance.busy_s).run(inputs, timeout_s)

    def stage(self, size: int, kind: Hashable = None) -> tuple[Staged, NDArray[np.uint8]] | None:
        """Room for a request's inputs where the processes read them, to be filled before they run.

        Args:
            size: bytes, each input padded as a message lays them out.
            kind: of inputs that may share a batch, see `Staging.take`.

        Returns:
            The inputs, none yet, and the room to be written to; the caller drops them in the end. None
            when there is no room: inputs that are not staged are copied when they run.
        """
        place = self.staging.take(size, kind)
        if place is None:
            return None
        room = place.room
        if room.size != size:  # the worker was closed, and its arena with it
            place.drop()
            return None
        return Staged(place), room

    def samples(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """How many samples checked inputs hold: their first dimension where that is the batch, else 1."""
        if not self._any_batch and not self.takes_batches:
            return 1
        return int(next(iter(inputs.values())).shape[0])

    @property
    def takes_batches(self) -> bool:
        """Whether the first dimension of every input and output varies: requests may be put together."""
        specs = (*self.inputs, *self.outputs)
        return bool(self.inputs) and all(spec.shape[:1] == (-1,) for spec in specs)

    def close(self, drain_deadline_s: float) -> None:
        """Waits for the requests under way, then ends and reaps all processes. Never raises; may be repeated.

        Args:
            drain_deadline_s: longest wait for requests; those still running then get WORKER_DIED, seconds.
        """
        with self._state:
            self._closing = True
            self._state.wait_for(lambda: self._users == 0, timeout=drain_deadline_s)
        instances = (*self._instances, *self._leaving)
        others = [threading.Thread(target=each.close, name=f"end-{each.pid}") for each in instances[1:]]
        for thread in others:
            thread.start()
        instances[0].close()
        for thread in others:
            thread.join()
        self.staging.close()

    # Starting, and the ends of processes.

    def _load(self, deadline_s: float) -> None:
        _load_all(self._instances, deadline_s)
        self.figures = self._figures
        first = self._instances[0]
        self.runtime, self.accelerator = first.runtime, first.accelerator
        self.inputs, self.outputs = first.inputs, first.outputs
        self._any_batch = splits_by_sample(self.inputs, self.outputs)
        with self._state:
            self._starting = False
            for instance in self._instances:
                self.queue.add(instance)
        for instance in self._instances:
            if instance.ended:  # ready, and gone before the last one was
                self._ended(instance)

    def _ended(self, instance: Instance) -> None:
        """In the watching thread of a process: it ended and was reaped."""
        with self._state:
            here = instance in self._instances and instance not in self._lost
            if self._starting or self._closing or not here:
                return
            self._lost.append(instance)
            self._deaths += not instance.outgrown
            last = not self._died and not self.alive
            self._died = self._died or last
            callbacks, losses = list(self._callbacks), list(self._losses)
            self.queue.remove(instance)
            if last:
                self.staging.close()
        log.error("worker %s (process %d) %s", self.spec, instance.pid, instance.last_words())
        if last:
            for callback in callbacks:
                self._tell(callback, self)
        elif not self._died:
            for told in losses:
                self._tell(told, self, instance)

    def _tell(self, listener: Callable[..., None], *what: object) -> None:
        try:
            listener(*what)
        except Exception:
            log.exception("a listener for the death of worker %s failed", self.spec)


def _load_all(instances: Sequence[Instance], deadline_s: float) -> None:
    """Has them load side by side, all within the deadline. Raises SluiceError as `Worker.start`."""
    deadline = time.monotonic() + deadline_s
    for instance in instances:
        instance.begin_load(deadline_s)
    for instance in instances:
        instance.end_load(deadline_s, deadline - time.monotonic())
