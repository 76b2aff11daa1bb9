"""What the delta engine must reach, as pure checks over one run's measurements.

A target whose pair or peer was not measured in the run is listed as not measured, never as met. KB are 1000
bytes. Sizes are those at effort max, seconds those at effort default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.peers import Measurement

SIZES, SPEEDS = "sluice max", "sluice default"
OURS = (SIZES, SPEEDS)
BASELINE = "XOR+planes"  # what the MiniLM targets are ratios to
# Below this a patch is mostly framing, and a ratio of two such sizes says nothing about the coding.
LEAST_FOR_MEAN = 10  # pairs
MIN_BEST_FOR_MEAN_BYTES = 1024
MEAN_AT_MOST = 0.40
OVER_BEST_RATIO, OVER_BEST_BYTES = 1.01, 256
ENTROPY_RATIO = 1.02
DECODE_ANON_BYTES = 128_000_000
LARGE_BYTES = 20_000_000  # pairs that must decode faster than bspatch
KB_AT_MOST = {
    "ml_i8_pt": 309,
    "tf_mob_i8": 27,
    "cnn_qdq_pt": 87,
    "git_silero_v4hot": 318,
    "git_ad_f32_to_i8": 2.5,
    "git_resnet_f32_to_i8": 5,
    "git_retina_a": 3,
    "minilm_f32_to_i8": 10,
    "minilm_f32_to_f16": 10,
    "minilm_f32_pruned": 7,
}
OF_BASELINE_AT_MOST = {
    "minilm_f32_all": 0.90,
    "minilm_f32_two_layers": 0.90,
    "minilm_f32_decay": 0.80,
    "minilm_bf16": 0.58,
}
FULL_OVER_PATCH_AT_LEAST = {"minilm_f32_two_layers": 11}
# Pair: how many times faster than bsdiff and bspatch.
ENCODE_FASTER = {
    "minilm_f32_all": 20,
    "minilm_f32_two_layers": 20,
    "minilm_f32_decay": 20,
    "ml_i8_pt": 4,
    "minilm_i8_tensor": 4,
    "minilm_i8_channel": 4,
}
DECODE_FASTER = {"minilm_f32_all": 3, "minilm_f32_two_layers": 3, "minilm_f32_decay": 3, "minilm_bf16": 1.5}


@dataclass(frozen=True)
class PairResult:
    """One pair of a run: bytes of the new file, whether it is a shared pair, each tool's figures."""

    full_bytes: int
    shared: bool
    tools: Mapping[str, Measurement]


@dataclass(frozen=True)
class Check:
    """One target. `met` is None when the run did not measure it; `measured` then says what was missing."""

    what: str
    target: str
    measured: str
    met: bool | None


Results = Mapping[str, PairResult]


def best_peer(result: PairResult) -> tuple[str, int] | None:
    """The peer with the smallest patch, and its size in bytes."""
    sizes = [(tool.patch_bytes, name) for name, tool in result.tools.items() if name not in OURS]
    return (min(sizes)[1], min(sizes)[0]) if sizes else None


def ratio_to_best(result: PairResult) -> float | None:
    """Our patch's size at effort max over the best peer's."""
    best = best_peer(result)
    return result.tools[SIZES].patch_bytes / best[1] if best and SIZES in result.tools else None


def geometric_mean(results: Results) -> tuple[float, int] | None:
    """Of the ratios to the best peer over shared pairs whose best patch is not mere framing; and how many."""
    ratios = []
    for result in results.values():
        best, ratio = best_peer(result), ratio_to_best(result)
        if result.shared and best and ratio and best[1] > MIN_BEST_FOR_MEAN_BYTES:
            ratios.append(ratio)
    return (math.exp(sum(map(math.log, ratios)) / len(ratios)), len(ratios)) if ratios else None


def checks(results: Results) -> list[Check]:
    """Every target against the run."""
    return [
        _never_larger(results),
        _mean(results),
        *(_kilobytes(results, pair, most) for pair, most in KB_AT_MOST.items()),
        *(_of_baseline(results, pair, most) for pair, most in OF_BASELINE_AT_MOST.items()),
        *(_of_full(results, pair, least) for pair, least in FULL_OVER_PATCH_AT_LEAST.items()),
        _entropy(results),
        *(
            _faster(results, pair, least, "encodes faster than bsdiff", lambda tool: tool.encode_s)
            for pair, least in ENCODE_FASTER.items()
        ),
        *_decode(results),
        _memory(results),
    ]


def _never_larger(results: Results) -> Check:
    what, target = "largest patch relative to the best peer", "≤ 1.01 of the best + 256 B on every pair"
    over, worst = [], 0.0
    for name, result in results.items():
        best, ratio = best_peer(result), ratio_to_best(result)
        if best is None or ratio is None:
            continue
        worst = max(worst, ratio)
        size = result.tools[SIZES].patch_bytes
        if size > best[1] * OVER_BEST_RATIO + OVER_BEST_BYTES:
            over.append(f"{name} {size:,} B, {best[0]} {best[1]:,} B")
    if not worst:
        return Check(what, target, "no pair had a peer", None)
    return Check(what, target, "; ".join(over) or f"worst ratio {worst:.3f}", not over)


def _mean(results: Results) -> Check:
    what, target = "geometric mean to the best peer, shared pairs", f"≤ {MEAN_AT_MOST:.2f}"
    mean = geometric_mean(results)
    if mean is None or mean[1] < LEAST_FOR_MEAN:
        return Check(what, target, f"fewer than {LEAST_FOR_MEAN} shared pairs are no mean", None)
    return Check(what, target, f"{mean[0]:.3f} over {mean[1]} pairs", mean[0] <= MEAN_AT_MOST)


def _kilobytes(results: Results, pair: str, most: float) -> Check:
    if pair not in results or SIZES not in results[pair].tools:
        return Check(pair, f"≤ {most:g} KB", "not measured", None)
    size = results[pair].tools[SIZES].patch_bytes / 1000
    return Check(pair, f"≤ {most:g} KB", f"{size:.2f} KB", size <= most)


def _of_baseline(results: Results, pair: str, most: float) -> Check:
    what, target = f"{pair} to {BASELINE}", f"≤ {most:.2f}"
    tools = results[pair].tools if pair in results else {}
    if SIZES not in tools or BASELINE not in tools:
        return Check(what, target, "not measured", None)
    ratio = tools[SIZES].patch_bytes / tools[BASELINE].patch_bytes
    return Check(what, target, f"{ratio:.3f}", ratio <= most)


def _of_full(results: Results, pair: str, least: float) -> Check:
    what, target = f"{pair}: full over patch", f"≥ {least:g}x"
    if pair not in results or SIZES not in results[pair].tools:
        return Check(what, target, "not measured", None)
    ratio = results[pair].full_bytes / results[pair].tools[SIZES].patch_bytes
    return Check(what, target, f"{ratio:.2f}x", ratio >= least)


def _entropy(results: Results) -> Check:
    what, target = "coded residuals to the model's own entropy", "≤ 1.02 on every pair"
    ratios = {
        name: ours.pool_bytes / ours.entropy_bytes
        for name, result in results.items()
        if (ours := result.tools.get(SIZES)) is not None
        and ours.entropy_bytes
        and ours.pool_bytes
        and ours.pool_bytes > MIN_BEST_FOR_MEAN_BYTES
    }
    if not ratios:
        return Check(what, target, "not measured", None)
    over = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if ratio > ENTROPY_RATIO]
    return Check(what, target, "; ".join(over) or f"worst {max(ratios.values()):.3f}", not over)


def _faster(
    results: Results, pair: str, least: float, what: str, seconds: Callable[[Measurement], float]
) -> Check:
    label, target = f"{pair} {what}", f"≥ {least:g}x"
    tools = results[pair].tools if pair in results else {}
    if SPEEDS not in tools or "bsdiff" not in tools:
        missing = "bsdiff was not run on it" if SPEEDS in tools else "not measured"
        return Check(label, target, missing, None)
    ours, theirs = seconds(tools[SPEEDS]), seconds(tools["bsdiff"])
    return Check(
        label, target, f"{theirs / ours:.2f}x ({ours:.2f} s, {theirs:.2f} s)", theirs / ours >= least
    )


def _decode(results: Results) -> list[Check]:
    pairs = dict(DECODE_FASTER)
    for name, result in results.items():
        if result.full_bytes > LARGE_BYTES:
            pairs.setdefault(name, 1)
    return [
        _faster(results, pair, least, "decodes faster than bspatch", lambda tool: tool.decode_s)
        for pair, least in pairs.items()
    ]


def _memory(results: Results) -> Check:
    what, target = "peak anonymous memory of decoding", "< 128 MB on every pair"
    peaks = {
        name: peak
        for name, result in results.items()
        for tool in OURS
        if tool in result.tools and (peak := result.tools[tool].decode_anon_bytes) is not None
    }
    if not peaks:
        return Check(what, target, "not measured", None)
    worst = max(peaks, key=peaks.__getitem__)
    return Check(what, target, f"{peaks[worst] / 1e6:.0f} MB ({worst})", peaks[worst] < DECODE_ANON_BYTES)
