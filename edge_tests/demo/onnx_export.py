"""Exports a network as an int8 ONNX file: a float graph, then static quantisation by ONNX Runtime's own
tool.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from edge_tests.demo.network import INPUT, OUTPUT, Array, Network
from edge_tests.harness.models import IR_VERSION, OPSET

_SOFTMAX = "softmax"


class _Images(CalibrationDataReader):
    def __init__(self, images: Array) -> None:
        self._batches = iter([{INPUT: images.astype(np.float32)}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def export(network: Network, calibration: Array, path: Path) -> Path:
    """Writes `network` with int8 weights and activations, float32 input and output, and any batch size.

    Args:
        network: what to export.
        calibration: float32 [n, features], from the training data, to find the activations' ranges.
        path: of the file to write.
    """
    with tempfile.TemporaryDirectory() as scratch:
        float_path = Path(scratch) / "float.onnx"
        export_float(network, float_path)
        # The tool advises on the root logger to pre-process a graph that has nothing to pre-process.
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            quantize_static(
                float_path,
                path,
                _Images(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[_SOFTMAX],
                extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
            )
        finally:
            logging.disable(previous)
    return path


def export_float(network: Network, path: Path) -> None:
    """Writes `network` with float32 weights."""
    nodes, constants, source = [], [], INPUT
    for index, layer in enumerate(network.layers):
        weights, bias, sums = f"dense{index}.weights", f"dense{index}.bias", f"dense{index}.sums"
        constants += [
            numpy_helper.from_array(layer.weights.astype(np.float32), weights),
            numpy_helper.from_array(layer.bias.astype(np.float32), bias),
        ]
        nodes.append(helper.make_node("Gemm", [source, weights, bias], [sums], name=f"dense{index}"))
        source = sums
        if index < len(network.layers) - 1:
            source = f"dense{index}.output"
            nodes.append(helper.make_node("Relu", [sums], [source], name=f"relu{index}"))
    nodes.append(helper.make_node("Softmax", [source], [OUTPUT], name=_SOFTMAX, axis=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", network.features])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", network.classes])],
        constants,
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION), path
    )
