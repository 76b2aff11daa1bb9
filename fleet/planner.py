"""Plan: for each file that a device needs, the fewest bytes that can be offered in the time it gives.

In order, for each distinct file of the variant: it has the file; or candidates for a base are chosen
(bases.py) and their deltas and the full copy are looked up or started (deltas.py); when all are known, or the
wait is over, the smallest that its decoder understands is offered. A delta competes with the full copy, so it
is offered only once the full copy's size is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from fleet import catalog
from fleet.bases import Target, choose_bases
from fleet.builds import AHEAD, AWAITED
from fleet.catalog import Held
from fleet.database import Database
from fleet.deltas import FULL, Delta, DeltaCache, Failed
from fleet.limits import (
    MAX_AHEAD_BUILDS,
    MAX_BASES,
    MAX_FEATURE_CHARACTERS,
    MAX_FEATURES,
    MAX_PLAN_WAIT_MS,
    RETRY_AFTER_MS,
)
from sluice.api.v1 import diff_pb2, errors_pb2
from updater.digests import check_digest
from updater.errors import SluiceError
from updater.manifest import Manifest, Variant


@dataclass(frozen=True)
class Wish:
    """What a device can use: its decoder's features; until when it waits (seconds, the loop's clock)."""

    features: frozenset[str]
    accept_full: bool
    deadline: float


class Planner:
    """Plans over one delta cache."""

    def __init__(self, database: Database, deltas: DeltaCache) -> None:
        self._database = database
        self._deltas = deltas

    async def plan(self, request: diff_pb2.PlanRequest) -> diff_pb2.PlanResponse:
        """The plan for one variant of a version.

        Raises SluiceError(REQUEST_INVALID | LIMIT_EXCEEDED | MODEL_UNKNOWN | VERSION_UNKNOWN |
        NO_COMPATIBLE_VARIANT | DELTA_PROOF_FAILED | DELTA_UNSUPPORTED).
        """
        _check(request)
        digests = list(dict.fromkeys(request.base_digests))

        def look(connection: Connection) -> tuple[Manifest, list[Held]]:
            row = catalog.version_row(connection, request.model, request.version)
            return Manifest.parse(row.manifest), catalog.held_files(connection, digests)

        manifest, held = await self._database.read(look)
        wish = Wish(
            frozenset(request.features),
            request.accept_full,
            asyncio.get_running_loop().time() + request.wait_ms / 1000,
        )
        owned = set(digests)
        plans = await asyncio.gather(
            *(
                self._plan_file(target, owned, held, digests, wish)
                for target in targets(manifest, manifest.variant(request.variant))
            )
        )
        pending = any(plan.WhichOneof("how") == "pending" for plan in plans)
        return diff_pb2.PlanResponse(files=plans, retry_after_ms=RETRY_AFTER_MS if pending else 0)

    async def _plan_file(
        self, target: Target, owned: set[str], held: list[Held], preference: Sequence[str], wish: Wish
    ) -> diff_pb2.FilePlan:
        plan = diff_pb2.FilePlan(digest=target.digest, size=target.size)
        if target.digest in owned:
            plan.have.SetInParent()
            return plan
        bases = (FULL, *choose_bases(target, held, preference))
        known = await self._gather(target.digest, bases, wish)
        offer = _choose(target, bases, known, wish)
        if offer is None:
            plan.pending.SetInParent()
        elif offer.base == FULL:
            plan.full.CopyFrom(diff_pb2.Offer(digest=offer.digest, size=offer.size))
        else:
            plan.delta.CopyFrom(diff_pb2.Offer(digest=offer.digest, size=offer.size, base_digest=offer.base))
        return plan

    async def _gather(self, target: str, bases: Sequence[str], wish: Wish) -> dict[str, Delta | Failed]:
        """Each base's delta, as far as known when the wait is over. Builds go on after it."""
        known: dict[str, Delta | Failed] = {}
        tasks: dict[asyncio.Task[Delta | Failed], str] = {}
        for base in bases:
            found = await self._deltas.find(base, target)
            if found is None:
                tasks[self._deltas.start(base, target, AWAITED)] = base
            else:
                known[base] = found
        if tasks:
            left = max(wish.deadline - asyncio.get_running_loop().time(), 0)
            done, _ = await asyncio.wait(tasks, timeout=left)
            known.update({tasks[task]: task.result() for task in done})
        return known

    async def schedule_ahead(self, name: str, number: int, active: dict[int, set[str]]) -> int:
        """Starts the full copies of a version's files, and deltas to them; returns how many builds.

        Args:
            name: the model.
            number: the version that devices will move to.
            active: versions that devices report as active, with the variants they run; empty means all.
        """

        def look(connection: Connection) -> tuple[Manifest, list[Held]]:
            row = catalog.version_row(connection, name, number)
            return Manifest.parse(row.manifest), catalog.files_of(connection, name, list(active))

        manifest, held = await self._database.read(look)
        wanted: dict[tuple[str, str], None] = {}
        for variant in manifest.variants:
            for target in targets(manifest, variant):
                wanted[FULL, target.digest] = None
                for version, variants in active.items():
                    if variants and variant.name not in variants:
                        continue
                    box = [file for file in held if (file.version, file.variant) == (version, variant.name)]
                    if any(file.digest == target.digest for file in box):
                        continue
                    wanted.update({(base, target.digest): None for base in choose_bases(target, box, ())})
        started = 0
        for base, digest in list(wanted)[:MAX_AHEAD_BUILDS]:
            if await self._deltas.find(base, digest) is None:
                self._deltas.start(base, digest, AHEAD)
                started += 1
        return started


def targets(manifest: Manifest, variant: Variant) -> list[Target]:
    """The variant's files, each distinct digest once, in the manifest's order."""
    found: dict[str, Target] = {}
    for file in variant.files:
        found.setdefault(
            file.digest,
            Target(
                file.digest, file.size, manifest.model, manifest.version, variant.name, file.path, file.role
            ),
        )
    return list(found.values())


def _choose(
    target: Target, bases: Sequence[str], known: dict[str, Delta | Failed], wish: Wish
) -> Delta | None:
    """The smallest offer, or None while a better one may still come.

    Raises SluiceError when all is known and nothing can be offered.
    """
    ready = [delta for delta in known.values() if isinstance(delta, Delta)]
    usable = [delta for delta in ready if delta.features <= wish.features]
    complete = len(known) == len(bases)
    if usable and (complete or (wish.accept_full and FULL in known)):
        return min(usable, key=lambda delta: (delta.size, delta.base != FULL))
    if not complete:
        return None
    if ready:
        lacking = sorted(set.union(*(set(delta.features) for delta in ready)) - wish.features)
        raise SluiceError(
            errors_pb2.DELTA_UNSUPPORTED,
            f"every delta to {target.path} needs features that the device lacks: {', '.join(lacking)}",
            hint="update the agent on the device",
            obj=target.digest,
        )
    reasons = "; ".join(failed.message for failed in known.values() if isinstance(failed, Failed))
    raise SluiceError(
        errors_pb2.DELTA_PROOF_FAILED,
        f"no way to {target.path} could be built and proven: {reasons}",
        hint="it is tried again later; the control plane's log has the details",
        obj=target.digest,
    )


def _check(request: diff_pb2.PlanRequest) -> None:
    if request.version == 0:
        raise SluiceError(errors_pb2.REQUEST_INVALID, "the version to plan for is missing", obj="version")
    if len(request.base_digests) > MAX_BASES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"{len(request.base_digests)} base digests; at most {MAX_BASES} are looked at",
            hint="list the likeliest bases only",
            obj="base_digests",
        )
    for digest in request.base_digests:
        check_digest(digest, "a base digest")
    if request.wait_ms > MAX_PLAN_WAIT_MS:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"wait_ms is {request.wait_ms}; at most {MAX_PLAN_WAIT_MS} are waited",
            obj="wait_ms",
        )
    if len(request.features) > MAX_FEATURES or any(
        len(feature) > MAX_FEATURE_CHARACTERS for feature in request.features
    ):
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"more than {MAX_FEATURES} features, or one over {MAX_FEATURE_CHARACTERS} characters",
            obj="features",
        )
