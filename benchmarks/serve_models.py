"""The models that serving is measured on: what they cost matters, not what they answer.

`mlp` is small: what is measured is the way to it. `cnn` takes an image of 602 KB (FP32, 3x224x224): what is
measured is how that travels. Both have random weights. `minilm` is the text encoder of `make minilm`, its
weights dynamically quantised to int8, with requests of different lengths: what is measured is what batches
gain. All take batches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 13, 8
INPUT, OUTPUT = "x", "y"
TOKENS, MASK = "input_ids", "attention_mask"
ORDINARY_TOKENS = (1000, 30_000)  # of the vocabulary: no marks
MINILM = Path(__file__).resolve().parents[1] / ".cache" / "minilm" / "base_i8_tensor.onnx"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model: its datatype, and its shape without the batch dimension (-1: the length)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model to be served.

    Attributes:
        name: that it is served under.
        path: of the ONNX file.
        inputs: FP32, or INT64 for tokens.
        output: its only one.
        lengths: of its requests, in tokens; one is drawn for each. Empty: the model has no lengths.
        batches: whether requests may be put together; a subject without is served by ours alone.
    """

    name: str
    path: Path
    inputs: tuple[Tensor, ...]
    output: Tensor
    lengths: tuple[int, ...] = ()
    batches: bool = True

    def sample(self, seed: int = 0, length: int = 0) -> dict[str, NDArray[Any]]:
        """A batch of one; `length` 0: the first of `lengths`."""
        rng = np.random.default_rng(seed)
        length = length or (self.lengths[0] if self.lengths else 0)
        made: dict[str, NDArray[Any]] = {}
        for tensor in self.inputs:
            shape = (1, *(length if size < 0 else size for size in tensor.shape))
            if tensor.name == TOKENS:
                made[tensor.name] = rng.integers(*ORDINARY_TOKENS, shape)
            elif tensor.datatype == "INT64":
                made[tensor.name] = np.full(shape, tensor.name == MASK, np.int64)
            else:
                made[tensor.name] = rng.standard_normal(shape).astype(np.float32)
        return made


def minilm(directory: Path) -> Subject:
    """MiniLM, most requests short (at most 16 tokens), a few of 128. Raises FileNotFoundError."""
    return _minilm(directory, "minilm", (8, 12, 16, 16, 128))


def minilm_short(directory: Path) -> Subject:
    """MiniLM with short requests only."""
    return _minilm(directory, "minilm_short", (16,))


def minilm_alone(directory: Path) -> Subject:
    """The same with requests that run one by one."""
    return replace(_minilm(directory, "minilm_alone", (16,)), batches=False)


def least_cosine(subject: Subject, batch: int = 8) -> float:
    """The least cosine similarity of a sample's answer in a batch to its answer alone, in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(subject.path, options, providers=["CPUExecutionProvider"])
    samples = [subject.sample(seed) for seed in range(batch)]
    (together,) = session.run(
        None, {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}
    )
    found = []
    for part, sample in zip(together, samples, strict=True):
        alone = session.run(None, sample)[0].ravel().astype(np.float64)
        found.append(part.ravel() @ alone / np.linalg.norm(part) / np.linalg.norm(alone))
    return float(min(found))


def _minilm(directory: Path, name: str, lengths: tuple[int, ...]) -> Subject:
    del directory
    if not MINILM.is_file():
        raise FileNotFoundError(f"{MINILM} is not there: `make minilm` generates it")
    inputs = tuple(Tensor(each, "INT64", (-1,)) for each in (TOKENS, MASK, "token_type_ids"))
    return Subject(name, MINILM, inputs, Tensor("last_hidden_state", "FP32", (-1, 384)), lengths)


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
    return Subject(name, path, (Tensor(INPUT, "FP32", shape),), Tensor(OUTPUT, "FP32", (classes,)))
