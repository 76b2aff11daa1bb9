"""Keeps loaded what the version policies of the active versions ask for beside them (version_policy.py).

One thread looks at every model whenever something changed: a version that the policy names, that the disk
holds and that is not loaded yet is started, checked as at an activation, and made addressable; one that it
no longer names is drained and ended. A worker that dies is started again with the supervisor's backoff, and
left alone once it is in a crash loop, until the model's active version changes.

Rules: the active version goes first: nothing is started for want of memory that it might need; a version that
cannot be loaded is logged and costs the active one nothing; every start has a deadline.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agent.limits import DRAIN_S, HELD_LOOK_S, HELD_MEMORY_RESERVE_BYTES
from agent.router import Router, Serving
from agent.slots import Installed
from agent.supervisor import CRASH_LOOP, History, LoopRule, after_death
from agent.version_policy import chosen, pinned
from agent.worker import Worker
from updater.errors import SluiceError

log = logging.getLogger(__name__)


@dataclass
class _Trouble:
    """Of one version: what its failures so far mean."""

    history: History = field(default_factory=History)
    again_at: float = 0.0  # time.monotonic


class HeldVersions:
    """The thread and what it knows.

    Args:
        router: where versions are addressed.
        on_disk: the versions of each model whose files lie on the box.
        installed: what lies in a version's directory. Raises SluiceError.
        bring_up: starts and checks a worker. Raises SluiceError.
        instances: how many processes a version wants. Raises SluiceError.
        available_bytes: of memory.
        rule: when failures of a version are a crash loop.
    """

    def __init__(
        self,
        router: Router,
        on_disk: Callable[[], Mapping[str, list[int]]],
        installed: Callable[[str, int], Installed],
        bring_up: Callable[[str, Installed], Worker],
        *,
        instances: Callable[[str, Installed], int],
        available_bytes: Callable[[], int],
        rule: LoopRule = CRASH_LOOP,
    ) -> None:
        self._router = router
        self._on_disk = on_disk
        self._installed = installed
        self._bring_up = bring_up
        self._instances = instances
        self._available_bytes = available_bytes
        self._rule = rule
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._troubles: dict[tuple[str, int, int], _Trouble] = {}  # model, its active version, this version
        self._thread = threading.Thread(target=self._run, name="held-versions", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Starts nothing more; what is being started is closed, within `timeout_s`."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def changed(self) -> None:
        """Something changed: a version was activated, went back, was loaded, unloaded or removed."""
        self._wake.set()

    def pinned(self) -> dict[str, tuple[int, ...]]:
        """By model, versions that must stay on the disk. Raises SluiceError(IO_FAILED)."""
        on_disk = self._on_disk()
        return {
            serving.model: pinned(
                serving.active.versions, serving.active.version, on_disk.get(serving.model, [])
            )
            for serving in self._router.models()
        }

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            wait_s = HELD_LOOK_S
            try:
                wait_s = self.settle()
            except SluiceError as error:
                log.warning("versions beside the active ones: %s", error)
            except Exception:
                log.exception("a defect in keeping versions beside the active ones; going on")
            self._wake.wait(wait_s)

    def settle(self) -> float:
        """Loads and ends what the policies ask for; returns after how many seconds to look again."""
        on_disk = self._on_disk()
        waits = [HELD_LOOK_S]
        current = set()
        for serving in self._router.models():
            active = serving.active
            wanted = chosen(active.versions, active.version, on_disk.get(serving.model, []))
            loaded = {worker.version for worker in serving.workers if worker.alive}
            for worker in serving.held:
                if worker.version not in wanted or not worker.alive:
                    self._end(worker)
            for version in wanted:
                key = (serving.model, active.version, version)
                current.add(key)
                if version not in loaded and not self._stop.is_set():
                    waits.append(self._load(serving, version, self._troubles.setdefault(key, _Trouble())))
        for key in set(self._troubles) - current:
            del self._troubles[key]
        return min(waits)

    def _load(self, serving: Serving, version: int, trouble: _Trouble) -> float:
        """Loads one version; returns after how many seconds to look again."""
        left_s = trouble.again_at - time.monotonic()
        if left_s > 0:
            return left_s
        name = f"{serving.model}@{version}"
        each = serving.active.resident_bytes() // len(serving.active.instances)
        try:
            installed = self._installed(serving.model, version)
            needed = each * self._instances(serving.model, installed) + HELD_MEMORY_RESERVE_BYTES
            if self._available_bytes() < needed:
                log.warning("%s is not loaded: about %d bytes of memory are needed for it", name, needed)
                return self._failed(trouble, 0.0)
            worker = self._bring_up(serving.model, installed)
        except SluiceError as error:
            log.warning("%s is held and cannot be loaded: %s", name, error)
            return self._failed(trouble, 0.0)
        if self._stop.is_set() or not self._router.hold(worker):
            worker.close(0)
            return 0.0 if not self._stop.is_set() else HELD_LOOK_S
        began = time.monotonic()
        log.info("%s can be asked for beside version %d", name, serving.active.version)

        def died(_worker: Worker) -> None:
            self._failed(trouble, time.monotonic() - began)
            self._wake.set()

        worker.on_death(died)
        return HELD_LOOK_S

    def _failed(self, trouble: _Trouble, lived_s: float) -> float:
        now = time.monotonic()
        decision = after_death(trouble.history, now, lived_s, random.random(), self._rule)  # noqa: S311 - jitter
        trouble.history = decision.history
        trouble.again_at = time.monotonic() + decision.wait_s
        return decision.wait_s

    def _end(self, worker: Worker) -> None:
        """Takes it out of the router; requests that it has are answered."""
        if self._router.let_go(worker):
            log.info("%s is no longer kept beside the active version", worker.spec)
            threading.Thread(
                target=worker.close, args=(DRAIN_S,), name=f"drain-{worker.spec}", daemon=True
            ).start()
