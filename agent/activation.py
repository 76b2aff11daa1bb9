"""The versions that this box serves, as others see them: activated, gone back from, loaded, unloaded, booted.

A change to another version is a swap (swap.py decides, swapping.py drives); this file begins and ends them,
and does what is no change: boot, and what clients may ask for. Everything before a swap's commit leaves what
serves untouched; a kill between commit and turn is mended at boot, which starts what the slots call active.

Boot tries active, then previous, and says in the update record why it had to.

Rules: one change at a time for each model (a lock); a worker that is not in the router is closed before the
lock is given up; the slots name as active only what was loaded once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from agent import slots as moves
from agent.batch_terms import Gate
from agent.control import CancelledError
from agent.installer import Installer, Prepared
from agent.limits import DRAIN_S, MAX_NAME_CHARACTERS
from agent.reporter import Loaded
from agent.repository import Held
from agent.router import Router
from agent.slots import Installed, Slots
from agent.starter import Starter
from agent.state import State, Update
from agent.swap import Terms
from agent.swap_actions import Step
from agent.swapping import Seen, Swaps
from agent.turning import Turner
from agent.worker import Worker
from runtimes.interface import ExternalDelegate
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.manifest import Variant
from updater.store import Store

log = logging.getLogger(__name__)


class Activator:
    """Starts, turns and closes workers of versions that are on disk. Methods may be called from any thread.

    Args:
        state: slots and update records.
        store: of this box.
        installer: for manifests and directories; only its offline methods are used.
        router: what serves.
        threads: of a model's runtime unless its variant says otherwise.
        terms: what a variant's options, over the configuration, say of its swap; and what was not understood.
        load_deadline_s: see AgentConfig.
        changed: called when the reported state changed.
        gate: what low-priority requests wait for; None: nothing.
        process_bytes, delegates: see `Starter`.
    """

    def __init__(
        self,
        state: State,
        store: Store,
        installer: Installer,
        router: Router,
        *,
        threads: int,
        terms: Callable[[Mapping[str, str]], tuple[Terms, list[str]]],
        load_deadline_s: float,
        changed: Callable[[], None],
        gate: Gate | None = None,
        process_bytes: int = 0,
        delegates: tuple[ExternalDelegate, ...] = (),
    ) -> None:
        self._state = state
        self._installer = installer
        self._router = router
        self._terms = terms
        self._changed = changed
        starter = Starter(
            store,
            threads=threads,
            load_deadline_s=load_deadline_s,
            gate=gate,
            process_bytes=process_bytes,
            delegates=delegates,
        )
        self._turner = Turner(state, router, installer, starter)
        self._swaps = Swaps(self._turner, load_deadline_s=load_deadline_s, changed=changed)

    def loaded(self) -> dict[str, Loaded]:
        """What each model's active worker has loaded, for the report."""
        return self._turner.loaded()

    def swaps(self) -> list[Seen]:
        """Every change of version under way, soaking ones too."""
        return self._swaps.seen()

    def held(self) -> list[Held]:
        """Every model's active and previous version on disk."""
        return [
            Held(slots.model, installed.version)
            for slots in self._state.models().values()
            for installed in (slots.active, slots.previous)
            if installed is not None
        ]

    def unloaded(self, model: str) -> bool:
        """Whether a client unloaded the model: it then does not serve, and nothing needs mending."""
        return model in self._turner.unloaded

    def unload(self, model: str) -> None:
        """Ends the model's workers; its slots and files stay. Raises SluiceError(MODEL_UNKNOWN)."""
        self._require(model)
        self._swaps.abort(model)
        with self._turner.lock(model):
            self._swaps.end(model)
            self._swaps.forget(model)
            self._turner.unloaded.add(model)
            workers = self._router.remove(model)
        for worker in workers:
            worker.close(DRAIN_S)
        log.warning("a client unloaded %s", model)
        self._changed()

    def load(self, model: str) -> None:
        """Serves the active version of a model that is not served; no effect if it is.

        Raises SluiceError(MODEL_UNKNOWN | MODEL_NOT_SERVING) or why the version cannot be loaded.
        """
        self._require(model)
        with self._turner.lock(model):
            if self._router.serving(model) is None:
                slots = self._state.slots(model)
                if slots.active is None:
                    raise SluiceError(
                        errors_pb2.MODEL_NOT_SERVING, f"no version of {model} is active yet", obj=model
                    )
                failure = self._boot_version(slots, slots.active)
                if failure is not None:
                    raise failure
                log.warning("a client loaded %s", model)
        self._changed()

    def stage(self, prepared: Prepared, model: str) -> None:
        """The version is whole on disk and about to be activated."""
        with self._turner.lock(model):
            self._state.save(moves.stage(self._state.slots(model), prepared.installed))

    def unstage(self, model: str) -> None:
        """The staged version was given up."""
        with self._turner.lock(model):
            slots = self._state.slots(model)
            if slots.staged is not None:
                self._state.save(moves.unstage(slots))

    def activate(self, model: str, prepared: Prepared, update: Update, step: Step) -> bool:
        """Makes a staged version the active one.

        Args:
            model: its name.
            prepared: the version.
            update: its record, written with the slots.
            step: told about each step.

        Returns:
            Whether it is active. If not, it is in shadow, and what `on_end` was given hears how that ends.

        Raises SluiceError(STORE_CORRUPT | MEMORY_SHORT | MODEL_LOAD_FAILED | RUNTIME_UNAVAILABLE |
        WARM_UP_FAILED | GOLDEN_MISMATCH | CASCADE_INVALID | CASCADE_INCOMPLETE | WORKER_DIED | ...), or
        CancelledError after `abort`; what serves is then untouched, or started again where it had to make
        room.
        """
        with self._turner.lock(model):
            terms = self._terms_of(f"{model}@{prepared.installed.version}", prepared.variant)
            return self._swaps.begin(model, prepared, update, terms, step)

    def on_end(self, ended: Callable[[str, SluiceError | CancelledError | None], None]) -> None:
        """Has `ended(model, error)` called at the end of each swap for which `activate` returned False."""
        self._swaps.on_end(ended)

    def abort(self, model: str, unless: str = "") -> None:
        """Gives up an activation before its commit, unless it is of the version with this manifest digest."""
        self._swaps.abort(model, unless)

    def boot(self, model: str) -> None:
        """Serves a model from disk at start: the active version, else the previous one.

        Never raises for a model that cannot be served: that is recorded and logged, and other models go on.
        """
        with self._turner.lock(model):
            slots = self._state.slots(model)
            if slots.active is None:
                return
            failure = self._boot_version(slots, slots.active)
            if failure is None:
                return
            log.error("%s@%d cannot be served: %s", model, slots.active.version, failure)
            update = self._turner.failure_record(model, slots.active, failure)
            if slots.previous is None:
                self._state.save_update(update)
                return
            second = self._boot_version(slots, slots.previous)
            if second is None:
                log.warning("%s@%d serves in its place", model, slots.previous.version)
                self._state.save(moves.revert(slots, pin=False), replace(update, reverted=True))
            else:
                log.error("%s@%d cannot be served either: %s", model, slots.previous.version, second)
                self._state.save_update(update)

    def _boot_version(self, slots: Slots, installed: Installed) -> SluiceError | None:
        """Serves it from disk; a soak that had not ended begins anew."""
        model = slots.model
        try:
            worker = self._turner.bring_up(model, installed)
            try:
                self._turner.turn(model, installed, worker)
            except SluiceError:
                worker.close(0)
                raise
            if slots.soaking and installed == slots.active:
                variant = self._installer.load_manifest(installed, model).variant(installed.variant)
                self._swaps.resume(model, self._terms_of(str(worker.spec), variant))
        except SluiceError as error:
            return error
        return None

    def _terms_of(self, name: str, variant: Variant) -> Terms:
        terms, faults = self._terms(variant.options)
        for fault in faults:
            log.warning("%s: %s", name, fault)
        return terms

    def revert(
        self, model: str, *, pin: bool, error: SluiceError | None = None, only_version: int = 0
    ) -> tuple[int, int]:
        """Goes back to the previous version; returns the versions left and taken.

        Args:
            model: its name.
            pin: an administrator asked, and holds the version.
            error: what it answers, where nobody asked.
            only_version: do nothing unless this version is active still; 0 for any.

        Raises SluiceError(MODEL_UNKNOWN | MODEL_NOT_SERVING | NO_PREVIOUS_VERSION), or why the previous
        version cannot be loaded; the active version then stays.
        """
        self._require(model)
        self._swaps.abort(model)
        with self._turner.lock(model):
            self._swaps.end(model)
            slots = self._state.slots(model)
            moves.revert(slots, pin=pin)  # or its error, before anything is done
            assert slots.active is not None
            if only_version and slots.active.version != only_version:
                return slots.active.version, slots.active.version
            return self._swaps.go_back(slots, None if pin else error)

    def crash_looped(self, model: str, what: str = "kept dying") -> None:
        """The supervisor found that the active worker keeps dying: back to the previous version, if any."""
        serving = self._router.serving(model)
        if serving is None:
            return
        version = serving.active.version
        failure = SluiceError(errors_pb2.WORKER_DIED, f"the worker of {model}@{version} {what}", obj=model)
        try:
            self.revert(model, pin=False, error=failure, only_version=version)
        except SluiceError as error:
            log.warning("%s and the box cannot go back: %s", failure.message, error)
            slots = self._state.slots(model)
            if slots.active is not None:
                both = SluiceError(failure.reason, f"{failure.message}; going back failed: {error}")
                self._state.save_update(self._turner.failure_record(model, slots.active, both, final=True))
            self._changed()

    def outgrew(self, model: str) -> None:
        """The active worker outgrows its memory limit over and over: as `crash_looped`."""
        self.crash_looped(model, "outgrew its memory over and over")

    def bring_up(self, model: str, installed: Installed) -> Worker:
        """A worker of a version on disk, loaded and checked. Raises SluiceError as `activate`."""
        return self._turner.bring_up(model, installed)

    def instances(self, model: str, installed: Installed) -> int:
        """How many processes a version on disk wants. Raises SluiceError."""
        return self._turner.instances(model, installed)

    def close(self, timeout_s: float) -> None:
        """Ends every swap and closes every worker, all at once."""
        until = time.monotonic() + timeout_s
        self._swaps.close()
        threads = []
        for serving in self._router.models():
            for worker in self._router.remove(serving.model):
                thread = threading.Thread(
                    target=worker.close, args=(timeout_s / 2,), name=f"close-{worker.spec}"
                )
                thread.start()
                threads.append(thread)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _require(self, model: str) -> None:
        """Raises SluiceError(MODEL_UNKNOWN)."""
        known = sorted(self._state.models())
        if model not in known:
            name = model[:MAX_NAME_CHARACTERS]
            raise SluiceError(
                errors_pb2.MODEL_UNKNOWN,
                f"this box has no model {name!r}",
                hint=f"it has {', '.join(known)}" if known else "no version was rolled out to it yet",
                obj=name,
            )
