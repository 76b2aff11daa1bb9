"""One TensorProto: where its elements lie, and what they are when they are few.

ONNX keeps elements in `raw_data` (little-endian, row-major), in a typed field, or in a file beside the model.
Which of them are a span:

- `raw_data`, and `float_data` or `double_data` when packed (as every known exporter writes them): yes, they
  are fixed-width arrays. Unpacked, a tag lies between the elements: no span.
- `int32_data` holds the smaller integers and float16 too, as varints of one to ten bytes. When each has one
  byte (values 0 to 127) the bytes are an array and the span's dtype is "uint8", whatever the tensor's type;
  else there is no span. Values of few elements are decoded all the same: scales and zero points live there.
- `int64_data`, `uint64_data` and `string_data`: no span.
- external data: a span of that other file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from updater.formats import limits
from updater.formats.layout import byte_length, elements
from updater.formats.protobuf import FIXED32, FIXED64, LENGTH, VARINT, Field, Walker

_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1fn",
    24: "float8_e8m0fnu",
    25: "uint2",
    26: "int2",
    # 27 and 28 are floats of six bits, whose packing ONNX has not settled
}

# Fields of TensorProto.
_DIMS, _DATA_TYPE, _FLOAT_DATA, _INT32_DATA, _INT64_DATA, _NAME, _RAW_DATA = 1, 2, 4, 5, 7, 8, 9
_DOUBLE_DATA, _UINT64_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 10, 11, 13, 14
_TYPED_DATA = {
    _FLOAT_DATA: FIXED32,
    _INT32_DATA: VARINT,
    _INT64_DATA: VARINT,
    _DOUBLE_DATA: FIXED64,
    _UINT64_DATA: VARINT,
}
_EXTERNAL = 1  # of DataLocation

_NUMPY = {
    "float32": "<f4",
    "float16": "<f2",
    "float64": "<f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
    "int64": "<i8",
    "uint64": "<u8",
}


@dataclass(eq=False)
class Tensor:
    """What one TensorProto says, its elements left where they are.

    Attributes:
        name: as in the file, or given by the node that holds it.
        at: byte where the message begins.
        dtype: a key of `ELEMENT_BITS`; None for strings and unknown types.
        shape: as in the file, checked.
        count: elements.
        raw: where raw_data lies, as [start, end).
        typed: the typed data, one field for each packed array or loose number; None when not kept.
        external: the entries of external_data, when the elements lie in another file.
    """

    name: str
    at: int
    dtype: str | None
    shape: tuple[int, ...]
    count: int
    raw: tuple[int, int] | None
    typed: list[Field] | None = field(default_factory=list)
    external: dict[str, str] | None = None

    @property
    def what(self) -> str:
        """The tensor, for errors."""
        return f"tensor {self.name!r}"


class TensorReader:
    """Reads the TensorProtos of one file, counting what it keeps against the limits."""

    def __init__(self, walker: Walker) -> None:
        self.walker = walker
        self.source = walker.source
        self.tensors_left = limits.MAX_TENSORS
        self.loose_left = limits.MAX_LOOSE_NUMBERS

    def read(self, start: int, end: int, name: str = "") -> Tensor:
        """The tensor at [start, end); `name` is for those that have none of their own."""
        self.tensors_left -= 1
        if self.tensors_left < 0:
            raise self.source.invalid(
                f"at byte {start} lies one tensor more than the {limits.MAX_TENSORS} allowed"
            )
        number = location = 0
        dims: list[int] = []
        raw: tuple[int, int] | None = None
        typed: list[Field] | None = []
        external: dict[str, str] = {}
        what = f"the tensor {name!r} at byte {start}"
        for part in self.walker.fields(start, end, what):
            if part.number == _DIMS:
                dims += self._dims(part, what)
            elif part.number == _DATA_TYPE and part.wire == VARINT:
                number = part.start
            elif part.number == _DATA_LOCATION and part.wire == VARINT:
                location = part.start
            elif part.number == _NAME and part.wire == LENGTH:
                name = self.source.text(part.start, part.end, "the name of a tensor") or name
            elif part.number == _RAW_DATA and part.wire == LENGTH:
                raw = (part.start, part.end)
            elif part.number in _TYPED_DATA and part.wire in (LENGTH, _TYPED_DATA[part.number]):
                typed = self._keep(typed, part)
            elif part.number == _EXTERNAL_DATA and part.wire == LENGTH:
                key, value = self._entry(part)
                external[key] = value
        what = f"tensor {name!r}"
        count = elements(self.source, dims, what, start)
        tensor = Tensor(name, start, _DTYPES.get(number), tuple(dims), count, raw, typed)
        if location == _EXTERNAL:
            tensor.external = external
        elif raw is not None and tensor.dtype is not None:
            self._check_length(tensor, tensor.dtype, *raw)
        return tensor

    def _check_length(self, tensor: Tensor, dtype: str, start: int, end: int) -> None:
        wanted = byte_length(dtype, tensor.count)
        if end - start != wanted:
            raise self.source.invalid(
                f"{tensor.what} at byte {tensor.at} has {end - start} bytes of elements at byte {start}, but "
                f"{dtype} of shape {list(tensor.shape)} needs {wanted}"
            )

    def place(self, tensor: Tensor) -> tuple[str, int, int] | None:
        """The dtype, start and end of the tensor's elements in this file, if they are an array there."""
        if tensor.dtype is None or tensor.external is not None:
            return None
        if tensor.raw is not None:
            return tensor.dtype, *tensor.raw
        if tensor.typed is None or len(tensor.typed) != 1 or tensor.typed[0].wire != LENGTH:
            return None
        part = tensor.typed[0]
        length = part.end - part.start
        if part.number == _INT32_DATA:
            one_each = length == tensor.count and self.walker.one_byte_each(part.start, part.end)
            return ("uint8", part.start, part.end) if one_each else None
        fixed = {_FLOAT_DATA: ("float32", "complex64"), _DOUBLE_DATA: ("float64", "complex128")}
        if tensor.dtype not in fixed.get(part.number, ()):
            return None
        self._check_length(tensor, tensor.dtype, part.start, part.end)
        return tensor.dtype, part.start, part.end

    def values(self, tensor: Tensor) -> list[float] | None:
        """The elements as numbers; None for other types, external data and more elements than allowed."""
        if tensor.external is not None or tensor.count > limits.MAX_QUANTISATION_PARAMETERS:
            return None
        if tensor.raw is not None:
            return _decode(self.source.data[slice(*tensor.raw)], tensor.dtype, tensor.count)
        if tensor.typed is None:
            return None
        values: list[float] = []
        for part in tensor.typed:
            more = self._numbers(part, tensor.dtype, limits.MAX_QUANTISATION_PARAMETERS - len(values))
            if more is None:
                return None
            values += more
        return values if len(values) == tensor.count else None

    def _numbers(self, part: Field, dtype: str | None, limit: int) -> list[float] | None:
        if part.number in (_FLOAT_DATA, _DOUBLE_DATA):
            form = "<f4" if part.number == _FLOAT_DATA else "<f8"
            data = self.source.data[part.start : part.end]
            if len(data) > limit * 8 or len(data) % np.dtype(form).itemsize:
                return None
            return [float(value) for value in np.frombuffer(data, form)]
        codes: list[int] | None = [part.start]
        if part.wire == LENGTH:
            codes = self.walker.packed_varints(part.start, part.end, "a packed field", limit)
        if codes is None:
            return None
        if dtype in ("float16", "bfloat16"):  # as bit patterns
            bits = np.array([code & 0xFFFF for code in codes], "<u2")
            return _decode(bits.tobytes(), dtype, len(codes))
        return [code - (1 << 64) if code >> 63 and part.number != _UINT64_DATA else code for code in codes]

    def _keep(self, typed: list[Field] | None, part: Field) -> list[Field] | None:
        self.loose_left -= 1
        if typed is None or self.loose_left < 0:
            return None
        typed.append(part)
        return typed

    def _dims(self, part: Field, what: str) -> list[int]:
        dims: list[int] | None = [part.start] if part.wire == VARINT else None
        if part.wire == LENGTH:
            dims = self.walker.packed_varints(part.start, part.end, what, limits.MAX_RANK)
        if dims is None:
            raise self.source.invalid(f"{what} has a shape that cannot be read")
        return [dim - (1 << 64) if dim >> 63 else dim for dim in dims]

    def _entry(self, entry: Field) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for part in self.walker.fields(entry.start, entry.end, "an external data entry"):
            if part.number in texts and part.wire == LENGTH:
                texts[part.number] = self.source.text(part.start, part.end, "an external data entry")
        return texts[1], texts[2]


def _decode(data: bytes, dtype: str | None, count: int) -> list[float] | None:
    if dtype in ("int4", "uint4"):  # two to a byte, the first in the low half
        packed = np.frombuffer(data, "u1")
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count].astype(int)
        return [int(code) - 16 if dtype == "int4" and code > 7 else int(code) for code in codes]
    if dtype == "bfloat16":
        return [float(value) for value in (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")]
    if dtype not in _NUMPY:
        return None
    return list(np.frombuffer(data, _NUMPY[dtype]).tolist())
