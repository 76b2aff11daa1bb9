"""The models that serving is measured on, with random weights: what they cost matters, not what they answer.

`mlp` is small: what is measured is the way to it. `cnn` takes an image of 602 KB (FP32, 3x224x224): what is
measured is how that travels. Both take batches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 13, 8
INPUT, OUTPUT = "x", "y"


@dataclass(frozen=True)
class Subject:
    """A model to be served.

    Attributes:
        name: that it is served under.
        path: of the ONNX file.
        shape: of one sample of its only input, FP32, without the batch dimension.
        classes: width of its only output, FP32.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    classes: int

    def sample(self, seed: int = 0) -> NDArray[np.float32]:
        """A batch of one."""
        return np.random.default_rng(seed).standard_normal((1, *self.shape)).astype(np.float32)


def mlp(directory: Path) -> Subject:
    """64 -> 128 -> 64 -> 10."""
    rng = np.random.default_rng(1)
    nodes, constants, source, widths = [], [], INPUT, (64, 128, 64, 10)
    for index, (rows, columns) in enumerate(itertools.pairwise(widths)):
        constants += [
            _weights(rng, f"w{index}", (rows, columns), rows),
            numpy_helper.from_array(np.zeros(columns, np.float32), f"b{index}"),
        ]
        last = index == len(widths) - 2
        sums = OUTPUT if last else f"s{index}"
        nodes.append(helper.make_node("Gemm", [source, f"w{index}", f"b{index}"], [sums]))
        if not last:
            nodes.append(helper.make_node("Relu", [sums], [f"h{index}"]))
            source = f"h{index}"
    return _write(directory, "mlp", nodes, constants, (64,), 10)


def cnn(directory: Path) -> Subject:
    """Six 3x3 convolutions with stride 2, then a mean and a dense layer: some 100 million multiplications."""
    rng = np.random.default_rng(2)
    nodes, constants, source, channels = [], [], INPUT, (3, 16, 32, 64, 96, 128, 160)
    for index, (before, after) in enumerate(itertools.pairwise(channels)):
        constants.append(_weights(rng, f"k{index}", (after, before, 3, 3), before * 9))
        nodes += [
            helper.make_node(
                "Conv",
                [source, f"k{index}"],
                [f"c{index}"],
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                strides=[2, 2],
            ),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
        ]
        source = f"r{index}"
    constants += [
        _weights(rng, "w", (channels[-1], 10), channels[-1]),
        numpy_helper.from_array(np.zeros(10, np.float32), "b"),
    ]
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], [OUTPUT]),
    ]
    return _write(directory, "cnn", nodes, constants, (3, 224, 224), 10)


def _weights(rng: np.random.Generator, name: str, shape: tuple[int, ...], fan_in: int) -> Any:
    return numpy_helper.from_array(rng.normal(0, fan_in**-0.5, shape).astype(np.float32), name)


def _write(
    directory: Path, name: str, nodes: list[Any], constants: list[Any], shape: tuple[int, ...], classes: int
) -> Subject:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path = directory / f"{name}.onnx"
    onnx.save(model, path)
    return Subject(name, path, shape, classes)
