"""What an approximate update keeps of each layer's change: integer codes times a step.

A method orders what it could keep (rows, weights, singular directions) over the whole model, most useful
first; its `amount` says how many are kept, so that one number between 1 and `most` runs from almost nothing
to everything, and whoever has a budget searches that one number. Rules: the same layers and amount give the
same codes; steps have STEP_BITS significant bits, so that they are cheap to send and exact to recover.

Sources: sign, Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv:2402.10193); topk,
Aji and Heafield, "Sparse Communication for Distributed Gradient Descent" (arXiv:1704.05021); lowrank,
Eckart and Young 1936, as used for deltas by Hu et al., "LoRA" (arXiv:2106.09685).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from updater.approximate.layers import Integers, Layer, Reals

STEP_BITS = 12  # significant bits of a step
LEVELS = 4  # steps below the least kept change: what is kept errs by at most an eighth of it
MIN_ROW = 64  # elements of a row that gets a step of its own
FACTOR_MAX = 127  # of a factor's codes, which are 8-bit integers


@dataclass(frozen=True)
class Update:
    """The change of one layer.

    Attributes:
        codes: one for each element, flat.
        steps: one for the layer, or one for each row; ignored for layers of 8-bit codes.
    """

    codes: Integers
    steps: Reals

    def reals(self, rows: int) -> Reals:
        """The changes: each code times its step, float64, flat."""
        steps = self.steps if len(self.steps) == 1 else self.steps[:, None]
        changes: Reals = self.codes.reshape(rows, -1) * steps
        return changes.reshape(-1)


class Method(ABC):
    """A way to approximate a model's change.

    Attributes:
        layers: that it acts on, some of those given.
        unit: what `amount` counts, for people.
        most: the largest amount.
        guess: an amount to begin a search with.
    """

    unit: str
    most: int
    guess: int

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)

    @abstractmethod
    def update(self, index: int, amount: int) -> Update:
        """What is kept of layer `index` when `amount` of all units is kept, 0 to `most`."""


class Sign(Method):
    """The sign of every change, times the mean change of its row, for the rows that change most.

    The mean of |d| is the scale with the least squared error among all scale * sign(d).
    """

    unit = "rows"

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        means = [np.abs(_rows(layer)).mean(axis=1) for layer in self.layers]
        # What a row is worth: the squared relative change it keeps, for each bit that it costs.
        worth = [mean / _scale(layer) for layer, mean in zip(self.layers, means)]
        self._ranking = _Ranking(worth)
        self._worth, self._means = worth, means
        self.most = self.guess = len(self._ranking)

    def update(self, index: int, amount: int) -> Update:
        layer = self.layers[index]
        kept = self._ranking.kept(self._worth[index], amount)
        signs = np.sign(_rows(layer)).astype(np.int64)
        signs[~kept] = 0
        steps = np.where(kept, self._means[index], 0.0)
        if layer.size < MIN_ROW * layer.rows:
            steps = steps[kept].mean(keepdims=True) if kept.any() else np.zeros(1)
        steps = _few_bits(steps)
        if len(steps) > 1:
            signs[steps == 0] = 0
        return Update(signs.reshape(-1), steps)


class Sparse(Method):
    """The largest changes of the whole model, quantised; all others stay as they were.

    Args:
        layers: as for all.
        relative: whether changes are ranked relative to the root mean square of their layer's weights, so
        that
            `amount` sets one relative threshold for all layers, or as they are.
    """

    unit = "weights"

    def __init__(self, layers: Sequence[Layer], *, relative: bool) -> None:
        super().__init__(layers)
        self._scales = [_scale(layer) if relative else 1.0 for layer in self.layers]
        self._ranking = _Ranking([self._worth(index) for index in range(len(self.layers))])
        self.most = len(self._ranking)
        self.guess = max(1, self.most // 100)

    def _worth(self, index: int) -> NDArray[np.float32]:
        return (np.abs(self.layers[index].change()) / self._scales[index]).astype(np.float32)

    def update(self, index: int, amount: int) -> Update:
        layer = self.layers[index]
        kept = self._ranking.kept(self._worth(index), amount)
        if not layer.is_float:
            codes = layer.target.astype(np.int64) - layer.start.astype(np.int64)
            return Update(np.where(kept, codes, 0), np.ones(1))
        change = np.where(kept, layer.change(), 0.0)
        sizes = np.abs(change[kept])
        if not sizes.size:
            return Update(np.zeros(layer.size, np.int64), np.ones(1))
        step = _few_bits(np.array([max(sizes.min(), sizes.max() / (1 << 20)) / LEVELS]))
        codes = np.rint(change / step[0]).astype(np.int64)
        return Update(codes, step)


class LowRank(Method):
    """The largest singular directions of every layer, as a product of two matrices of 8-bit integers.

    A layer is the matrix [rows, all other dimensions]. Directions of all layers are ranked by the share of
    the layer's weights that they move, for each byte of their factors.
    """

    unit = "directions"

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self._factors = []
        worth = []
        for layer in self.layers:
            matrix = _rows(layer)
            left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
            root = np.sqrt(sizes)
            self._factors.append((left * root, root[:, None] * right))
            worth.append(sizes / _scale(layer) / np.sqrt(sum(matrix.shape)))
        self._worth = worth
        self._ranking = _Ranking(worth)
        self.most = len(self._ranking)
        self.guess = max(1, self.most // 10)

    def update(self, index: int, amount: int) -> Update:
        kept = self._ranking.kept(self._worth[index], amount)
        left, right = self._factors[index]
        left, right = left[:, kept], right[kept]
        if not left.size or not np.any(left) or not np.any(right):
            return Update(np.zeros(self.layers[index].size, np.int64), np.ones(1))
        steps = [np.abs(factor).max() / FACTOR_MAX for factor in (left, right)]
        codes = [
            np.rint(factor / step).astype(np.int64) for factor, step in zip((left, right), steps, strict=True)
        ]
        step = _few_bits(np.array([steps[0] * steps[1]]))
        return Update((codes[0] @ codes[1]).reshape(-1), step)


METHODS = ("sign", "topk", "threshold", "lowrank")


def make_method(name: str, layers: Sequence[Layer]) -> Method:
    """The method of that name, one of METHODS, for the layers that it can act on.

    sign and lowrank act on floats, topk and threshold on 8-bit codes as well.
    """
    floats = [layer for layer in layers if layer.is_float]
    if name == "sign":
        return Sign(floats)
    if name == "lowrank":
        return LowRank(floats)
    return Sparse(layers, relative=name == "threshold")


class _Ranking:
    """An order over what all layers could keep: the largest first."""

    def __init__(self, worth: Sequence[NDArray[np.floating]]) -> None:
        whole = np.concatenate([array.reshape(-1) for array in worth]) if worth else np.empty(0)
        whole = whole[whole > 0]
        whole.sort()
        self._ascending = whole

    def __len__(self) -> int:
        return len(self._ascending)

    def kept(self, worth: NDArray[np.floating], amount: int) -> NDArray[np.bool_]:
        """Which are among the `amount` largest; all that equal the least of these are."""
        if amount <= 0 or not len(self):
            return np.zeros(worth.shape, np.bool_)
        least = self._ascending[max(0, len(self) - amount)]
        found: NDArray[np.bool_] = (worth >= least) & (worth > 0)
        return found


def _rows(layer: Layer) -> Reals:
    return layer.change().reshape(layer.rows, -1)


def _scale(layer: Layer) -> float:
    """Root mean square of the layer's wanted weights; 1 if they are all 0."""
    values = layer.values(layer.target)
    return float(np.sqrt(values @ values / values.size)) or 1.0


def _few_bits(steps: Reals) -> Reals:
    """Steps rounded to STEP_BITS significant bits."""
    fraction, exponent = np.frexp(steps)
    short: Reals = np.ldexp(np.rint(np.ldexp(fraction, STEP_BITS)), exponent - STEP_BITS)
    return short
