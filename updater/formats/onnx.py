"""ONNX: a protobuf of graphs, whose initializers and constants are the weights.

The schema is https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; the numbers below are its fields. The
reader walks the wire format in the mapped file (why, see `protobuf.py`): model, graphs, initializers,
`Constant` nodes and other tensor attributes, subgraphs in attributes, functions. Order of work: every message
that can hold a tensor, then the wiring of quantisation (`onnx_quantisation.py`), then spans. Sparse
initializers and training graphs are passed over.

ONNX has no magic bytes. A file is ONNX when its fields, read as a ModelProto, are all known ones of the right
type with believable texts until a graph has come that begins as graphs do, and an ir_version was among them.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from updater.formats import limits
from updater.formats.layout import arrange
from updater.formats.onnx_external import External, locate
from updater.formats.onnx_quantisation import WIRED_OPS, Graph, Node, wire
from updater.formats.onnx_tensor import TensorReader
from updater.formats.protobuf import LENGTH, VARINT, Field, Walker
from updater.formats.source import Source
from updater.formats.span import TensorSpan

# Fields of the schema's messages.
_MODEL_IR_VERSION, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 1, 7, 8, 25
_MODEL_WIRES = {1: VARINT, 2: LENGTH, 3: LENGTH, 4: LENGTH, 5: VARINT, 6: LENGTH, 7: LENGTH, 8: LENGTH}
_MODEL_WIRES |= {14: LENGTH, 20: LENGTH, 25: LENGTH, 26: LENGTH}
_MODEL_TEXTS = (2, 3, 4)
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
# First bytes of the tags of its fields.
_GRAPH_TAGS = (*(number << 3 | LENGTH for number in (1, 2, 5, 10, 11, 12, 13, 14, 15)), 0x82)
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 1, 3, 5, 6
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 10, 11
_FUNCTION_NAME, _FUNCTION_NODE = 1, 7

_MAX_IR_VERSION = 127
_MAX_FIELD_HEAD_BYTES = 20  # two varints
_OPSET_SINCE_IR_VERSION = 3  # from here on a model states its opsets
_WIRED_INTS = ("axis", "block_size", "transB")
_MAX_NODE_INPUTS = 64  # that the wiring looks at


@dataclass
class OnnxModel:
    """The spans of an ONNX model in its own file, and those in external files by their location."""

    spans: tuple[TensorSpan, ...]
    external: dict[str, list[External]] = field(default_factory=dict)


def matches(source: Source) -> bool:
    """Whether the file reads as a ModelProto at least into its graph."""
    return _recognise(source)[0]


def may_begin(source: Source) -> bool:
    """Whether the file ends before its graph, and nothing speaks against ONNX."""
    matched, faultless = _recognise(source)
    return faultless and not matched


def read(source: Source) -> OnnxModel:
    """The spans of a file that `matches`. Raises MODEL_FILE_TRUNCATED or MODEL_FILE_INVALID."""
    return _Reader(source).model()


def _recognise(source: Source) -> tuple[bool, bool]:
    """Whether the file is ONNX, and whether it reads as a ModelProto up to its end, cut or not."""
    walker = Walker(source)
    seen: set[int] = set()
    position = 0
    while position < source.size:
        part = walker.head(position)
        if part is None:  # the head of a field is cut, or it is none
            return False, source.size - position < _MAX_FIELD_HEAD_BYTES
        if _MODEL_WIRES.get(part.number) != part.wire or not _believable(source, part):
            return False, False
        seen.add(part.number)
        if {_MODEL_IR_VERSION, _MODEL_GRAPH} <= seen:
            # A graph of which no byte is left does not tell yet.
            return part.start < source.size, True
        position = part.end
    return False, True


def _believable(source: Source, part: Field) -> bool:
    """Whether a field of the model could be one of a real model, as far as the file holds it."""
    if part.number == _MODEL_IR_VERSION:
        return 1 <= part.start <= _MAX_IR_VERSION
    if part.number == _MODEL_GRAPH and part.start < min(part.end, source.size):
        return source.data[part.start] in _GRAPH_TAGS
    if part.number in _MODEL_TEXTS:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(source.data[part.start : part.end][: limits.MAX_HEAD_TEXT_BYTES])
        except UnicodeDecodeError:
            return False
        return part.end - part.start <= limits.MAX_HEAD_TEXT_BYTES and text.isprintable()
    return True


class _Reader:
    """Walks one model; graphs and what they hold gather in lists, bounded by the limits."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.walker = Walker(source)
        self.tensor_reader = TensorReader(self.walker)
        self.graphs: list[Graph] = []
        self.nodes_left = limits.MAX_NODES

    def model(self) -> OnnxModel:
        ir_version = 0
        numbers: set[int] = set()
        main = Graph("", None)
        self.graphs.append(main)
        functions = 0
        for part in self.walker.fields(0, self.source.size, "the model", outermost=True):
            numbers.add(part.number)
            if part.number in _MODEL_WIRES and _MODEL_WIRES[part.number] != part.wire:
                raise self.source.invalid(
                    f"field {part.number} of the model, before byte {part.end}, has wire type {part.wire} "
                    f"instead of {_MODEL_WIRES[part.number]}"
                )
            if part.number == _MODEL_IR_VERSION:
                ir_version = part.start
            elif part.number == _MODEL_GRAPH:
                self._graph(part, main, 0)
            elif part.number == _MODEL_FUNCTION:
                self._function(part, functions)
                functions += 1
        if _MODEL_GRAPH not in numbers:
            raise self.source.truncated("a model's graph should follow")
        if ir_version >= _OPSET_SINCE_IR_VERSION and _MODEL_OPSET not in numbers:
            raise self.source.truncated(f"a model of IR version {ir_version} states its operator sets")
        return self._spans()

    def _graph(self, part: Field, graph: Graph, depth: int) -> None:
        if depth > limits.MAX_GRAPH_DEPTH:
            raise self.source.invalid(
                f"the graph at byte {part.start} lies deeper than the {limits.MAX_GRAPH_DEPTH} levels allowed"
            )
        what = f"graph {graph.path!r}" if graph.path else "the graph"
        for member in self.walker.fields(part.start, part.end, what):
            if member.wire != LENGTH:
                continue
            if member.number == _GRAPH_NODE:
                self._node(member, graph, depth)
            elif member.number == _GRAPH_INITIALIZER:
                graph.add(self.tensor_reader.read(member.start, member.end))

    def _function(self, part: Field, index: int) -> None:
        graph = Graph(f"function{index}/", None)
        self.graphs.append(graph)
        for member in self.walker.fields(part.start, part.end, f"function {index}"):
            if member.number == _FUNCTION_NAME and member.wire == LENGTH:
                graph.path = self.source.text(member.start, member.end, "the name of a function") + "/"
            elif member.number == _FUNCTION_NODE and member.wire == LENGTH:
                self._node(member, graph, 0)

    def _node(self, part: Field, graph: Graph, depth: int) -> None:
        op_type = name = ""
        inputs: list[Field] = []
        outputs: list[Field] = []
        attributes: list[Field] = []
        for member in self.walker.fields(part.start, part.end, "a node"):
            if member.wire != LENGTH:
                continue
            if member.number == _NODE_INPUT and len(inputs) < _MAX_NODE_INPUTS:
                inputs.append(member)
            elif member.number == _NODE_OUTPUT and not outputs:
                outputs.append(member)
            elif member.number == _NODE_NAME:
                name = self.source.text(member.start, member.end, "the name of a node")
            elif member.number == _NODE_OP_TYPE:
                op_type = self.source.text(member.start, member.end, "the type of a node")
            elif member.number == _NODE_ATTRIBUTE:
                attributes.append(member)
        output = "".join(self._texts(outputs, "the name of an output"))
        ints: dict[str, int] = {}
        for attribute in attributes:
            self._attribute(attribute, graph, depth, op_type, name or output or op_type, output, ints)
        if op_type in WIRED_OPS:
            self.nodes_left -= 1
            if self.nodes_left < 0:
                raise self.source.invalid(
                    f"at byte {part.start} lies one quantised node more than the {limits.MAX_NODES} allowed"
                )
            graph.nodes.append(Node(op_type, tuple(self._texts(inputs, "an input")), output, ints))

    def _texts(self, parts: list[Field], what: str) -> list[str]:
        return [self.source.text(part.start, part.end, what) for part in parts]

    def _attribute(
        self,
        part: Field,
        graph: Graph,
        depth: int,
        op_type: str,
        node: str,
        output: str,
        ints: dict[str, int],
    ) -> None:
        name = ""
        number = 0
        tensors: list[Field] = []
        graphs: list[Field] = []
        for member in self.walker.fields(part.start, part.end, "an attribute"):
            if member.number == _ATTRIBUTE_INT and member.wire == VARINT:
                number = member.start - (1 << 64) if member.start >> 63 else member.start
            elif member.wire != LENGTH:
                continue
            elif member.number == _ATTRIBUTE_NAME:
                name = self.source.text(member.start, member.end, "the name of an attribute")
            elif member.number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                tensors.append(member)
            elif member.number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                graphs.append(member)
        if name in _WIRED_INTS:
            ints[name] = number
        for index, member in enumerate(tensors):
            tensor = self.tensor_reader.read(member.start, member.end, f"{node}.{name}.{index}")
            if op_type == "Constant" and output:
                tensor.name = output  # by which other nodes know it
            graph.add(tensor)
        for index, member in enumerate(graphs):
            inner = Graph(f"{graph.path}{node}.{name}{index or ''}/", graph)
            self.source.spend_text(len(inner.path), "the path of a graph", member.start)
            self.graphs.append(inner)
            self._graph(member, inner, depth + 1)

    def _spans(self) -> OnnxModel:
        quantised = wire(self.graphs, self.tensor_reader)
        spans: list[TensorSpan] = []
        external: dict[str, list[External]] = {}
        for graph in self.graphs:
            for tensor in graph.tensors:
                self.source.spend_text(len(graph.path), "the path of a tensor", tensor.at)
                name = graph.path + tensor.name
                parameters = quantised.get(tensor)
                if tensor.external is not None:
                    found = locate(self.source, tensor, name, parameters)
                    external.setdefault(found.location, []).append(found)
                    continue
                place = self.tensor_reader.place(tensor)
                if place is not None:
                    dtype, start, end = place
                    spans.append(TensorSpan(name, dtype, tensor.shape, start, end - start, parameters))
        return OnnxModel(arrange(spans), external)
