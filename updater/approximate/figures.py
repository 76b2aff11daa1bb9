"""How far an approximate layer is from the wanted one.

relative_mse: mean squared error of the layer's weights over the mean square of the wanted weights, so that
layers of any scale compare. explained: the share of the change's energy that was kept, 1 - |error|^2 /
|change|^2: 0 for the base itself, 1 for the target; below 0 is worse than no update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from updater.approximate.layers import Layer, Words


@dataclass(frozen=True)
class LayerFigures:
    """One layer, approximate against wanted.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        elements: in all.
        changed: whose words differ from what the update began from.
        relative_mse: as above; infinite when the wanted weights are all 0 and these are not.
        cosine: between the kept change and the wanted one, -1 to 1; 0 when nothing was kept.
        explained: as above.
        error_energy: sum of squared errors.
        change_energy: sum of squared wanted changes.
    """

    name: str
    dtype: str
    elements: int
    changed: int
    relative_mse: float
    cosine: float
    explained: float
    error_energy: float
    change_energy: float


@dataclass(frozen=True)
class Tally:
    """All layers of a file."""

    layers: tuple[LayerFigures, ...]

    @property
    def worst(self) -> LayerFigures:
        """The layer with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative_mse)

    @property
    def explained(self) -> float:
        """The mean over layers of the share that was kept, weighed by elements.

        By elements, because layers differ in scale and a sum of squares would count the coarsest only.
        """
        whole = sum(layer.elements for layer in self.layers)
        return sum(layer.explained * layer.elements for layer in self.layers) / whole


def explained(layer: Layer, words: Words) -> LayerFigures:
    """The figures of one layer."""
    wanted, start, found = layer.values(layer.target), layer.values(layer.start), layer.values(words)
    change, kept, error = wanted - start, found - start, found - wanted
    square, lost = float(wanted @ wanted), float(error @ error)
    energy, own = float(change @ change), float(kept @ kept)
    return LayerFigures(
        layer.name,
        layer.dtype,
        layer.size,
        int(np.count_nonzero(words != layer.start)),
        lost / square if square else (0.0 if not lost else math.inf),
        float(kept @ change) / math.sqrt(own * energy) if own and energy else 0.0,
        1 - lost / energy if energy else (1.0 if not lost else -math.inf),
        lost,
        energy,
    )


def tally(layers: Sequence[Layer], words: Sequence[Words]) -> Tally:
    """The figures of all layers."""
    return Tally(tuple(explained(layer, found) for layer, found in zip(layers, words, strict=True)))
