"""The layers of two model files that an approximate update may change, and the file that it makes of them.

A layer is a tensor of the target with a counterpart of the same type and shape in the base: by name, or,
where names differ, the next unpaired one of that type and shape. Floats of 16 to 64 bits and 8-bit codes
with two or more dimensions and MIN_ELEMENTS elements count; biases, norms and scales are small, matter
much, and stay exact.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors
from updater.formats import read_model
from updater.formats.span import ModelFile, Quantisation, TensorSpan

MIN_ELEMENTS = 64  # of a tensor that is worth approximating
FLOATS = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}  # explicit bits of the significand
CODES = {"int8": (-128, 127), "uint8": (0, 255)}
_WORDS = {
    "float16": "<u2",
    "bfloat16": "<u2",
    "float32": "<u4",
    "float64": "<u8",
    "int8": "<i1",
    "uint8": "<u1",
}

Words = NDArray[Any]
Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """One tensor on both sides, as the words of its elements, flat.

    Attributes:
        name: in the target.
        dtype: a key of FLOATS or CODES.
        shape: of both.
        offset: of the first byte in the target's file.
        base: the base's words: unsigned for floats, the codes themselves for 8-bit integers.
        target: the target's.
        old: of integers: the base's scales; None when the file has none.
        new: the target's, likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    base: Words
    target: Words
    old: Quantisation | None = None
    new: Quantisation | None = None

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def rows(self) -> int:
        """Slices along the first dimension."""
        return self.shape[0]

    @property
    def size(self) -> int:
        return self.base.size

    @cached_property
    def start(self) -> Words:
        """The words that an update begins from: the base's; of codes, its reals on the target's scale."""
        if self.is_float or self.old is None or self.new is None or self.old == self.new:
            return self.base
        reals = _reals(self.base, self.old, self.shape)
        scale, zero = _per_element(self.new, self.shape)
        with np.errstate(all="ignore"):
            codes = np.rint(np.nan_to_num(reals / scale, posinf=0.0, neginf=0.0)) + zero
        return np.clip(codes, *CODES[self.dtype]).reshape(-1).astype(self.base.dtype)

    def values(self, words: Words) -> Reals:
        """The real numbers that words stand for in the target, float64, flat."""
        if self.is_float:
            return decode(words, self.dtype)
        return _reals(words, self.new, self.shape)

    def change(self) -> Reals:
        """What the update changes: wanted values less those it begins from, float64, flat."""
        return self.values(self.target) - self.values(self.start)


def decode(words: Words, dtype: str) -> Reals:
    """The values of float words."""
    floats = (
        (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if dtype == "bfloat16"
        else words.view(words.dtype.str.replace("u", "f"))
    )
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaNs
        return floats.astype(np.float64)


def encode(values: Reals, dtype: str) -> Words:
    """The float words nearest to values, ties to even; bfloat16 through float32."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            words = np.dtype(_WORDS[dtype])
            return values.astype(words.str.replace("u", "f")).view(words)
        wide = values.astype("<f4").view("<u4")
    even = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
    half: Words = ((wide + even) >> np.uint32(16)).astype("<u2")
    return half


def find_layers(base: Path, target: Path) -> list[Layer]:
    """The layers of two files that may be approximated, in the order of the target.

    Layers that are equal on both sides, and those with a NaN or infinity, are left out: they stay as they
    are.

    Raises:
        SluiceError: MODEL_FILE_INVALID if either file has no tensors that can be read, keeps weights in
        other files,
            or if no layer differs; as `read_model`.
    """
    old, new = _model(base), _model(target)
    layers = []
    base_bytes, target_bytes = _mapped(base), _mapped(target)
    for span, origin in _pairs(old, new):
        words = np.dtype(_WORDS[span.dtype])
        layer = Layer(
            span.name,
            span.dtype,
            span.shape,
            span.offset,
            np.frombuffer(base_bytes, words, span.length // words.itemsize, origin.offset),
            np.frombuffer(target_bytes, words, span.length // words.itemsize, span.offset),
            origin.quantisation,
            span.quantisation,
        )
        if np.array_equal(layer.start, layer.target):
            continue
        if bool(
            np.isfinite(layer.values(layer.base)).all() and np.isfinite(layer.values(layer.target)).all()
        ):
            layers.append(layer)
    if not layers:
        raise SluiceError(
            errors_pb2.MODEL_FILE_INVALID,
            f"{base} and {target} share no weights that differ and could be approximated: tensors of the "
            f"same type and shape, two or more dimensions and at least {MIN_ELEMENTS} elements",
            hint="use the exact delta: `sluice delta create`",
            obj=str(target),
        )
    return layers


def write_file(target: Path, layers: list[Layer], words: list[Words], out: Path) -> None:
    """Writes the target's bytes with other words for its layers; `out` appears only when it is complete."""
    with os_errors("reading", target):
        data = bytearray(target.read_bytes())
    for layer, found in zip(layers, words, strict=True):
        plain = np.ascontiguousarray(found, np.dtype(_WORDS[layer.dtype])).tobytes()
        data[layer.offset : layer.offset + len(plain)] = plain
    write_atomic(out, bytes(data))


def _model(path: Path) -> ModelFile:
    model = read_model(path)
    if model.external:
        raise SluiceError(
            errors_pb2.MODEL_FILE_INVALID,
            f"{path} keeps weights in other files ({', '.join(model.external[:3])}), never approximated",
            hint="store the weights inside the model file",
            obj=str(path),
        )
    return model


def _mapped(path: Path) -> Words:
    with os_errors("reading", path):
        return np.memmap(path, np.uint8, "r")


def _pairs(old: ModelFile, new: ModelFile) -> list[tuple[TensorSpan, TensorSpan]]:
    """The target's spans that count, each with its counterpart."""
    free: dict[tuple[str, tuple[int, ...]], list[TensorSpan]] = defaultdict(list)
    for span in old.spans:
        if _counts(span):
            free[span.dtype, span.shape].append(span)
    wanted = [span for span in new.spans if _counts(span)]
    found: dict[int, TensorSpan] = {}
    for index, span in enumerate(wanted):
        group = free[span.dtype, span.shape]
        same = next((origin for origin in group if origin.name == span.name and span.name), None)
        if same is not None:
            group.remove(same)
            found[index] = same
    for index, span in enumerate(wanted):
        group = free[span.dtype, span.shape]
        if index not in found and group:
            found[index] = group.pop(0)
    return [(span, found[index]) for index, span in enumerate(wanted) if index in found]


def _counts(span: TensorSpan) -> bool:
    if span.dtype not in _WORDS or len(span.shape) < 2:
        return False
    size = int(np.prod(span.shape, dtype=np.int64))
    fits = size * np.dtype(_WORDS[span.dtype]).itemsize == span.length
    return size >= MIN_ELEMENTS and fits and _readable(span.quantisation, span.shape)


def _readable(found: Quantisation | None, shape: tuple[int, ...]) -> bool:
    if found is None:
        return True
    if len(found.scales) != len(found.zero_points) or not found.scales:
        return False
    if found.axis is None or len(found.scales) == 1:
        return len(found.scales) == 1
    return 0 <= found.axis < len(shape) and shape[found.axis] == len(found.scales)


def _per_element(found: Quantisation, shape: tuple[int, ...]) -> tuple[Reals, Reals]:
    """Scales and zero points, shaped to be broadcast over the tensor."""
    scale, zero = np.array(found.scales, np.float64), np.array(found.zero_points, np.float64)
    if len(scale) == 1 or found.axis is None:
        return scale, zero
    along = [1] * len(shape)
    along[found.axis] = len(scale)
    return scale.reshape(along), zero.reshape(along)


def _reals(codes: Words, found: Quantisation | None, shape: tuple[int, ...]) -> Reals:
    if found is None:
        return codes.astype(np.float64)
    scale, zero = _per_element(found, shape)
    return ((codes.reshape(shape).astype(np.float64) - zero) * scale).reshape(-1)
