"""Whether a new version does as well as the one before it: what was seen, and pure verdicts on it.

In *shadow* both versions answer the same live requests, so outputs can be compared one by one
(`judge_likeness`). In the *soak* the new version answers, so its failures and its time are held against those
of the version before it (`judge_outcomes`); where that one is warm and there was a shadow, the comparison
goes on with roles exchanged (`judge_mirror`).

Rules: a verdict needs a minimum of requests, because a few say nothing, and one on time alone needs more. A
version is slow only if its 95th percentile is so by a ratio and by LATENCY_FLOOR_S, and its median by the
ratio's root: a ratio of microseconds is noise, and a burst of other work moves the slowest requests, not all.
Time is that of the worker for a request, without its wait in the queue: load makes queues, not versions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from agent.limits import (
    LATENCY_FLOOR_S,
    LATENCY_REQUESTS_FACTOR,
    LATEST_REQUESTS,
    UNCOMPARED_ERROR_SHARE,
)


@dataclass(frozen=True)
class Times:
    """The worker's time for requests, seconds; 0 when there were none."""

    median_s: float = 0.0
    p95_s: float = 0.0


@dataclass(frozen=True)
class Outcomes:
    """How the latest requests to one version ended.

    Attributes:
        requests: looked at.
        failures: those of them that failed; ones turned away by a full queue are neither.
        times: of those answered.
    """

    requests: int = 0
    failures: int = 0
    times: Times = Times()

    @property
    def error_share(self) -> float:
        return self.failures / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class Likeness:
    """How a version in shadow compares with the one that serves.

    Attributes:
        compared: requests that both answered.
        mismatched: those of them with an output outside the tolerance.
        unanswered: requests that the new version failed and the old one answered.
        dropped: copies that were not taken, because the queue was full.
        cosine_min: least cosine similarity of an output; 1 before the first.
        max_abs_error: largest absolute difference of an output.
        worst: the output of the last mismatch, for people.
        times: of the new worker.
        previous: of the old worker, for the same requests.
    """

    compared: int = 0
    mismatched: int = 0
    unanswered: int = 0
    dropped: int = 0
    cosine_min: float = 1.0
    max_abs_error: float = 0.0
    worst: str = ""
    times: Times = Times()
    previous: Times = Times()


@dataclass(frozen=True)
class Gates:
    """What a new version must keep to beside the one before it.

    Attributes:
        min_requests: fewer than so many say nothing.
        error_share: of its requests that may fail beyond the share that failed before, 0 to 1; 1: any.
        latency_ratio: of its 95th percentile to the one before; 0: any.
    """

    min_requests: int = 50
    error_share: float = 0.05
    latency_ratio: float = 2.0


@dataclass(frozen=True)
class ShadowTerms:
    """How long a new version answers beside the old one, and how like it must be.

    Attributes:
        share: of the live requests that both answer, 0 to 1; 0: no shadow.
        seconds: longest time.
        requests: compared requests that suffice.
        cosine_min: least cosine similarity of each output.
        max_abs_error: largest absolute difference of each output; None for no bound.
        mismatch_share: of the compared requests that may be outside of that, 0 to 1.
    """

    share: float = 0.0
    seconds: float = 60.0
    requests: int = 100
    cosine_min: float = 0.95
    max_abs_error: float | None = None
    mismatch_share: float = 0.05


def times_of(seconds: Iterable[float]) -> Times:
    """Median and 95th percentile, by nearest rank."""
    ordered = sorted(seconds)
    if not ordered:
        return Times()
    return Times(ordered[math.ceil(0.5 * len(ordered)) - 1], ordered[math.ceil(0.95 * len(ordered)) - 1])


def judge_outcomes(new: Outcomes, old: Outcomes | None, gates: Gates) -> str:
    """Why the new version is worse in its soak; empty if it is not, or too little was seen.

    Without enough requests to the old version nothing can be compared: then only a version that fails more
    than UNCOMPARED_ERROR_SHARE of its requests is worse.
    """
    if new.requests < gates.min_requests:
        return ""
    comparable = old is not None and old.requests >= gates.min_requests
    before = old if old is not None and comparable else Outcomes()
    allowed = before.error_share + gates.error_share if comparable else UNCOMPARED_ERROR_SHARE
    if gates.error_share < 1 and new.error_share > allowed:
        than = f"; of those before it {before.error_share:.1%} did" if comparable else ""
        return f"{new.failures} of its latest {new.requests} requests failed{than}"
    least = min(LATENCY_REQUESTS_FACTOR * gates.min_requests, LATEST_REQUESTS)
    many = min(new.requests, before.requests) >= least
    if comparable and many and _slower(new.times, before.times, gates):
        return _slow(new.times, before.times)
    return ""


def judge_likeness(seen: Likeness, terms: ShadowTerms, gates: Gates, *, over: bool) -> tuple[bool, str]:
    """Whether a shadow is at its end, and why the new version is not to be activated (empty if it is).

    Args:
        seen: so far.
        terms: of the shadow.
        gates: the share of failures and the latency ratio; its minimum counts if the shadow needs no fewer.
        over: its time is up. What was seen then decides; where that is too little, nothing speaks against it.
    """
    tried = seen.compared + seen.unanswered
    enough = tried >= min(gates.min_requests, terms.requests)
    if enough and seen.unanswered > gates.error_share * tried:
        return True, f"it failed {seen.unanswered} of {tried} live requests that the version before answered"
    if enough and (why := _unlike(seen, terms)):
        return True, why
    done = over or tried >= terms.requests
    if done and enough and _slower(seen.times, seen.previous, gates):
        return True, _slow(seen.times, seen.previous)
    return done, ""


def judge_mirror(seen: Likeness, terms: ShadowTerms, gates: Gates) -> str:
    """Why a version that answers is too unlike the one before it; empty if it is not, or too little was seen.

    What the version before could not answer speaks against nobody.
    """
    return _unlike(seen, terms) if seen.compared >= min(gates.min_requests, terms.requests) else ""


def _unlike(seen: Likeness, terms: ShadowTerms) -> str:
    if seen.mismatched <= terms.mismatch_share * seen.compared:
        return ""
    return (
        f"{seen.mismatched} of {seen.compared} live requests got another answer than from the version before"
        f" ({seen.worst})"
    )


def _slower(new: Times, old: Times, gates: Gates) -> bool:
    ratio = gates.latency_ratio
    if ratio <= 0 or old.p95_s <= 0 or new.p95_s - old.p95_s <= LATENCY_FLOOR_S:
        return False
    return new.p95_s > ratio * old.p95_s and new.median_s > math.sqrt(ratio) * old.median_s


def _slow(new_times: Times, old_times: Times) -> str:
    new, old = new_times.p95_s * 1000, old_times.p95_s * 1000
    return f"95 % of its answers took up to {new:.1f} ms, of the version before up to {old:.1f} ms"
