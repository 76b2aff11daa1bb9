"""Which waiting requests run next, together, and which are turned away. Pure: the caller brings the time.

One `Scheduler` stands before the workers of one version, each of which runs one batch at a time. Requests are
submitted, wait in queues, and leave in exactly one way: in a batch (`take`), turned away (`submit`, `trim`),
past their deadline (`expire`) or cancelled. The caller tells how many workers there are and when a batch is
done (`finished`); while as many run as there are workers, there is no next one.

Order. Every request has a rank: its arrival plus the handicap of its priority. The smallest rank goes first,
so a higher priority overtakes, but a request that has waited for its handicap is overtaken by nobody who
comes after: no priority starves. A batch holds requests of one key (equal shapes but for the batch
dimension), in the order of rank, so requests of different lengths wait in queues of their own, each with its
own learned sizes (curve.py).

Waiting. A request never waits while a worker is free, unless the policy has a window, the curve says
that a fuller batch pays, and by the rate of arrivals at least one more request is to be expected in time:
then the batch waits, 5 ms from its first request's arrival when the worker is busy for more than 0.8 of the
time, up to 20 ms below that, never beyond the policy's window, and never so long that a deadline is missed.

Holding. While `hold_low` is set, requests of low priority stay in the queue, for LOW_HOLD_S at most, and the
others go past them; the caller sets it anew before it takes (host_gate.py says when).

Turning away. The queue is bounded in number, and beyond LEAST_QUEUE by the wait to be expected: another is
let in if the workers will have run what waits within QUEUE_WAIT_S. What requests of a length cost is taken
from the median of the latest batches, since one that a busy box held up says nothing of those behind it. For
one too many the lowest priority goes first, of that the latest. The breaker (breaker.py) turns away
everything but a probe while latencies are over its bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import IntEnum

from agent.breaker import Breaker
from agent.curve import Curves
from agent.limits import (
    BATCH_COSINE_MIN,
    BATCH_TARGET_S,
    BUSY_LOAD,
    COST_LATEST,
    GATE_LOOK_S,
    HANDICAP_S,
    LEAST_QUEUE,
    LEAST_RETRY_S,
    LOAD_HALF_LIFE_S,
    LOW_HOLD_S,
    MAX_QUEUE,
    MOST_RETRY_S,
    QUEUE_WAIT_S,
    WINDOW_BUSY_S,
    WINDOW_IDLE_S,
)


class Priority(IntEnum):
    """Of a request; the numbers are those of the protocol's parameter "priority"."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


@dataclass(frozen=True)
class Policy:
    """How one model's requests are put together.

    Attributes:
        max_batch: most samples in a batch made of several requests; 1: requests run one by one.
        preferred: batch sizes that are sent without waiting for more.
        window_s: longest wait for a fuller batch, seconds; 0: none.
        target_s: how long a batch should run at most, seconds; the batch size follows it.
        queue: requests that may wait, at most; see "Turning away".
        breaker_s: from arrival to answer; over it a request counts as too slow, seconds; 0: no breaker.
        cosine_min: least similarity of an answer in a batch to the answer alone for batches to be used.
    """

    max_batch: int = 1
    preferred: tuple[int, ...] = ()
    window_s: float = 0.0
    target_s: float = BATCH_TARGET_S
    queue: int = MAX_QUEUE
    breaker_s: float = 0.0
    cosine_min: float = BATCH_COSINE_MIN


@dataclass(eq=False, slots=True)
class Item:
    """One request to the scheduler.

    Attributes:
        number: unique among the scheduler's requests.
        key: requests with equal keys may share a batch.
        samples: that it holds, at least 1.
        elements: of its largest sample, for the length's class.
        priority: see Priority.
        arrived: when it was submitted.
        deadline: when it need not be run any more.
        rank: the smallest goes first.
    """

    number: int
    key: Hashable
    samples: int
    elements: int
    priority: Priority
    arrived: float
    deadline: float
    rank: float = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.arrived + HANDICAP_S[self.priority]


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests that run together; all of one key."""

    items: tuple[Item, ...]
    began: float

    @property
    def samples(self) -> int:
        return sum(item.samples for item in self.items)


@dataclass(frozen=True)
class Shed:
    """A request that is turned away, and when it may be worth trying again, seconds."""

    item: Item
    retry_s: float
    why: str


class _Cost:
    """What a request of one class of length takes of a worker's time, seconds."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=COST_LATEST)
        self.median_s = 0.0

    def learn(self, seconds: float) -> None:
        self._latest.append(seconds)
        self.median_s = sorted(self._latest)[len(self._latest) // 2]


class Scheduler:
    """The queues before one version's workers. Not thread-safe: its caller holds a lock.

    Args:
        policy: see there.
        workers: how many there are, at least 1; to be set anew when that changes.
    """

    def __init__(self, policy: Policy, workers: int = 1) -> None:
        self.policy = policy
        self.workers = workers
        self.curves = Curves()
        self.hold_low = False
        self.load = 0.0  # share of the time that the workers were busy lately, 0 to 1
        self._breaker = Breaker()
        self._waiting: list[Item] = []  # by rank
        self._running: list[Batch] = []
        self._last_end: float | None = None
        self._last_arrival: float | None = None
        self._interval_s = float("inf")  # between arrivals, averaged
        self._costs: dict[int, _Cost] = {}  # of requests by class of length

    @property
    def waiting(self) -> tuple[Item, ...]:
        """Those that wait, by rank."""
        return tuple(self._waiting)

    @property
    def low_waits(self) -> bool:
        """Whether a request of low priority waits."""
        return any(item.priority is Priority.LOW for item in self._waiting)

    @property
    def running(self) -> tuple[Batch, ...]:
        """In the order in which they began."""
        return tuple(self._running)

    @property
    def busy(self) -> bool:
        """Whether no worker is free."""
        return len(self._running) >= self.workers

    @property
    def first(self) -> Item | None:
        """The one with the smallest rank among those that wait."""
        return self._waiting[0] if self._waiting else None

    def run_now(self, item: Item, now: float) -> Batch | None:
        """Submits and takes in one step a request that finds a worker free and need not wait for more;
        None: it has to be submitted.
        """
        policy = self.policy
        if self.busy or self._waiting or policy.window_s > 0 or policy.breaker_s > 0:
            return None
        self._note_arrival(now)
        batch = Batch((item,), now)
        self._running.append(batch)
        return batch

    def submit(self, item: Item, now: float) -> list[Shed]:
        """Takes a request in; returns who is turned away for it, possibly itself."""
        self._note_arrival(now)
        retry_s = self._breaker.refuses(item.number, now, self.policy.breaker_s)
        if retry_s > 0:
            return [Shed(item, retry_s, "its answers take too long at present")]
        self._insert(item)
        most, waiting = self.policy.queue, len(self._waiting)
        if LEAST_QUEUE < waiting <= most and self.wait_s() > QUEUE_WAIT_S:
            most = waiting - 1
        return self.trim(most, "its queue is full")

    def trim(self, most: int, why: str) -> list[Shed]:
        """Turns requests away until at most `most` wait: the lowest priority first, of that the latest."""
        turned_away = []
        while len(self._waiting) > most:
            worst = max(self._waiting, key=lambda item: (item.priority, item.rank, item.number))
            self._waiting.remove(worst)
            turned_away.append(Shed(worst, self._retry_s(), why))
            self._breaker.forget(worst.number)
        return turned_away

    def waits(self, number: int) -> bool:
        """Whether the request is in a queue."""
        return any(item.number == number for item in self._waiting)

    def cancel(self, number: int) -> bool:
        """Takes a waiting request out; false when it does not wait (any more)."""
        for index, item in enumerate(self._waiting):
            if item.number == number:
                del self._waiting[index]
                self._breaker.forget(number)
                return True
        return False

    def expire(self, now: float) -> list[Item]:
        """Takes out those whose deadline has passed."""
        if not self._waiting:
            return []
        late = [item for item in self._waiting if item.deadline <= now]
        for item in late:
            self.cancel(item.number)
        return late

    def take(self, now: float) -> Batch | None:
        """The next batch; None while no worker is free, nothing waits, or the batch waits for more (see
        `wake_at`).
        """
        if self.busy or not self._waiting:
            return None
        items = self._next(now)
        if not items or self._window_end(items, now) is not None:
            return None
        if len(items) == len(self._waiting):
            self._waiting.clear()
        else:
            chosen = set(map(id, items))
            self._waiting = [item for item in self._waiting if id(item) not in chosen]
        batch = Batch(tuple(items), now)
        self._running.append(batch)
        return batch

    def wake_at(self, now: float) -> float | None:
        """When `take` is to be called again though nothing happens; None: only when something does."""
        if self.busy or not self._waiting:
            return None
        items = self._next(now)
        return self._window_end(items, now) if items else now + GATE_LOOK_S

    def finished(self, batch: Batch, now: float, *, ran: bool) -> None:
        """A running batch is done; `ran`: its worker answered, so that its time means something."""
        self._running.remove(batch)
        seconds = now - batch.began
        self._note_busy(now, seconds)
        self._costs.setdefault(batch.items[0].elements.bit_length(), _Cost()).learn(
            seconds / len(batch.items)
        )
        if ran and self.policy.max_batch > 1:
            elements = max(item.elements for item in batch.items)
            self.curves.learn(elements, batch.samples, seconds, self.policy, now)
        if self.policy.breaker_s > 0:
            for item in batch.items:
                self._breaker.note(item.number, now - item.arrived, now, self.policy.breaker_s)

    def inherit(self, other: Scheduler) -> None:
        """Goes on with another's policy and what it has learned: this worker replaces that one's process."""
        self.policy, self.curves = other.policy, other.curves

    # The queue.

    def wait_s(self) -> float:
        """About how long it takes until what waits now has run, seconds; infinite while nothing is known."""
        if not self._costs:
            return math.inf if self._waiting else 0.0
        costs = {length: cost.median_s for length, cost in self._costs.items()}
        unknown_s = max(costs.values())
        total_s = sum([costs.get(item.elements.bit_length(), unknown_s) for item in self._waiting])
        return total_s / self.workers

    def _insert(self, item: Item) -> None:
        at = len(self._waiting)
        while at and self._waiting[at - 1].rank > item.rank:
            at -= 1
        self._waiting.insert(at, item)

    # Batches.

    def _next(self, now: float) -> list[Item]:
        """The head and those of its key that go with it; nothing while all that wait are held."""
        waiting = self._waiting
        if self.hold_low:
            waiting = [
                item
                for item in waiting
                if item.priority is not Priority.LOW or now - item.arrived >= LOW_HOLD_S
            ]
            if not waiting:
                return []
        head = waiting[0]
        if len(waiting) == 1 or self.policy.max_batch == 1:
            return [head]
        room = self.curves.batch_size(head.elements, self.policy)
        items, samples = [head], head.samples
        for item in waiting[1:]:
            if item.key == head.key:
                if samples + item.samples > room:
                    break
                items.append(item)
                samples += item.samples
        return items

    def _window_end(self, items: list[Item], now: float) -> float | None:
        """Until when the batch waits for more; None when it goes now."""
        policy = self.policy
        if policy.window_s <= 0:
            return None
        samples = sum(item.samples for item in items)
        room = self.curves.batch_size(items[0].elements, policy)
        if samples >= room or samples in policy.preferred:
            return None
        window_s = min(policy.window_s, self._adapted_window_s())
        pays = self.curves.pays(items[0].elements, samples, policy)
        if not pays or window_s < self._interval_s:
            return None
        expected_s = self.curves.expected_s(items[0].elements, samples)
        end = min(
            min(item.arrived for item in items) + window_s,
            min(item.deadline for item in items) - expected_s,
        )
        return end if end > now else None

    def _adapted_window_s(self) -> float:
        if self.load > BUSY_LOAD:
            return WINDOW_BUSY_S
        return WINDOW_IDLE_S - (WINDOW_IDLE_S - WINDOW_BUSY_S) * self.load / BUSY_LOAD

    # What is observed.

    def _note_arrival(self, now: float) -> None:
        if self._last_arrival is not None:
            gap_s = max(0.0, now - self._last_arrival)
            known = self._interval_s if self._interval_s != float("inf") else gap_s
            self._interval_s = 0.8 * known + 0.2 * gap_s
        self._last_arrival = now

    def _note_busy(self, now: float, busy_s: float) -> None:
        since = self._last_end if self._last_end is not None else now - busy_s
        each_s = busy_s / self.workers
        period_s = max(now - since, each_s, 1e-9)
        keep = 0.5 ** (period_s / LOAD_HALF_LIFE_S)
        self.load = keep * self.load + (1 - keep) * min(1.0, each_s / period_s)
        self._last_end = now

    def _retry_s(self) -> float:
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, self.wait_s()))
