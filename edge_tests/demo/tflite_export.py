"""Exports a network as an int8 TensorFlow Lite file, quantised here as TensorFlow's converter does it.

Activations have one scale and zero point for each tensor, from the range seen on calibration data;
weights are symmetric with scale max|w| / 127; biases are int32 with scale (input's scale) x (weights'
scale). The scheme is that of
https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ai_edge_litert.schema_py_generated import BuiltinOperator

from edge_tests.demo.network import INPUT, OUTPUT, Array, Network
from edge_tests.harness.tflite import Graph, Quantisation

# Fixed by the specification for softmax over int8.
_PROBABILITY = Quantisation(1 / 256, -128)

# Versions of the operators that take int8 with float32 at the other end.
_DEQUANTIZE_VERSION = 2
_FULLY_CONNECTED_VERSION = 4
_SOFTMAX_VERSION = 2


def export(network: Network, calibration: Array, path: Path) -> Path:
    """Writes `network` with int8 weights and activations, float32 input and output, and any batch size.

    Args:
        network: what to export.
        calibration: float32 [n, features], from the training data, to find the activations' ranges.
        path: of the file to write.
    """
    graph = Graph()
    image = graph.tensor(INPUT, (-1, network.features), "float32")
    scale = _activation_scale(calibration)
    values = graph.tensor("image.codes", (-1, network.features), "int8", quantisation=scale)
    graph.operator(BuiltinOperator.QUANTIZE, [image], [values])
    for index, (layer, seen) in enumerate(zip(network.layers, network.activations(calibration), strict=True)):
        weights_scale = Quantisation(float(np.float32(np.abs(layer.weights).max() / 127)))
        bias_scale = Quantisation(float(np.float32(scale.scale) * np.float32(weights_scale.scale)))
        weights = np.ascontiguousarray(_codes(layer.weights, weights_scale, -127, 127).astype(np.int8).T)
        bias = _codes(layer.bias, bias_scale, -(2**31) + 1, 2**31 - 1).astype(np.int32)
        constants = [
            graph.tensor(
                f"dense{index}.weights", weights.shape, "int8", data=weights, quantisation=weights_scale
            ),
            graph.tensor(f"dense{index}.bias", bias.shape, "int32", data=bias, quantisation=bias_scale),
        ]
        scale = _activation_scale(seen)
        sums = graph.tensor(f"dense{index}.output", (-1, len(bias)), "int8", quantisation=scale)
        graph.fully_connected(
            [values, *constants],
            sums,
            version=_FULLY_CONNECTED_VERSION,
            relu=index < len(network.layers) - 1,
        )
        values = sums
    codes = graph.tensor("probabilities.codes", (-1, network.classes), "int8", quantisation=_PROBABILITY)
    graph.softmax(values, codes, version=_SOFTMAX_VERSION)
    probabilities = graph.tensor(OUTPUT, (-1, network.classes), "float32")
    graph.operator(BuiltinOperator.DEQUANTIZE, [codes], [probabilities], version=_DEQUANTIZE_VERSION)
    return graph.write(path, {INPUT: image}, {OUTPUT: probabilities}, description="sluice demo: digits")


def _activation_scale(values: Array) -> Quantisation:
    """Maps the range seen, widened to hold zero, onto -128 to 127."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = float(np.float32((high - low) / 255))
    return Quantisation(scale, round(-128 - low / scale))


def _codes(values: Array, scale: Quantisation, low: int, high: int) -> Array:
    return np.clip(np.rint(values.astype(np.float64) / scale.scale), low, high)
