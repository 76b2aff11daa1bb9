"""What one caller may take of the control plane: requests, bytes, deltas worked on at once.

Each caller has two buckets that fill at a fixed rate up to a burst. What does not fit is refused with the
time after which it would. The table of callers is bounded: whoever called least recently goes first, with a
bucket that is full by then or nearly so. Pure but for the table; the caller brings the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fleet import limits
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.identity import Identity, Kind


@dataclass(frozen=True)
class Quota:
    """Limits of one caller.

    Attributes:
        requests_per_s: calls; `requests_burst` of them at once after a rest.
        bytes_per_s: of what is sent to the control plane; `bytes_burst` at once after a rest.
        diffs: calls at once that may have deltas computed.
    """

    requests_per_s: float
    requests_burst: int
    bytes_per_s: float
    bytes_burst: int
    diffs: int


DEVICE = Quota(
    limits.DEVICE_REQUESTS_PER_S,
    limits.DEVICE_REQUESTS_BURST,
    limits.DEVICE_BYTES_PER_S,
    limits.DEVICE_BYTES_BURST,
    limits.DEVICE_DIFFS,
)
OPERATOR = Quota(
    limits.OPERATOR_REQUESTS_PER_S,
    limits.OPERATOR_REQUESTS_BURST,
    limits.OPERATOR_BYTES_PER_S,
    limits.OPERATOR_BYTES_BURST,
    limits.OPERATOR_DIFFS,
)
# All callers of one address together, of those who show no certificate.
ANONYMOUS = Quota(
    limits.ANONYMOUS_REQUESTS_PER_S,
    limits.ANONYMOUS_REQUESTS_BURST,
    limits.ANONYMOUS_BYTES_PER_S,
    limits.ANONYMOUS_BYTES_BURST,
    0,
)


@dataclass(frozen=True)
class Quotas:
    """The quota of each kind of caller."""

    device: Quota = DEVICE
    operator: Quota = OPERATOR
    anonymous: Quota = ANONYMOUS

    def of(self, identity: Identity | None) -> Quota:
        """The quota of one caller."""
        if identity is None:
            return self.anonymous
        return self.operator if identity.kind is Kind.OPERATOR else self.device


class Bucket:
    """Tokens that come back at a rate, up to a burst. It begins full."""

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at_s = now_s

    def take(self, count: float, now_s: float) -> float:
        """0 when `count` tokens were there and are taken; else the seconds until they will be.

        More than the burst is let through when the bucket is full, and leaves a debt.
        """
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        missing = min(count, self._burst) - self._tokens
        if missing > 0:
            return missing / self._rate
        self._tokens -= count
        return 0.0


class Usage:
    """What one caller uses now."""

    def __init__(self, name: str, quota: Quota, now_s: float) -> None:
        self._name = name
        self._quota = quota
        self._requests = Bucket(quota.requests_per_s, quota.requests_burst, now_s)
        self._bytes = Bucket(quota.bytes_per_s, quota.bytes_burst, now_s)
        self._diffs = 0

    def request(self, now_s: float) -> None:
        """Counts one call. Raises SluiceError(LIMIT_EXCEEDED)."""
        wait_s = self._requests.take(1, now_s)
        if wait_s:
            quota = self._quota
            raise self._over(f"more than {quota.requests_per_s:g} calls a second", wait_s)

    def received(self, count: int, now_s: float) -> None:
        """Counts the bytes of one message. Raises SluiceError(LIMIT_EXCEEDED)."""
        wait_s = self._bytes.take(max(count, limits.LEAST_COUNTED_BYTES), now_s)
        if wait_s:
            raise self._over(f"more than {self._quota.bytes_per_s:g} bytes a second", wait_s)

    @contextmanager
    def diff(self) -> Iterator[None]:
        """Counts a call that may have deltas computed, while it runs. Raises SluiceError(LIMIT_EXCEEDED)."""
        if self._diffs >= self._quota.diffs:
            raise self._over(f"more than {self._quota.diffs} plans at once", limits.DIFF_RETRY_S)
        self._diffs += 1
        try:
            yield
        finally:
            self._diffs -= 1

    def _over(self, what: str, wait_s: float) -> SluiceError:
        return SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"{self._name} asks for {what}",
            hint=f"try again in {wait_s:.1f} s",
            obj=self._name,
            retry_s=wait_s,
        )


class Usages:
    """The usage of every caller, at most MAX_CALLERS of them."""

    def __init__(self, quotas: Quotas, most: int = limits.MAX_CALLERS) -> None:
        self._quotas = quotas
        self._most = most
        self._usages: OrderedDict[str, Usage] = OrderedDict()

    def usage(self, identity: Identity | None, address: str, now_s: float) -> Usage:
        """One caller's usage.

        Args:
            identity: None without a certificate; then callers of one address share theirs.
            address: of the caller.
            now_s: the time.
        """
        # An operator has one quota, whichever certificate is shown.
        name = f"{identity.kind.value} {identity.name}" if identity is not None else address
        usage = self._usages.get(name)
        if usage is None:
            usage = self._usages[name] = Usage(name, self._quotas.of(identity), now_s)
            if len(self._usages) > self._most:
                self._usages.popitem(last=False)
        else:
            self._usages.move_to_end(name)
        return usage
