"""The demo's classifier as numbers: fully connected layers, ReLU between them, softmax at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INPUT, OUTPUT = "image", "probabilities"  # names of the exported models' input and output, in every format


@dataclass(frozen=True)
class Layer:
    """y = x W + b: weights float32 [in, out], bias float32 [out]."""

    weights: Array
    bias: Array


@dataclass(frozen=True)
class Network:
    layers: tuple[Layer, ...]

    @property
    def features(self) -> int:
        return int(self.layers[0].weights.shape[0])

    @property
    def classes(self) -> int:
        return int(self.layers[-1].weights.shape[1])

    def activations(self, images: Array) -> list[Array]:
        """What each layer puts out for float32 [n, features]: after ReLU, and logits from the last."""
        results, values = [], images
        for index, layer in enumerate(self.layers):
            values = values @ layer.weights + layer.bias
            if index < len(self.layers) - 1:
                values = np.maximum(values, 0)
            results.append(values)
        return results

    def predict(self, images: Array) -> Array:
        """Probabilities, float32 [n, classes]."""
        logits = self.activations(images)[-1]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def accuracy(probabilities: Array, labels: Array) -> float:
    """Share of samples whose most probable class is the label."""
    return float((probabilities.argmax(axis=1) == labels).mean())
