"""Open Inference datatypes, their NumPy dtypes, and their bytes on the wire.

Raw contents are row-major and little-endian. An element of BYTES is its length as four bytes followed by
that many bytes. BF16, which NumPy lacks, is carried as uint16 holding the raw bits: nothing here computes
with it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.interface import InputInvalid

BYTES = "BYTES"
BF16 = "BF16"

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BF16: np.dtype("<u2"),
    BYTES: np.dtype(np.object_),
}
_DATATYPES: dict[np.dtype[Any], str] = {
    dtype: datatype for datatype, dtype in _DTYPES.items() if datatype != BF16
}

DATATYPES: tuple[str, ...] = tuple(_DTYPES)

_LENGTH = struct.Struct("<I")


def to_dtype(datatype: str) -> np.dtype[Any]:
    """The dtype of arrays that carry `datatype`.

    Raises:
        InputInvalid: no such datatype.
    """
    try:
        return _DTYPES[datatype]
    except KeyError:
        raise InputInvalid(
            f"{datatype!r} is not an Open Inference datatype", hint=f"use one of {', '.join(DATATYPES)}"
        ) from None


def of_dtype(dtype: np.dtype[Any]) -> str:
    """The datatype that an array of `dtype` carries; "" if there is none. Fixed-width strings are BYTES."""
    if dtype.kind in "SU":
        return BYTES
    return _DATATYPES.get(dtype, "")


def bytes_elements(array: NDArray[Any]) -> NDArray[np.object_]:
    """`array`, of bytes or str (as UTF-8), as an object array of bytes in the same shape.

    Raises:
        InputInvalid: an element is neither.
    """
    elements = np.empty(array.size, np.object_)
    for index, element in enumerate(array.ravel().tolist()):
        if isinstance(element, str):
            elements[index] = element.encode()
        elif isinstance(element, bytes):
            elements[index] = element
        else:
            raise InputInvalid(
                f"element {index} of a BYTES tensor is {type(element).__name__}, not bytes or str"
            )
    return elements.reshape(array.shape)


def decode(datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> NDArray[Any]:
    """The array that raw contents stand for, without a copy where the datatype allows (then read-only).

    Args:
        datatype: of the tensor.
        shape: of the tensor; checked against the length of `raw` before anything is allocated.
        raw: the contents.

    Raises:
        InputInvalid: the datatype, shape and length do not fit together.
    """
    dtype = to_dtype(datatype)
    if any(dimension < 0 for dimension in shape):
        raise InputInvalid(f"the shape {list(shape)} has a negative dimension")
    count = math.prod(shape)
    view = memoryview(raw)
    if datatype == BYTES:
        return _decode_bytes(count, view).reshape(tuple(shape))
    if count * dtype.itemsize != view.nbytes:
        raise InputInvalid(
            f"a {datatype} tensor of shape {list(shape)} has {count * dtype.itemsize} bytes, "
            f"not {view.nbytes}",
            hint="send row-major, little-endian contents",
        )
    if datatype == "BOOL" and count and int(np.frombuffer(view, np.uint8).max()) > 1:
        raise InputInvalid("a BOOL tensor has a byte other than 0 and 1")
    return np.frombuffer(view, dtype).reshape(tuple(shape))


def encode(array: NDArray[Any]) -> bytes:
    """The raw contents of `array`.

    Raises:
        InputInvalid: no datatype carries its dtype.
    """
    if not of_dtype(array.dtype):
        raise InputInvalid(f"no Open Inference datatype carries NumPy's {array.dtype}")
    if of_dtype(array.dtype) == BYTES:
        return b"".join(
            part
            for element in bytes_elements(array).ravel()
            for part in (_LENGTH.pack(len(element)), element)
        )
    return array.tobytes()


def _decode_bytes(count: int, view: memoryview) -> NDArray[np.object_]:
    if count * _LENGTH.size > view.nbytes:
        raise InputInvalid(f"a BYTES tensor of {count} elements does not fit in {view.nbytes} bytes")
    elements = np.empty(count, np.object_)
    offset = 0
    for index in range(count):
        if offset + _LENGTH.size > view.nbytes:
            raise InputInvalid(f"a BYTES tensor ends before its element {index} of {count}")
        (length,) = _LENGTH.unpack_from(view, offset)
        offset += _LENGTH.size
        if length > view.nbytes - offset:
            raise InputInvalid(
                f"element {index} of a BYTES tensor claims {length} bytes; {view.nbytes - offset} are left"
            )
        elements[index] = bytes(view[offset : offset + length])
        offset += length
    if offset != view.nbytes:
        raise InputInvalid(f"a BYTES tensor of {count} elements is followed by {view.nbytes - offset} bytes")
    return elements
