"""What a reader says about a model file: its format and where each tensor's elements lie in its bytes.

A span is a claim about bytes, not a copy of them: whoever codes a delta maps the file and reads
`length` bytes at `offset` as a row-major, little-endian array of `dtype` and `shape`. Rules that every
reader keeps: spans lie inside the file, are sorted by offset and never overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantisation:
    """How a tensor's integers stand for reals: real = scale * (code - zero_point).

    Attributes:
        scales: one, or one for each slice along `axis`, or, with a block, one for each `block` elements along
            `axis` and for each step of the other axes, row by row; exactly as the file has them (float32).
        zero_points: as many as scales.
        axis: the dimension that the scales run along, 0 or more; None for one scale for the whole tensor.
        block: elements along `axis` that share a scale, which divide it; 0 where whole slices do.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int | None
    block: int = 0

    def groups(self, shape: tuple[int, ...]) -> int:
        """How many scales a tensor of this shape has, if they are those of blocks; 0 if these do not fit."""
        if not self.block or self.axis is None or self.axis >= len(shape) or shape[self.axis] % self.block:
            return 0
        return math.prod(shape) // self.block


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor's elements lie in a file.

    Attributes:
        name: as in the file; a tensor of a subgraph or second graph has its path before it. May be empty.
        dtype: the element type, a key of `ELEMENT_BITS`.
        shape: elements along each dimension; () for a scalar.
        offset: bytes from the start of the file.
        length: bytes; equals the elements of `shape` times the element's size, except for elements smaller
            than a byte, which are packed two or more to a byte and padded at the end.
        quantisation: how to read the codes as reals, if the file says so and the reader understands it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    quantisation: Quantisation | None = None


@dataclass(frozen=True)
class ModelFile:
    """What a reader found in one file.

    Attributes:
        format: "onnx", "tflite", "safetensors" or "opaque" (any other file: no spans).
        size: bytes.
        spans: sorted by offset, never overlapping, all inside the file.
        external: names of external data files that an ONNX model refers to, relative to its directory.
    """

    format: str
    size: int
    spans: tuple[TensorSpan, ...]
    external: tuple[str, ...] = ()


# Bits of one element of each dtype that a span can have.
ELEMENT_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float64": 64,
    "complex64": 64,
    "complex128": 128,
    "bool": 8,
    "int8": 8,
    "uint8": 8,
    "int16": 16,
    "uint16": 16,
    "int32": 32,
    "uint32": 32,
    "int64": 64,
    "uint64": 64,
    "int2": 2,
    "uint2": 2,
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
}
