"""What one caller may take of the control plane: requests, bytes to it and from it, deltas worked on at once.

Each caller has buckets that fill at a fixed rate up to a burst. What does not fit is refused with the time
after which it would. Bytes sent to a caller are known only when an answer is made: those of an ordinary call
are sent, and may leave a debt that the next call waits for; a download stops where the bucket is empty, and
goes on once it holds SENT_AT_ONCE_BYTES, so that whoever resumes at a block's boundary makes headway.

The table of callers is bounded: whoever called least recently goes first, with a bucket that is full by then
or nearly so. Pure but for the table; the caller brings the time.
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
        sent_per_s: bytes sent by the control plane; `sent_burst` at once after a rest.
    """

    requests_per_s: float
    requests_burst: int
    bytes_per_s: float
    bytes_burst: int
    diffs: int
    sent_per_s: float
    sent_burst: int


DEVICE = Quota(
    limits.DEVICE_REQUESTS_PER_S,
    limits.DEVICE_REQUESTS_BURST,
    limits.DEVICE_BYTES_PER_S,
    limits.DEVICE_BYTES_BURST,
    limits.DEVICE_DIFFS,
    limits.DEVICE_SENT_PER_S,
    limits.DEVICE_SENT_BURST,
)
OPERATOR = Quota(
    limits.OPERATOR_REQUESTS_PER_S,
    limits.OPERATOR_REQUESTS_BURST,
    limits.OPERATOR_BYTES_PER_S,
    limits.OPERATOR_BYTES_BURST,
    limits.OPERATOR_DIFFS,
    limits.OPERATOR_SENT_PER_S,
    limits.OPERATOR_SENT_BURST,
)
# All callers of one address together, of those who show no certificate.
ANONYMOUS = Quota(
    limits.ANONYMOUS_REQUESTS_PER_S,
    limits.ANONYMOUS_REQUESTS_BURST,
    limits.ANONYMOUS_BYTES_PER_S,
    limits.ANONYMOUS_BYTES_BURST,
    0,
    limits.ANONYMOUS_SENT_PER_S,
    limits.ANONYMOUS_SENT_BURST,
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
        wait_s = self.wait_s(count, now_s)
        if not wait_s:
            self._tokens -= count
        return wait_s

    def wait_s(self, count: float, now_s: float) -> float:
        """The seconds until `take` would give them, or the whole burst; 0 when it would now."""
        self._fill(now_s)
        return max(0.0, min(count, self._burst) - self._tokens) / self._rate

    def spend(self, count: float, now_s: float) -> None:
        """Takes them, there or not."""
        self._fill(now_s)
        self._tokens -= count

    def _fill(self, now_s: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
        self._at_s = now_s


class Usage:
    """What one caller uses now."""

    def __init__(self, name: str, quota: Quota, now_s: float) -> None:
        self._name = name
        self._quota = quota
        self._requests = Bucket(quota.requests_per_s, quota.requests_burst, now_s)
        self._bytes = Bucket(quota.bytes_per_s, quota.bytes_burst, now_s)
        self._sent = Bucket(quota.sent_per_s, quota.sent_burst, now_s)
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

    def answer(self, now_s: float, *, download: bool) -> None:
        """Before a call is answered: nothing sent before it may be owed, and a download needs a good part.

        Raises SluiceError(LIMIT_EXCEEDED).
        """
        wait_s = self._sent.wait_s(limits.SENT_AT_ONCE_BYTES if download else 0, now_s)
        if wait_s:
            raise self._over_sent(wait_s)

    def sent(self, count: int, now_s: float, *, download: bool) -> None:
        """Counts the bytes of one answer, before it is sent.

        Raises SluiceError(LIMIT_EXCEEDED) for a download that has to pause.
        """
        if not download:
            self._sent.spend(count, now_s)
        elif self._sent.take(count, now_s):
            raise self._over_sent(self._sent.wait_s(limits.SENT_AT_ONCE_BYTES, now_s))

    def _over_sent(self, wait_s: float) -> SluiceError:
        return self._over(f"more than {self._quota.sent_per_s:g} bytes a second to be sent to it", wait_s)

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
