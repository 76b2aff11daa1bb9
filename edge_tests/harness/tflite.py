"""Writes TensorFlow Lite files without TensorFlow.

The file is a FlatBuffer; its schema ships inside ai-edge-litert. `Graph` collects tensors and operators
of one subgraph, and `Graph.finish` packs them with one signature. Buffers are aligned to 16 bytes, as the
schema's `force_align` asks and as converters do (the generated Python classes alone do not).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
SIGNATURE_KEY = "serving_default"
_BUFFER_ALIGNMENT = 16

_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "bool": schema.TensorType.BOOL,
    "string": schema.TensorType.STRING,
}


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16 in the file."""

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 (the generated name)
        vector = None
        if self.data is not None:
            payload = bytes(self.data)
            builder.StartVector(1, len(payload), _BUFFER_ALIGNMENT)
            builder.head = builder.head - len(payload)
            builder.Bytes[builder.head : builder.head + len(payload)] = payload
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


@dataclass(frozen=True)
class Quantisation:
    """real = scale * (code - zero_point)."""

    scale: float
    zero_point: int = 0


@dataclass
class Graph:
    """One subgraph under construction; tensors are named by the index that `tensor` returns."""

    tensors: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    codes: dict[tuple[int, int, str], int] = field(default_factory=dict)
    buffers: list[Any] = field(default_factory=lambda: [_AlignedBuffer()])  # buffer 0 is the empty one

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        *,
        data: NDArray[Any] | bytes | None = None,
        quantisation: Quantisation | None = None,
    ) -> int:
        """Adds a tensor; a -1 in `shape` varies (and is 1 until the interpreter resizes it)."""
        item = schema.TensorT()
        item.name = name
        item.shape = [max(1, dimension) for dimension in shape]
        if -1 in shape:
            item.shapeSignature = list(shape)
        item.type = _TYPES[dtype]
        item.hasRank = True
        if data is not None:
            buffer = _AlignedBuffer()
            buffer.data = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
            self.buffers.append(buffer)
            item.buffer = len(self.buffers) - 1
        if quantisation is not None:
            item.quantization = schema.QuantizationParametersT()
            item.quantization.scale = np.array([quantisation.scale], np.float32)
            item.quantization.zeroPoint = np.array([quantisation.zero_point], np.int64)
        self.tensors.append(item)
        return len(self.tensors) - 1

    def operator(
        self,
        code: int,
        inputs: list[int],
        outputs: list[int],
        *,
        version: int = 1,
        options_type: int = 0,
        options: Any = None,
        custom: str = "",
    ) -> None:
        """Appends an operator; operators run in the order in which they were added."""
        item = schema.OperatorT()
        item.opcodeIndex = self.codes.setdefault((code, version, custom), len(self.codes))
        item.inputs, item.outputs = inputs, outputs
        item.builtinOptionsType, item.builtinOptions = options_type, options
        self.operators.append(item)

    def fully_connected(
        self, inputs: list[int], output: int, *, version: int = 1, relu: bool = False
    ) -> None:
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = (
            schema.ActivationFunctionType.RELU if relu else schema.ActivationFunctionType.NONE
        )
        self.operator(
            schema.BuiltinOperator.FULLY_CONNECTED,
            inputs,
            [output],
            version=version,
            options_type=schema.BuiltinOptions.FullyConnectedOptions,
            options=options,
        )

    def softmax(self, source: int, output: int, *, version: int = 1) -> None:
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        self.operator(
            schema.BuiltinOperator.SOFTMAX,
            [source],
            [output],
            version=version,
            options_type=schema.BuiltinOptions.SoftmaxOptions,
            options=options,
        )

    def finish(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        signature: str = SIGNATURE_KEY,
        description: str = "sluice test model",
    ) -> bytes:
        """The file's bytes. `inputs` and `outputs` map names to tensors; signature "" leaves it out."""
        subgraph = schema.SubGraphT()
        subgraph.name = "main"
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs = list(inputs.values()), list(outputs.values())
        model = schema.ModelT()
        model.version = SCHEMA_VERSION
        model.description = description
        model.subgraphs = [subgraph]
        model.buffers = self.buffers
        model.operatorCodes = [_operator_code(*key) for key in self.codes]
        if signature:
            definition = schema.SignatureDefT()
            definition.signatureKey = signature
            definition.subgraphIndex = 0
            definition.inputs = [_tensor_map(name, index) for name, index in inputs.items()]
            definition.outputs = [_tensor_map(name, index) for name, index in outputs.items()]
            model.signatureDefs = [definition]
        builder = flatbuffers.Builder(4096)
        builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
        return bytes(builder.Output())

    def write(self, path: Path, inputs: dict[str, int], outputs: dict[str, int], **options: Any) -> Path:
        path.write_bytes(self.finish(inputs, outputs, **options))
        return path


def _operator_code(code: int, version: int, custom: str) -> Any:
    item = schema.OperatorCodeT()
    item.builtinCode = code
    item.deprecatedBuiltinCode = min(code, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    item.version = version
    item.customCode = custom or None
    return item


def _tensor_map(name: str, index: int) -> Any:
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name, index
    return item
