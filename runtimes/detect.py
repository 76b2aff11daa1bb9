"""Tells model formats apart by content, never by name.

TensorFlow Lite files carry a FlatBuffers identifier at byte 4. ONNX files are a bare protobuf message
without a mark, so the top-level fields are walked: they must be fields of ModelProto, with its wire
types, and hold the graph. A file cut short still counts as ONNX, so that the error a reader gets is about
the cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from runtimes.interface import ModelRejected

ONNX = "onnx"
TFLITE = "tflite"

_TFLITE_IDENTIFIER = b"TFL3"

_VARINT, _LENGTH_DELIMITED = 0, 2
# Field number to wire type of onnx.ModelProto: ir_version, producer_name, producer_version, domain,
# model_version, doc_string, graph, opset_import, metadata_props, training_info, functions, configuration.
_MODEL_PROTO = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_GRAPH = 7
_MAX_FIELDS = (
    10_000  # top-level fields looked at; real files have about a dozen, functions and properties more
)
_MAX_FIELD_BYTES = 2**31  # protobuf's limit for a message


def detect_format(path: Path) -> str:
    """What the file is: "onnx", "tflite", or "" if neither.

    Raises:
        ModelRejected: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head[4:8] == _TFLITE_IDENTIFIER:
                return TFLITE
            file.seek(0)
            return ONNX if _is_onnx(file) else ""
    except OSError as error:
        raise ModelRejected(
            f"the model file {path} cannot be read: {error.strerror or error}", obj=str(path)
        ) from error


def _is_onnx(file: BinaryIO) -> bool:
    for _ in range(_MAX_FIELDS):
        key = _varint(file)
        if key is None or _MODEL_PROTO.get(key >> 3) != key & 7:
            return False
        if key >> 3 == _GRAPH:
            return True
        value = _varint(file)
        if value is None or (key & 7 == _LENGTH_DELIMITED and value > _MAX_FIELD_BYTES):
            return False
        if key & 7 == _LENGTH_DELIMITED:
            file.seek(value, 1)
    return False


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
