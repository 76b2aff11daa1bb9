"""The commit point and the turn, forwards and back, and what is known of the workers that are turned to.

Rules: one change at a time for each model (`lock`); the slots are written before the router turns, and
written back when that fails; the slots name as active only what was loaded once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from agent import slots as moves
from agent.installer import Installer
from agent.limits import DRAIN_S
from agent.reporter import Loaded
from agent.retry import Cause, cause_of
from agent.router import Router
from agent.slots import Installed, Slots
from agent.starter import Starter
from agent.state import State, Update
from agent.worker import Worker
from updater.errors import SluiceError

log = logging.getLogger(__name__)


class Turner:
    """Turns models. Methods may be called from any thread; those that change something need the model's lock.

    Args:
        state: slots and update records.
        router: what serves.
        installer: for what is on disk; only its offline methods are used.
        starter: of workers.
    """

    def __init__(self, state: State, router: Router, installer: Installer, starter: Starter) -> None:
        self.state = state
        self.router = router
        self.installer = installer
        self.starter = starter
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._loaded: dict[str, Installed] = {}
        self._gaps_s: dict[str, float] = {}
        self.unloaded: set[str] = set()  # by a client, until a load, an activation or the next start

    def lock(self, model: str) -> threading.RLock:
        """Held while the model changes."""
        with self._guard:
            return self._locks.setdefault(model, threading.RLock())

    def loaded(self) -> dict[str, Loaded]:
        """What each model's active worker has loaded, for the report."""
        found = {}
        for serving in self.router.models():
            with self._guard:
                installed = self._loaded.get(serving.model)
                gap_s = self._gaps_s.get(serving.model, 0.0)
            if installed is not None and installed.version == serving.active.version:
                digests = serving.active.spec.loaded_digests
                found[serving.model] = Loaded(installed, digests, serving.ready, gap_s)
        return found

    def bring_up(self, model: str, installed: Installed) -> Worker:
        """A worker of a version on disk, checked. Raises SluiceError."""
        return self.starter.bring_up(model, self.installer.prepare(installed, model))

    def instances(self, model: str, installed: Installed) -> int:
        """How many processes a version on disk wants. Raises SluiceError."""
        return self.starter.instances(self.installer.prepare(installed, model))

    def turn(self, model: str, installed: Installed, worker: Worker) -> None:
        """Turns the router. Raises SluiceError(WORKER_DIED), nothing is changed then."""
        self.router.activate(model, installed.version, worker)
        self.unloaded.discard(model)
        with self._guard:
            self._loaded[model] = installed
            self._gaps_s.pop(model, None)

    def note_gap(self, model: str, seconds: float) -> None:
        """The turn that was just made ended a gap without a version that answers."""
        with self._guard:
            self._gaps_s[model] = seconds

    def go_back(self, slots: Slots, error: SluiceError | None) -> tuple[int, int]:
        """Goes back to the previous version; returns the versions left and taken.

        Args:
            slots: of the model, as they are.
            error: what it answers; None: an administrator asked, and holds the version.

        Raises SluiceError(MODEL_NOT_SERVING | NO_PREVIOUS_VERSION), or why the previous version cannot be
        loaded; the active version then stays.
        """
        model = slots.model
        after = moves.revert(slots, pin=error is None)
        assert slots.active is not None
        assert after.active is not None
        leaving, taking = slots.active, after.active
        serving = self.router.serving(model)
        warm = serving.previous if serving is not None else None
        ready = warm is not None and warm.alive and warm.version == taking.version
        worker = warm if ready and warm is not None else self.bring_up(model, taking)
        update = Update(
            model,
            leaving.version,
            leaving.manifest_digest,
            attempts=1,
            failures=1,
            reason=None if error is None else error.reason,
            message="" if error is None else error.message,
            final=True,
            reverted=True,
        )
        try:
            self.state.save(after, update)
            try:
                self.turn(model, taking, worker)
            except BaseException:
                self.state.save(slots)
                raise
        except BaseException:
            worker.close(0)
            raise
        left = self.router.drop_previous(model)
        if left is not None:
            close_soon([left])
        because = "an administrator asked" if error is None else error.message
        log.warning("went back from %s@%d to version %d: %s", model, leaving.version, taking.version, because)
        return leaving.version, taking.version

    def failure_record(
        self, model: str, installed: Installed, error: SluiceError, *, final: bool | None = None
    ) -> Update:
        """The record of a version that was active and cannot be served, or cannot be left; not yet written.

        Args:
            model: its name.
            installed: the version.
            error: what happened to it.
            final: given up; None: unless its files are damaged, or the box was short of something.
        """
        before = self.state.updates().get(model)
        attempts = before.attempts if before is not None and before.version == installed.version else 0
        return Update(
            model,
            installed.version,
            installed.manifest_digest,
            attempts=attempts + 1,
            failures=1,
            reason=error.reason,
            message=error.message,
            final=cause_of(error.reason) is Cause.FINAL if final is None else final,
        )


def committed(before: Slots, installed: Installed) -> Slots:
    """The slots with this version active."""
    return moves.commit(moves.stage(before, installed))


def close_soon(workers: Sequence[Worker]) -> None:
    """Drains and closes workers that are out of the router, in threads of their own."""
    for worker in workers:
        name = f"drain-{worker.spec}"
        threading.Thread(target=worker.close, args=(DRAIN_S,), name=name, daemon=True).start()
