"""Targets are met, missed or not measured; nothing else, and never met unmeasured."""

from __future__ import annotations

import pytest

from benchmarks import targets
from benchmarks.peers import Measurement
from benchmarks.targets import PairResult


def result(
    ours: int,
    *,
    full: int = 1_000_000,
    shared: bool = True,
    encode_s: float = 1.0,
    anon: int = 1,
    **peers: int,
) -> PairResult:
    tools = {name: Measurement(ours, encode_s, 1.0, anon, None) for name in targets.OURS}
    tools |= {name.replace("_", "-"): Measurement(size, 10.0, 2.0) for name, size in peers.items()}
    return PairResult(full, shared, tools)


def check(results: dict[str, PairResult], what: str) -> targets.Check:
    return next(item for item in targets.checks(results) if item.what.startswith(what))


def test_nothing_measured_is_nothing_met() -> None:
    assert all(item.met is None for item in targets.checks({}))


def test_mean_is_geometric_over_shared_pairs_above_framing() -> None:
    results = {
        "a": result(10_000, bsdiff=100_000),
        "b": result(40_000, bsdiff=100_000, xdelta3=200_000),
        "tiny": result(900, bsdiff=1000),
        "own": result(100_000, bsdiff=100_000, shared=False),
    }
    mean = targets.geometric_mean(results)
    assert mean is not None
    assert mean[0] == pytest.approx(0.2)
    assert mean[1] == 2


@pytest.mark.parametrize(("ours", "met"), [(10_356, True), (10_357, False)])
def test_a_patch_may_exceed_the_best_peer_by_a_little(ours: int, met: bool) -> None:
    found = check({"a": result(ours, bsdiff=10_000, xdelta3=90_000)}, "largest patch")
    assert found.met is met
    assert ("a 10,357 B" in found.measured) is not met


@pytest.mark.parametrize(("ours", "met"), [(309_000, True), (309_001, False)])
def test_kilobytes_are_thousands(ours: int, met: bool) -> None:
    assert check({"ml_i8_pt": result(ours)}, "ml_i8_pt").met is met


def test_ratios_to_the_baseline_need_the_baseline() -> None:
    pair = PairResult(1, False, {"sluice max": Measurement(90, 1, 1), "XOR+planes": Measurement(100, 1, 1)})
    assert check({"minilm_f32_all": pair}, "minilm_f32_all to").met is True
    assert check({"minilm_f32_all": result(90)}, "minilm_f32_all to").met is None


def test_speed_counts_only_beside_bsdiff_in_the_same_run() -> None:
    assert check({"ml_i8_pt": result(1, encode_s=2.0, bsdiff=2)}, "ml_i8_pt encodes").met is True
    assert check({"ml_i8_pt": result(1, encode_s=3.0, bsdiff=2)}, "ml_i8_pt encodes").met is False
    alone = check({"ml_i8_pt": result(1)}, "ml_i8_pt encodes")
    assert alone.met is None
    assert "bsdiff" in alone.measured


def test_every_large_pair_must_decode_faster() -> None:
    found = check({"new": result(1, full=20_000_001, bsdiff=2)}, "new decodes")
    assert found.met is True
    assert found.target == "≥ 1x"


def test_memory_is_the_worst_of_all_pairs() -> None:
    results = {"a": result(1, anon=5), "b": result(1, anon=200_000_000)}
    found = check(results, "peak anonymous")
    assert found.met is False
    assert "200 MB (b)" in found.measured


def test_entropy_is_checked_where_the_encoder_tells_it() -> None:
    def pair(coded: int) -> PairResult:
        return PairResult(1, True, {"sluice max": Measurement(coded + 500, 1, 1, 1, coded, 10_000.0)})

    assert check({"a": pair(10_200)}, "coded residuals").met is True
    assert check({"a": pair(10_201), "b": pair(10_000)}, "coded residuals").met is False
    assert check({"a": pair(1_000)}, "coded residuals").met is None  # tables weigh more than what they code
