"""On what a model runs: the accelerators asked for, best first, each tried before it is trusted.

In order, for each accelerator but the CPU: the tiny model must be answered right on it (probing.py), then the
file is loaded on it, with the accelerators behind it for what it lacks, and must answer one request of zeros.
Whatever fails on the way is a reason to take the next one, and is told, never swallowed.

Rules: the CPU is trusted because the runtime itself was probed on it; where the CPU is not asked for, nothing
falls back to it; a library that ends the process takes its caller with it, who then leaves that accelerator
out (agent/placement.py does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtimes import registry
from runtimes.datatypes import BYTES, to_dtype
from runtimes.detect import detect_format
from runtimes.inputs import Arrays
from runtimes.interface import CPU, LoadOptions, Model, RuntimeFailure, TensorSpec

MAX_TRIAL_BYTES = 64 << 20  # of the zeros that one trial is given


@dataclass(frozen=True)
class Placed:
    """A loaded model and where it runs.

    Attributes:
        model: the model.
        accelerator: the first that it uses.
        passed_over: why others, that were asked for first, are not used; one sentence each.
    """

    model: Model
    accelerator: str
    passed_over: tuple[str, ...] = ()


def load(path: Path, *, format: str, preferred: str, options: LoadOptions) -> Placed:  # noqa: A002
    """Loads a file on the first of `options.accelerators` that works.

    Args:
        path: the model file.
        format: what it is said to be; "" to tell from its content.
        preferred: a runtime's name; "" for any.
        options: how to run it.

    Raises:
        ModelRejected, RuntimeUnavailable: as `registry.load`, for the last accelerator tried.
    """
    wanted = options.accelerators
    passed_over: list[str] = []
    for index, accelerator in enumerate(wanted):
        rest = replace(options, accelerators=wanted[index:])
        last = index == len(wanted) - 1
        if accelerator == CPU:
            model = registry.load(path, format=format, preferred=preferred, options=rest)
            return Placed(model, CPU, tuple(passed_over))
        try:
            return Placed(_load_tried(path, format, preferred, rest), accelerator, tuple(passed_over))
        except RuntimeFailure as error:
            if last:
                raise
            passed_over.append(f"{accelerator} is not used: {error}")
    raise AssertionError("LoadOptions names at least one accelerator")


def _load_tried(path: Path, format: str, preferred: str, options: LoadOptions) -> Model:  # noqa: A002
    runtime = registry.select(format or detect_format(path), preferred)
    runtime.check_accelerator(options.accelerators[0], options.delegates)
    model = registry.load(path, format=format, preferred=preferred, options=options)
    try:
        model.run(blank(model.inputs))
    except BaseException:
        model.close()
        raise
    return model


def blank(specs: Sequence[TensorSpec]) -> Arrays:
    """Zeros, or empty byte strings, for each input; what varies is 1.

    Raises:
        RuntimeFailure: they would take over MAX_TRIAL_BYTES.
    """
    shapes = {spec.name: tuple(1 if size < 0 else size for size in spec.shape) for spec in specs}
    total = sum(math.prod(shapes[spec.name]) * to_dtype(spec.datatype).itemsize for spec in specs)
    if total > MAX_TRIAL_BYTES:
        raise RuntimeFailure(f"trying the model takes {total} bytes of zeros; at most {MAX_TRIAL_BYTES}")
    return {
        spec.name: np.full(shapes[spec.name], b"", np.object_)
        if spec.datatype == BYTES
        else np.zeros(shapes[spec.name], to_dtype(spec.datatype))
        for spec in specs
    }
