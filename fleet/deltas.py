"""The delta cache: every delta and full copy that was built and proven, and the memory of builds that failed.

A delta is built once however many devices ask (single flight by base and target), offered only after its
proof, kept in a store of its own under a byte limit, and evicted least recently used first; what is being
fetched or was offered a moment ago stays. A failed build is not repeated before its back-off has passed.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from fleet import log, tables
from fleet.builds import Builds, Built, Described
from fleet.catalog import external_data_of
from fleet.clock import SECOND, now_us
from fleet.database import Database
from fleet.limits import OFFER_HOLD_S, RETRY_FIRST_S, RETRY_MOST_S
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.store import Store

FULL = ""  # the base of a full copy


@dataclass(frozen=True)
class Delta:
    """A delta that may be offered.

    Attributes:
        base: digest; FULL for a full copy.
        features: what a decoder must have beyond the base set.
    """

    base: str
    target: str
    digest: str
    size: int
    base_size: int
    target_size: int
    features: frozenset[str]


@dataclass(frozen=True)
class Failed:
    """A build that failed lately and is not tried again before `retry_us`."""

    base: str
    target: str
    message: str
    retry_us: int


class DeltaCache:
    """Deltas by base and target.

    Args:
        store: where delta files lie; nothing else may be in it.
        encoder: names the encoder's release: deltas of another are built anew when next asked for.
        limit: bytes of all deltas.
    """

    def __init__(self, database: Database, store: Store, builds: Builds, *, encoder: str, limit: int) -> None:
        self._database = database
        self._store = store
        self._builds = builds
        self._encoder = encoder
        self._limit = limit
        self._running: dict[tuple[str, str], asyncio.Task[Delta | Failed]] = {}
        self._used: dict[str, int] = {}  # delta digest to microseconds, not yet in the database
        self._fetching: Counter[str] = Counter()

    async def find(self, base: str, target: str) -> Delta | Failed | None:
        """What is known without building: a delta, a recent failure, or nothing."""
        found = await self._database.read(lambda c: _load(c, base, target, self._encoder))
        if isinstance(found, Delta):
            if found.digest in self._used or await asyncio.to_thread(self._store.has, found.digest):
                self._used[found.digest] = now_us()
                return found
            return None
        return found

    def start(self, base: str, target: str, urgency: int) -> asyncio.Task[Delta | Failed]:
        """The build of a delta: the running one, or a new one. What goes wrong ends as Failed."""
        key = (base, target)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._build(base, target, urgency))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return task

    async def describe(self, base: str, target: str) -> tuple[Delta, list[dict[str, Any]]] | None:
        """A ready delta and its regions, in the target's order."""
        columns = tables.deltas.c

        def find(connection: Connection) -> Row[Any] | None:
            return connection.execute(
                select(tables.deltas).where(
                    columns.base == base, columns.target == target, columns.ready.is_(True)
                )
            ).one_or_none()

        row = await self._database.read(find)
        return None if row is None else (_delta(row), json.loads(zlib.decompress(row.regions)))

    @contextmanager
    def fetching(self, digest: str) -> Iterator[None]:
        """Keeps a delta from eviction while it is read."""
        self._fetching[digest] += 1
        try:
            yield
        finally:
            self._used[digest] = now_us()
            self._fetching[digest] -= 1
            if not self._fetching[digest]:
                del self._fetching[digest]

    async def _build(self, base: str, target: str, urgency: int) -> Delta | Failed:
        known = await self.find(base, target)
        if known is not None:
            return known
        log.event("delta_started", base=base or "none", target=target)
        try:
            described = await self._database.read(lambda c: _described(c, base, target))
            built = await self._builds.build(base, target, urgency, described)
            return await self._keep(base, target, built)
        except SluiceError as error:
            return await self._remember_failure(base, target, error)
        except Exception as error:  # noqa: BLE001 - a defect of ours must not be retried without back-off
            log.warning("delta_defect", error, base=base or "none", target=target)
            defect = SluiceError(errors_pb2.INTERNAL, f"building the delta failed: {type(error).__name__}")
            return await self._remember_failure(base, target, defect)

    async def _keep(self, base: str, target: str, built: Built) -> Delta:
        await asyncio.to_thread(self._store.add_file, built.path, digest=built.digest, move=True)
        kept = Delta(
            base,
            target,
            built.digest,
            built.size,
            built.base_size,
            built.target_size,
            frozenset(built.features),
        )
        self._used[kept.digest] = now_us()
        outdated = await self._database.write(lambda c: _save(c, kept, built, self._encoder))
        if outdated and outdated != kept.digest and outdated not in self._fetching:
            await asyncio.to_thread(self._store.remove, outdated)
        log.event("delta_built", base=base or "none", target=target, digest=kept.digest, bytes=kept.size)
        await self.evict()
        return kept

    async def _remember_failure(self, base: str, target: str, error: SluiceError) -> Failed:
        failed = await self._database.write(
            lambda c: _save_failure(c, base, target, str(error), self._encoder)
        )
        log.warning(
            "delta_failed", base=base or "none", target=target, reason=error.code, message=error.message
        )
        return failed

    async def evict(self) -> int:
        """Brings the cache under its limit, as far as nobody uses it; returns how many deltas went."""
        used, self._used = dict(self._used), {}
        held_since = now_us() - int(OFFER_HOLD_S * SECOND)
        recent = {digest: at for digest, at in used.items() if at >= held_since}
        keep = set(self._fetching)

        def choose(connection: Connection) -> list[str]:
            for digest, at in used.items():
                connection.execute(
                    update(tables.deltas).where(tables.deltas.c.digest == digest).values(used_us=at)
                )
            victims = _victims(connection, self._limit, held_since, keep)
            connection.execute(delete(tables.deltas).where(tables.deltas.c.digest.in_(victims)))
            return victims

        try:
            victims = await self._database.write(choose)
        except BaseException:
            self._used = used | self._used
            raise
        self._used = recent | self._used
        for digest in victims:
            await asyncio.to_thread(self._store.remove, digest)
            log.event("delta_evicted", digest=digest)
        return len(victims)

    async def stop(self) -> None:
        """Ends running builds and keeps what is known of use."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self.evict()


def _described(connection: Connection, base: str, target: str) -> Described:
    return Described(
        base=external_data_of(connection, base) if base else None,
        target=external_data_of(connection, target),
    )


def _victims(connection: Connection, limit: int, held_since: int, keep: set[str]) -> list[str]:
    """Delta digests to drop, least recently used first."""
    columns = tables.deltas.c
    rows = connection.execute(
        select(columns.digest, columns.size, columns.used_us)
        .where(columns.ready.is_(True))
        .order_by(columns.used_us)
    ).all()
    excess = sum(row.size for row in rows) - limit
    victims = []
    for row in rows:
        if excess <= 0 or row.used_us >= held_since:
            break
        if row.digest not in keep:
            victims.append(row.digest)
            excess -= row.size
    return victims


def _load(connection: Connection, base: str, target: str, encoder: str) -> Delta | Failed | None:
    columns = tables.deltas.c
    row = connection.execute(
        select(tables.deltas).where(
            columns.base == base, columns.target == target, columns.encoder == encoder
        )
    ).one_or_none()
    if row is None:
        return None
    if row.ready:
        return _delta(row)
    return Failed(base, target, row.failure, row.retry_us) if row.retry_us > now_us() else None


def _delta(row: Row[Any]) -> Delta:
    return Delta(
        row.base,
        row.target,
        row.digest,
        row.size,
        row.base_size,
        row.target_size,
        frozenset(json.loads(row.features)),
    )


def _save(connection: Connection, kept: Delta, built: Built, encoder: str) -> str:
    """Remembers a delta; returns the digest of the one it replaces, if any."""
    now = now_us()
    columns = tables.deltas.c
    outdated = connection.execute(
        select(columns.digest).where(columns.base == kept.base, columns.target == kept.target)
    ).scalar()
    _upsert(
        connection,
        {
            "base": kept.base,
            "target": kept.target,
            "ready": True,
            "encoder": encoder,
            "digest": kept.digest,
            "size": kept.size,
            "base_size": kept.base_size,
            "target_size": kept.target_size,
            "features": json.dumps(sorted(kept.features)),
            "regions": zlib.compress(json.dumps(built.regions).encode()),
            "built_us": now,
            "used_us": now,
            "failures": 0,
            "retry_us": 0,
            "failure": "",
        },
    )
    return outdated or ""


def _save_failure(connection: Connection, base: str, target: str, message: str, encoder: str) -> Failed:
    columns = tables.deltas.c
    before = connection.execute(
        select(columns.failures).where(columns.base == base, columns.target == target)
    ).scalar()
    failures = (before or 0) + 1
    wait = min(RETRY_FIRST_S * 2 ** min(failures - 1, 20), RETRY_MOST_S)
    now = now_us()
    retry = now + int(wait * SECOND)
    _upsert(
        connection,
        {
            "base": base,
            "target": target,
            "ready": False,
            "encoder": encoder,
            "digest": "",
            "size": 0,
            "base_size": 0,
            "target_size": 0,
            "features": "[]",
            "regions": b"",
            "built_us": now,
            "used_us": now,
            "failures": failures,
            "retry_us": retry,
            "failure": message,
        },
    )
    return Failed(base, target, message, retry)


def _upsert(connection: Connection, row: dict[str, Any]) -> None:
    statement = insert(tables.deltas).values(row)
    changed = {name: statement.excluded[name] for name in row if name not in ("base", "target")}
    connection.execute(statement.on_conflict_do_update(index_elements=["base", "target"], set_=changed))
