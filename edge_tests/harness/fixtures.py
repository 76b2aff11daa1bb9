"""Writes the model files that are kept in the repository: `python -m edge_tests.harness.fixtures`.

Two sets, each model in both formats with the same names and arithmetic: the runtimes' probe, which ships
with the package, and the conformance suite's, which must also run where neither `onnx` nor a TensorFlow
Lite writer can be installed. `edge_tests/unit/runtimes/test_fixtures.py` checks that the files are what
this writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

from edge_tests.conformance.expected import BIAS, CODE_OFFSET, SCALE, WEIGHTS
from edge_tests.harness.models import write_onnx
from edge_tests.harness.tflite import Graph, Quantisation
from runtimes import probing
from runtimes.detect import ONNX, TFLITE

CONFORMANCE = Path(__file__).resolve().parent.parent / "conformance" / "fixtures"

FLOAT = TensorProto.FLOAT
FEATURES, CLASSES = WEIGHTS.shape
Operator = schema.BuiltinOperator


def write_all(conformance: Path, probe_onnx: Path, probe_tflite: Path) -> list[Path]:
    """Writes every file and returns the paths."""
    weights, bias = np.array([[1, 2], [3, 4]], np.float32), np.array([0.5, -0.5], np.float32)
    written = [
        _affine_onnx(probe_onnx, weights, bias, batch=1),
        _affine_tflite(probe_tflite, weights, bias, batch=1),
    ]
    builders: dict[str, Callable[[Path], Path]] = {
        "affine.onnx": lambda path: _affine_onnx(path, WEIGHTS, BIAS, batch="batch"),
        "affine.tflite": lambda path: _affine_tflite(path, WEIGHTS, BIAS, batch=-1),
        "single.onnx": lambda path: _affine_onnx(path, WEIGHTS, BIAS, batch=1),
        "single.tflite": lambda path: _affine_tflite(path, WEIGHTS, BIAS, batch=1),
        "unsigned.tflite": lambda path: _affine_tflite(path, WEIGHTS, BIAS, batch=-1, signature=""),
        "mixing.onnx": _mixing_onnx,
        "mixing.tflite": _mixing_tflite,
        "reshape.onnx": _reshape_onnx,
        "reshape.tflite": _reshape_tflite,
        "codes.onnx": _codes_onnx,
        "codes.tflite": _codes_tflite,
        "words.onnx": _words_onnx,
        "words.tflite": _words_tflite,
        "pair.onnx": _pair_onnx,
        "pair.tflite": _pair_tflite,
    }
    return written + [build(conformance / name) for name, build in builders.items()]


def _affine_onnx(path: Path, weights: np.ndarray, bias: np.ndarray, *, batch: str | int) -> Path:
    return write_onnx(
        path,
        [
            helper.make_node("MatMul", ["x", "weights"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        inputs={"x": (FLOAT, [batch, weights.shape[0]])},
        outputs={"y": (FLOAT, [batch, weights.shape[1]])},
        constants=[numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )


def _affine_tflite(
    path: Path, weights: np.ndarray, bias: np.ndarray, *, batch: int, signature: str = "serving_default"
) -> Path:
    """Its tensors have names other than its signature's, to tell which of them a runtime uses."""
    graph = Graph()
    source = graph.tensor("x_tensor", (batch, weights.shape[0]), "float32")
    rows = np.ascontiguousarray(weights.T)
    constants = [
        graph.tensor("weights", rows.shape, "float32", data=rows),
        graph.tensor("bias", bias.shape, "float32", data=bias),
    ]
    target = graph.tensor("y_tensor", (batch, weights.shape[1]), "float32")
    graph.fully_connected([source, *constants], target)
    return graph.write(path, {"x": source}, {"y": target}, signature=signature)


def _mixing_onnx(path: Path) -> Path:
    """Adds the mean of x over the batch: right for its batch of one, wrong if resized."""
    return write_onnx(
        path,
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Add", ["x", "mean"], ["y"]),
        ],
        inputs={"x": (FLOAT, [1, FEATURES])},
        outputs={"y": (FLOAT, [1, FEATURES])},
    )


def _mixing_tflite(path: Path) -> Path:
    graph = Graph()
    source = graph.tensor("x", (1, FEATURES), "float32")
    axis = graph.tensor("axis", (1,), "int32", data=np.array([0], np.int32))
    mean = graph.tensor("mean", (1, FEATURES), "float32")
    target = graph.tensor("y", (1, FEATURES), "float32")
    reducer = schema.ReducerOptionsT()
    reducer.keepDims = True
    graph.operator(
        Operator.MEAN,
        [source, axis],
        [mean],
        options_type=schema.BuiltinOptions.ReducerOptions,
        options=reducer,
    )
    _tflite_arithmetic(graph, "Add", source, mean, target)
    return graph.write(path, {"x": source}, {"y": target})


def _reshape_onnx(path: Path) -> Path:
    """Reshapes to a constant shape with a batch of one: fails if resized."""
    return write_onnx(
        path,
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        inputs={"x": (FLOAT, [1, FEATURES])},
        outputs={"y": (FLOAT, [1, 2, FEATURES // 2])},
        constants=[numpy_helper.from_array(np.array([1, 2, FEATURES // 2], np.int64), "shape")],
    )


def _reshape_tflite(path: Path) -> Path:
    graph = Graph()
    source = graph.tensor("x", (1, FEATURES), "float32")
    shape = graph.tensor("shape", (3,), "int32", data=np.array([1, 2, FEATURES // 2], np.int32))
    target = graph.tensor("y", (1, 2, FEATURES // 2), "float32")
    options = schema.ReshapeOptionsT()
    options.newShape = [1, 2, FEATURES // 2]
    graph.operator(
        Operator.RESHAPE,
        [source, shape],
        [target],
        options_type=schema.BuiltinOptions.ReshapeOptions,
        options=options,
    )
    return graph.write(path, {"x": source}, {"y": target})


def _codes_onnx(path: Path) -> Path:
    """int8 in, int8 out: y = x + CODE_OFFSET in codes."""
    return write_onnx(
        path,
        [
            helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["real"]),
            helper.make_node("Add", ["real", "offset"], ["sum"]),
            helper.make_node("QuantizeLinear", ["sum", "scale", "zero"], ["y"]),
        ],
        inputs={"x": (TensorProto.INT8, ["batch", FEATURES])},
        outputs={"y": (TensorProto.INT8, ["batch", FEATURES])},
        constants=[
            numpy_helper.from_array(np.array(SCALE, np.float32), "scale"),
            numpy_helper.from_array(np.array(0, np.int8), "zero"),
            numpy_helper.from_array(np.array([CODE_OFFSET * SCALE], np.float32), "offset"),
        ],
    )


def _codes_tflite(path: Path) -> Path:
    graph = Graph()
    scale = Quantisation(SCALE)
    source = graph.tensor("x", (-1, FEATURES), "int8", quantisation=scale)
    codes = np.full(1, CODE_OFFSET, np.int8)
    offset = graph.tensor("offset", (1,), "int8", data=codes, quantisation=scale)
    target = graph.tensor("y", (-1, FEATURES), "int8", quantisation=scale)
    _tflite_arithmetic(graph, "Add", source, offset, target, version=2)
    return graph.write(path, {"x": source}, {"y": target})


def _words_onnx(path: Path) -> Path:
    """Strings: picks some of the texts by index."""
    return write_onnx(
        path,
        [helper.make_node("Gather", ["texts", "index"], ["picked"])],
        inputs={"texts": (TensorProto.STRING, ["texts"]), "index": (TensorProto.INT32, ["picked"])},
        outputs={"picked": (TensorProto.STRING, ["picked"])},
    )


def _words_tflite(path: Path) -> Path:
    graph = Graph()
    texts = graph.tensor("texts", (-1,), "string")
    index = graph.tensor("index", (-1,), "int32")
    picked = graph.tensor("picked", (-1,), "string")
    graph.operator(
        Operator.GATHER,
        [texts, index],
        [picked],
        version=3,
        options_type=schema.BuiltinOptions.GatherOptions,
        options=schema.GatherOptionsT(),
    )
    return graph.write(path, {"texts": texts, "index": index}, {"picked": picked})


def _pair_onnx(path: Path) -> Path:
    """Two inputs, two outputs."""
    return write_onnx(
        path,
        [
            helper.make_node("Add", ["left", "right"], ["sum"]),
            helper.make_node("Sub", ["left", "right"], ["difference"]),
        ],
        inputs={"left": (FLOAT, [1, 2]), "right": (FLOAT, [1, 2])},
        outputs={"sum": (FLOAT, [1, 2]), "difference": (FLOAT, [1, 2])},
    )


def _pair_tflite(path: Path) -> Path:
    graph = Graph()
    left, right = graph.tensor("left", (1, 2), "float32"), graph.tensor("right", (1, 2), "float32")
    total, difference = graph.tensor("sum", (1, 2), "float32"), graph.tensor("difference", (1, 2), "float32")
    _tflite_arithmetic(graph, "Add", left, right, total)
    _tflite_arithmetic(graph, "Sub", left, right, difference)
    return graph.write(path, {"left": left, "right": right}, {"sum": total, "difference": difference})


def _tflite_arithmetic(
    graph: Graph, kind: str, left: int, right: int, target: int, *, version: int = 1
) -> None:
    graph.operator(
        getattr(Operator, kind.upper()),
        [left, right],
        [target],
        version=version,
        options_type=getattr(schema.BuiltinOptions, f"{kind}Options"),
        options=getattr(schema, f"{kind}OptionsT")(),
    )


if __name__ == "__main__":
    for path in write_all(CONFORMANCE, probing.MODELS[ONNX], probing.MODELS[TFLITE]):
        print(f"{path.stat().st_size:6d}  {path.name}")
