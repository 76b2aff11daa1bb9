"""Calls whose request does not come in: they hold a thread each, so they are watched and cut off.

gRPC gives a call its thread with the headers; the request may follow byte by byte, or never. So handlers of
single requests take theirs as a stream of one, by `Reading.whole`, which knows what is still being read,
and a thread looks at that once a second.

Rules: a request that is not whole after READ_S is cancelled; while more than READING_MOST are being read,
so are those that take over READ_CROWDED_S, the oldest first. A client sees CANCELLED. Who sends requests
whole never notices: reading one takes milliseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from agent.limits import READ_CROWDED_S, READ_LOOK_S, READ_S, READING_MOST

log = logging.getLogger(__name__)
Call = TypeVar("Call")


def overdue(calls: Sequence[tuple[Call, float]], now: float) -> list[Call]:
    """Which calls to cut off, of those whose request is being read. Pure.

    Args:
        calls: each with the time it began.
        now: on the same clock.
    """
    oldest = sorted(calls, key=lambda item: item[1])
    crowded = len(oldest) - READING_MOST
    return [
        call
        for place, (call, since) in enumerate(oldest)
        if now - since >= READ_S or (place < crowded and now - since >= READ_CROWDED_S)
    ]


class Reading:
    """The calls whose request is being read, and the thread that looks at them, from `start` to `stop`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[grpc.ServicerContext, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slow-requests", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()

    def whole(
        self, behavior: Callable[[Any, grpc.ServicerContext], Any]
    ) -> Callable[[Iterator[Any], grpc.ServicerContext], Any]:
        """A behaviour of one request as one of a stream of requests, of which it takes the first."""

        def read_then_behave(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._lock:
                self._since[context] = time.monotonic()
            try:
                request = next(requests, None)
            finally:
                with self._lock:
                    del self._since[context]
            if request is None:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request")
            return behavior(request, context)

        return read_then_behave

    def _run(self) -> None:
        while not self._stop.wait(READ_LOOK_S):
            with self._lock:
                calls = list(self._since.items())
            late = overdue(calls, time.monotonic())
            for context in late:
                context.cancel()
            if late:
                log.warning("%d calls were cut off: their requests did not come in", len(late))
