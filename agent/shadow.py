"""A version in shadow: a share of the live requests goes to its worker too, and the answers are compared.

The request is answered first, by the version that serves; then its inputs and outputs are offered here, and
one thread gives the inputs to the new worker and compares. A caller never waits for it and never sees it:
`offer` puts a copy into a queue bounded in number and bytes, and takes none when that is full, so that under
load the shadow sees less and costs no more.

Which requests are copied is counted, not drawn: at a share of 0.01 every hundredth, whoever asks.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from agent.figures import Timing
from agent.golden import compare
from agent.judging import Likeness, ShadowTerms, times_of
from agent.limits import LATEST_REQUESTS, SHADOW_QUEUE, SHADOW_QUEUE_BYTES, SHADOW_REQUEST_S
from agent.worker import Worker
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Copy:
    """A request that was answered: its inputs, that answer, and the worker's seconds for it."""

    inputs: Arrays
    outputs: Arrays
    seconds: float
    size: int


class Shadow:
    """One shadow, from its making to `close`.

    Args:
        worker: of the new version, not in the router.
        terms: its share and tolerance.
    """

    def __init__(self, worker: Worker, terms: ShadowTerms) -> None:
        self._worker = worker
        self._terms = terms
        self._changed = threading.Condition()
        self._waiting: deque[_Copy] = deque()
        self._waiting_bytes = 0
        self._debt = 0.0  # of copies owed to the share; one is taken whenever it reaches 1
        self._closed = False
        self._compared = self._mismatched = self._unanswered = self._dropped = 0
        self._cosine_min, self._max_abs_error, self._worst = 1.0, 0.0, ""
        self._times: deque[tuple[float, float]] = deque(maxlen=LATEST_REQUESTS)  # new, old
        self._thread = threading.Thread(target=self._run, name=f"shadow-{worker.spec}", daemon=True)
        self._thread.start()

    def offer(self, inputs: Arrays, outputs: Arrays, timing: Timing) -> None:
        """Takes a copy of a request that was answered, if it is its turn and there is room; never waits long.

        Args:
            inputs: as `Worker.check` returned them for the version that serves.
            outputs: its answer. Both may lie in memory that is used again: what is taken is copied.
            timing: where its time went.
        """
        if not timing.infer_s:
            return  # the cache answered: there is nothing to compare
        with self._changed:
            self._debt += self._terms.share
            if self._closed or self._debt < 1:
                return
            self._debt -= 1
            size = sum(map(_size, (*inputs.values(), *outputs.values())))
            if len(self._waiting) >= SHADOW_QUEUE or self._waiting_bytes + size > SHADOW_QUEUE_BYTES:
                self._dropped += 1
                return
            self._waiting_bytes += size
        seconds = timing.input_s + timing.infer_s + timing.output_s
        copy = _Copy(_copied(inputs), _copied(outputs), seconds, size)
        with self._changed:
            if self._closed:
                return
            self._waiting.append(copy)
            self._changed.notify()

    def seen(self) -> Likeness:
        """What was compared so far."""
        with self._changed:
            return Likeness(
                self._compared,
                self._mismatched,
                self._unanswered,
                self._dropped,
                self._cosine_min,
                self._max_abs_error,
                self._worst,
                times_of(new for new, _ in self._times),
                times_of(old for _, old in self._times),
            )

    def close(self) -> None:
        """Takes no more copies and forgets those that wait; the comparison under way ends by itself."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._waiting_bytes = 0
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                copy = self._waiting.popleft()
                self._waiting_bytes -= copy.size
            try:
                self._compare(copy)
            except Exception:
                log.exception("a defect in comparing answers of %s", self._worker.spec)
                with self._changed:
                    self._unanswered += 1

    def _compare(self, copy: _Copy) -> None:
        try:
            outputs, timing = self._worker.run([self._worker.check(copy.inputs)], SHADOW_REQUEST_S)
        except SluiceError as error:
            if error.reason == errors_pb2.WORKER_DIED and not self._worker.alive:
                return  # whoever watches the worker knows
            log.info("in shadow %s failed a request: %s", self._worker.spec, error)
            with self._changed:
                self._unanswered += 1
            return
        terms = self._terms
        results = [
            compare(name, outputs[name], expected, terms.cosine_min, terms.max_abs_error)
            for name, expected in copy.outputs.items()
            if name in outputs
        ]
        missing = sorted(copy.outputs.keys() - outputs.keys())
        wrong = [str(result) for result in results if not result.passed]
        wrong += [f"{name}: it has no such output" for name in missing]
        with self._changed:
            self._compared += 1
            self._times.append((timing.input_s + timing.infer_s + timing.output_s, copy.seconds))
            self._cosine_min = min([self._cosine_min, *(result.cosine for result in results)])
            errors = [result.max_abs_error for result in results if result.max_abs_error < math.inf]
            self._max_abs_error = max([self._max_abs_error, *errors])
            if wrong:
                self._mismatched += 1
                self._worst = wrong[0]


def _copied(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}


def _size(array: NDArray[Any]) -> int:
    """Bytes, those of byte strings too."""
    return array.nbytes + (sum(map(len, array.flat)) if array.dtype == object else 0)
