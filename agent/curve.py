"""What batches cost, learned from those that ran, for each class of length; and how large they may be. Pure.

Sizes are counted in steps (1, 2, 3-4, 5-8, ...), lengths in classes (powers of two of the elements in a
sample). A size is known once it was seen SIZE_SEEN times; what was not seen for CURVE_KEEP_S is forgotten and
tried again, because the box's load and clock change.

The allowed size is the least of three: the policy's; the controller's, which halves when a batch takes more
than 1.2 of its target and doubles when a full one takes less than 0.8; and what pays: walking up from the
smallest known step, the largest that makes a sample cheaper by PAYS or more than every smaller one, or the
first that is not known yet, so that it gets known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from agent.limits import (
    CURVE_EVERY,
    CURVE_KEEP_S,
    CURVE_LATEST,
    MAX_LENGTH_CLASSES,
    PAYS,
    SIZE_SEEN,
    SWEEP_S,
    TOO_FAST,
    TOO_SLOW,
)


class Bounds(Protocol):
    """The part of a policy that matters here: see `scheduling.Policy`."""

    @property
    def max_batch(self) -> int: ...
    @property
    def target_s(self) -> float: ...


@dataclass
class _Size:
    """How long batches of one step take: the medians of the latest, which a few slow ones do not move."""

    latest: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=CURVE_LATEST))
    ran: int = 0
    sample_s: float = 0.0
    batch_s: float = 0.0
    last: float = 0.0

    @property
    def seen(self) -> int:
        return len(self.latest)


@dataclass
class _Length:
    """One class of length: its steps by number, the controller's size (0: not set yet), the last clean-up."""

    sizes: dict[int, _Size] = field(default_factory=dict)
    limit: int = 0
    swept: float = 0.0


class Curves:
    """The curves of one model, by class of length."""

    def __init__(self) -> None:
        self._lengths: dict[int, _Length] = {}

    def learn(self, elements: int, samples: int, seconds: float, bounds: Bounds, now: float) -> None:
        """A batch of `samples` samples of at most `elements` elements ran for `seconds`."""
        length = self._length(elements)
        size = length.sizes.setdefault(_step(samples), _Size())
        if now - size.last > CURVE_KEEP_S:
            size.latest.clear()
        size.latest.append((seconds / samples, seconds))
        size.ran += 1
        if size.ran % CURVE_EVERY == 0 or len(size.latest) < CURVE_LATEST:
            size.sample_s, size.batch_s = sorted(size.latest)[len(size.latest) // 2]
        size.last = now
        if now - length.swept > SWEEP_S:
            length.swept = now
            for step in [step for step, found in length.sizes.items() if now - found.last > CURVE_KEEP_S]:
                del length.sizes[step]
        limit = min(length.limit or bounds.max_batch, bounds.max_batch)
        if seconds > TOO_SLOW * bounds.target_s:
            limit = max(1, min(limit, samples) // 2)
        elif seconds < TOO_FAST * bounds.target_s and samples >= limit:
            limit = min(bounds.max_batch, limit * 2)
        length.limit = limit

    def batch_size(self, elements: int, bounds: Bounds) -> int:
        """Most samples that a batch of that length should have now."""
        length = self._lengths.get(_class(elements))
        if length is None:
            return 1
        return min(bounds.max_batch, length.limit or bounds.max_batch, self._paying(length, bounds.max_batch))

    def pays(self, elements: int, samples: int, bounds: Bounds) -> bool:
        """Whether a batch larger than `samples` is known to make a sample cheaper."""
        length = self._lengths.get(_class(elements))
        if length is None:
            return False
        here = length.sizes.get(_step(samples))
        if here is None or here.seen < SIZE_SEEN:
            return False
        return any(
            size.seen >= SIZE_SEEN and size.sample_s < (1 - PAYS) * here.sample_s
            for step, size in length.sizes.items()
            if _step(samples) < step <= _step(bounds.max_batch)
        )

    def expected_s(self, elements: int, samples: int) -> float:
        """About how long a batch takes; 0 when nothing is known."""
        length = self._lengths.get(_class(elements))
        found = None if length is None else length.sizes.get(_step(samples))
        return 0.0 if found is None else found.batch_s

    def _length(self, elements: int) -> _Length:
        number = _class(elements)
        if number not in self._lengths and len(self._lengths) >= MAX_LENGTH_CLASSES:
            self._lengths.pop(next(iter(self._lengths)))
        return self._lengths.setdefault(number, _Length())

    @staticmethod
    def _paying(length: _Length, most: int) -> int:
        allowed, cheapest = 1, float("inf")
        for step in range(min(length.sizes, default=0), _step(most) + 1):
            size = length.sizes.get(step)
            if size is None or size.seen < SIZE_SEEN:
                return 1 << step
            if size.sample_s < (1 - PAYS) * cheapest:
                allowed, cheapest = 1 << step, size.sample_s
        return allowed


def _step(samples: int) -> int:
    """0 for 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8, ..."""
    return max(0, samples - 1).bit_length()


def _class(elements: int) -> int:
    return elements.bit_length()
