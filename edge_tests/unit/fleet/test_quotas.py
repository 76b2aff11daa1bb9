"""What one caller may take: buckets, plans at once, a bounded table. Time is the test's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.limits import FETCH_BYTES, LEAST_COUNTED_BYTES, SENT_AT_ONCE_BYTES
from fleet.quotas import ANONYMOUS, DEVICE, OPERATOR, Bucket, Quota, Quotas, Usages
from updater.errors import SluiceError
from updater.identity import Identity, Kind
from updater.limits import BLOCK_OVERHEAD_BYTES, MAX_BLOCK_BYTES, MAX_FILE_BYTES

SMALL = Quota(
    requests_per_s=2,
    requests_burst=3,
    bytes_per_s=1000,
    bytes_burst=5000,
    diffs=1,
    sent_per_s=100,
    sent_burst=1000,
)
BOX = Identity("test", Kind.DEVICE, "box-1")


def refused(call: object) -> SluiceError:
    with pytest.raises(SluiceError) as caught:
        call()  # type: ignore[operator]
    assert caught.value.code == "LIMIT_EXCEEDED"
    assert caught.value.retry_s > 0
    assert "try again in" in caught.value.hint
    return caught.value


def test_calls_come_back_at_their_rate() -> None:
    usage = Usages(Quotas(device=SMALL)).usage(BOX, "", 0)
    for _ in range(3):
        usage.request(0)
    error = refused(lambda: usage.request(0))
    assert "device box-1 asks for more than 2 calls a second" in error.message
    assert error.retry_s == pytest.approx(0.5)
    usage.request(0.5)
    refused(lambda: usage.request(0.6))
    for _ in range(3):
        usage.request(100)
    refused(lambda: usage.request(100))


def test_bytes_count_and_small_messages_count_for_something() -> None:
    usage = Usages(Quotas(device=SMALL)).usage(BOX, "", 0)
    usage.received(4000, 0)
    assert refused(lambda: usage.received(2000, 0)).retry_s == pytest.approx(1)
    for _ in range(1000 // LEAST_COUNTED_BYTES):
        usage.received(1, 0)
    refused(lambda: usage.received(LEAST_COUNTED_BYTES, 0))
    # More than a bucket holds is let through when it is full, and paid for afterwards.
    usage.received(9000, 100)
    assert refused(lambda: usage.received(1000, 100)).retry_s == pytest.approx(5)


def test_plans_at_once_are_counted_while_they_run() -> None:
    usage = Usages(Quotas(device=SMALL)).usage(BOX, "", 0)
    with usage.diff():
        refused(lambda: usage.diff().__enter__())
    with pytest.raises(ValueError, match="x"), usage.diff():
        raise ValueError("x")
    with usage.diff():
        pass


def test_what_is_sent_is_owed_and_a_download_goes_on_with_a_good_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fleet.limits.SENT_AT_ONCE_BYTES", 500)
    usage = Usages(Quotas(device=SMALL)).usage(BOX, "", 0)
    usage.answer(0, download=True)
    for _ in range(4):
        usage.sent(250, 0, download=True)
    error = refused(lambda: usage.sent(250, 0, download=True))
    assert "100 bytes a second to be sent" in error.message
    assert error.retry_s == pytest.approx(5)  # not 2.5 s: what is left would not be worth a call
    usage.answer(0, download=False)  # nothing is owed
    assert refused(lambda: usage.answer(2, download=True)).retry_s == pytest.approx(3)
    usage.answer(5, download=True)
    # An ordinary answer is always sent; the next call waits until it is paid for.
    usage.sent(700, 5, download=False)
    assert refused(lambda: usage.answer(5, download=False)).retry_s == pytest.approx(2)
    usage.answer(7, download=False)
    # A bucket smaller than the good part gives all that it has.
    monkeypatch.setattr("fleet.limits.SENT_AT_ONCE_BYTES", 1 << 20)
    assert refused(lambda: usage.answer(7, download=True)).retry_s == pytest.approx(10)
    usage.answer(17, download=True)


def test_a_block_of_a_delta_fits_into_what_a_download_goes_on_with() -> None:
    for quota in (DEVICE, OPERATOR):
        least = min(SENT_AT_ONCE_BYTES, quota.sent_burst)
        assert least > MAX_BLOCK_BYTES + BLOCK_OVERHEAD_BYTES + FETCH_BYTES
    assert DEVICE.sent_burst >= 2 * MAX_FILE_BYTES


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 4)), max_size=60))
def test_a_bucket_never_gives_more_than_its_rate_and_burst(steps: list[tuple[float, float]]) -> None:
    bucket, now, given_ = Bucket(2.0, 5.0, 0.0), 0.0, 0.0
    for pause, count in steps:
        now += pause
        wait = bucket.take(count, now)
        if wait == 0:
            given_ += count
        else:
            assert bucket.take(count, now + wait + 1e-6) == 0
            now += wait + 1e-6
            given_ += count
        assert given_ <= 5 + 2 * now + 1e-3


def test_kinds_of_callers_are_apart_and_the_table_is_bounded() -> None:
    quotas = Quotas()
    assert (quotas.of(None), quotas.of(BOX)) == (ANONYMOUS, DEVICE)
    ann = Identity("test", Kind.OPERATOR, "ann")
    assert quotas.of(ann) == OPERATOR
    callers = Usages(quotas, most=3)
    first = callers.usage(BOX, "10.0.0.1", 0)
    assert callers.usage(BOX, "10.0.0.2", 0) is first  # by identity, wherever it calls from
    assert callers.usage(None, "10.0.0.1", 0) is callers.usage(None, "10.0.0.1", 0)
    assert callers.usage(Identity("test", Kind.OPERATOR, "box-1"), "", 0) is not first
    for number in range(5):
        callers.usage(Identity("test", Kind.DEVICE, f"d{number}"), "", 0)
    assert callers.usage(BOX, "", 0) is not first
