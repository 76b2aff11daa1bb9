"""The response cache: the same content, its time, its bound, and what it keeps when there is no room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.cache import Cache, key_of
from agent.limits import CACHE_ENTRY_BYTES, CACHE_HALVE_AFTER, MAX_CACHE_COUNTS

TEN = {"y": np.zeros(10, np.uint8)}


def test_kept_for_its_time_and_no_longer() -> None:
    cache = Cache()
    outputs = {"y": np.arange(3), "t": np.array([b"ab"], object)}
    assert cache.get(b"k", 0.0) is None
    assert cache.put(b"k", outputs, 2.0, 0.0)
    found = cache.get(b"k", 1.9)
    assert found is not None
    assert found["y"].tolist() == [0, 1, 2]
    assert found["t"].tolist() == [b"ab"]
    assert cache.get(b"k", 2.0) is None
    assert cache.size == 0


def test_what_is_kept_is_nobodys_to_change() -> None:
    cache = Cache()
    outputs = {"y": np.arange(3)}
    cache.put(b"k", outputs, 1.0, 0.0)
    outputs["y"][0] = 9
    found = cache.get(b"k", 0.0)
    assert found is not None
    assert found["y"][0] == 0
    with pytest.raises(ValueError, match="read-only"):
        found["y"][0] = 9
    found.clear()
    assert cache.get(b"k", 0.0)


def test_when_full_the_less_asked_for_leave_and_only_for_one_asked_for_more() -> None:
    cache = Cache(most_bytes=20, entry_bytes=0)
    for key, asked in ((b"often", 3), (b"rare", 1)):
        for _ in range(asked):
            cache.get(key, 0.0)
        assert cache.put(key, TEN, 9.0, 0.0)
    cache.get(b"new", 0.0)
    assert not cache.put(b"new", TEN, 9.0, 0.0)  # asked for as often as the rarest
    cache.get(b"new", 0.0)
    assert cache.put(b"new", TEN, 9.0, 0.0)
    assert cache.get(b"rare", 0.0) is None
    assert cache.get(b"often", 0.0)
    assert not cache.put(b"large", {"y": np.zeros(21, np.uint8)}, 9.0, 0.0)
    assert cache.put(b"late", {"y": np.zeros(20, np.uint8)}, 9.0, 9.0)  # the others' time is over


def test_favourites_fade() -> None:
    cache = Cache(most_bytes=10, entry_bytes=0)
    for _ in range(100):
        cache.get(b"old", 0.0)
    cache.put(b"old", TEN, 1e9, 0.0)
    for _ in range(8 * CACHE_HALVE_AFTER):
        cache.get(b"new", 0.0)
    assert cache.put(b"new", TEN, 1e9, 0.0)


def test_entries_without_outputs_are_bounded_too() -> None:
    cache = Cache(most_bytes=5 * CACHE_ENTRY_BYTES)
    kept = [cache.put(bytes([number]), {}, 9.0, 0.0) for number in range(9)]
    assert kept == [True] * 5 + [False] * 4


def test_counts_are_bounded() -> None:
    cache = Cache()
    for number in range(3 * MAX_CACHE_COUNTS):
        cache.get(number.to_bytes(4, "big"), 0.0)
        assert len(cache._asked) <= MAX_CACHE_COUNTS


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12), st.integers(0, 5)), max_size=60))
def test_whatever_comes_the_bound_holds(events: list[tuple[int, int, int]]) -> None:
    cache, now = Cache(most_bytes=30, entry_bytes=1), 0.0
    for number, size, ttl in events:
        key, now = bytes([number]), now + 0.5
        found = cache.get(key, now)
        if found is None:
            cache.put(key, {"y": np.full(size, number, np.uint8)}, ttl, now)
        else:
            assert (found["y"] == number).all()
        assert cache.size == sum(entry.size for entry in cache._entries.values()) <= 30


def test_keys_differ_where_answers_may() -> None:
    x = np.arange(6, dtype=np.int32)
    different = [
        ("m", 1, {"x": x}),
        ("m", 2, {"x": x}),
        ("n", 1, {"x": x}),
        ("m", 1, {"z": x}),
        ("m", 1, {"x": x.reshape(2, 3)}),
        ("m", 1, {"x": x.view(np.uint32)}),
        ("m", 1, {"x": x + 1}),
        ("m", 1, {"x": x, "y": x}),
        ("m", 1, {"x": np.array([b"a", b"bc"], object)}),
        ("m", 1, {"x": np.array([b"ab", b"c"], object)}),
    ]
    assert len({key_of(*each) for each in different}) == len(different)
    assert key_of("m", 1, {"x": x}) == key_of("m", 1, {"x": x[:].copy()})
    assert key_of("m", 1, {"x": np.arange(12, dtype=np.int32)[::2]}) != key_of("m", 1, {"x": x})
