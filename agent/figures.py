"""What is counted and timed of one version's inferences, for ModelStatistics and metrics.

A worker owns one `Figures`; a worker that takes a dead one's place goes on with its predecessor's, so that a
restart loses nothing. Memory is sums, as many of them as there were batch sizes, and one number for each of
the LATEST_REQUESTS that a new version is judged by.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from agent.judging import Outcomes, times_of
from agent.limits import LATEST_REQUESTS

# Upper bounds of the histograms' classes; one more class takes what is over the last.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass
class Timing:
    """Where one request's or batch's time went, seconds.

    Attributes:
        queue_s: waiting for the worker.
        input_s: handing the inputs to the worker.
        infer_s: until the worker's answer came.
        output_s: taking the answer apart and encoding it.
    """

    queue_s: float = 0.0
    input_s: float = 0.0
    infer_s: float = 0.0
    output_s: float = 0.0


@dataclass(frozen=True)
class Sum:
    """How often, and how long altogether (seconds)."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Parts:
    """One sum for each part of a `Timing`."""

    queue: Sum = Sum()
    input: Sum = Sum()
    infer: Sum = Sum()
    output: Sum = Sum()


@dataclass(frozen=True)
class CascadeCounts:
    """Samples of a cascade.

    Attributes:
        kept: it was sure of and answered.
        escalated: it was unsure of, answered by the model after it.
        failed: it was unsure of, and answered because the model after it did not.
    """

    kept: int = 0
    escalated: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        """Of samples that were escalated, 0 to 1."""
        return self.escalated / max(1, self.kept + self.escalated + self.failed)


@dataclass(frozen=True)
class Snapshot:
    """All figures at one moment.

    Attributes:
        success: requests answered, and their time.
        fail: requests that failed for whatever reason, and their time.
        parts: of the requests answered.
        samples: answered.
        batches: by number of samples, ascending: how each was run.
        last_ms: when the last request was answered, milliseconds since the epoch; 0: none was.
        hits: answers found in the cache, and the time of looking.
        misses: look-ups in vain, and their time.
        durations: requests answered by the time they took, one number for each class of SECONDS.
        waits: the same by the time that they waited for the worker.
        cascade: of a cascade, its samples by what became of them; None for other versions.
    """

    success: Sum = Sum()
    fail: Sum = Sum()
    parts: Parts = Parts()
    samples: int = 0
    batches: tuple[tuple[int, Parts], ...] = ()
    last_ms: int = 0
    hits: Sum = Sum()
    misses: Sum = Sum()
    durations: tuple[int, ...] = ()
    waits: tuple[int, ...] = ()
    cascade: CascadeCounts | None = None

    @property
    def executions(self) -> int:
        return sum(parts.infer.count for _, parts in self.batches)


class _Tally:
    """How often, and the sums of a Timing's parts; changed in place because it is on every request's way."""

    __slots__ = ("count", "infer_s", "input_s", "output_s", "queue_s")

    def __init__(self) -> None:
        self.count = 0
        self.queue_s = self.input_s = self.infer_s = self.output_s = 0.0

    def add(self, timing: Timing) -> None:
        self.count += 1
        self.queue_s += timing.queue_s
        self.input_s += timing.input_s
        self.infer_s += timing.infer_s
        self.output_s += timing.output_s

    @property
    def total_s(self) -> float:
        return self.queue_s + self.input_s + self.infer_s + self.output_s

    def parts(self) -> Parts:
        times = (self.queue_s, self.input_s, self.infer_s, self.output_s)
        return Parts(*(Sum(self.count, seconds) for seconds in times))


class Figures:
    """The figures of one version; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = _Tally()
        self._batches: dict[int, _Tally] = {}
        self._samples = 0
        self._failed = 0
        self._failed_s = 0.0
        self._last_s = 0.0
        self._cache = [Sum(), Sum()]  # misses, hits
        self._durations = [0] * (len(SECONDS) + 1)
        self._waits = [0] * (len(SECONDS) + 1)
        self._cascade: CascadeCounts | None = None
        self._latest: deque[float] = deque(maxlen=LATEST_REQUESTS)  # the worker's seconds; NaN: it failed

    def answered(self, samples: int, timing: Timing) -> None:
        """A request of `samples` samples was answered."""
        total_s = timing.queue_s + timing.input_s + timing.infer_s + timing.output_s
        with self._lock:
            self._durations[bisect_left(SECONDS, total_s)] += 1
            self._waits[bisect_left(SECONDS, timing.queue_s)] += 1
            self._answered.add(timing)
            if timing.infer_s:  # else the cache answered
                self._latest.append(timing.input_s + timing.infer_s + timing.output_s)
            self._samples += samples
            self._last_s = time.time()

    def failed(self, seconds: float, *, judged: bool = True) -> None:
        """A request failed after so long; not `judged`: through no fault of the version."""
        with self._lock:
            self._failed += 1
            self._failed_s += seconds
            if judged:
                self._latest.append(math.nan)

    def latest(self) -> Outcomes:
        """How the latest requests ended."""
        with self._lock:
            seen = list(self._latest)
        answered = [seconds for seconds in seen if not math.isnan(seconds)]
        return Outcomes(len(seen), len(seen) - len(answered), times_of(answered))

    def ran(self, samples: int, timing: Timing) -> None:
        """The worker ran a batch of `samples` samples."""
        with self._lock:
            tally = self._batches.get(samples)
            if tally is None:
                tally = self._batches[samples] = _Tally()
            tally.add(timing)

    def looked_up(self, seconds: float, *, hit: bool) -> None:
        """The cache was asked, which took so long."""
        with self._lock:
            found = self._cache[hit]
            self._cache[hit] = Sum(found.count + 1, found.seconds + seconds)

    def cascaded(self, *, kept: int = 0, escalated: int = 0, failed: int = 0) -> None:
        """So many samples of a request were kept or handed on, see `CascadeCounts`."""
        with self._lock:
            seen = self._cascade or CascadeCounts()
            self._cascade = CascadeCounts(seen.kept + kept, seen.escalated + escalated, seen.failed + failed)

    def snapshot(self) -> Snapshot:
        """The figures now."""
        with self._lock:
            return Snapshot(
                success=Sum(self._answered.count, self._answered.total_s),
                fail=Sum(self._failed, self._failed_s),
                parts=self._answered.parts(),
                samples=self._samples,
                batches=tuple((size, tally.parts()) for size, tally in sorted(self._batches.items())),
                last_ms=int(self._last_s * 1000),
                hits=self._cache[True],
                misses=self._cache[False],
                durations=tuple(self._durations),
                waits=tuple(self._waits),
                cascade=self._cascade,
            )
