"""Approximate updates, as an operator makes them: searched within a budget, and held against golden outputs.

In order: (1) the layers that may be approximated are found in both files, (2) approximate targets are built
and their real deltas measured until the budget is met (`fleet.approximate_search`), each one running on the
golden inputs, (3) what falls short of the bounds is named. The caller writes the file, or refuses it.

This is the one module of the control plane's side that runs models: it is part of the publish pipeline.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleet.approximate_search import Search, Trial
from fleet.golden import INPUT, OUTPUT, check_golden
from runtimes import registry
from runtimes.interface import Model, RuntimeFailure, RuntimeUnavailable, TensorSpec
from sluice.api.v1 import errors_pb2
from updater import delta
from updater.approximate import (
    EXACT,
    ROUNDINGS,
    Layer,
    Method,
    Rounding,
    find_layers,
    make_method,
    realise,
    tally,
    write_file,
)
from updater.approximate.layers import Words
from updater.delta import DeltaSummary
from updater.errors import SluiceError

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class Bounds:
    """What an approximate target must keep to.

    Attributes:
        min_cosine: least cosine similarity of each golden output, -1 to 1.
        max_layer_mse: largest relative mean squared error of a layer's weights.
    """

    min_cosine: float = 0.95
    max_layer_mse: float = 0.002


@dataclass(frozen=True)
class Outcome:
    """An approximate target, not yet written.

    Attributes:
        method: its name.
        unit: what its amounts count.
        most: the largest amount.
        best: what was chosen.
        trials: all that was measured, in order.
        target_size: bytes of the file.
        exact_delta_size: bytes of the delta to the wanted target itself.
        base_cosine: least cosine of the base's golden outputs; None without a golden file.
        shortfalls: the bounds that it does not keep to, in words; none if it may be published.
        layers: that were approximated.
        words: their words.
    """

    method: str
    unit: str
    most: int
    best: Trial
    trials: tuple[Trial, ...]
    target_size: int
    exact_delta_size: int
    base_cosine: float | None
    shortfalls: tuple[str, ...]
    layers: tuple[Layer, ...]
    words: tuple[Words, ...]

    def write(self, target: Path, out: Path) -> None:
        """Writes the approximate file; `target` is the wanted one."""
        write_file(target, list(self.layers), list(self.words), out)


def find_approximate(
    base: Path,
    target: Path,
    method_name: str,
    budget: int,
    *,
    golden: Path | None,
    bounds: Bounds,
    progress: Progress = lambda _what, _done, _total: None,
) -> Outcome:
    """Finds the approximate target whose delta against `base` fits the budget.

    Args:
        base: what the boxes hold.
        target: what they should have.
        method_name: one of updater.approximate.METHODS.
        budget: bytes of the delta.
        golden: golden inputs and outputs of the target; None leaves outputs unchecked.
        bounds: what is named as a shortfall when not kept to.
        progress: called while deltas are made.

    Raises:
        SluiceError: REQUEST_INVALID if the exact delta fits; LIMIT_EXCEEDED if nothing does;
        MODEL_FILE_INVALID for
            files or golden files that cannot be used; RUNTIME_UNAVAILABLE, MODEL_LOAD_FAILED.
    """
    layers = find_layers(base, target)
    method = make_method(method_name, layers)
    if not method.layers or not method.most:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"the method {method_name} acts on float weights, and none of {target} differ from the base's",
            hint="the methods topk and threshold act on 8-bit codes as well",
            obj=str(target),
        )
    judge = _Judge(golden) if golden is not None else None
    base_cosine = judge.cosine(base) if judge is not None else None
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
        bench = _Bench(base, target, method, judge, Path(directory), progress)
        exact = bench.diff(target, "the exact delta").delta_size
        if exact <= budget:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"the exact delta takes {exact} bytes, which is within the budget of {budget}",
                hint=f"push {target} itself: nothing need be approximated",
                obj=str(target),
            )
        # 8-bit codes are integers already: rounding would measure the same file again.
        roundings = ROUNDINGS if any(layer.is_float for layer in method.layers) else (EXACT,)
        search = Search(method.most, method.guess, budget, bench.attempt, bench.foresee, roundings)
        best = search.run()
    return Outcome(
        method_name,
        method.unit,
        method.most,
        best,
        tuple(search.trials),
        target.stat().st_size,
        exact,
        base_cosine,
        tuple(_shortfalls(best, bounds)),
        tuple(method.layers),
        tuple(bench.words(best.amount, best.rounding)),
    )


def _shortfalls(best: Trial, bounds: Bounds) -> Iterator[str]:
    if best.cosine is not None and not best.cosine >= bounds.min_cosine:
        yield f"the golden outputs have cosine {best.cosine:.6f}; at least {bounds.min_cosine:g} is wanted"
    over = [layer for layer in best.tally.layers if not layer.relative_mse <= bounds.max_layer_mse]
    over.sort(key=lambda layer: -layer.relative_mse)
    if over:
        others = f" and {len(over) - 3} more" if len(over) > 3 else ""
        named = ", ".join(f"{layer.name!r} {layer.relative_mse:.4g}" for layer in over[:3])
        yield (
            f"the relative mean squared error of {len(over)} of {len(best.tally.layers)} layers is over "
            f"{bounds.max_layer_mse:g}: {named}{others}"
        )


@dataclass
class _Bench:
    """Builds approximate targets in a scratch directory and measures them."""

    base: Path
    target: Path
    method: Method
    judge: _Judge | None
    scratch: Path
    progress: Progress
    tries: int = 0

    def words(self, amount: int, rounding: Rounding) -> list[Words]:
        method = self.method
        return [
            realise(layer, method.update(index, amount), rounding)
            for index, layer in enumerate(method.layers)
        ]

    def foresee(self, amount: int, rounding: Rounding) -> float:
        return tally(self.method.layers, self.words(amount, rounding)).explained

    def attempt(self, amount: int, rounding: Rounding) -> Trial:
        self.tries += 1
        words = self.words(amount, rounding)
        path = self.scratch / f"approximate{self.target.suffix}"
        write_file(self.target, self.method.layers, words, path)
        summary = self.diff(path, f"try {self.tries}")
        coded = {region.target_offset: region.coded_bytes for region in summary.regions}
        return Trial(
            amount,
            rounding,
            summary.delta_size,
            tally(self.method.layers, words),
            self.judge.cosine(path) if self.judge is not None else None,
            tuple(coded.get(layer.offset, 0) for layer in self.method.layers),
        )

    def diff(self, path: Path, what: str) -> DeltaSummary:
        return delta.create(
            self.base,
            path,
            self.scratch / "delta",
            progress=lambda done, total: self.progress(what, done, total),
        )


class _Judge:
    """Runs models on golden inputs and compares their outputs with the golden ones."""

    def __init__(self, golden: Path) -> None:
        check_golden(golden)
        self._path = golden
        with np.load(golden, allow_pickle=False) as arrays:
            self._inputs = _named(arrays, INPUT)
            self._outputs = _named(arrays, OUTPUT)

    def cosine(self, path: Path) -> float:
        """The least cosine of all golden outputs."""
        with _errors(path), registry.load(path) as model:
            return self._compare(model)

    def _compare(self, model: Model) -> float:
        answers = model.run(self._fit(self._inputs, model.inputs, "input"))
        wanted = self._fit(self._outputs, model.outputs, "output")
        return min(cosine(answers[name], wanted[name]) for name in wanted)

    def _fit(self, arrays: Arrays, specs: tuple[TensorSpec, ...], what: str) -> Arrays:
        """The arrays under the model's names; a single stranger takes the single name left."""
        names = [spec.name for spec in specs]
        strangers = [name for name in arrays if name not in names]
        free = [name for name in names if name not in arrays]
        if len(strangers) == 1 and len(free) == 1:
            return {free[0] if name in strangers else name: array for name, array in arrays.items()}
        if strangers or (free and what == "input"):
            raise SluiceError(
                errors_pb2.MODEL_FILE_INVALID,
                f"the golden file {self._path} has {what}s {sorted(arrays)}, and the model has {names}",
                hint="name the arrays input.<name> and output.<name> as the model does",
                obj=str(self._path),
            )
        return arrays


def cosine(answered: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Cosine similarity of all elements; 0 for another shape or what is not finite; texts equal or not."""
    if answered.shape != wanted.shape:
        return 0.0
    if answered.dtype.kind not in "iuf" or wanted.dtype.kind not in "iuf":
        return float(np.array_equal(answered.astype(str), wanted.astype(str)))
    a, b = answered.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    # Scaled first: squares of large values overflow.
    largest_a, largest_b = np.abs(a).max(initial=0), np.abs(b).max(initial=0)
    if not largest_a or not largest_b:
        return float(largest_a == largest_b)
    a, b = a / largest_a, b / largest_b
    return max(-1.0, min(1.0, float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))))


def _named(arrays: Any, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns what a runtime raises into a SluiceError."""
    try:
        yield
    except RuntimeUnavailable as error:
        raise SluiceError(
            errors_pb2.RUNTIME_UNAVAILABLE,
            f"the golden outputs need a runtime to run {path.name} here: {error.message}",
            hint="install one: pip install 'sluice[onnx]' or 'sluice[tflite]'; or drop --golden with --force",
            obj=str(path),
        ) from error
    except RuntimeFailure as error:
        raise SluiceError(
            errors_pb2.MODEL_LOAD_FAILED,
            f"the golden inputs could not be run through {path.name}: {error.message}",
            hint=error.hint or "check the model and the golden file",
            obj=str(path),
        ) from error
