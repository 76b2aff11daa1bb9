"""Scores, batches taken apart and put together, and declarations that cannot work; nothing runs here."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent import options
from agent.cascade import (
    LOGITS,
    MAX_CASCADE_STEPS,
    PROBABILITIES,
    Cascade,
    Member,
    check,
    merged,
    rows_of,
    score,
    unsure,
)
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

LARGE = Cascade("large")
CHANCES = replace(LARGE, scores=PROBABILITIES)


def test_the_score_is_the_weighted_sum_of_confidence_and_certainty() -> None:
    p = np.array([0.7, 0.2, 0.1])
    entropy = -sum(x * math.log(x) for x in p) / math.log(3)
    expected = 0.6 * 0.7 + 0.4 * (1 - entropy)
    assert score(CHANCES, p[None], 1) == pytest.approx(expected)
    assert score(LARGE, np.log(p)[None] + 5, 1) == pytest.approx(expected)
    other = replace(CHANCES, confidence_weight=1.0, entropy_weight=0.25)
    assert score(other, p[None], 1) == pytest.approx(0.7 + 0.25 * (1 - entropy))


def test_certain_and_clueless() -> None:
    values = np.array([[1, 0, 0, 0], [0.25] * 4, [0, 0, 1, 0]], np.float32)
    assert score(CHANCES, values, 3) == pytest.approx([1, 0.15, 1])
    assert unsure(CHANCES, values, 3).tolist() == [False, True, False]
    assert unsure(replace(CHANCES, threshold=0.1), values, 3).tolist() == [False] * 3
    assert unsure(replace(CHANCES, threshold=0.0), values * np.nan, 3).tolist() == [False] * 3


def test_one_class_counts_as_two() -> None:
    assert score(CHANCES, np.array([[1.0], [0.0], [0.5]]), 3) == pytest.approx([1, 1, 0.3])
    assert score(CHANCES, np.array([1.0, 0.5]), 2) == pytest.approx([1, 0.3])
    assert score(LARGE, np.array([[50.0], [-50.0], [0.0]]), 3) == pytest.approx([1, 1, 0.3])


def test_a_model_without_batches_and_one_with_positions() -> None:
    assert score(CHANCES, np.array([0.5, 0.5]), 1) == pytest.approx([0.3])
    tokens = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [1.0, 0.0]]])
    assert score(CHANCES, tokens, 2) == pytest.approx([0.3, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_probability_is_handed_on(bad: float) -> None:
    values = np.array([[1.0, 0.0], [bad, 0.0]])
    assert score(CHANCES, values, 2).tolist() == [1.0, 0.0]
    if bad != -np.inf:  # a logit of -inf is a probability of 0
        assert score(LARGE, values, 2)[1] == 0


def test_logits_said_to_be_probabilities_are_handed_on() -> None:
    assert score(CHANCES, np.array([[4.0, -2.0]]), 1).tolist() == [0.0]
    assert score(CHANCES, np.array([[0.5, 0.2]]), 1).tolist() == [0.0]
    assert score(CHANCES, np.array([[0.51, 0.51]]), 1)[0] > 0, "half precision may miss 1 by a little"


def test_outputs_without_the_samples() -> None:
    assert score(LARGE, np.zeros((0, 3)), 2).tolist() == [0, 0]
    assert score(LARGE, np.zeros((1, 5)), 3).tolist() == [0, 0, 0]


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=5),
        elements=st.floats(allow_nan=True, allow_infinity=True, width=16),
    ),
    st.sampled_from([LOGITS, PROBABILITIES]),
)
def test_scores_lie_between_nought_and_one(values: np.ndarray, kind: str) -> None:
    found = score(replace(LARGE, scores=kind), values, len(values))
    assert found.shape == (len(values),)
    assert (found >= -1e-9).all()
    assert (found <= 1 + 1e-9 + 0.6 * 0.05).all()


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_every_sample_is_answered_by_one_model(marks: list[bool]) -> None:
    which = np.array(marks)
    x = np.arange(len(marks) * 2, dtype=np.float32).reshape(-1, 2)
    own = {"y": x, "z": x[:, :1]}
    if not which.any():
        return
    chosen = rows_of({"x": x, "w": x}, ["x"], which)
    assert list(chosen) == ["x"]
    assert chosen["x"].tolist() == x[which].tolist()
    assert chosen["x"].flags.c_contiguous
    answered = {"y": -chosen["x"] - 1, "z": -chosen["x"][:, :1] - 1, "more": chosen["x"]}
    both = merged(own, answered, which)
    assert both is not None
    assert set(both) == {"y", "z"}
    np.testing.assert_array_equal(both["y"], np.where(which[:, None], -x - 1, x))
    assert own["y"].min() >= 0, "the small model's own answer is not written to: a cache may hold it"


def test_answers_of_another_shape_are_not_merged() -> None:
    own, which = {"y": np.zeros((3, 2), np.float32)}, np.array([True, False, True])
    for answer in (np.zeros((2, 3), np.float32), np.zeros((1, 2), np.float32), np.zeros((2, 2))):
        assert merged(own, {"y": answer}, which) is None
    assert merged(own, {"y": np.ones((3, 7))}, np.array([True] * 3)) is not None


# Declarations.


def member(model: str, to: str = "", version: int = 1, **changes: object) -> Member:
    made = Member(
        model,
        version,
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("y", "FP32", (-1, 4))],
        Cascade(to) if to else None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def checked(first: Member, *others: Member) -> SluiceError | None:
    def find(model: str, version: str) -> Member | None:
        for other in others:
            if other.model == model and version in ("", str(other.version)):
                return other
        return None

    try:
        check(first, find)
    except SluiceError as error:
        return error
    return None


def test_chains_that_work() -> None:
    assert checked(member("a")) is None
    assert checked(member("a", "b"), member("b")) is None
    assert checked(member("a", "b@3"), member("b", version=3)) is None
    assert checked(member("a", "b"), member("b", "c"), member("c")) is None
    assert checked(member("a", "a@1", version=2), member("a")) is None


@pytest.mark.parametrize(
    ("first", "others", "says"),
    [
        (member("a", "a"), [member("a", "a")], "a circle: a → a"),
        (member("a", "a@2", version=2), [member("a", version=2)], "a circle: a → a@2"),
        (member("a", "b"), [member("b", "a")], "a circle: a → b → a"),
        (member("a", "b"), [member("b", "c"), member("c", "b")], "a circle: a → b → c → b"),
        (member("a", "b"), [member("b", "a@1"), member("a")], "a circle: a → b → a@1"),
        (member("a", "Not A Name"), [], "is 'Not A Name', not a model's name"),
        (member("a", "b@x"), [member("b")], "is 'b@x', not a model's name"),
    ],
)
def test_circles_and_names(first: Member, others: list[Member], says: str) -> None:
    error = checked(first, *others)
    assert error is not None
    assert error.reason == errors_pb2.CASCADE_INVALID
    assert says in error.message


def test_a_model_that_is_not_there_may_still_come() -> None:
    for first, others in (
        (member("a", "b"), ()),
        (member("a", "b@4"), (member("b"),)),
        (member("a", "b"), (member("b", "c"),)),
    ):
        error = checked(first, *others)
        assert error is not None
        assert error.reason == errors_pb2.CASCADE_INCOMPLETE
        assert "does not serve" in error.message


def test_a_chain_without_end() -> None:
    names = [f"m{index}" for index in range(MAX_CASCADE_STEPS + 2)]
    others = [member(name, to) for name, to in pairwise(names)]
    error = checked(others[0], *others)
    assert error is not None
    assert f"over {MAX_CASCADE_STEPS} models" in error.message
    assert checked(others[0], *others[: MAX_CASCADE_STEPS - 1], member(names[MAX_CASCADE_STEPS - 1])) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": [TensorSpec("x", "FP32", (-1, 9))]}, "the input 'x' FP32[-1, 9] of b@1 does not fit"),
        ({"inputs": [TensorSpec("x", "FP16", (-1, 8))]}, "does not fit 'x' FP32[-1, 8]"),
        ({"inputs": [TensorSpec("x", "FP32", (8,))]}, "does not fit"),
        ({"inputs": [TensorSpec("z", "FP32", (-1, 8))]}, "b@1 has the input 'z' FP32[-1, 8], and"),
        ({"outputs": [TensorSpec("y", "FP32", (-1, 5))]}, "the output 'y' FP32[-1, 4] of a@1 does not fit"),
        ({"outputs": []}, "a@1 has the output 'y' FP32[-1, 4], and b@1 has only"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, object], says: str) -> None:
    error = checked(member("a", "b"), member("b", **changes))
    assert error is not None
    assert error.reason == errors_pb2.CASCADE_INVALID
    assert says in error.message


def test_what_varies_may_fit_and_the_larger_model_may_have_more() -> None:
    more = [TensorSpec("more", "INT64", (-1,)), TensorSpec("y", "FP32", (-1, -1))]
    loose = member("b", outputs=more, inputs=[TensorSpec("x", "FP32", (-1, -1))])
    assert checked(member("a", "b"), loose) is None
    inputs = [TensorSpec("x", "FP32", (-1, 8)), TensorSpec("mask", "INT64", (-1, 8))]
    assert checked(member("a", "b", inputs=inputs), member("b")) is None


def test_no_output_to_score() -> None:
    codes = [TensorSpec("y", "INT64", (-1,))]
    error = checked(member("a", "b", outputs=codes), member("b", outputs=codes))
    assert error is not None
    assert "no output to score" in error.message
    named = member("a", cascade=Cascade("b", output="z"))
    error = checked(named, member("b"))
    assert error is not None
    assert "'z' of FP32" in error.message


# Options.


def test_options_of_a_cascade() -> None:
    found = options.read({"cascade_to": "large"}, 1)
    assert (found.cascade, found.faults) == (LARGE, ())
    given = {
        "cascade_to": "large@3",
        "cascade_threshold": "0.85",
        "cascade_weights": "1, 0",
        "cascade_output": "scores",
        "cascade_scores": "probabilities",
    }
    expected = Cascade("large@3", 0.85, 1.0, 0.0, "scores", PROBABILITIES)
    assert options.read(given, 1).cascade == expected
    assert expected.target == ("large", "3")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cascade_threshold", "1.1"),
        ("cascade_threshold", "-0.5"),
        ("cascade_threshold", "nan"),
        ("cascade_weights", "0.6"),
        ("cascade_weights", "0.6,0.4,0.1"),
        ("cascade_scores", "odds"),
    ],
)
def test_options_that_are_not_understood(name: str, text: str) -> None:
    found = options.read({"cascade_to": "large", name: text}, 1)
    assert found.cascade == LARGE
    (fault,) = found.faults
    assert f"option {name} is {text!r}" in fault
    (idle,) = options.read({"cascade_threshold": "0.5"}, 1).faults
    assert "no effect without cascade_to" in idle
