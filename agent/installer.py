"""Brings a version's files onto the box: manifest, choice of variant, plan, fetch and apply, directory.

Order: the gate, which asks whether the version may be installed here -> the manifest (from the store, else
GetVersion; its digest must be the desired one) -> the best variant
-> which files are missing -> room on the disk -> Plan with every file held, the likeliest bases first -> each
missing file fetched and applied in one stream, bytes decoded as they arrive -> the version's directory.
One call of `install` is one attempt; retry.py decides about the next. Partial files are named by target and
delta, so that another attempt, or another process after a power cut, goes on at a block boundary.

Rules: what the control plane says is checked against the manifest, never the other way round; a file enters
the store only by its digest; a version whose files are all here needs no network.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import update_limits as limits
from agent.chooser import Box, choose
from agent.control import CancelledError, Control
from agent.retry import hinted
from agent.slots import Installed, Slots
from agent.state import DesiredModel
from agent.status_table import size
from agent.trust import Gate
from agent.version_directory import materialise
from sluice.api.v1 import diff_pb2, errors_pb2, sync_pb2
from updater.delta import FEATURES, Applier
from updater.digests import PREFIX, digest_bytes, is_digest
from updater.errors import SluiceError, os_errors
from updater.manifest import File, Manifest, Variant
from updater.store import Store
from updater.trust.decision import Held

log = logging.getLogger(__name__)
PARTIAL_PREFIX = "apply-"


@dataclass(frozen=True)
class Prepared:
    """A version that is whole on disk.

    Attributes:
        installed: for the staged slot.
        manifest: parsed.
        variant: the chosen one.
        directory: its files by name.
    """

    installed: Installed
    manifest: Manifest
    variant: Variant
    directory: Path


# Called with the step, delta bytes received and delta bytes in all.
Progress = Callable[[sync_pb2.UpdateStep.ValueType, int, int], None]


class Installer:
    """Installs versions, one at a time.

    Args:
        store: of this box.
        slots_dir: where version directories lie, on the store's file system.
        control: of the calling thread.
        gate: decides which versions may be installed.
        device_id: of this box.
        box: what was probed of this box.
        reserve_bytes: disk space to leave free.
        make_room: frees what no slot needs; called when the disk is too full.
    """

    def __init__(
        self,
        store: Store,
        slots_dir: Path,
        control: Control,
        gate: Gate,
        *,
        device_id: str,
        box: Callable[[], Box],
        reserve_bytes: int,
        make_room: Callable[[], None],
    ) -> None:
        self._store = store
        self._slots_dir = slots_dir
        self._control = control
        self._gate = gate
        self._device_id = device_id
        self._box = box
        self._reserve_bytes = reserve_bytes
        self._make_room = make_room

    def load_manifest(self, installed: Installed, model: str) -> Manifest:
        """The manifest of an installed version, from the store alone, its bytes proven."""
        path = self._store.verify(installed.manifest_digest)
        with os_errors("reading the manifest", path):
            return _checked(path.read_bytes(), model, installed.version, installed.manifest_digest)

    def prepare(self, installed: Installed, model: str) -> Prepared:
        """An installed version from what is on disk, its directory rebuilt if need be; no network."""
        manifest = self.load_manifest(installed, model)
        variant = manifest.variant(installed.variant)
        directory = materialise(self._store, self._slots_dir, model, installed, variant)
        return Prepared(installed, manifest, variant, directory)

    def install(
        self,
        desired: DesiredModel,
        slots: Slots,
        *,
        likely_bases: Sequence[str],
        full: bool,
        progress: Progress,
        cancelled: Callable[[], bool],
    ) -> Prepared:
        """One attempt to bring the desired version onto the disk.

        Args:
            desired: which version.
            slots: what there is of the model, whose floor counts.
            likely_bases: digests of files to name first as bases: those of the active version.
            full: name no bases, so that full copies come.
            progress: told about each step.
            cancelled: asked often; the attempt ends with CancelledError once it says so.

        Raises SluiceError with the cause, or CancelledError.
        """
        progress(sync_pb2.UPDATE_STEP_PLANNING, 0, 0)
        self._gate.check(desired, self._held(slots))
        manifest = self._manifest(desired)
        choice = choose(manifest, self._box())
        variant = choice.variant
        installed = Installed(desired.version, desired.manifest_digest, variant.name, choice.runtime)
        missing = {file.digest: file for file in variant.files if not self._store.has(file.digest)}
        if missing:
            self._check_room(missing)
            bases = self._bases(variant, likely_bases, full=full)
            plans = self._plan(desired, variant, bases, missing, cancelled, full=full)
            self._fetch(missing, plans, frozenset(bases), progress, cancelled)
        progress(sync_pb2.UPDATE_STEP_STAGING, -1, -1)
        directory = materialise(self._store, self._slots_dir, desired.model, installed, variant)
        return Prepared(installed, manifest, variant, directory)

    def discard_partials(self) -> None:
        """Forgets everything received but not yet whole: it cannot be trusted, or is no longer wanted."""
        for path in self._store.staged():
            if path.name.startswith(PARTIAL_PREFIX):
                with os_errors("removing", path):
                    path.unlink(missing_ok=True)

    def check_bases(self, digests: Sequence[str]) -> None:
        """Re-hashes possible bases; damaged ones are set aside by the store and no longer named in plans."""
        for digest in digests:
            if self._store.has(digest):
                try:
                    self._store.verify(digest)
                except SluiceError as error:
                    log.warning("a base is damaged: %s", error)

    def _held(self, slots: Slots) -> Held:
        """What the box holds of a model, as `director.decide` takes it.

        An active version whose manifest is damaged has no floor that is known: then its own number is one.
        """
        if slots.active is None:
            return Held(previous_digest=slots.previous.manifest_digest if slots.previous else "")
        try:
            floor = self.load_manifest(slots.active, slots.model).floor
        except SluiceError as error:
            log.warning("the floor of %s@%d is unknown: %s", slots.model, slots.active.version, error)
            floor = slots.active.version
        return Held(
            active=slots.active.version,
            active_digest=slots.active.manifest_digest,
            floor=floor,
            previous_digest=slots.previous.manifest_digest if slots.previous else "",
        )

    def _manifest(self, desired: DesiredModel) -> Manifest:
        if not is_digest(desired.manifest_digest):
            raise SluiceError(
                errors_pb2.MANIFEST_INVALID,
                f"{desired.model}@{desired.version} is desired with a malformed manifest digest",
                obj=f"{desired.model}@{desired.version}",
            )
        if self._store.has(desired.manifest_digest):
            try:
                data = self._store.verify(desired.manifest_digest).read_bytes()
            except SluiceError as error:
                if error.reason != errors_pb2.STORE_CORRUPT:
                    raise
                log.warning("the stored manifest is damaged, fetching it again: %s", error)
            else:
                return _checked(data, desired.model, desired.version, desired.manifest_digest)
        data = self._control.get_version(desired.model, desired.version).manifest
        manifest = _checked(data, desired.model, desired.version, desired.manifest_digest)
        self._store.add_bytes(data)
        return manifest

    def _check_room(self, missing: dict[str, File]) -> None:
        """Refuses to begin what the disk cannot hold, after freeing what no slot needs."""
        begun = sum(
            path.stat().st_blocks * 512
            for path in self._store.staged()
            if any(path.name.startswith(_partial_stem(digest)) for digest in missing)
        )
        needed = sum(file.size for file in missing.values()) - begun
        needed = max(needed, 0) + limits.BLOCK_ROOM_BYTES + self._reserve_bytes
        for final in (False, True):
            free = shutil.disk_usage(self._store.root).free
            if free >= needed:
                return
            if final:
                raise SluiceError(
                    errors_pb2.DISK_FULL,
                    f"the update needs {size(needed)} free below {self._store.root}, "
                    f"{size(self._reserve_bytes)} of reserve included; {size(free)} are",
                    hint="free space there, or lower update.reserve_bytes; the agent tries again",
                    obj=str(self._store.root),
                )
            self._make_room()

    def _check_reserve(self, file: File) -> None:
        """Stops short of the last block: the databases must be able to say that the disk is full."""
        free = shutil.disk_usage(self._store.root).free
        if free < self._reserve_bytes + limits.LEAST_FREE_BYTES:
            raise SluiceError(
                errors_pb2.DISK_FULL,
                f"{size(free)} are left below {self._store.root} while writing {file.path};"
                f" {size(self._reserve_bytes)} are reserved",
                hint="free space there; the update goes on where it stopped",
                obj=str(self._store.root),
            )

    def _bases(self, variant: Variant, likely: Sequence[str], *, full: bool) -> list[str]:
        """What to tell the control plane that this box holds, likeliest base first."""
        wanted = [file.digest for file in variant.files if self._store.has(file.digest)]
        if full:
            return wanted
        held = [digest for digest in likely if self._store.has(digest)]
        ordered = dict.fromkeys([*held, *wanted, *self._store.digests()])
        return list(ordered)[: limits.MAX_BASES]

    def _plan(
        self,
        desired: DesiredModel,
        variant: Variant,
        bases: Sequence[str],
        missing: dict[str, File],
        cancelled: Callable[[], bool],
        *,
        full: bool,
    ) -> dict[str, diff_pb2.FilePlan]:
        """Asks until every missing file has an offer; after PLAN_PENDING_S takes full copies."""
        patience = time.monotonic() + limits.PLAN_PENDING_S
        while True:
            if cancelled():
                raise CancelledError("planning")
            request = diff_pb2.PlanRequest(
                device_id=self._device_id,
                model=desired.model,
                version=desired.version,
                variant=variant.name,
                base_digests=bases,
                wait_ms=limits.PLAN_SERVER_WAIT_MS,
                accept_full=full or time.monotonic() > patience,
                features=FEATURES,
            )
            response = self._control.plan(request)
            plans = {plan.digest: plan for plan in response.files if plan.digest in missing}
            absent = missing.keys() - plans.keys()
            if absent:
                raise _contradiction(f"the plan leaves out {min(absent)}", desired)
            if all(plan.WhichOneof("how") != "pending" for plan in plans.values()):
                return plans
            wait_s = response.retry_after_ms / 1000
            _pause(min(max(wait_s, limits.PLAN_RETRY_LEAST_S), limits.PLAN_RETRY_MOST_S), cancelled)

    def _fetch(
        self,
        missing: dict[str, File],
        plans: dict[str, diff_pb2.FilePlan],
        bases: frozenset[str],
        progress: Progress,
        cancelled: Callable[[], bool],
    ) -> None:
        offers = {digest: _offer(plan, bases) for digest, plan in plans.items()}
        total = sum(offer.size for offer in offers.values())
        done = 0
        for digest, offer in offers.items():
            before = done

            def note(position: int, before: int = before) -> None:
                progress(sync_pb2.UPDATE_STEP_FETCHING, before + position, total)

            self._fetch_file(missing[digest], offer, note, cancelled)
            done += offer.size
        progress(sync_pb2.UPDATE_STEP_FETCHING, total, total)

    def _fetch_file(
        self,
        file: File,
        offer: diff_pb2.Offer,
        note: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """One file: its delta streamed into the applier from where the last attempt ended."""
        partial = self._partial(file.digest, offer.digest)
        base = self._store.require(offer.base_digest) if offer.base_digest else None
        with Applier(
            base,
            partial,
            expected_target=file.digest,
            expected_size=file.size,
            delta_digest=offer.digest,
            sync_bytes=limits.APPLY_SYNC_BYTES,
        ) as applier:
            position = applier.resume_offset
            if position:
                log.info("resuming %s at byte %d of %d", file.path, position, offer.size)
            note(position)
            for data in self._received(offer, position, note, cancelled):
                self._check_reserve(file)
                applier.feed(data)
                position += len(data)
                note(position)
            applier.finish()
        self._store.add_file(partial, digest=file.digest, move=True)

    def _received(
        self, offer: diff_pb2.Offer, position: int, note: Callable[[int], None], cancelled: Callable[[], bool]
    ) -> Iterator[bytes]:
        """The delta's bytes from `position` to its end.

        A control plane that has sent enough for now says when to come back: then this goes on where it was.
        """
        waits = 0
        while True:
            begun = position
            try:
                for message in self._control.fetch(offer.digest, position, self._device_id, cancelled):
                    if message.offset != position or position + len(message.data) > offer.size:
                        raise SluiceError(
                            errors_pb2.DELTA_INVALID,
                            f"{len(message.data)} bytes of {offer.digest} came for offset {message.offset}"
                            f" where {position} was due, of {offer.size} in all",
                            obj=offer.digest,
                        )
                    position += len(message.data)
                    yield message.data
                return
            except SluiceError as error:
                waits = waits + 1 if position == begun else 1
                later = error.reason == errors_pb2.LIMIT_EXCEEDED and error.retry_s > 0
                if not later or waits > limits.FETCH_WAITS:
                    raise
                wait_s = hinted(error.retry_s, random.random())  # noqa: S311 - jitter
                log.info("waiting %.1f s at byte %d of %d: %s", wait_s, position, offer.size, error.message)
            note(position)
            _pause(wait_s, cancelled)

    def _partial(self, target: str, delta: str) -> Path:
        """The partial file for this target and delta; those of other deltas to the same target go."""
        stem = _partial_stem(target)
        name = f"{stem}.{delta[len(PREFIX) :][:16]}"
        for path in self._store.staged():
            if path.name.startswith(stem) and not path.name.startswith(name):
                with os_errors("removing", path):
                    path.unlink(missing_ok=True)
        return self._store.staging(name)


def _partial_stem(target: str) -> str:
    return PARTIAL_PREFIX + target[len(PREFIX) :]


def _checked(data: bytes, model: str, version: int, digest: str) -> Manifest:
    """The manifest in `data` if it is the one that is meant."""
    name = f"{model}@{version}"
    if digest_bytes(data) != digest:
        raise SluiceError(
            errors_pb2.MANIFEST_INVALID,
            f"the manifest of {name} has digest {digest_bytes(data)}, not the desired {digest}",
            hint="the control plane contradicts itself; roll the version out again",
            obj=name,
        )
    manifest = Manifest.parse(data)
    if (manifest.model, manifest.version) != (model, version):
        raise SluiceError(
            errors_pb2.MANIFEST_INVALID,
            f"the manifest of {name} says that it is {manifest.model}@{manifest.version}",
            obj=name,
        )
    return manifest


def _offer(plan: diff_pb2.FilePlan, bases: frozenset[str]) -> diff_pb2.Offer:
    """The offer in a file's plan, checked against what this box holds and named."""
    how = plan.WhichOneof("how")
    offer = plan.delta if how == "delta" else plan.full
    sound = how in ("delta", "full") and is_digest(offer.digest)
    if not sound or (offer.base_digest not in bases if how == "delta" else offer.base_digest):
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"the plan for {plan.digest} is not one that this box can follow: {how or 'nothing offered'}"
            f" {offer.digest} from {offer.base_digest or 'no base'}",
            obj=plan.digest,
        )
    return offer


def _contradiction(what: str, desired: DesiredModel) -> SluiceError:
    name = f"{desired.model}@{desired.version}"
    return SluiceError(errors_pb2.REQUEST_INVALID, f"planning {name}: {what}", obj=name)


def _pause(seconds: float, cancelled: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if cancelled():
            raise CancelledError("waiting for a delta")
        time.sleep(min(left, limits.CANCEL_CHECK_S))
