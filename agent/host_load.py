"""The box's load, measured for the gate of low-priority work, and the gate as the queues share it.

The main thread calls `tick` about once a second; the queues before all workers ask `admits` and tell what
they run. The reading is the kernel's count of the processors' time, which psutil differences.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from agent.host_gate import HostGate

log = logging.getLogger(__name__)


def measured_load() -> float:
    """Of all cores since the last call in this thread, 0 to 1."""
    return psutil.cpu_percent(interval=None) / 100.0


class HostLoad:
    """A gate for many threads.

    Args:
        hold_load, spare_load: see HostGate.
        read: the load since it was last called, 0 to 1.
        clock: as time.monotonic.
    """

    def __init__(
        self,
        hold_load: float,
        spare_load: float,
        *,
        read: Callable[[], float] = measured_load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gate = HostGate(os.cpu_count() or 1, hold_load, spare_load)
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        read()  # the first reading means nothing

    def tick(self) -> None:
        """Takes a reading."""
        load = self._read()
        with self._lock:
            before = self._gate.level
            after = self._gate.observe(load, self._clock())
            seen = self._gate.load
        if after is not before:
            log.info("low-priority requests: the box is %s now (load %.0f %%)", after.value, 100 * seen)

    def admits(self) -> bool:
        """Whether low-priority work may begin."""
        with self._lock:
            return self._gate.admits(self._clock())

    @contextmanager
    def low_work(self, threads: int) -> Iterator[None]:
        """Around a run of low-priority work with so many threads."""
        with self._lock:
            self._gate.began(threads, self._clock())
        try:
            yield
        finally:
            with self._lock:
                self._gate.ended(threads, self._clock())
