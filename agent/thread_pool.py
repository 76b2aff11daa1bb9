"""Threads for gRPC's handlers: what `ThreadPoolExecutor` does there, at less cost for each call.

gRPC's server hands every call to an executor and asks to be told of its end, nothing else: no result, no
cancelling. The standard library's futures pay for these with a condition variable and several locks a call.
Here a call costs a few holds of one lock, and the waking of one thread.

Rules: at most `threads` threads, started when all others are busy; the one that became idle last is woken
first, because its caches are warm; calls over that number wait in order, and how many may wait is gRPC's to
bound (`maximum_concurrent_rpcs`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from typing import Any

log = logging.getLogger(__name__)


class _Call:
    """A call on its way; as much of a future as gRPC uses."""

    __slots__ = ("arguments", "callbacks", "ended", "lock", "work")

    def __init__(self, lock: threading.Lock, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.lock = lock
        self.work = work
        self.arguments = arguments
        self.ended = False
        self.callbacks: list[Callable[[Any], Any]] = []

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Has `callback` called, with nothing of use, when the call has ended; at once if it has."""
        with self.lock:
            if not self.ended:
                self.callbacks.append(callback)
                return
        callback(None)


class _Thread:
    """An idle thread's gate, and what it is to do once it is let through; None: to end."""

    __slots__ = ("call", "gate")

    def __init__(self, call: _Call | None) -> None:
        self.call = call
        self.gate = threading.Lock()
        self.gate.acquire()


class ThreadPool(futures.Executor):
    """The executor. Args: `threads` at most; `name` begins theirs."""

    def __init__(self, threads: int, name: str) -> None:
        self._most = threads
        self._name = name
        self._lock = threading.Lock()
        self._started = 0
        self._idle: list[_Thread] = []
        self._waiting: deque[_Call] = deque()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Has `fn(*args)` called in one of the threads. Raises RuntimeError after `shutdown`."""
        assert not kwargs  # gRPC gives none
        call = _Call(self._lock, fn, args)
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads are ending")
            if self._idle:
                thread = self._idle.pop()
                thread.call = call
                thread.gate.release()
            elif self._started < self._most:
                self._started += 1
                threading.Thread(
                    target=self._serve,
                    args=(_Thread(call),),
                    name=f"{self._name}-{self._started}",
                    daemon=True,
                ).start()
            else:
                self._waiting.append(call)
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Takes no more calls; those taken are finished. Nobody waits for that: the threads are daemons."""
        with self._lock:
            self._closed = True
            for thread in self._idle:
                thread.gate.release()
            self._idle.clear()

    def _serve(self, thread: _Thread) -> None:
        call = thread.call
        while call is not None:
            try:
                call.work(*call.arguments)
            except BaseException:  # gRPC's handlers answer with a status instead
                log.exception("a call failed unexpectedly")
            thread.call = None  # an idle thread keeps no request alive
            with self._lock:
                call.ended = True
                callbacks, over = call.callbacks, self._closed
                call = self._waiting.popleft() if self._waiting else None
                if call is None and not over:
                    self._idle.append(thread)
            for callback in callbacks:
                callback(None)
            del callbacks
            if call is None and not over:
                thread.gate.acquire()
                call = thread.call
