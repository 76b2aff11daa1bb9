"""The delta cache's limit and its memory of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge_tests.harness.operator import onnx_model
from fleet import deltas
from fleet.builds import AWAITED, Builds
from fleet.database import Database
from fleet.deltas import FULL, Delta, DeltaCache, Failed
from updater.digests import digest_bytes
from updater.store import Store

Scenario = Callable[[DeltaCache, Store, Store], Coroutine[Any, Any, None]]


def run(
    tmp_path: Path, scenario: Scenario, *, limit: int = 1 << 30, encoder: str = "updater.delta:create"
) -> None:
    async def main() -> None:
        files, store = Store(tmp_path / "files"), Store(tmp_path / "deltas")
        database = Database(tmp_path / "control.db")
        cache = DeltaCache(database, store, Builds(files, store, encoder, 2, 0), encoder=encoder, limit=limit)
        try:
            await scenario(cache, files, store)
        finally:
            await cache.stop()
            database.close()

    asyncio.run(main())


async def build(cache: DeltaCache, files: Store, seed: int) -> Delta:
    target = files.add_bytes(onnx_model(seed))
    built = await cache.start(FULL, target, AWAITED)
    assert isinstance(built, Delta)
    return built


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cache: DeltaCache, files: Store, store: Store) -> None:
        built = [await build(cache, files, seed) for seed in range(3)]
        assert await cache.find(FULL, built[0].target) == built[0]  # used again, after the others
        monkeypatch.setattr(deltas, "OFFER_HOLD_S", -1.0)  # nothing is held for having been offered
        assert await cache.evict() == 1
        assert [store.has(delta.digest) for delta in built] == [True, False, True]
        assert await cache.find(FULL, built[1].target) is None

    run(tmp_path, scenario, limit=130_000)


def test_what_is_fetched_or_was_just_offered_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cache: DeltaCache, files: Store, store: Store) -> None:
        built = [await build(cache, files, seed) for seed in range(2)]
        assert await cache.evict() == 0
        monkeypatch.setattr(deltas, "OFFER_HOLD_S", -1.0)
        with cache.fetching(built[0].digest):
            assert await cache.evict() == 1
            assert [store.has(delta.digest) for delta in built] == [True, False]
        assert await cache.evict() == 1
        assert list(store.digests()) == []

    run(tmp_path, scenario, limit=1)


def test_failures_back_off_and_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cache: DeltaCache, files: Store, store: Store) -> None:
        base, target = (files.add_bytes(onnx_model(seed)) for seed in (1, 2))
        first = await cache.start(base, target, AWAITED)
        assert isinstance(first, Failed)
        assert "DELTA_PROOF_FAILED" in first.message
        assert await cache.start(base, target, AWAITED) == first  # not tried
        later = first.retry_us + 1
        monkeypatch.setattr(deltas, "now_us", lambda: later)
        second = await cache.start(base, target, AWAITED)
        assert isinstance(second, Failed)
        assert second.retry_us - later == 2 * int(deltas.RETRY_FIRST_S * 1_000_000)

    run(tmp_path, scenario, encoder="edge_tests.harness.encoders:torn")


def test_a_missing_file_is_a_failure_with_its_name(tmp_path: Path) -> None:
    async def scenario(cache: DeltaCache, files: Store, store: Store) -> None:
        missing = digest_bytes(b"missing")
        failed = await cache.start(FULL, missing, AWAITED)
        assert isinstance(failed, Failed)
        assert missing in failed.message

    run(tmp_path, scenario)
