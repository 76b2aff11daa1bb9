"""Which ONNX weights are quantised, and how, read from the wiring of the graph.

ONNX keeps scales and zero points as tensors of their own; only the operator that consumes a weight tells
which belong to it. Three wirings are known, then names:

1. Operators that take a weight with its scale and zero point: DequantizeLinear, the QLinear operators, and
   those of the com.microsoft domain (`_RULES`). One scale may pass through operators that only move elements
   (Gather of a quantised embedding, then DequantizeLinear).
2. MatMulInteger and ConvInteger, which dynamic quantisation makes: they take the zero point; the scale joins
   later, as the only constant multiplied into the cast result.
3. The names that ONNX Runtime's quantiser gives: W_quantized, W_scale, W_zero_point.

Scales of blocks are those of DequantizeLinear's `block_size`. Blocks that do not divide their axis and scales
that are not constant are left alone: no quantisation is always a safe answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from updater.formats.layout import quantisation
from updater.formats.onnx_tensor import Tensor, TensorReader
from updater.formats.span import Quantisation

_PER_TENSOR = -100  # no axis of any tensor: several scales are not understood
_MAX_STEPS = 8  # nodes between an integer product and the multiplication by its scale


@dataclass(frozen=True)
class Node:
    """A node that matters here: its type, inputs ("" where left out), first output, integer attributes."""

    op_type: str
    inputs: tuple[str, ...]
    output: str
    ints: dict[str, int]

    def input(self, index: int) -> str:
        """An input's name, "" when left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class Graph:
    """The tensors and kept nodes of one graph.

    Attributes:
        path: what to put before the names of its tensors; "" for the model's own graph.
        parent: the graph whose names are visible here too.
    """

    path: str
    parent: Graph | None
    nodes: list[Node] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    by_name: dict[str, Tensor] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> None:
        """Adds a tensor; the first of a name keeps it."""
        self.tensors.append(tensor)
        self.by_name.setdefault(tensor.name, tensor)

    def find(self, name: str) -> Tensor | None:
        """The constant tensor of that name here or in a graph around."""
        graph: Graph | None = self
        while graph is not None and name:
            if name in graph.by_name:
                return graph.by_name[name]
            graph = graph.parent
        return None


@dataclass(frozen=True)
class _Rule:
    """Inputs of an operator that belong together, and the weight's axis that several scales run along."""

    weight: int
    scale: int
    zero_point: int
    axis: int = _PER_TENSOR


_RULES = {
    "DequantizeLinear": (_Rule(0, 1, 2),),  # the axis is an attribute
    "QLinearConv": (_Rule(3, 4, 5, axis=0), _Rule(0, 1, 2)),
    "QLinearMatMul": (_Rule(3, 4, 5, axis=-1), _Rule(0, 1, 2)),
    "QGemm": (_Rule(3, 4, 5, axis=-1), _Rule(0, 1, 2)),  # the axis depends on transB
    "QLinearAdd": (_Rule(0, 1, 2), _Rule(3, 4, 5)),
    "QLinearMul": (_Rule(0, 1, 2), _Rule(3, 4, 5)),
    "DynamicQuantizeMatMul": (_Rule(1, 2, 3, axis=-1),),
    "MatMulIntegerToFloat": (_Rule(1, 3, 5, axis=-1),),
    "DynamicQuantizeLSTM": (_Rule(1, 8, 9), _Rule(2, 10, 11)),
    "QAttention": (_Rule(1, 4, 7, axis=-1),),
}
_INTEGER_OPS = {"MatMulInteger": _Rule(1, -1, 3, axis=-1), "ConvInteger": _Rule(1, -1, 3, axis=0)}
_MOVING_OPS = ("Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
WIRED_OPS = frozenset([*_RULES, *_INTEGER_OPS, *_MOVING_OPS, "Cast", "Mul"])


def wire(graphs: list[Graph], reader: TensorReader) -> dict[Tensor, Quantisation]:
    """The quantisation of each weight for which one is found."""
    found: dict[Tensor, Quantisation] = {}
    for graph in graphs:
        wiring = _Wiring(graph, reader)
        for weight, parameters in wiring.found():
            found.setdefault(weight, parameters)
    for graph in graphs:
        for tensor in graph.tensors:
            named = None if tensor in found else _by_name(graph, tensor, reader)
            if named is not None:
                found[tensor] = named
    return found


class _Wiring:
    """The nodes of one graph by what they make and take."""

    def __init__(self, graph: Graph, reader: TensorReader) -> None:
        self.graph = graph
        self.reader = reader
        self.makers = {node.output: node for node in graph.nodes}
        self.takers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            if node.op_type in ("Cast", "Mul"):
                for name in set(node.inputs):
                    self.takers[name].append(node)

    def found(self) -> Iterator[tuple[Tensor, Quantisation]]:
        for node in self.graph.nodes:
            for rule in _RULES.get(node.op_type, ()):
                block = node.ints.get("block_size", 0)
                if block < 0:
                    continue
                weight, moved = self._weight(node.input(rule.weight))
                scale = self.graph.find(node.input(rule.scale))
                zero_point = node.input(rule.zero_point)
                axis = _PER_TENSOR if moved else _axis(node, rule)
                parameters = self._parameters(weight, scale, zero_point, axis, block)
                if weight is not None and parameters is not None:
                    yield weight, parameters
            if node.op_type in _INTEGER_OPS:
                rule = _INTEGER_OPS[node.op_type]
                weight = self.graph.find(node.input(rule.weight))
                scale = self._scale_after(node.output)
                parameters = self._parameters(weight, scale, node.input(rule.zero_point), rule.axis)
                if weight is not None and parameters is not None:
                    yield weight, parameters

    def _weight(self, name: str) -> tuple[Tensor | None, bool]:
        """The constant behind a name, through nodes that only move elements; and whether there were any."""
        for step in range(_MAX_STEPS):
            tensor = self.graph.find(name)
            if tensor is not None:
                return tensor, step > 0
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in _MOVING_OPS:
                break
            name = maker.input(0)
        return None, False

    def _scale_after(self, name: str) -> Tensor | None:
        """The one constant that is multiplied into an integer product on its way on."""
        for _ in range(_MAX_STEPS):
            takers = self.takers.get(name, [])
            if len(takers) != 1:
                return None
            taker = takers[0]
            if taker.op_type == "Mul":
                others = [other for other in taker.inputs if other != name]
                maker = self.makers.get(others[0]) if others else None
                if maker is not None and maker.op_type == "Mul":
                    others = list(maker.inputs)
                constants = [tensor for other in others if (tensor := self.graph.find(other)) is not None]
                if constants:
                    return constants[0] if len(constants) == 1 else None
            name = taker.output
        return None

    def _parameters(
        self, weight: Tensor | None, scale: Tensor | None, zero_point: str, axis: int, block: int = 0
    ) -> Quantisation | None:
        if weight is None or scale is None:
            return None
        zero: Tensor | None = self.graph.find(zero_point)
        if zero_point and zero is None:
            return None  # computed when the model runs
        return parameters_of(self.reader, weight, scale, zero, axis, block)


def parameters_of(
    reader: TensorReader, weight: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int = 0
) -> Quantisation | None:
    """The quantisation of integers by a scale and perhaps a zero point; None if they do not fit.

    With a block, scales have the shape of the weight, but for the axis, which has one for each block.
    """
    if "int" not in (weight.dtype or "") or "float" not in (scale.dtype or ""):
        return None
    if block:
        steps = list(weight.shape)
        if not -len(steps) <= axis < len(steps) or steps[axis] % block:
            return None  # moved, or a last block of fewer elements
        steps[axis] //= block
        if scale.shape != tuple(steps):
            return None
    elif max(len(scale.shape), 1) > 1 and scale.count != max(scale.shape):
        return None  # scales along more than one axis
    if not reader.source.spend_parameters(scale.count + (zero_point.count if zero_point else 0)):
        return None
    scales = reader.values(scale)
    zero_points: list[float] | None = [] if zero_point is None else reader.values(zero_point)
    if scales is None or zero_points is None:
        return None
    return quantisation(scales, [int(point) for point in zero_points], weight.shape, axis, block)


def _axis(node: Node, rule: _Rule) -> int:
    if node.op_type == "DequantizeLinear":
        return node.ints.get("axis", 1)
    if node.op_type == "QGemm" and node.ints.get("transB"):
        return 0
    return rule.axis


def _by_name(graph: Graph, tensor: Tensor, reader: TensorReader) -> Quantisation | None:
    name = tensor.name.removesuffix("_quantized")
    if name == tensor.name:
        return None
    scale = graph.find(name + "_scale")
    if scale is None:
        return None
    return parameters_of(reader, tensor, scale, graph.find(name + "_zero_point"), _PER_TENSOR)
