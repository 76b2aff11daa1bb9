"""TFLite: a flatbuffer of subgraphs, whose tensors name buffers, whose bytes are the weights.

The schema is tensorflow/compiler/mlir/lite/schema/schema.fbs; the numbers below are the places of its fields.
Order of work: visit every table that a runtime would follow (so that a file that was cut short is refused
wherever it was cut), note each buffer's bytes, then give every tensor that has bytes a span. Tensors without
bytes (activations), strings, sparse tensors and types of later schemas have no span. A model above 2 GiB
keeps its buffers behind the flatbuffer and states their offset and size; those are spans too.
"""

from __future__ import annotations

from updater.formats import limits
from updater.formats.flatbuffer import Flatbuffer, Table
from updater.formats.layout import arrange, byte_length, elements, quantisation
from updater.formats.source import Source
from updater.formats.span import ELEMENT_BITS, Quantisation, TensorSpan

_IDENTIFIER = b"TFL3"
_HEAD_BYTES = 8  # the offset of the root table, the identifier

_DTYPES = {
    0: "float32",
    1: "float16",
    2: "int32",
    3: "uint8",
    4: "int64",
    6: "bool",
    7: "int16",
    8: "complex64",
    9: "int8",
    10: "float64",
    11: "complex128",
    12: "uint64",
    15: "uint32",
    16: "uint16",
    17: "int4",
    18: "bfloat16",
    19: "int2",
    20: "uint4",
    21: "float8_e4m3fn",
    22: "float8_e5m2",
}

# Fields of the schema's tables.
_MODEL_CODES, _MODEL_SUBGRAPHS, _MODEL_DESCRIPTION, _MODEL_BUFFERS = 1, 2, 3, 4
_MODEL_METADATA, _MODEL_SIGNATURES = 6, 7
_CODE_CUSTOM = 1
_SUBGRAPH_TENSORS, _SUBGRAPH_INPUTS, _SUBGRAPH_OUTPUTS, _SUBGRAPH_OPERATORS, _SUBGRAPH_NAME = 0, 1, 2, 3, 4
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_BUFFER, _TENSOR_NAME, _TENSOR_QUANTISATION = 0, 1, 2, 3, 4
_TENSOR_SPARSITY = 6
_QUANTISATION_SCALE, _QUANTISATION_ZERO_POINT, _QUANTISATION_DETAILS_TYPE, _QUANTISATION_AXIS = 2, 3, 4, 6
_OPERATOR_INPUTS, _OPERATOR_OUTPUTS, _OPERATOR_OPTIONS, _OPERATOR_CUSTOM = 1, 2, 4, 5
_BUFFER_DATA, _BUFFER_OFFSET, _BUFFER_SIZE = 0, 1, 2
_METADATA_NAME = 0
_SIGNATURE_INPUTS, _SIGNATURE_OUTPUTS, _SIGNATURE_KEY = 0, 1, 2
_TENSOR_MAP_NAME = 0


def matches(source: Source) -> bool:
    """Whether the file carries the identifier of TFLite's flatbuffers."""
    return source.data[4:_HEAD_BYTES] == _IDENTIFIER


def may_begin(source: Source) -> bool:
    """Whether the file is too short to tell, and nothing speaks against TFLite."""
    return source.size < _HEAD_BYTES and _IDENTIFIER.startswith(source.data[4:_HEAD_BYTES])


def read(source: Source) -> tuple[TensorSpan, ...]:
    """The spans of a file that `matches`. Raises MODEL_FILE_TRUNCATED or MODEL_FILE_INVALID."""
    model = Flatbuffer(source).root("the model table")
    _visit_texts(model)
    buffers = [
        _buffer_bytes(source, buffer)
        for buffer in model.tables(_MODEL_BUFFERS, "buffer {}".format, limits.MAX_TENSORS)
    ]
    spans = []
    subgraphs = model.tables(_MODEL_SUBGRAPHS, "subgraph {}".format, limits.MAX_TENSORS)
    if not subgraphs:
        raise source.invalid(f"the model table at byte {model.at} has no subgraph")
    tensor_count = 0
    for index, subgraph in enumerate(subgraphs):
        prefix = f"{index}/" if index else ""
        _visit_operators(subgraph)
        tensors = subgraph.tables(_SUBGRAPH_TENSORS, f"tensor {prefix}{{}}".format, limits.MAX_TENSORS)
        tensor_count += len(tensors)
        if tensor_count > limits.MAX_TENSORS:
            raise source.invalid(
                f"subgraph {index} at byte {subgraph.at} has tensors beyond the {limits.MAX_TENSORS} allowed"
            )
        for tensor in tensors:
            span = _span(source, tensor, prefix, buffers)
            if span is not None:
                spans.append(span)
    return arrange(spans)


def _visit_texts(model: Table) -> None:
    model.text(_MODEL_DESCRIPTION, "the description")
    for code in model.tables(_MODEL_CODES, "operator code {}".format, limits.MAX_TENSORS):
        code.text(_CODE_CUSTOM, "the custom code")
    for entry in model.tables(_MODEL_METADATA, "metadata {}".format, limits.MAX_TENSORS):
        entry.text(_METADATA_NAME, "the name")
    for signature in model.tables(_MODEL_SIGNATURES, "signature {}".format, limits.MAX_TENSORS):
        signature.text(_SIGNATURE_KEY, "the key")
        for field in (_SIGNATURE_INPUTS, _SIGNATURE_OUTPUTS):
            for tensor_map in signature.tables(field, "tensor map {}".format, limits.MAX_TENSORS):
                tensor_map.text(_TENSOR_MAP_NAME, "the name")


def _visit_operators(subgraph: Table) -> None:
    subgraph.text(_SUBGRAPH_NAME, "the name")
    subgraph.vector(_SUBGRAPH_INPUTS, 4, "the inputs")
    subgraph.vector(_SUBGRAPH_OUTPUTS, 4, "the outputs")
    for operator in subgraph.tables(_SUBGRAPH_OPERATORS, "operator {}".format, limits.MAX_NODES):
        operator.vector(_OPERATOR_INPUTS, 4, "the inputs")
        operator.vector(_OPERATOR_OUTPUTS, 4, "the outputs")
        operator.table(_OPERATOR_OPTIONS, f"the options of {operator.what}")
        operator.vector(_OPERATOR_CUSTOM, 1, "the custom options")


def _buffer_bytes(source: Source, buffer: Table) -> tuple[int, int]:
    """Offset and length of a buffer's bytes; (0, 0) when it has none."""
    offset, size = buffer.scalar(_BUFFER_OFFSET, "Q"), buffer.scalar(_BUFFER_SIZE, "Q")
    if offset <= 1:  # 0 by default; converters write 1 where they will patch in the offset later
        return buffer.vector(_BUFFER_DATA, 1, "the data")
    if offset + size > source.size:
        raise source.truncated(f"{buffer.what} lies from byte {offset} to byte {offset + size}")
    return offset, size


def _span(source: Source, tensor: Table, prefix: str, buffers: list[tuple[int, int]]) -> TensorSpan | None:
    name = prefix + tensor.text(_TENSOR_NAME, "the name")
    quantised = _quantisation_table(tensor)
    shape = tensor.numbers(_TENSOR_SHAPE, "i", "the shape", limits.MAX_RANK)
    if shape is None:
        raise source.invalid(
            f"{tensor.what} at byte {tensor.at} has more dimensions than the {limits.MAX_RANK} allowed"
        )
    index = tensor.scalar(_TENSOR_BUFFER, "I")
    if index >= max(len(buffers), 1):
        raise source.invalid(
            f"{tensor.what} ({name!r}) at byte {tensor.at} names buffer {index}, "
            f"but the model has {len(buffers)} buffers"
        )
    offset, length = buffers[index] if buffers else (0, 0)
    dtype = _DTYPES.get(tensor.scalar(_TENSOR_TYPE, "b"))
    if length == 0 or dtype is None or tensor.table(_TENSOR_SPARSITY, "the sparsity") is not None:
        return None
    dimensions = tuple(int(dimension) for dimension in shape)
    what = f"{tensor.what} ({name!r})"
    wanted = byte_length(dtype, elements(source, dimensions, what, tensor.at))
    if wanted != length:
        if not dimensions or ELEMENT_BITS[dtype] < 8:
            return None  # of unknown rank, or packed in a way that we do not know
        raise source.invalid(
            f"{what} at byte {tensor.at} has {length} bytes of data at byte {offset}, "
            f"but {dtype} of shape {list(dimensions)} needs {wanted}"
        )
    parameters = _quantisation(quantised, dimensions) if quantised and "int" in dtype else None
    return TensorSpan(name, dtype, dimensions, offset, length, parameters)


def _quantisation_table(tensor: Table) -> Table | None:
    return tensor.table(_TENSOR_QUANTISATION, f"the quantisation of {tensor.what}")


def _quantisation(table: Table, shape: tuple[int, ...]) -> Quantisation | None:
    if table.scalar(_QUANTISATION_DETAILS_TYPE, "B"):
        return None  # custom or blockwise: not one scale for each slice
    limit = limits.MAX_QUANTISATION_PARAMETERS
    counts = [
        table.vector(_QUANTISATION_SCALE, 4, "the scales")[1],
        table.vector(_QUANTISATION_ZERO_POINT, 8, "the zero points")[1],
    ]
    if not table.buffer.source.spend_parameters(sum(counts)):
        return None
    scales = table.numbers(_QUANTISATION_SCALE, "f", "the scales", limit)
    zero_points = table.numbers(_QUANTISATION_ZERO_POINT, "q", "the zero points", limit)
    if scales is None or zero_points is None:
        return None
    axis = table.scalar(_QUANTISATION_AXIS, "i")
    if axis < 0:
        return None
    return quantisation(scales, [int(point) for point in zero_points], shape, axis)
