"""Every limit of the model readers, with its unit. Real files stay far below; hostile ones are refused."""

from __future__ import annotations

# A tensor: dimensions, and elements along all of them.
MAX_RANK = 64
MAX_ELEMENTS = 1 << 40

# A file: tensors, bytes of any one name in it, and bytes of all names read. A hostile file lets many tensors
# share one long name, so that a small file would make much text.
MAX_TENSORS = 1 << 18
MAX_NAME_BYTES = 1 << 14
MAX_TEXT_BYTES = 64 << 20

# Scales and zero points decoded: of one tensor, and of all tensors of a file, for they may be shared too
# (elements). Beyond either, tensors get no quantisation.
MAX_QUANTISATION_PARAMETERS = 1 << 20
MAX_ALL_QUANTISATION_PARAMETERS = 1 << 22

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

# safetensors: bytes of the JSON header (about 30,000 tensors); parsing one takes up to 30 bytes a byte.
MAX_SAFETENSORS_HEADER_BYTES = 4 << 20

# How much of a file is looked at in one piece, in bytes, where a whole array must be read.
PIECE_BYTES = 1 << 20
