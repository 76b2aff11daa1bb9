"""The reported state, composed from what is really loaded.

What answers requests is asked of the router, never of the database: a version counts as active when a worker
process has loaded its verified files, and as healthy while that process lives. `compose` is pure; `Progress`
holds the one thing that is neither in the database nor in the router: how far the running update is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent import update_limits as limits
from agent.slots import Installed, Slots
from agent.state import Desired, Update
from sluice.api.v1 import sync_pb2


@dataclass(frozen=True)
class Loaded:
    """What the active worker of a model has loaded, and how long nothing answered before it did."""

    installed: Installed
    digests: tuple[str, ...]
    healthy: bool
    gap_s: float = 0.0


@dataclass(frozen=True)
class Running:
    """The update that runs, or waits for its next attempt."""

    version: int
    step: sync_pb2.UpdateStep.ValueType
    fetched_bytes: int = 0
    total_bytes: int = 0


class Progress:
    """Where each model's update is; tells the sync thread when that changed, bytes not too often.

    Args:
        changed: called after a change that is worth a report.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._told_s = 0.0

    def note(self, model: str, running: Running) -> None:
        """The update has come this far."""
        now = time.monotonic()
        with self._lock:
            before = self._running.get(model)
            self._running[model] = running
            moved = before is None or (before.version, before.step) != (running.version, running.step)
            tell = moved or now - self._told_s >= limits.PROGRESS_REPORT_S
            if tell:
                self._told_s = now
        if tell:
            self._changed()

    def clear(self, model: str) -> None:
        """No update of this model runs."""
        with self._lock:
            self._running.pop(model, None)
        self._changed()

    def get(self, model: str) -> Running | None:
        with self._lock:
            return self._running.get(model)

    def all(self) -> dict[str, Running]:
        with self._lock:
            return dict(self._running)


def compose(
    desired: Desired,
    models: Mapping[str, Slots],
    updates: Mapping[str, Update],
    running: Mapping[str, Running],
    loaded: Mapping[str, Loaded],
    now_s: float,
) -> sync_pb2.ReportedState:
    """The whole reported state.

    Args:
        desired: last taken up.
        models: the slots of each model.
        updates: the record of each model's last update.
        running: updates under way.
        loaded: what the active workers have loaded.
        now_s: Unix time.
    """
    report = sync_pb2.ReportedState(desired_generation=desired.generation)
    report.time.FromNanoseconds(int(now_s * 1e9))
    for model in sorted({*models, *updates, *running, *loaded}):
        report.models.append(
            _model(models.get(model, Slots(model)), updates.get(model), running.get(model), loaded.get(model))
        )
    return report


def _model(
    slots: Slots, update: Update | None, running: Running | None, loaded: Loaded | None
) -> sync_pb2.ReportedModel:
    item = sync_pb2.ReportedModel(model=slots.model, step=_step(slots, update, running))
    if loaded is not None:
        item.active_version = loaded.installed.version
        item.active_manifest_digest = loaded.installed.manifest_digest
        item.variant = loaded.installed.variant
        item.loaded_digests.extend(loaded.digests)
        item.healthy = loaded.healthy
        item.gap_ms = round(loaded.gap_s * 1000)
    if slots.previous is not None:
        item.previous_version = slots.previous.version
    if slots.pinned and slots.active is not None:
        item.pinned_version = slots.active.version
    if running is not None:
        item.target_version = running.version
        item.fetched_bytes = running.fetched_bytes
        item.fetch_total_bytes = running.total_bytes
    elif update is not None:
        item.fetched_bytes = update.fetched_bytes
        item.fetch_total_bytes = update.total_bytes
    if update is not None and update.reason is not None:
        item.failure.version = update.version
        item.failure.reason = update.reason
        item.failure.message = update.message
        item.failure.attempts = update.attempts
        item.failure.final = update.final
    return item


def _step(slots: Slots, update: Update | None, running: Running | None) -> sync_pb2.UpdateStep.ValueType:
    if running is not None:
        return running.step
    if update is not None and update.reverted:
        return sync_pb2.UPDATE_STEP_REVERTED
    if update is not None and update.final:
        return sync_pb2.UPDATE_STEP_FAILED
    if slots.soaking:
        return sync_pb2.UPDATE_STEP_SOAKING
    committed = slots.active is not None and update is not None and update.reason is None
    if committed and slots.active is not None and slots.active.version == update.version:  # type: ignore[union-attr]
        return sync_pb2.UPDATE_STEP_COMMITTED
    return sync_pb2.UPDATE_STEP_UNSPECIFIED
