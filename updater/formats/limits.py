"""Every limit of the model readers, with its unit. Real files stay far below; hostile ones are refused."""

from __future__ import annotations

# A tensor: dimensions, and elements along all of them.
MAX_RANK = 64
MAX_ELEMENTS = 1 << 40

# A file: tensors, and bytes of any one name in it.
MAX_TENSORS = 1 << 18
MAX_NAME_BYTES = 1 << 14

# Scales or zero points of one tensor that are decoded (elements); more: no quantisation.
MAX_QUANTISATION_PARAMETERS = 1 << 16

# ONNX: protobuf fields visited (this bounds the time: about a microsecond each), graphs within graphs,
# nodes kept for the wiring of quantisation, and numbers kept that lie outside packed arrays.
MAX_PROTOBUF_FIELDS = 1 << 23
MAX_GRAPH_DEPTH = 32
MAX_NODES = 1 << 18
MAX_LOOSE_NUMBERS = 1 << 18

# ONNX: bytes of each text at the head of a model (producer, domain) for it to look like ONNX.
MAX_HEAD_TEXT_BYTES = 1 << 12

# TFLite: flatbuffer tables visited (about three microseconds each).
MAX_FLATBUFFER_TABLES = 1 << 20

# safetensors: bytes of the JSON header (about 130,000 tensors); parsing takes some 10 bytes a byte.
MAX_SAFETENSORS_HEADER_BYTES = 16 << 20

# How much of a file is looked at in one piece, in bytes, where a whole array must be read.
PIECE_BYTES = 1 << 20
