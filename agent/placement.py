"""Starts a worker on the best accelerator that works.

The worker itself passes over what refuses or answers wrong (runtimes/placement.py). What is left for us is a
library that ends its process: then the next worker leaves that accelerator out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from agent.worker import Worker
from agent.worker_spec import LoadCrashed, WorkerSpec

log = logging.getLogger(__name__)


def start(
    spec: WorkerSpec,
    deadline_s: float,
    started: Callable[[Worker], None] | None = None,
    start_one: Callable[[WorkerSpec, float, Callable[[Worker], None] | None], Worker] = Worker.start,
) -> Worker:
    """A worker for the spec, whose `spec` says what it was started with at last.

    Args:
        spec: with accelerators, best first.
        deadline_s: for all attempts, seconds.
        started: see `Worker.start`; called for each attempt.
        start_one: starts one; `Worker.start` but for tests of libraries that crash.

    Raises SluiceError as `Worker.start`, for the last accelerator.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return start_one(spec, deadline - time.monotonic(), started)
        except LoadCrashed as error:
            if len(spec.accelerators) == 1:
                raise
            log.warning("%s is not loaded on %s: %s", spec, spec.accelerators[0], error.message)
            spec = replace(spec, accelerators=spec.accelerators[1:])
