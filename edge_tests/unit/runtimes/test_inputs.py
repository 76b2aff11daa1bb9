"""Checks of a caller's tensors, without a library."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes.inputs import check_inputs, run_each, splits_by_sample
from runtimes.interface import InferenceFailed, InputInvalid, TensorSpec

ONE = TensorSpec("a", "FP32", (1, 2))
VARIES = TensorSpec("b", "FP32", (-1, 2))
SCALAR = TensorSpec("c", "FP32", ())


@pytest.mark.parametrize(
    ("inputs", "outputs", "splits"),
    [
        ([ONE], [ONE], True),
        ([ONE, ONE], [ONE], True),
        ([VARIES], [VARIES], False),
        ([ONE], [VARIES], False),
        ([ONE, SCALAR], [ONE], False),
        ([ONE], [SCALAR], False),
        ([], [ONE], False),
        ([TensorSpec("a", "FP32", (4, 2))], [TensorSpec("a", "FP32", (4, 2))], False),
    ],
)
def test_which_models_are_for_one_sample(inputs, outputs, splits):
    assert splits_by_sample(inputs, outputs) is splits


def test_arrays_come_in_the_models_order_and_contiguous():
    given = {"b": np.ones((4, 2), np.float32)[::2], "a": np.ones((1, 2), np.float32)}
    arrays = check_inputs([ONE, VARIES], given, any_batch=False)
    assert list(arrays) == ["a", "b"]
    assert arrays["b"].flags.c_contiguous


def test_a_scalar_stays_one():
    assert check_inputs([SCALAR], {"c": np.array(1, np.float32)}, any_batch=False)["c"].shape == ()
    with pytest.raises(InputInvalid, match=r"\[\], not rank 1"):
        check_inputs([SCALAR], {"c": np.ones(1, np.float32)}, any_batch=False)


def test_bf16_is_sent_as_raw_bits():
    spec = TensorSpec("a", "BF16", (1,))
    assert check_inputs([spec], {"a": np.zeros(1, np.uint16)}, any_batch=False)["a"].dtype == np.uint16
    with pytest.raises(InputInvalid, match="FP32; send its raw bits as UINT16"):
        check_inputs([spec], {"a": np.zeros(1, np.float32)}, any_batch=False)


def test_errors_carry_the_input():
    with pytest.raises(InputInvalid) as caught:
        check_inputs([ONE], {"a": np.ones((1, 3), np.float32)}, any_batch=True)
    assert caught.value.obj == "a"
    assert str(caught.value) == "the input 'a' must be FP32 of shape [1, 2], not shape [1, 3]"


def test_answers_that_do_not_join_are_an_error():
    lengths = iter([1, 2])

    def ragged(_sample):
        return {"y": np.zeros((1, next(lengths)))}

    with pytest.raises(InferenceFailed, match="2 samples"):
        run_each({"a": np.ones((2, 2))}, ragged)
