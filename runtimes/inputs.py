"""Checks that a caller's tensors fit a model, and splits batches. Pure: it sees specs and arrays, no
library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.datatypes import BF16, BYTES, bytes_elements, of_dtype, to_dtype
from runtimes.interface import InferenceFailed, InputInvalid, TensorSpec

Arrays = dict[str, NDArray[Any]]
_MOST_REMEMBERED = 64  # combinations of shapes of one model that have passed


def splits_by_sample(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether a model for one sample may be given many: the first dimension of every tensor is exactly 1."""
    return bool(inputs) and all(spec.shape[:1] == (1,) for spec in (*inputs, *outputs))


class InputCheck:
    """`check_inputs` for one model, at a glance for what passed before: the same names in the model's order,
    with the same datatypes and shapes. Safe to use from any thread.

    Args:
        specs: what the model wants.
        any_batch: see `check_inputs`.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, any_batch: bool) -> None:
        self._specs = specs
        self._any_batch = any_batch
        self._passed: dict[tuple[Any, ...], None] = {}

    def __call__(self, given: Mapping[str, NDArray[Any]]) -> Arrays:
        """The arrays as `check_inputs` gives them, or the very dictionary. Raises InputInvalid."""
        try:
            key = tuple([(name, array.dtype, array.shape) for name, array in given.items()])
            if key in self._passed and isinstance(given, dict):
                for array in given.values():
                    if not array.flags.c_contiguous:
                        break
                else:
                    return given
        except AttributeError:  # no array: refused below
            key = ()
        arrays = check_inputs(self._specs, given, any_batch=self._any_batch)
        if list(given) == list(arrays) and not any(spec.datatype == BYTES for spec in self._specs):
            while len(self._passed) >= _MOST_REMEMBERED:
                self._passed.pop(next(iter(self._passed)), None)
            self._passed[key] = None
        return arrays


def check_inputs(
    specs: Sequence[TensorSpec], given: Mapping[str, NDArray[Any]], *, any_batch: bool
) -> Arrays:
    """The arrays in the order of `specs`, contiguous, BYTES as objects of bytes.

    Args:
        specs: what the model wants.
        given: what the caller sent.
        any_batch: whether the first dimension may be any size, the same for all (see `splits_by_sample`).

    Raises:
        InputInvalid: naming the input, what was expected and what came.
    """
    wanted = ", ".join(str(spec) for spec in specs)
    names = {spec.name for spec in specs}
    for name in given:
        if name not in names:
            raise InputInvalid(
                f"the model has no input {name!r}", hint=f"its inputs are {wanted}", obj=str(name)
            )
    arrays: Arrays = {}
    for spec in specs:
        if spec.name not in given:
            raise InputInvalid(f"the input {spec.name!r} is missing", hint=f"send {wanted}", obj=spec.name)
        arrays[spec.name] = _check_input(spec, given[spec.name], any_batch)
    if any_batch:
        sizes = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise InputInvalid(
                "the inputs differ in batch size: " + ", ".join(f"{n!r} has {s}" for n, s in sizes.items()),
                hint="give every input the same first dimension",
            )
    return arrays


def run_each(arrays: Mapping[str, NDArray[Any]], infer: Callable[[Arrays], Arrays]) -> Arrays:
    """Calls `infer` for each sample along the first dimension and joins the answers along theirs.

    Raises:
        InferenceFailed: the answers to the samples do not fit together.
    """
    batch = next(iter(arrays.values())).shape[0]
    answers = [
        infer({name: array[index : index + 1] for name, array in arrays.items()}) for index in range(batch)
    ]
    try:
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    except ValueError as error:
        raise InferenceFailed(
            f"the answers to the {batch} samples of a batch have different shapes: {error}",
            hint="send the samples one by one",
        ) from error


def _check_input(spec: TensorSpec, value: NDArray[Any], any_batch: bool) -> NDArray[Any]:
    def refuse(came: str) -> InputInvalid:
        return InputInvalid(
            f"the input {spec.name!r} must be {spec.datatype} of shape {list(spec.shape)}, not {came}",
            hint="-1 stands for any size" if -1 in spec.shape else "",
            obj=spec.name,
        )

    if not isinstance(value, np.ndarray):
        raise refuse(f"a {type(value).__name__}")
    expected = to_dtype(spec.datatype)
    if spec.datatype == BYTES:
        if of_dtype(value.dtype) != BYTES:
            raise refuse(f"{of_dtype(value.dtype) or value.dtype}")
    elif value.dtype != expected:
        came = of_dtype(value.dtype) or str(value.dtype)
        raise refuse(f"{came}; send its raw bits as UINT16" if spec.datatype == BF16 else came)
    if value.ndim != len(spec.shape):
        raise refuse(f"rank {value.ndim}, shape {list(value.shape)}")
    for axis, (size, allowed) in enumerate(zip(value.shape, spec.shape)):
        varies = allowed == -1 or (axis == 0 and any_batch)
        if not varies and size != allowed:
            raise refuse(f"shape {list(value.shape)}")
        if axis == 0 and size == 0:
            raise refuse(f"shape {list(value.shape)}, which holds no sample")
    return bytes_elements(value) if spec.datatype == BYTES else np.asarray(value, order="C")
