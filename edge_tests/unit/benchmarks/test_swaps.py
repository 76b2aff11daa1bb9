from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.swaps import KILL_EVERY_S, Killed, Swapped, sound, tables

SWAPPED = Swapped(
    swaps=1000,
    requests=4000,
    failed=0,
    wrong=0,
    versions={1: 2001, 2: 1999},
    inside=[0.001] * 98 + [0.003, 0.004],
    outside=[0.001] * 98 + [0.002, 0.003],
    changes=[0.5, 0.7, 0.6],
    memory=(100_000_000, 104_000_000),
    descriptors=(22, 22),
)
KILLED = Killed(
    kills=200,
    requests=4000,
    failed=3,
    wrong=0,
    late=0,
    strange=0,
    back=[0.4, 0.5],
    same_agent=True,
    errors=["m0 UNAVAILABLE …"] * 3,
)


def test_figures_stand_beside_what_is_wanted() -> None:
    text = "".join(table.markdown() for table in tables(SWAPPED, KILLED))
    for part in ("4,000, 0, 0", "2,001 and 1,999", "1.040 times", "0.60, 0.70", "0.45, 0.50", "| yes |"):
        assert part in text


@pytest.mark.parametrize("wrong", [{"failed": 1}, {"wrong": 1}, {"memory": (100, 106)}])
def test_swaps_that_callers_notice_are_a_failure(wrong: dict[str, object]) -> None:
    assert sound(SWAPPED, None)
    assert not sound(replace(SWAPPED, **wrong), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"strange": 1}, {"late": 1}, {"wrong": 1}, {"same_agent": False}, {"back": [0.4, 5.1]}]
)
def test_kills_that_others_notice_are_a_failure(wrong: dict[str, object]) -> None:
    assert sound(None, KILLED)
    assert not sound(None, replace(KILLED, **wrong))  # type: ignore[arg-type]


def test_kills_of_one_model_are_no_crash_loop() -> None:
    assert KILL_EVERY_S > 30  # three in 60 s would be one
