"""The latency circuit breaker: turns requests away while answers take too long, and probes for the end of it.

Closed, it counts how many of the last BREAKER_ANSWERS answers took longer than the bound; when more than half
did, it opens. Open, it refuses everything for a while: BREAKER_FIRST_S, doubled each time it opens again
without having closed, at most BREAKER_MOST_S. Then one request is let through, the probe: in time, it closes
the breaker; late, it opens it again. Pure: the caller brings the time.
"""

from __future__ import annotations

from collections import deque

from agent.limits import BREAKER_ANSWERS, BREAKER_FIRST_S, BREAKER_MOST_S, LEAST_RETRY_S


class Breaker:
    """One model's breaker. A bound of 0 means that there is none: it stays closed."""

    def __init__(self) -> None:
        self._late: deque[bool] = deque(maxlen=BREAKER_ANSWERS)
        self._open_until: float | None = None
        self._pause_s = BREAKER_FIRST_S
        self._probe: int | None = None

    def refuses(self, number: int, now: float, bound_s: float) -> float:
        """For how long the request should stay away, seconds; 0: it may come in."""
        if bound_s <= 0 or self._open_until is None:
            return 0.0
        if now < self._open_until:
            return self._open_until - now
        if self._probe is not None:
            return LEAST_RETRY_S
        self._probe = number
        return 0.0

    def note(self, number: int, seconds: float, now: float, bound_s: float) -> None:
        """A request that had been let in was answered after so long."""
        if bound_s <= 0:
            return
        late = seconds > bound_s
        if self._open_until is not None:
            if number != self._probe:
                return  # let in before the breaker opened
            self._probe = None
            if late:
                self._open(now)
            else:
                self._open_until, self._pause_s = None, BREAKER_FIRST_S
                self._late.clear()
            return
        self._late.append(late)
        if len(self._late) == BREAKER_ANSWERS and sum(self._late) * 2 > BREAKER_ANSWERS:
            self._open(now)

    def forget(self, number: int) -> None:
        """A request that had been let in left without an answer; if it was the probe, another may come."""
        if number == self._probe:
            self._probe = None

    def _open(self, now: float) -> None:
        self._open_until = now + self._pause_s
        self._pause_s = min(BREAKER_MOST_S, 2 * self._pause_s)
