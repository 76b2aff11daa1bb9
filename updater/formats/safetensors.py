"""safetensors: eight bytes of header length, a JSON header, then the tensors one after another.

The format is described at https://github.com/huggingface/safetensors. As its reference does, this reader
wants the tensors to cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from updater.formats import limits
from updater.formats.layout import arrange, byte_length, elements
from updater.formats.source import Source
from updater.formats.span import TensorSpan

_LENGTH_BYTES = 8
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F4": "float4_e2m1fn",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def matches(source: Source) -> bool:
    """Whether the file begins as safetensors does: a believable length, then a JSON object."""
    head = source.data[: _LENGTH_BYTES + 2]
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return len(head) == _LENGTH_BYTES + 2 and 2 <= length < 1 << 32 and head[8:10] in (b'{"', b"{}", b"{ ")


def may_begin(source: Source) -> bool:
    """Whether the file is too short to tell, and nothing speaks against safetensors."""
    head = source.data[: _LENGTH_BYTES + 2]
    if len(head) == _LENGTH_BYTES + 2:
        return False
    return not any(head[4:_LENGTH_BYTES]) and head[_LENGTH_BYTES:] in (b"", b"{")


def read(source: Source) -> tuple[TensorSpan, ...]:
    """The spans of a file that `matches`. Raises MODEL_FILE_TRUNCATED or MODEL_FILE_INVALID."""
    header_length = int.from_bytes(source.data[:_LENGTH_BYTES], "little")
    if header_length > limits.MAX_SAFETENSORS_HEADER_BYTES:
        raise source.invalid(
            f"the header length at byte 0 is {header_length} bytes, "
            f"more than the {limits.MAX_SAFETENSORS_HEADER_BYTES} allowed"
        )
    start = _LENGTH_BYTES + header_length  # of the tensors
    if start > source.size:
        raise source.truncated(f"the JSON header from byte {_LENGTH_BYTES} to byte {start} is announced")
    found = sorted(_entries(source, _parse(source, start)), key=lambda entry: entry[1:3])
    position = 0
    spans = []
    for name, begin, end, dtype, shape in found:
        if begin != position or end < begin:
            raise source.invalid(
                f"the header at byte {_LENGTH_BYTES} puts tensor {name!r} at data offsets "
                f"[{begin}, {end}], but the tensor before it ends at {position}"
            )
        position = end
        if start + end > source.size:
            raise source.truncated(f"tensor {name!r} lies from byte {start + begin} to byte {start + end}")
        count = elements(source, shape, f"tensor {name!r}", start + begin)
        if dtype not in _DTYPES:
            continue  # a type of a later version: its bytes are no array to us
        wanted = byte_length(_DTYPES[dtype], count)
        if wanted != end - begin:
            raise source.invalid(
                f"tensor {name!r} at byte {start + begin} has {end - begin} bytes, but {dtype} of shape "
                f"{list(shape)} needs {wanted}"
            )
        spans.append(TensorSpan(name, _DTYPES[dtype], shape, start + begin, end - begin))
    if start + position != source.size:
        raise source.invalid(
            f"the header at byte {_LENGTH_BYTES} describes tensors up to byte {start + position}, "
            f"but the file goes on to byte {source.size}"
        )
    return arrange(spans)


def _parse(source: Source, start: int) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a name occurs twice")
        return members

    try:
        header = json.loads(source.data[_LENGTH_BYTES:start], object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise source.invalid(
            f"the header from byte {_LENGTH_BYTES} to byte {start} is not valid JSON: {error}"
        ) from error
    if not isinstance(header, dict):
        raise source.invalid(f"the header at byte {_LENGTH_BYTES} is not a JSON object")
    return header


def _entries(source: Source, header: dict[str, Any]) -> list[tuple[str, int, int, str, tuple[int, ...]]]:
    if len(header) > limits.MAX_TENSORS:
        raise source.invalid(
            f"the header has {len(header)} tensors, more than the {limits.MAX_TENSORS} allowed"
        )
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        known = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = known.get("dtype"), known.get("shape"), known.get("data_offsets")
        if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise source.invalid(
                f"the header at byte {_LENGTH_BYTES} describes tensor {name[:80]!r} without a proper dtype, "
                "shape and data_offsets"
            )
        found.append((name, offsets[0], offsets[1], dtype, tuple(shape)))
    return found


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
