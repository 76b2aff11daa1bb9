"""From files on disk to a version that answers: start beside, check, commit, turn, soak, or go back.

Activation: re-hash the files -> worker process beside the running one -> warm-up -> golden inputs -> the
slots are committed (one transaction) -> the router turns -> the old worker stays warm for the soak time ->
it is closed, its files stay. Everything before the commit leaves what serves untouched; a kill between
commit and turn is mended at boot, which starts what the slots call active.

Going back uses the previous worker if it is still warm, else starts one from disk; only when that one is
ready are the slots committed and the router turned. Boot tries active, then previous, and says in the
update record why it had to.

Rules: one change at a time for each model (a lock); a worker that is not in the router is closed before the
lock is given up; the slots name as active only what was loaded once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent import golden, options
from agent import slots as moves
from agent.batch_proof import batches_are_safe
from agent.installer import Installer, Prepared
from agent.limits import DRAIN_S, MAX_NAME_CHARACTERS
from agent.reporter import Loaded
from agent.repository import Held
from agent.retry import Cause, cause_of
from agent.router import Router
from agent.scheduling import Policy
from agent.slots import Installed, Slots
from agent.state import State, Update
from agent.version_directory import verify
from agent.worker import Worker, WorkerSpec
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError
from updater.store import Store

log = logging.getLogger(__name__)


@dataclass
class _Soak:
    """A soak under way: which worker, and since when (time.monotonic)."""

    worker: Worker
    since_s: float


class Activator:
    """Starts, turns and closes workers of versions that are on disk. Methods may be called from any thread.

    Args:
        state: slots and update records.
        store: of this box.
        installer: for manifests and directories; only its offline methods are used.
        router: what serves.
        threads: of a model's runtime unless its variant says otherwise.
        soak_s: see AgentConfig.
        load_deadline_s: see AgentConfig.
        changed: called when the reported state changed.
    """

    def __init__(
        self,
        state: State,
        store: Store,
        installer: Installer,
        router: Router,
        *,
        threads: int,
        soak_s: float,
        load_deadline_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._state = state
        self._store = store
        self._installer = installer
        self._router = router
        self._threads = threads
        self._soak_s = soak_s
        self._load_deadline_s = load_deadline_s
        self._changed = changed
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._loaded: dict[str, Installed] = {}
        self._soaks: dict[str, _Soak] = {}
        self._unloaded: set[str] = set()  # by a client, until a load, an activation or the next start

    def _lock(self, model: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(model, threading.RLock())

    def loaded(self) -> dict[str, Loaded]:
        """What each model's active worker has loaded, for the report."""
        found = {}
        for serving in self._router.models():
            with self._guard:
                installed = self._loaded.get(serving.model)
            if installed is not None and installed.version == serving.active.version:
                found[serving.model] = Loaded(installed, serving.active.spec.loaded_digests, serving.ready)
        return found

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
        return model in self._unloaded

    def unload(self, model: str) -> None:
        """Ends the model's workers; its slots and files stay. Raises SluiceError(MODEL_UNKNOWN)."""
        known = self._state.models()
        if model not in known:
            raise _unknown(model, sorted(known))
        with self._lock(model):
            self._unloaded.add(model)
            self._soaks.pop(model, None)
            workers = self._router.remove(model)
        for worker in workers:
            worker.close(DRAIN_S)
        log.warning("a client unloaded %s", model)
        self._changed()

    def load(self, model: str) -> None:
        """Serves the active version of a model that is not served; no effect if it is.

        Raises SluiceError(MODEL_UNKNOWN | MODEL_NOT_SERVING) or why the version cannot be loaded.
        """
        known = self._state.models()
        if model not in known:
            raise _unknown(model, sorted(known))
        with self._lock(model):
            if self._router.serving(model) is None:
                slots = self._state.slots(model)
                if slots.active is None:
                    raise SluiceError(
                        errors_pb2.MODEL_NOT_SERVING, f"no version of {model} is active yet", obj=model
                    )
                failure = self._boot_version(model, slots.active)
                if failure is not None:
                    raise failure
                if slots.soaking:
                    self._begin_soak(model)
                log.warning("a client loaded %s", model)
        self._changed()

    def stage(self, prepared: Prepared, model: str) -> None:
        """The version is whole on disk and about to be activated."""
        with self._lock(model):
            self._state.save(moves.stage(self._state.slots(model), prepared.installed))

    def unstage(self, model: str) -> None:
        """The staged version was given up."""
        with self._lock(model):
            slots = self._state.slots(model)
            if slots.staged is not None:
                self._state.save(moves.unstage(slots))

    def activate(
        self,
        model: str,
        prepared: Prepared,
        update: Update,
        step: Callable[[sync_pb2.UpdateStep.ValueType], None],
    ) -> None:
        """Makes a staged version the active one.

        Args:
            model: its name.
            prepared: the version.
            update: its record, written with the slots.
            step: told about each step.

        Raises SluiceError(STORE_CORRUPT | MODEL_LOAD_FAILED | RUNTIME_UNAVAILABLE | WARM_UP_FAILED |
        GOLDEN_MISMATCH | WORKER_DIED | WORKER_TIMEOUT | ...); what serves is then untouched.
        """
        with self._lock(model):
            worker = self._bring_up(model, prepared, step)
            step(sync_pb2.UPDATE_STEP_ACTIVATING)
            before = self._state.slots(model)
            after = moves.commit(moves.stage(before, prepared.installed))
            self._commit(before, after, update, worker)
            log.info("%s@%d answers now", model, prepared.installed.version)
            self._soaks[model] = _Soak(worker, time.monotonic())
        self._changed()

    def _commit(self, before: Slots, after: Slots, update: Update, worker: Worker) -> None:
        """The commit point, then the turn. A worker that died just then undoes both."""
        assert after.active is not None
        try:
            self._state.save(after, update)
            try:
                self._turn(after.model, after.active, worker)
            except BaseException:
                self._state.save(before)
                raise
        except BaseException:
            worker.close(0)
            raise

    def _turn(self, model: str, installed: Installed, worker: Worker) -> None:
        self._router.activate(model, installed.version, worker)
        self._unloaded.discard(model)
        with self._guard:
            self._loaded[model] = installed

    def _bring_up(
        self, model: str, prepared: Prepared, step: Callable[[sync_pb2.UpdateStep.ValueType], None]
    ) -> Worker:
        """A worker that has loaded the version and passed its checks; closed again when it fails one."""
        installed, variant = prepared.installed, prepared.variant
        step(sync_pb2.UPDATE_STEP_VERIFYING)
        digests = verify(prepared.directory, model, installed.version, variant, self._store)
        step(sync_pb2.UPDATE_STEP_WARMING_UP)
        wanted = options.read(variant.options, self._threads)
        for fault in wanted.faults:
            log.warning("%s@%d: %s", model, installed.version, fault)
        spec = WorkerSpec(
            model=model,
            version=installed.version,
            path=prepared.directory / variant.model_file.path,
            format=variant.format,
            runtime_preference=installed.runtime,
            threads=wanted.threads,
            loaded_digests=digests,
        )
        worker = Worker.start(spec, self._load_deadline_s)
        try:
            golden.warm_up(worker, self._load_deadline_s)
            examples = None
            if variant.golden_file is not None:
                path = prepared.directory / variant.golden_file.path
                golden.check_golden(worker, path, variant.tolerance, self._load_deadline_s)
                examples = golden.convert_inputs(worker, golden.read_golden(path)[0])
            worker.cache_s = wanted.cache_s
            worker.queue.policy = self._policy(worker, wanted.policy, examples)
        except BaseException:
            worker.close(0)
            raise
        worker.checked()
        return worker

    def _policy(self, worker: Worker, policy: Policy, examples: golden.Arrays | None) -> Policy:
        """The policy, with batches only for a model that was seen to answer right in them."""
        if policy.max_batch == 1 or not worker.takes_batches:
            return replace(policy, max_batch=1)
        why_not = batches_are_safe(worker, examples, self._load_deadline_s, policy.cosine_min)
        if why_not:
            log.warning("requests to %s run one by one: %s", worker.spec, why_not)
            return replace(policy, max_batch=1)
        return policy

    def boot(self, model: str) -> None:
        """Serves a model from disk at start: the active version, else the previous one.

        Never raises for a model that cannot be served: that is recorded and logged, and other models go on.
        """
        with self._lock(model):
            slots = self._state.slots(model)
            if slots.active is None:
                return
            failure = self._boot_version(model, slots.active)
            if failure is None:
                if slots.soaking:
                    self._begin_soak(model)
                return
            log.error("%s@%d cannot be served: %s", model, slots.active.version, failure)
            update = _failed_update(self._state, slots, slots.active, failure)
            if slots.previous is None:
                self._state.save_update(update)
                return
            second = self._boot_version(model, slots.previous)
            if second is None:
                log.warning("%s@%d serves in its place", model, slots.previous.version)
                self._state.save(moves.revert(slots, pin=False), replace(update, reverted=True))
            else:
                log.error("%s@%d cannot be served either: %s", model, slots.previous.version, second)
                self._state.save_update(update)

    def _boot_version(self, model: str, installed: Installed) -> SluiceError | None:
        try:
            prepared = self._installer.prepare(installed, model)
            worker = self._bring_up(model, prepared, lambda _step: None)
            try:
                self._turn(model, installed, worker)
            except SluiceError:
                worker.close(0)
                raise
        except SluiceError as error:
            return error
        return None

    def _begin_soak(self, model: str) -> None:
        serving = self._router.serving(model)
        if serving is not None:
            self._soaks[model] = _Soak(serving.active, time.monotonic())

    def check_soaks(self) -> float | None:
        """Ends the soaks that are over; returns the seconds until the next one is, None when none runs."""
        waits = []
        for model in list(self._soaks):
            with self._lock(model):
                soak = self._soaks.get(model)
                serving = self._router.serving(model)
                if soak is None or serving is None:
                    self._soaks.pop(model, None)
                    continue
                if serving.active is not soak.worker or not serving.ready:
                    # It died: what replaces it must prove itself for the whole time again.
                    soak.worker, soak.since_s = serving.active, time.monotonic()
                left_s = soak.since_s + self._soak_s - time.monotonic()
                if left_s > 0:
                    waits.append(left_s)
                else:
                    self._end_soak(model)
        return min(waits) if waits else None

    def _end_soak(self, model: str) -> None:
        self._state.save(moves.soaked(self._state.slots(model)))
        del self._soaks[model]
        previous = self._router.drop_previous(model)
        if previous is not None:
            previous.close(DRAIN_S)
        log.info("%s has proven itself for %g s", model, self._soak_s)
        self._changed()

    def revert(self, model: str, *, pin: bool, why: str = "", only_version: int = 0) -> tuple[int, int]:
        """Goes back to the previous version; returns the versions left and taken.

        Args:
            model: its name.
            pin: an administrator asked.
            why: the failure that it answers; empty when an administrator asked.
            only_version: do nothing unless this version is active still; 0 for any.

        Raises SluiceError(MODEL_UNKNOWN | MODEL_NOT_SERVING | NO_PREVIOUS_VERSION), or why the previous
        version cannot be loaded; the active version then stays.
        """
        known = self._state.models()
        if model not in known:
            raise _unknown(model, sorted(known))
        with self._lock(model):
            slots = self._state.slots(model)
            after = moves.revert(slots, pin=pin)
            assert slots.active is not None
            assert after.active is not None
            leaving, taking = slots.active, after.active
            if only_version and leaving.version != only_version:
                return leaving.version, leaving.version
            serving = self._router.serving(model)
            warm = serving.previous if serving is not None else None
            ready = warm is not None and warm.alive and warm.version == taking.version
            worker = warm if ready and warm is not None else self._revive(model, taking)
            update = Update(
                model,
                leaving.version,
                leaving.manifest_digest,
                attempts=1,
                failures=1,
                reason=None if pin else errors_pb2.WORKER_DIED,
                message=why,
                final=True,
                reverted=True,
            )
            self._commit(slots, after, update, worker)
            self._soaks.pop(model, None)
            left = self._router.drop_previous(model)
        if left is not None:
            left.close(DRAIN_S)
        because = why or "an administrator asked"
        log.warning("went back from %s@%d to version %d: %s", model, leaving.version, taking.version, because)
        self._changed()
        return leaving.version, taking.version

    def _revive(self, model: str, installed: Installed) -> Worker:
        prepared = self._installer.prepare(installed, model)
        return self._bring_up(model, prepared, lambda _step: None)

    def crash_looped(self, model: str) -> None:
        """The supervisor found that the active worker keeps dying: back to the previous version, if any."""
        serving = self._router.serving(model)
        if serving is None:
            return
        version = serving.active.version
        why = f"the worker of {model}@{version} kept dying"
        try:
            self.revert(model, pin=False, why=why, only_version=version)
        except SluiceError as error:
            log.warning("%s and the box cannot go back: %s", why, error)
            slots = self._state.slots(model)
            if slots.active is not None:
                failure = SluiceError(errors_pb2.WORKER_DIED, f"{why}; going back failed: {error}")
                update = _failed_update(self._state, slots, slots.active, failure)
                self._state.save_update(replace(update, final=True))
            self._changed()

    def close(self, timeout_s: float) -> None:
        """Closes every worker, all at once."""
        threads = []
        for serving in self._router.models():
            for worker in self._router.remove(serving.model):
                thread = threading.Thread(
                    target=worker.close, args=(timeout_s / 2,), name=f"close-{worker.spec}"
                )
                thread.start()
                threads.append(thread)
        until = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


def _unknown(model: str, known: list[str]) -> SluiceError:
    name = model[:MAX_NAME_CHARACTERS]
    return SluiceError(
        errors_pb2.MODEL_UNKNOWN,
        f"this box has no model {name!r}",
        hint=f"it has {', '.join(known)}" if known else "no version was rolled out to it yet",
        obj=name,
    )


def _failed_update(state: State, slots: Slots, installed: Installed, error: SluiceError) -> Update:
    """The update record of a version that was active and cannot be served.

    Not final when its files are damaged, or the box was short of something: it is installed again.
    """
    before = state.updates().get(slots.model)
    attempts = before.attempts if before is not None and before.version == installed.version else 0
    return Update(
        slots.model,
        installed.version,
        installed.manifest_digest,
        attempts=attempts + 1,
        failures=1,
        reason=error.reason,
        message=error.message,
        final=cause_of(error.reason) is Cause.FINAL,
    )
