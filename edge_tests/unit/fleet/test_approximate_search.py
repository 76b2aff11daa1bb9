"""The search for an amount within a budget, over codecs that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.approximate_search import CLOSE, MAX_TRIES, Search, Trial
from sluice.api.v1 import errors_pb2
from updater.approximate import EXACT, ROUNDINGS, LayerFigures, Rounding, Tally
from updater.errors import SluiceError

MOST = 100_000
Size = Callable[[int, Rounding], int]


def search(size: Size, budget: int, *, loss: Callable[[Rounding], float] = lambda _: 0.0) -> Search:
    """A search over the given sizes; what is explained grows with the amount, less a rounding's loss."""

    def kept(amount: int, rounding: Rounding) -> float:
        return (amount / MOST) ** 0.5 - (loss(rounding) if amount else 0.0)

    def attempt(amount: int, rounding: Rounding) -> Trial:
        assert 0 <= amount <= MOST
        figures = LayerFigures("w", "float32", 10, 1, 0.0, 1.0, kept(amount, rounding), 0.0, 1.0)
        return Trial(amount, rounding, size(amount, rounding), Tally((figures,)))

    return Search(MOST, MOST // 100, budget, attempt, kept)


@given(
    st.integers(0, 5000),
    st.floats(0.01, 40),
    st.floats(0.4, 1.6),
    st.integers(100, 2_000_000),
)
@settings(max_examples=200, deadline=None)
def test_the_budget_is_met_and_used(floor: int, rate: float, bend: float, budget: int) -> None:
    """Sizes that grow evenly, ever faster or ever slower."""

    def size(amount: int, rounding: Rounding) -> int:
        return floor + int(rate * MOST * (amount / MOST) ** bend) + (1 if rounding is EXACT else 0)

    found = search(size, budget)
    least = size(1, EXACT)
    if budget <= least:
        return
    best = found.run()
    assert best.delta_size <= budget
    assert len(found.trials) <= 1 + len(ROUNDINGS) + MAX_TRIES * len(ROUNDINGS)
    if budget < size(MOST, EXACT) and size(best.amount + 1, EXACT) - floor < 0.01 * budget:
        assert best.delta_size >= 0.75 * CLOSE * budget
    if budget >= size(MOST, EXACT):
        assert best.amount >= 0.75 * MOST


def test_a_rounding_that_codes_smaller_is_taken_when_it_costs_little() -> None:
    def size(amount: int, rounding: Rounding) -> int:
        return 100 + amount * (20 if rounding.bits is None else rounding.bits)

    best = search(size, 50_000, loss=lambda rounding: 0.001 if rounding.bits != 4 else 0.5).run()
    assert best.rounding.bits == 6


def test_exact_values_are_kept_when_nothing_codes_smaller() -> None:
    found = search(lambda amount, _: 100 + amount, 5000, loss=lambda rounding: 0.0)
    assert found.run().rounding is EXACT
    assert {trial.rounding.bits for trial in found.trials} == {None, 8}


def test_the_offsets_that_suit_the_codec_are_kept() -> None:
    def size(amount: int, rounding: Rounding) -> int:
        suits = (rounding.up, rounding.down) == (1, 1)
        return 100 + amount * (rounding.bits or 20) // (2 if suits else 1)

    best = search(size, 50_000).run()
    assert (best.rounding.up, best.rounding.down) == (1, 1)


def test_a_budget_below_what_stays_exact_says_so() -> None:
    with pytest.raises(SluiceError) as error:
        search(lambda amount, _: 1000 + amount, 900).run()
    assert error.value.reason == errors_pb2.LIMIT_EXCEEDED
    assert "takes 1000 bytes alone" in error.value.message


def test_a_step_that_no_budget_can_cross_says_what_was_least() -> None:
    found = search(lambda amount, _: 5000 if amount else 10, 900)
    with pytest.raises(SluiceError) as error:
        found.run()
    assert error.value.reason == errors_pb2.LIMIT_EXCEEDED
    assert "takes 5000 bytes" in error.value.message


def test_what_is_worse_than_no_update_is_never_taken() -> None:
    found = search(lambda amount, _: amount, 50_000, loss=lambda _: 2.0)
    with pytest.raises(SluiceError) as error:
        found.run()
    assert error.value.reason == errors_pb2.LIMIT_EXCEEDED


def test_a_model_that_cannot_be_rounded_is_measured_once_an_amount() -> None:
    found = search(lambda amount, _: 100 + amount, 5000)
    found.roundings = (EXACT,)
    assert 0.97 * 5000 <= found.run().delta_size <= 5000
    assert {trial.rounding for trial in found.trials} == {EXACT}
    amounts = [trial.amount for trial in found.trials]
    assert len(amounts) == len(set(amounts))
