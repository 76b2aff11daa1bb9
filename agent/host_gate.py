"""Whether low-priority work may begin, by how busy the whole box is. Pure: the caller brings load and time.

The box is *busy* over one bound of its processors' load (0.85): nothing of low priority begins. Under another
(0.30) it is *idle*: low-priority work may use the spare cores, as many models' workers at once as have any.
Between them, as *usual*, one model's worker at a time runs low-priority work.

What counts is the load by others: the part that admitted low-priority work itself causes is taken off, or
the gate would shut for what it let in. The load is averaged, and a level is left only once the load is well
past its bound, so that the gate does not flap.
"""

from __future__ import annotations

import enum

from agent.limits import GATE_HALF_LIFE_S, GATE_MARGIN, GATE_STALE_S, HOLD_LOAD, SPARE_LOAD


class Level(enum.Enum):
    """How busy the box is."""

    BUSY = "busy"
    USUAL = "usual"
    IDLE = "idle"


class HostGate:
    """The gate. Not thread-safe: its caller holds a lock.

    Args:
        cores: of the box.
        hold_load: over it the box is busy, share of all cores, 0 to 1; 1: it never is.
        spare_load: under it the box is idle; 0: it never is.
    """

    def __init__(self, cores: int, hold_load: float = HOLD_LOAD, spare_load: float = SPARE_LOAD) -> None:
        self._cores = max(1, cores)
        self._hold_load = hold_load
        self._spare_load = spare_load
        self._level = Level.USUAL
        self._load: float | None = None  # by others, averaged
        self._seen_s: float | None = None
        self._low_batches = 0
        self._low_cores = 0
        self._low_core_s = 0.0  # that low-priority work was allowed to use since the last observation
        self._counted_s = 0.0

    @property
    def level(self) -> Level:
        return self._level

    @property
    def load(self) -> float:
        """By others, averaged, 0 to 1."""
        return self._load or 0.0

    def observe(self, load: float, now: float) -> Level:
        """Takes in the load of all cores since the last call, 0 to 1."""
        self._count(now)
        period_s = max(0.0, now - self._seen_s) if self._seen_s is not None else 0.0
        own = self._low_core_s / (self._cores * period_s) if period_s > 0 else 0.0
        others = min(1.0, max(0.0, load - own))
        keep = 0.5 ** (period_s / GATE_HALF_LIFE_S) if self._load is not None else 0.0
        self._load = keep * (self._load or 0.0) + (1 - keep) * others
        self._seen_s, self._low_core_s = now, 0.0
        self._level = self._next_level(self._load)
        return self._level

    def admits(self, now: float) -> bool:
        """Whether low-priority work may begin; without a recent observation it may."""
        if self._seen_s is None or now - self._seen_s > GATE_STALE_S or self._level is Level.IDLE:
            return True
        return self._level is Level.USUAL and self._low_batches == 0

    def began(self, threads: int, now: float) -> None:
        """A worker runs low-priority work with so many threads."""
        self._count(now)
        self._low_batches += 1
        self._low_cores += threads

    def ended(self, threads: int, now: float) -> None:
        """It is done."""
        self._count(now)
        self._low_batches -= 1
        self._low_cores -= threads

    def _count(self, now: float) -> None:
        self._low_core_s += min(self._cores, self._low_cores) * max(0.0, now - self._counted_s)
        self._counted_s = now

    def _next_level(self, load: float) -> Level:
        busy = self._hold_load - (GATE_MARGIN if self._level is Level.BUSY else 0.0)
        idle = self._spare_load + (GATE_MARGIN if self._level is Level.IDLE else 0.0)
        if load > busy:
            return Level.BUSY
        return Level.IDLE if load < idle else Level.USUAL
