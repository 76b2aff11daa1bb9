"""How much a worker process may hold: the decision by its figures."""

from __future__ import annotations

from agent.growth import fits_beside, limit, outgrown
from agent.limits import GROWTH_BYTES, GROWTH_FACTOR, GROWTH_LEAST, RENEWAL_RESERVE_BYTES

MB = 1 << 20
GB = 1 << 30


def test_what_was_asked_for_holds() -> None:
    assert limit(300 * MB, 90 * MB, 4 * GB, 2) == 300 * MB
    assert limit(1, 90 * MB, 4 * GB, 2) == 1


def test_by_default_it_may_grow_well_beyond_what_it_held() -> None:
    assert limit(0, 100 * MB, 64 * GB, 1) == GROWTH_FACTOR * 100 * MB + GROWTH_BYTES


def test_never_more_than_a_share_of_the_box_for_all_processes_together() -> None:
    assert limit(0, 100 * MB, GB, 1) == int(0.8 * GB)
    assert 4 * limit(0, 50 * MB, GB, 4) <= 0.8 * GB


def test_a_model_that_fills_the_box_may_keep_what_it_needs() -> None:
    assert limit(0, 900 * MB, GB, 1) == int((1 + GROWTH_LEAST) * 900 * MB)


def test_the_largest_process_goes_first() -> None:
    assert outgrown([50, 90, 70], 60) == 1
    assert outgrown([50, 60, 0], 60) is None
    assert outgrown([50, 90], 0) is None  # not looked at


def test_two_fit_only_beside_a_reserve() -> None:
    assert fits_beside(90 * MB, 90 * MB + RENEWAL_RESERVE_BYTES)
    assert not fits_beside(90 * MB, 90 * MB + RENEWAL_RESERVE_BYTES - 1)
