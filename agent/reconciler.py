"""Moves the box from the state it is in to the desired one: one thread, one update at a time.

Each round looks at every desired model and asks the pure `due` whether there is something to do; what is due
gets one attempt (install, activate). A failed attempt leaves a record and a time for the next one, and the
round goes on with the next model: an update that cannot go on never blocks another. A version in shadow holds
up nothing either: its attempt is pending until the activator says how that ended. Between rounds the thread
sleeps until something is due or changes.

Rules: the desired state is written down before anything is done about it, unless the disk is full; a version
that failed for good is left alone until its desired entry changes (a new rollout of the same version is a
change); what an administrator pinned stays until then too.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from agent import slots as moves
from agent import update_limits as limits
from agent.activation import Activator
from agent.control import CancelledError, Control
from agent.installer import Installer
from agent.reporter import Progress, Running
from agent.retry import Cause, cause_of, decide, wants_full
from agent.slots import Slots
from agent.state import Desired, DesiredModel, State, Update
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.digests import is_digest
from updater.errors import SluiceError
from updater.manifest import is_name

log = logging.getLogger(__name__)
_MAX_SLEEP_S = 5.0
Ended = tuple[str, SluiceError | CancelledError | None]


def due(desired: DesiredModel, slots: Slots, update: Update | None, *, serving: bool) -> bool:
    """Whether a model needs an attempt, apart from waiting times.

    Args:
        desired: what is wanted.
        slots: what there is.
        update: the record of the last update.
        serving: a worker of this model is in the router.
    """
    if slots.pinned:
        return False
    if slots.active is not None and slots.active.manifest_digest == desired.manifest_digest and serving:
        return False
    return not (update is not None and update.final and update.manifest_digest == desired.manifest_digest)


def merge(before: Desired, message: sync_pb2.DesiredState) -> Desired | None:
    """The desired state after a message; None when the message is stale or changes nothing. Pure.

    State is sent whole: a model that the message does not list is no longer desired, and the box leaves it
    as it is.

    Raises SluiceError(LIMIT_EXCEEDED | REQUEST_INVALID).
    """
    if message.generation < before.generation:
        log.warning(
            "ignored a stale desired state: generation %d after %d; was the control plane's data replaced?",
            message.generation,
            before.generation,
        )
        return None
    if len(message.models) > limits.MAX_DESIRED_MODELS:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"the desired state lists {len(message.models)} models;"
            f" at most {limits.MAX_DESIRED_MODELS} are taken",
        )
    models: dict[str, DesiredModel] = {}
    for item in message.models:
        if not is_name(item.model) or not item.version or not is_digest(item.manifest_digest):
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"the desired state of generation {message.generation} has a malformed entry:"
                f" {item.model[:80]!r} version {item.version} {item.manifest_digest[:80]!r}",
            )
        models[item.model] = DesiredModel(item.model, item.version, item.manifest_digest, item.rollout_id)
    after = Desired(message.generation, models)
    return None if after == before else after


class Reconciler:
    """The thread that updates.

    Args:
        state: on disk.
        installer: this thread's own.
        activator: shared with boot and the local socket.
        control: the installer's, closed here at the end.
        progress: told where updates are.
        collect: removes what no slot needs; with True also what is only kept to spare. Called in this thread.
        serving: whether a worker of a model is in the router.
        free_bytes: on the state directory's file system.
        changed: called when the reported state changed.
    """

    def __init__(
        self,
        state: State,
        installer: Installer,
        activator: Activator,
        control: Control,
        progress: Progress,
        *,
        collect: Callable[[bool], None],
        serving: Callable[[str], bool],
        free_bytes: Callable[[], int],
        changed: Callable[[], None],
    ) -> None:
        self._state = state
        self._installer = installer
        self._activator = activator
        self._control = control
        self._progress = progress
        self._collect = collect
        self._serving = serving
        self._free_bytes = free_bytes
        self._changed = changed
        self._desired = self._written = state.desired()
        self._fresh: dict[str, DesiredModel] = {}  # entries that changed and are not written down
        self._unsaved: dict[str, Update] = {}
        self._short_of_room: dict[
            str, int
        ] = {}  # model -> bytes free when its attempt failed for want of room
        self._pending: dict[str, tuple[DesiredModel, Slots, Update]] = {}  # in shadow
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        activator.on_end(self._swap_ended)
        self._desired_lock = threading.Lock()
        self._retry_at: dict[str, float] = {}
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    @property
    def desired(self) -> Desired:
        with self._desired_lock:
            return self._desired

    def start(self) -> None:
        """Begins. What failed for want of a runtime or a root gets another chance: it may be there by now."""
        for update in self._state.updates().values():
            if update.final and update.reason in (
                errors_pb2.NO_COMPATIBLE_VARIANT,
                errors_pb2.RUNTIME_UNAVAILABLE,
                errors_pb2.VERSION_NOT_SIGNED,
            ):
                self._state.clear_update(update.model)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def alive(self) -> bool:
        """Whether the thread makes headway; for the watchdog."""
        return self._thread.is_alive() and time.monotonic() - self._beat_s < limits.LOOP_HANG_S

    def take(self, message: sync_pb2.DesiredState) -> None:
        """A desired state arrived: takes it up, forgets what was decided about entries that changed."""
        with self._desired_lock:
            before = self._desired
            try:
                after = merge(before, message)
            except SluiceError as error:
                log.warning("the desired state was not taken up: %s", error)
                return
            if after is None:
                return
            fresh = {name: item for name, item in after.models.items() if before.models.get(name) != item}
            self._desired = after
            self._fresh.update(fresh)
        for model in before.models.keys() - after.models.keys():
            self._progress.clear(model)
            self._activator.abort(model)
        for item in fresh.values():
            self._retry_at.pop(item.model, None)
            self._activator.abort(item.model, unless=item.manifest_digest)
            log.info("desired: %s@%d (generation %d)", item.model, item.version, after.generation)
        self._write_down()
        self._wake.set()
        self._changed()

    def _write_down(self) -> None:
        """Puts the desired state on disk, and ends pins and final failures of entries that changed.

        A disk that is too full for that must not keep the box from going back: the next round repeats it.
        """
        with self._desired_lock:
            try:
                updates = self._state.updates()
                for item in self._fresh.values():
                    # The failure of another version stays on record until an update succeeds.
                    update = updates.get(item.model)
                    if update is not None and update.version == item.version:
                        self._state.clear_update(item.model)
                    self._unsaved.pop(item.model, None)
                    slots = self._state.slots(item.model)
                    if slots.pinned:
                        self._state.save(moves.unpin(slots))
                if self._written != self._desired:
                    self._state.save_desired(self._desired)
            except SluiceError as error:
                log.warning("the desired state cannot be written down yet: %s", error)
                return
            self._fresh.clear()
            self._written = self._desired

    def updates(self) -> dict[str, Update]:
        """The update record of every model, those included that the disk had no room for."""
        return {**self._state.updates(), **self._unsaved}

    def _record(self, update: Update) -> None:
        """Writes an update record; on a full disk keeps it in memory until there is room."""
        try:
            self._state.save_update(update)
            self._unsaved.pop(update.model, None)
        except SluiceError as error:
            log.warning("an update record is kept in memory: %s", error)
            self._unsaved[update.model] = update

    def connected(self) -> None:
        """The control plane answers: attempts that waited for it need wait no longer."""
        updates = self.updates()
        for model in list(self._retry_at):
            update = updates.get(model)
            if update and update.reason is not None and cause_of(update.reason) is Cause.NETWORK:
                self._retry_at[model] = time.monotonic() + random.random()  # noqa: S311 - jitter
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._beat_s = time.monotonic()
            self._wake.clear()
            wait_s = _MAX_SLEEP_S
            try:
                wait_s = min(self._round(), _MAX_SLEEP_S)
            except SluiceError as error:
                log.warning("updating: %s", error)
            except Exception:
                log.exception("a defect in updating; going on")
            self._wake.wait(wait_s)
        self._control.close()

    def _see_room(self) -> None:
        """Attempts that wait for room on the disk go on once there is notably more of it."""
        for model, free in list(self._short_of_room.items()):
            if self._free_bytes() >= free + limits.BLOCK_ROOM_BYTES:
                del self._short_of_room[model]
                self._retry_at.pop(model, None)

    def _round(self) -> float:
        """One look at everything; returns the seconds until something is due."""
        self._write_down()
        for update in list(self._unsaved.values()):
            self._record(update)
        self._see_room()
        self._see_ended()
        waits = [_MAX_SLEEP_S]
        for item in self.desired.models.values():
            if self._stop.is_set():
                break
            if item.model in self._pending:
                continue
            models, updates = self._state.models(), self.updates()
            slots = models.get(item.model, Slots(item.model))
            if due(item, slots, updates.get(item.model), serving=self._serving(item.model)):
                left_s = self._retry_at.get(item.model, 0.0) - time.monotonic()
                if left_s <= 0:
                    self._attempt(item, slots, updates.get(item.model))
                    left_s = self._retry_at.get(item.model, 0.0) - time.monotonic()
                waits.append(max(left_s, 0.0))
            elif self._progress.get(item.model) is not None:
                self._progress.clear(item.model)
        return min(waits)

    def _swap_ended(self, model: str, error: SluiceError | CancelledError | None) -> None:
        """In a thread of the activator: a pending attempt came to its end."""
        self._ended.put((model, error))
        self._wake.set()

    def _see_ended(self) -> None:
        """Takes up what pending attempts came to."""
        while not self._ended.empty():
            model, error = self._ended.get()
            item, slots, update = self._pending.pop(model)
            if error is None:
                self._activated(item)
            elif isinstance(error, CancelledError):
                log.info("%s@%d is no longer wanted, or the agent stops", model, item.version)
                self._progress.clear(model)
            else:
                self._failed(item, slots, update, error)

    def _attempt(self, item: DesiredModel, slots: Slots, record: Update | None) -> None:
        """One attempt at one version; its outcome is in the record."""
        update = record or Update(item.model, item.version, item.manifest_digest)
        if update.manifest_digest != item.manifest_digest:
            update = Update(item.model, item.version, item.manifest_digest)
        bytes_seen = [update.fetched_bytes, update.total_bytes]

        def step(what: sync_pb2.UpdateStep.ValueType, fetched: int = -1, total: int = -1) -> None:
            self._beat_s = time.monotonic()
            if fetched >= 0 and total > 0:
                bytes_seen[:] = fetched, total
            self._progress.note(item.model, Running(item.version, what, *bytes_seen))

        try:
            self._install(item, slots, update, step, bytes_seen)
        except CancelledError:
            log.info("%s@%d is no longer wanted, or the agent stops", item.model, item.version)
            self._progress.clear(item.model)
        except SluiceError as error:
            self._failed(
                item, slots, replace(update, fetched_bytes=bytes_seen[0], total_bytes=bytes_seen[1]), error
            )
        except Exception as error:
            log.exception("a defect while installing %s@%d", item.model, item.version)
            failure = SluiceError(errors_pb2.INTERNAL, f"installing {item.model}@{item.version}: {error!r}")
            self._failed(item, slots, update, failure)

    def _install(
        self,
        item: DesiredModel,
        slots: Slots,
        update: Update,
        step: Callable[..., None],
        bytes_seen: list[int],
    ) -> None:
        prepared = self._installer.install(
            item,
            slots,
            likely_bases=self._likely_bases(slots),
            full=wants_full(update.reason, update.failures),
            progress=step,
            cancelled=lambda: not self._wanted(item),
        )
        self._activator.stage(prepared, item.model)
        done = replace(
            update,
            fetched_bytes=bytes_seen[0],
            total_bytes=bytes_seen[1],
            failures=0,
            reason=None,
            message="",
            final=False,
            reverted=False,
        )
        if self._activator.activate(item.model, prepared, done, step):
            self._activated(item)
        else:
            before = replace(update, fetched_bytes=bytes_seen[0], total_bytes=bytes_seen[1])
            self._pending[item.model] = item, slots, before

    def _activated(self, item: DesiredModel) -> None:
        self._unsaved.pop(item.model, None)
        self._retry_at.pop(item.model, None)
        self._progress.clear(item.model)
        self._collect(False)

    def _wanted(self, item: DesiredModel) -> bool:
        return not self._stop.is_set() and self.desired.models.get(item.model) == item

    def _likely_bases(self, slots: Slots) -> list[str]:
        """Files of what serves, then of what served before it; damage is found when a base is used."""
        found: list[str] = []
        for installed in slots.held:
            try:
                manifest = self._installer.load_manifest(installed, slots.model)
                found += [file.digest for file in manifest.variant(installed.variant).files]
            except SluiceError as error:
                log.warning("%s@%d cannot be a base: %s", slots.model, installed.version, error)
        return found

    def _failed(self, item: DesiredModel, slots: Slots, update: Update, error: SluiceError) -> None:
        """Writes the failure down and sets the time of the next attempt."""
        same = update.reason is not None and cause_of(update.reason) is cause_of(error.reason)
        failures = update.failures + 1 if same else 1
        decision = decide(error.reason, failures, random.random(), error.retry_s)  # noqa: S311 - jitter
        self._retry_at[item.model] = time.monotonic() + decision.wait_s
        self._short_of_room.pop(item.model, None)
        if cause_of(error.reason) is Cause.DISK:
            self._collect(True)
            self._short_of_room[item.model] = self._free_bytes()
        hint = f" ({error.hint})" if error.hint else ""
        self._record(
            replace(
                update,
                attempts=update.attempts + 1,
                failures=failures,
                reason=error.reason,
                message=error.message + hint,
                final=decision.final,
            )
        )
        what = "given up" if decision.final else f"next attempt in {decision.wait_s:.1f} s"
        log.warning("%s@%d failed, %s: %s", item.model, item.version, what, error)
        if decision.final:
            self._progress.clear(item.model)
            self._activator.unstage(item.model)
        if decision.discard_partial:
            self._installer.discard_partials()
        if cause_of(error.reason) is Cause.BASE:
            self._installer.check_bases(self._likely_bases(slots))
        self._changed()
