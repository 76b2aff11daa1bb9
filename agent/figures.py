"""What is counted and timed of one version's inferences, for ModelStatistics and metrics.

A worker owns one `Figures`; a worker that takes a dead one's place goes on with its predecessor's, so that a
restart loses nothing. Memory is bounded: batch sizes are few, and everything else is sums.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace


@dataclass(frozen=True)
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

    @property
    def total_s(self) -> float:
        return self.queue_s + self.input_s + self.infer_s + self.output_s


@dataclass(frozen=True)
class Sum:
    """How often, and how long altogether (seconds)."""

    count: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float) -> Sum:
        return Sum(self.count + 1, self.seconds + seconds)


@dataclass(frozen=True)
class Parts:
    """One sum for each part of a `Timing`."""

    queue: Sum = Sum()
    input: Sum = Sum()
    infer: Sum = Sum()
    output: Sum = Sum()

    def plus(self, timing: Timing) -> Parts:
        return Parts(
            self.queue.plus(timing.queue_s),
            self.input.plus(timing.input_s),
            self.infer.plus(timing.infer_s),
            self.output.plus(timing.output_s),
        )


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
    """

    success: Sum = Sum()
    fail: Sum = Sum()
    parts: Parts = Parts()
    samples: int = 0
    batches: tuple[tuple[int, Parts], ...] = ()
    last_ms: int = 0

    @property
    def executions(self) -> int:
        return sum(parts.infer.count for _, parts in self.batches)


class Figures:
    """The figures of one version; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = Snapshot()
        self._batches: dict[int, Parts] = {}

    def answered(self, samples: int, timing: Timing) -> None:
        """A request of `samples` samples was answered."""
        with self._lock:
            sums = self._sums
            self._sums = replace(
                sums,
                success=sums.success.plus(timing.total_s),
                parts=sums.parts.plus(timing),
                samples=sums.samples + samples,
                last_ms=time.time_ns() // 1_000_000,
            )

    def failed(self, seconds: float) -> None:
        """A request failed after so long."""
        with self._lock:
            self._sums = replace(self._sums, fail=self._sums.fail.plus(seconds))

    def ran(self, samples: int, timing: Timing) -> None:
        """The worker ran a batch of `samples` samples."""
        with self._lock:
            self._batches[samples] = self._batches.get(samples, Parts()).plus(timing)

    def snapshot(self) -> Snapshot:
        """The figures now."""
        with self._lock:
            return replace(self._sums, batches=tuple(sorted(self._batches.items())))
