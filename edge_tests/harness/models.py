"""Tiny real models for tests, each written in a few milliseconds, and golden files for them.

`tiny_onnx` and `tiny_tflite` hold the same network for the same seed: float32 input "x" [-1, 8], one
hidden layer, and float32 output "y" [-1, 4]. Another seed is another version; a small `change` is a
fine-tuned one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ai_edge_litert.schema_py_generated import BuiltinOperator
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_tests.harness.tflite import Graph
from runtimes import registry

INPUT, OUTPUT = "x", "y"
FEATURES, CLASSES = 8, 4

# Old enough for every release of ONNX Runtime that the [onnx] extra allows.
OPSET = 13
IR_VERSION = 8

Array = NDArray[Any]


def layers(seed: int, *, hidden: int = 16, change: float = 0.0) -> list[tuple[Array, Array]]:
    """Weights [in, out] and bias [out] of each layer; `change` moves them all by that standard deviation."""
    rng, moves = np.random.default_rng(seed), np.random.default_rng(seed + 1_000_003)
    result = []
    for rows, columns in ((FEATURES, hidden), (hidden, CLASSES)):
        weights = rng.normal(0, rows**-0.5, (rows, columns)) + change * moves.normal(size=(rows, columns))
        bias = rng.normal(0, 0.1, columns) + change * moves.normal(size=columns)
        result.append((weights.astype(np.float32), bias.astype(np.float32)))
    return result


def tiny_onnx(path: Path, seed: int = 0, *, hidden: int = 16, change: float = 0.0) -> Path:
    """Writes the network as ONNX."""
    nodes, constants, source = [], [], INPUT
    network = layers(seed, hidden=hidden, change=change)
    for index, (weights, bias) in enumerate(network):
        last = index == len(network) - 1
        target = OUTPUT if last else f"hidden{index}"
        constants += [
            numpy_helper.from_array(weights, f"weights{index}"),
            numpy_helper.from_array(bias, f"bias{index}"),
        ]
        sums = target if last else f"sums{index}"
        nodes.append(helper.make_node("Gemm", [source, f"weights{index}", f"bias{index}"], [sums]))
        if not last:
            nodes.append(helper.make_node("Relu", [sums], [target]))
        source = target
    return write_onnx(
        path,
        nodes,
        inputs={INPUT: (TensorProto.FLOAT, ["batch", FEATURES])},
        outputs={OUTPUT: (TensorProto.FLOAT, ["batch", CLASSES])},
        constants=constants,
    )


def tiny_tflite(path: Path, seed: int = 0, *, hidden: int = 16, change: float = 0.0) -> Path:
    """Writes the network as TensorFlow Lite."""
    graph = Graph()
    first = source = graph.tensor(INPUT, (-1, FEATURES), "float32")
    network = layers(seed, hidden=hidden, change=change)
    for index, (weights, bias) in enumerate(network):
        last = index == len(network) - 1
        rows = np.ascontiguousarray(weights.T)  # TensorFlow Lite keeps [out, in]
        constants = [
            graph.tensor(f"weights{index}", rows.shape, "float32", data=rows),
            graph.tensor(f"bias{index}", bias.shape, "float32", data=bias),
        ]
        target = graph.tensor(OUTPUT if last else f"hidden{index}", (-1, len(bias)), "float32")
        graph.fully_connected([source, *constants], target, relu=not last)
        source = target
    return graph.write(path, {INPUT: first}, {OUTPUT: source})


def unknown_operator_onnx(path: Path) -> Path:
    """A valid file that the runtime refuses to load."""
    return write_onnx(
        path,
        [helper.make_node("Frobnicate", [INPUT], [OUTPUT], domain="example.nowhere")],
        inputs={INPUT: (TensorProto.FLOAT, ["batch", FEATURES])},
        outputs={OUTPUT: (TensorProto.FLOAT, ["batch", CLASSES])},
        domains=("example.nowhere",),
    )


def unknown_operator_tflite(path: Path) -> Path:
    """A valid file that the runtime refuses to load."""
    graph = Graph()
    source = graph.tensor(INPUT, (-1, FEATURES), "float32")
    target = graph.tensor(OUTPUT, (-1, CLASSES), "float32")
    graph.operator(BuiltinOperator.CUSTOM, [source], [target], custom="Frobnicate")
    return graph.write(path, {INPUT: source}, {OUTPUT: target})


def hanging_onnx(path: Path) -> Path:
    """Loads, and then never answers: it loops without end, until its process is killed."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["state", "one"], ["next_state"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", FEATURES]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, ["batch", FEATURES]),
        ],
        [numpy_helper.from_array(np.array(1, np.float32), "one")],
    )
    return write_onnx(
        path,
        [helper.make_node("Loop", ["", "true", INPUT], [OUTPUT], body=body)],
        inputs={INPUT: (TensorProto.FLOAT, ["batch", FEATURES])},
        outputs={OUTPUT: (TensorProto.FLOAT, ["batch", FEATURES])},
        constants=[numpy_helper.from_array(np.array(True), "true")],
    )


def slow_to_load_onnx(path: Path, products: int = 400) -> Path:
    """Takes the runtime minutes to load: it folds a chain of constant matrix products, some 0.3 s each."""
    size = 2048
    nodes = [
        helper.make_node(
            "ConstantOfShape",
            ["shape"],
            ["product0"],
            value=numpy_helper.from_array(np.array([1 / size], np.float32)),
        )
    ]
    nodes += [
        helper.make_node("MatMul", [f"product{index}", "product0"], [f"product{index + 1}"])
        for index in range(products)
    ]
    nodes += [
        helper.make_node("ReduceMean", [f"product{products}"], ["mean"], keepdims=0),
        helper.make_node("Add", [INPUT, "mean"], [OUTPUT]),
    ]
    return write_onnx(
        path,
        nodes,
        inputs={INPUT: (TensorProto.FLOAT, ["batch", FEATURES])},
        outputs={OUTPUT: (TensorProto.FLOAT, ["batch", FEATURES])},
        constants=[numpy_helper.from_array(np.array([size, size], np.int64), "shape")],
    )


def truncated(path: Path, source: Path, keep: float = 0.5) -> Path:
    """The first part of `source`, `keep` of its bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def write_onnx(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: Mapping[str, tuple[int, list[Any]]],
    constants: list[onnx.TensorProto] | None = None,
    domains: tuple[str, ...] = (),
) -> Path:
    """Writes a graph; `inputs` and `outputs` map names to element type and shape."""
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        constants or [],
    )
    imports = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="sluice test model"
    )
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def samples(count: int, seed: int = 0) -> dict[str, Array]:
    """Inputs for the tiny network."""
    return {INPUT: np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)}


def write_golden(path: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Path:
    """A golden file: an .npz with keys "input.<name>" and "output.<name>"."""
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    arrays.update({f"output.{name}": array for name, array in outputs.items()})
    with path.open("wb") as file:  # savez adds .npz to a bare name
        np.savez(file, **arrays)
    return path


def golden(path: Path, model: Path, inputs: Mapping[str, Array]) -> Path:
    """A golden file with what the model's own runtime answers to `inputs`."""
    with registry.load(model) as loaded:
        return write_golden(path, inputs, loaded.run(inputs))
