"""Renews worker processes that outgrew their memory limit: a leak costs a model one process, and no request.

One thread looks at every process of every loaded version (growth.py decides). A fresh process is started
beside the one that holds too much and takes its place in the version's queue; the old one answers what it has
and ends. Where there is no memory for both, the old one is ended first: what it was running fails with
WORKER_DIED, and the supervisor starts another at once.

A renewal is no death. But a version that needs one over and over, RENEWAL_LOOP_TIMES within
RENEWAL_LOOP_WINDOW_S, is treated as one in a crash loop: that is reported once, so that the box can go back,
and further renewals wait with backoff and jitter.

Rules: one renewal at a time on a box, so that there is never memory for more than one process too many; each
has a deadline.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.golden import blank_inputs
from agent.growth import fits_beside, outgrown
from agent.instance import Instance
from agent.limits import (
    GROWTH_LOOK_S,
    MAX_REQUEST_S,
    RENEWAL_LOOP_TIMES,
    RENEWAL_LOOP_WINDOW_S,
    RESTART_LOAD_S,
)
from agent.memory import available_bytes
from agent.router import Router
from agent.supervisor import History, LoopRule, after_death
from agent.worker import Worker
from updater.errors import SluiceError

log = logging.getLogger(__name__)

RENEWAL_LOOP = LoopRule(RENEWAL_LOOP_TIMES, RENEWAL_LOOP_WINDOW_S)


@dataclass
class _Record:
    """Of one version: its renewals so far, and when the next one is due, if one is (time.monotonic)."""

    history: History = field(default_factory=History)
    due: float | None = None


class Renewer:
    """The thread and what it knows.

    Args:
        router: whose workers to look at.
        on_loop: called with the model's name, in the thread, when its active version needs renewals over and
            over.
        available: memory that may be taken, bytes.
    """

    def __init__(
        self,
        router: Router,
        on_loop: Callable[[str], None],
        *,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._router = router
        self._on_loop = on_loop
        self._available = available
        self._records: dict[tuple[str, int], _Record] = {}  # by model and version
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewer", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Looks no more; waits up to `timeout_s` for a renewal under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(GROWTH_LOOK_S):
            try:
                self.look()
            except Exception:
                log.exception("a defect in looking at the memory of workers; going on")

    def look(self) -> None:
        """Looks at every process once, and renews what is due."""
        seen = set()
        for serving in self._router.models():
            for worker in serving.workers:
                key = (worker.model, worker.version)
                seen.add(key)
                if self._stop.is_set() or not worker.alive:
                    continue
                instances = worker.instances
                which = outgrown([each.private_bytes() for each in instances], worker.memory_limit)
                if which is not None:
                    self._outgrown(worker, instances[which], self._records.setdefault(key, _Record()))
        for key in set(self._records) - seen:
            del self._records[key]

    def _outgrown(self, worker: Worker, instance: Instance, record: _Record) -> None:
        now = time.monotonic()
        if record.due is None:
            times = record.history.deaths
            calm_s = now - (times[-1] if times else instance.ready_at)
            decision = after_death(record.history, now, calm_s, random.random(), RENEWAL_LOOP)  # noqa: S311 - jitter
            record.history, record.due = decision.history, now + decision.wait_s
            if decision.report:
                self._report(worker)
        if now < record.due or not worker.alive:  # going back may have ended it
            return
        record.due = None
        self._renew(worker, instance)

    def _renew(self, worker: Worker, instance: Instance) -> None:
        held, most = instance.private_bytes(), worker.memory_limit
        log.warning(
            "worker %s (process %d) holds %d MiB and may hold %d: it is renewed",
            *(worker.spec, instance.pid, held >> 20, most >> 20),
        )
        if not fits_beside(worker.base_bytes, self._available()):
            log.warning("there is no memory for a second process of %s: the first is ended", worker.spec)
            worker.end_outgrown(instance, f"it held {held} bytes and may hold {most}")
            return
        try:
            if worker.renew(instance, RESTART_LOAD_S, lambda fresh: _try(worker, fresh)):
                log.info("a fresh process has its place in worker %s", worker.spec)
        except SluiceError as error:
            log.warning("starting a fresh process of %s failed, the old one goes on: %s", worker.spec, error)

    def _report(self, worker: Worker) -> None:
        log.error(
            "%s outgrows its memory over and over: %d times within %g s",
            *(worker.spec, RENEWAL_LOOP.deaths, RENEWAL_LOOP.window_s),
        )
        if self._router.is_active(worker):
            try:
                self._on_loop(worker.model)
            except Exception:
                log.exception("reacting to the growth of %s failed; renewals go on", worker.spec)


def _try(worker: Worker, fresh: Instance) -> None:
    """A first inference, so that no client waits for what that sets up. Raises SluiceError."""
    fresh.run([worker.check(blank_inputs(worker.inputs, 1))], MAX_REQUEST_S)
