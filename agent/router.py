"""Which worker answers for which model: the table that the inference front looks into, and its turn.

A model has an *active* worker and possibly a *previous* one that is kept warm; others are *held* beside them
where the active version's policy asks for that (version_policy.py). `activate` turns the model to
another worker in one step under one lock: a request sees the old table or the new one. `acquire` counts its
user on the worker under the same lock, so that a worker taken out of the table, then closed, still answers
every request that was given it.

The router starts no processes and closes only what it must let go of by itself: a previous worker that a new
activation pushes out. Everything it hands back is the caller's to close or keep.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agent.instance import Instance
from agent.limits import DRAIN_S, MAX_NAME_CHARACTERS, MAX_WAITING_ON_RESTART
from agent.version_policy import chosen
from agent.worker import Worker
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """One model's part of the table at one moment.

    Attributes:
        model: its name.
        active: answers requests without a version.
        previous: kept warm; answers requests that name its version.
        held: answer requests that name theirs, newest first.
    """

    model: str
    active: Worker
    previous: Worker | None
    held: tuple[Worker, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the active worker can answer."""
        return self.active.alive

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The active worker, the previous if there is one, and those held."""
        return (self.active, *(() if self.previous is None else (self.previous,)), *self.held)

    def place(self, worker: Worker) -> str:
        """What one of `workers` is: "active", "previous" or "held"."""
        if worker is self.active:
            return "active"
        return "previous" if worker is self.previous else "held"


class _Entry:
    """The mutable form of Serving."""

    def __init__(self, active: Worker) -> None:
        self.active = active
        self.previous: Worker | None = None
        self.held: dict[int, Worker] = {}
        self.soon = True  # should the active worker die, another can be expected soon
        self.waiting = 0  # requests that wait for that

    def serving(self, model: str) -> Serving:
        """As others see it."""
        held = sorted(self.held.values(), key=lambda worker: -worker.version)
        return Serving(model, self.active, self.previous, tuple(held))

    def keeps(self, worker: Worker) -> bool:
        """Holds a worker that leaves its place, if the active version's policy asks for it."""
        previous = [] if self.previous is None else [self.previous.version]
        versions = [self.active.version, worker.version, *previous, *self.held]
        wanted = chosen(self.active.versions, self.active.version, versions)
        if not worker.alive or worker.version not in wanted or worker.version in self.held:
            return False
        self.held[worker.version] = worker
        return True


class Router:
    """The table; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turned = threading.Condition(self._lock)
        self._entries: dict[str, _Entry] = {}
        self._on_death: Callable[[Worker], None] | None = None
        self._on_loss: Callable[[Worker, Instance], None] | None = None

    def watch(
        self,
        on_death: Callable[[Worker], None],
        on_loss: Callable[[Worker, Instance], None] | None = None,
    ) -> None:
        """Has `on_death(worker)` called when an active worker dies; from then on a restart is expected.

        `on_loss(worker, instance)` is called when one of its processes ends and others go on.
        """
        self._on_death = on_death
        self._on_loss = on_loss

    def activate(self, model: str, version: int, worker: Worker) -> Worker | None:
        """Turns the model to `worker`.

        The worker that was active is kept as the previous one and returned: `drop_previous` takes it out for
        closing. An older previous worker, unless it is `worker` itself, is drained and closed in the
        background.

        Raises:
            SluiceError: WORKER_DIED when `worker` is dead or closing; the table is then unchanged.
            ValueError: `worker` holds another model or version.
        """
        if (worker.model, worker.version) != (model, version):
            raise ValueError(f"a worker of {worker.spec} cannot serve {model}@{version}")
        if not worker.alive:
            raise SluiceError(
                errors_pb2.WORKER_DIED,
                f"the worker of {worker.spec} is not running, so the model was not turned to it",
                obj=str(worker.spec),
            )
        with self._turned:
            entry = self._entries.get(model)
            pushed_out = displaced = None
            if entry is None:
                entry = self._entries[model] = _Entry(worker)
            elif entry.active is not worker:
                displaced = entry.active
                pushed_out = entry.previous if entry.previous is not worker else None
                entry.active, entry.previous, entry.soon = worker, displaced, True
            # Loaded twice for a moment: the one that was held has no more to do.
            doubled = entry.held.pop(version, None)
            if pushed_out is not None and entry.keeps(pushed_out):
                pushed_out = None
            self._turned.notify_all()
        for leaving in (pushed_out, doubled):
            if leaving is not None and leaving is not worker:
                log.info("worker %s is no longer kept warm", leaving.spec)
                threading.Thread(
                    target=leaving.close, args=(DRAIN_S,), name=f"drain-{leaving.spec}", daemon=True
                ).start()
        self._listen(worker)
        return displaced

    def replace(self, dead: Worker, fresh: Worker) -> bool:
        """Puts `fresh` in the place of `dead`, a restart; false when `dead` is not active any more."""
        with self._turned:
            entry = self._entries.get(dead.model)
            if entry is None or entry.active is not dead:
                return False
            fresh.succeed(dead)
            entry.active, entry.soon = fresh, True
            self._turned.notify_all()
        self._listen(fresh)
        return True

    def drop_previous(self, model: str) -> Worker | None:
        """Takes the previous worker out of the table, for the caller to close.

        None if there is none, or it is held on because the active version's policy asks for it.
        """
        with self._turned:
            entry = self._entries.get(model)
            if entry is None:
                return None
            previous, entry.previous = entry.previous, None
            return None if previous is not None and entry.keeps(previous) else previous

    def hold(self, worker: Worker) -> bool:
        """Makes a version addressable beside the active one; false if it is there, or the model is not."""
        with self._turned:
            entry = self._entries.get(worker.model)
            if entry is None or worker.version in {
                item.version for item in entry.serving(worker.model).workers
            }:
                return False
            entry.held[worker.version] = worker
            return True

    def let_go(self, worker: Worker) -> bool:
        """Takes a held worker out of the table, for the caller to close; false if it is not there."""
        with self._turned:
            entry = self._entries.get(worker.model)
            if entry is None or entry.held.get(worker.version) is not worker:
                return False
            del entry.held[worker.version]
            return True

    def remove(self, model: str) -> tuple[Worker, ...]:
        """Takes the model out of the table; its workers are the caller's to close."""
        with self._turned:
            entry = self._entries.pop(model, None)
            self._turned.notify_all()
        if entry is None:
            return ()
        return entry.serving(model).workers

    def serving(self, model: str) -> Serving | None:
        """The model's part of the table; None if it is not there."""
        with self._turned:
            entry = self._entries.get(model)
            return None if entry is None else entry.serving(model)

    def models(self) -> tuple[Serving, ...]:
        """The whole table, by name."""
        with self._turned:
            return tuple(entry.serving(model) for model, entry in sorted(self._entries.items()))

    def expect_restart(self, worker: Worker, expected: bool) -> bool:
        """Says whether requests may wait for a restart of this dead worker; false when it is not active."""
        with self._turned:
            entry = self._entries.get(worker.model)
            if entry is None or entry.active is not worker:
                return False
            entry.soon = expected
            self._turned.notify_all()
            return True

    def report_death(self, worker: Worker) -> None:
        """Has a worker that was closed on purpose, and is active still, treated as one that died."""
        self._worker_died(worker)

    @contextlib.contextmanager
    def acquire(self, model: str, version: str = "", *, wait_s: float = 0.0) -> Iterator[Worker]:
        """The worker that answers for the model; it is not closed under the caller within the drain deadline.

        Args:
            model: its name.
            version: empty for the active one, or the number of a version that is loaded.
            wait_s: how long to wait for a restart of the active worker that is under way, seconds.

        Raises:
            SluiceError: MODEL_UNKNOWN, VERSION_UNKNOWN (not loaded), MODEL_NOT_SERVING (its worker is dead).
        """
        worker = self.take(model, version, wait_s=wait_s)
        try:
            yield worker
        finally:
            worker.leave()

    def take(self, model: str, version: str = "", *, wait_s: float = 0.0) -> Worker:
        """As `acquire`, at less cost: the caller calls the worker's `leave` in the end."""
        with self._lock:
            worker = self._find(model, version, wait_s)
            worker.enter()
        return worker

    def _find(self, model: str, version: str, wait_s: float) -> Worker:
        """Under the lock; gives it up while it waits for a restart."""
        deadline = None
        while True:
            entry = self._entries.get(model)
            if entry is None:
                raise self.unknown(model)
            worker = _pick(entry, model, version)
            if worker.alive:
                return worker
            if deadline is None:
                deadline = time.monotonic() + wait_s
            left_s = deadline - time.monotonic()
            restarting = worker is entry.active and self._on_death is not None and entry.soon
            may_wait = restarting and entry.waiting < MAX_WAITING_ON_RESTART
            if not may_wait or left_s <= 0:
                raise SluiceError(
                    errors_pb2.MODEL_NOT_SERVING,
                    f"the worker of {worker.spec} died"
                    + (" and is being started again" if restarting else ""),
                    hint="repeat the request; `sluice-agent status` tells more",
                    obj=str(worker.spec),
                )
            entry.waiting += 1
            try:
                self._turned.wait(left_s)
            finally:
                entry.waiting -= 1

    def unknown(self, model: str) -> SluiceError:
        """The error for a model that is not in the table."""
        with self._turned:
            names = ", ".join(sorted(self._entries)) or "none yet"
        name = model[:MAX_NAME_CHARACTERS]
        return SluiceError(
            errors_pb2.MODEL_UNKNOWN, f"this box serves no model {name!r}; it serves {names}", obj=name
        )

    def is_active(self, worker: Worker) -> bool:
        """Whether its model is turned to this worker."""
        with self._turned:
            entry = self._entries.get(worker.model)
            return entry is not None and entry.active is worker

    def _listen(self, worker: Worker) -> None:
        worker.on_death(self._worker_died)
        worker.on_loss(self._instance_lost)

    def _instance_lost(self, worker: Worker, instance: Instance) -> None:
        if self._on_loss is not None and self.is_active(worker):
            self._on_loss(worker, instance)

    def _worker_died(self, worker: Worker) -> None:
        with self._turned:
            active = self.is_active(worker)
            self._turned.notify_all()
        if active and self._on_death is not None:
            self._on_death(worker)


def _pick(entry: _Entry, model: str, version: str) -> Worker:
    """The worker for a version as the protocol writes it; raises VERSION_UNKNOWN."""
    if not version:
        return entry.active
    loaded = entry.serving(model).workers
    for worker in loaded:
        if version == str(worker.version):
            return worker
    have = ", ".join(str(worker.version) for worker in loaded)
    raise SluiceError(
        errors_pb2.VERSION_UNKNOWN,
        f"version {version[:MAX_NAME_CHARACTERS]!r} of {model} is not loaded; loaded: {have}",
        hint="leave the version empty for the active one",
        obj=f"{model}@{version[:MAX_NAME_CHARACTERS]}",
    )
