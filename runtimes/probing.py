"""The real inference that every runtime must get right before it is trusted.

The model is y = x W + b with W = [[1, 2], [3, 4]] and b = [0.5, -0.5], a few hundred bytes in each
format, in files that ship with the package (`edge_tests/harness/fixtures.py` writes them). An accelerator
without code for this chip, a library built for another NumPy and a wrong build all fail here; being
importable proves nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtimes.detect import ONNX, TFLITE
from runtimes.interface import Model, RuntimeFailure, RuntimeUnavailable

_DIRECTORY = Path(__file__).resolve().parent / "probe"
MODELS = {ONNX: _DIRECTORY / "affine.onnx", TFLITE: _DIRECTORY / "affine.tflite"}

_INPUT = np.array([[1.0, 2.0]], np.float32)
_EXPECTED = np.array([[7.5, 9.5]], np.float32)
_TOLERANCE = 0.05  # absolute; accelerators may compute in half precision, whose step here is 0.008


def check(model: Model) -> None:
    """Runs the tiny model once.

    Raises:
        RuntimeUnavailable: the inference failed or its answer is wrong.
    """
    try:
        answer = model.run({"x": _INPUT})["y"]
    except RuntimeFailure as error:
        raise RuntimeUnavailable(
            f"{model.runtime} failed on a tiny model: {error.message}",
            hint="reinstall it for this board and Python",
            obj=model.runtime,
        ) from error
    if answer.shape != _EXPECTED.shape or not np.allclose(answer, _EXPECTED, rtol=0, atol=_TOLERANCE):
        raise RuntimeUnavailable(
            f"{model.runtime} answered {answer.tolist()} on a tiny model; right is {_EXPECTED.tolist()}",
            hint="reinstall it for this board and Python",
            obj=model.runtime,
        )
