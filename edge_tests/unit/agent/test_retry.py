from __future__ import annotations

import pytest

from agent.retry import POLICIES, Backoff, Cause, cause_of, decide, hinted, jittered, wants_full
from agent.update_limits import HINT_MOST_S
from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason


@pytest.mark.parametrize("reason", list(ErrorReason.values()))
def test_every_reason_ends_or_waits(reason: ErrorReason.ValueType) -> None:
    cause = cause_of(reason)
    policy = POLICIES[cause]
    for failures in range(1, 60):
        decision = decide(reason, failures, 0.5)
        if policy.attempts and failures >= policy.attempts:
            assert decision.final
            assert decision.wait_s == 0
        else:
            assert not decision.final
            assert 0 < decision.wait_s <= policy.most_s


def test_causes() -> None:
    assert cause_of(errors_pb2.GOLDEN_MISMATCH) is Cause.FINAL
    assert cause_of(errors_pb2.VERSION_UNKNOWN) is Cause.FINAL
    assert cause_of(errors_pb2.CONTROL_UNREACHABLE) is Cause.NETWORK
    assert cause_of(errors_pb2.DELTA_CORRUPT) is Cause.DAMAGED
    assert cause_of(errors_pb2.DELTA_WRONG_BASE) is Cause.BASE
    assert cause_of(errors_pb2.DISK_FULL) is Cause.DISK
    assert cause_of(errors_pb2.INTERNAL) is Cause.OTHER
    assert cause_of(errors_pb2.OUT_OF_MEMORY) is Cause.KILLED
    assert cause_of(errors_pb2.CASCADE_INCOMPLETE) is Cause.MEMBER


def test_network_and_disk_never_give_up() -> None:
    for reason in (errors_pb2.CONTROL_UNREACHABLE, errors_pb2.DISK_FULL):
        assert not decide(reason, 100_000, 0.99).final


def test_a_killed_load_is_tried_again_and_given_up_at_last() -> None:
    decisions = [decide(errors_pb2.OUT_OF_MEMORY, failures, 0.5) for failures in range(1, 9)]
    assert [decision.final for decision in decisions] == [False] * 7 + [True]
    assert sum(decision.wait_s for decision in decisions) > 300, "memory may come back within minutes"
    assert not any(decision.discard_partial for decision in decisions)


def test_damaged_bytes_are_fetched_again_then_in_full() -> None:
    assert decide(errors_pb2.DELTA_CORRUPT, 1, 0).discard_partial
    assert not wants_full(errors_pb2.DELTA_CORRUPT, 1)
    assert wants_full(errors_pb2.DELTA_CORRUPT, 2)
    assert wants_full(errors_pb2.DELTA_WRONG_BASE, 2)
    assert wants_full(errors_pb2.DELTA_UNSUPPORTED, 1)
    assert not wants_full(errors_pb2.CONTROL_UNREACHABLE, 9)
    assert not wants_full(None, 0)
    assert not decide(errors_pb2.CONTROL_UNREACHABLE, 1, 0).discard_partial


def test_waits_double_are_capped_and_spread() -> None:
    assert [jittered(1, 300, n, 1.0) for n in (1, 2, 3)] == pytest.approx([1, 2, 4])
    assert jittered(1, 300, 10_000, 1.0) == pytest.approx(300)
    assert jittered(1, 300, 1, 0.0) == pytest.approx(0.1)


def test_what_the_control_plane_asks_to_wait_is_waited_within_bounds() -> None:
    assert hinted(10, 0.0) == 10
    assert 10 < hinted(10, 0.99) <= 11
    assert hinted(1e9, 0.99) <= HINT_MOST_S * 1.1
    assert decide(errors_pb2.LIMIT_EXCEEDED, 1, 0.5, 30).wait_s >= 30
    assert decide(errors_pb2.LIMIT_EXCEEDED, 20, 0.5, 1).wait_s > 30  # the backoff is longer
    assert decide(errors_pb2.VERSION_UNKNOWN, 1, 0.5, 30).wait_s == 0


def test_backoff_grows_and_resets() -> None:
    backoff = Backoff(1, 64)
    waits = [backoff.next_wait_s() for _ in range(20)]
    assert waits[0] <= 1
    assert max(waits) <= 64
    assert max(waits[7:]) > 5
    backoff.reset()
    assert backoff.next_wait_s() <= 1
