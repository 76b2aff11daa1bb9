"""Whether a model answers a sample the same, alone or in a batch: tried before its requests are put together.

Shapes cannot tell: a model may normalise over the batch, or mix its samples. So two samples are run alone and
in batches of two, in both orders, and every part must resemble the answer that the sample got alone: cosine
similarity of at least BATCH_COSINE_MIN, or what the model's options say, for each output. Small differences
are allowed because the order of summation and dynamic quantisation move with the batch; a model that must not
move at all forbids batches in its options.

The samples are taken from the golden inputs where there are any (text models want valid tokens), else made
up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.golden import Arrays, blank_inputs, compare
from agent.limits import BATCH_COSINE_MIN
from agent.worker import Worker
from runtimes.datatypes import BYTES
from updater.errors import SluiceError


def batches_are_safe(
    worker: Worker,
    golden: Mapping[str, NDArray[Any]] | None,
    timeout_s: float,
    cosine_min: float = BATCH_COSINE_MIN,
) -> str:
    """Tries it.

    Args:
        worker: with the model loaded; its `takes_batches` holds.
        golden: the golden inputs in the model's datatypes, if there are any.
        timeout_s: for each of the four inferences, seconds.
        cosine_min: see above.

    Returns:
        Why batches are not safe; empty if they are.
    """
    first = _first_sample(worker, golden)
    second = {name: _other(array) for name, array in first.items()}
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    swapped = {name: np.concatenate([second[name], first[name]]) for name in first}
    try:
        alone = [worker.infer(sample, timeout_s) for sample in (first, second)]
        for inputs, expected in ((both, alone), (swapped, alone[::-1])):
            found = worker.infer(inputs, timeout_s)
            for place, answer in enumerate(expected):
                for name, array in answer.items():
                    part = found[name][place : place + 1] if found[name].ndim else found[name]
                    result = compare(name, part, array, cosine_min, None)
                    if not result.passed:
                        return f"in a batch its answers differ from those alone: {result}"
    except SluiceError as error:
        return f"it fails on a batch: {error.message}"
    return ""


def _first_sample(worker: Worker, golden: Mapping[str, NDArray[Any]] | None) -> Arrays:
    if golden is not None:
        return {name: array[:1] for name, array in golden.items()}
    rng = np.random.default_rng(0)
    made = blank_inputs(worker.inputs, 1)
    for spec in worker.inputs:
        array = made[spec.name]
        if spec.datatype != BYTES and array.dtype.kind == "f":
            made[spec.name] = rng.standard_normal(array.shape).astype(array.dtype)
    return made


def _other(array: NDArray[Any]) -> NDArray[Any]:
    """Another sample whose values are as valid: the same elements in reverse; numbers a little larger."""
    flipped = array.reshape(1, -1)[:, ::-1].reshape(array.shape)
    return flipped * array.dtype.type(1.25) if array.dtype.kind == "f" else flipped
