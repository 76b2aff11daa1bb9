"""The safetensors reader against files written by the format's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from updater.errors import SluiceError
from updater.formats import ModelFile, read_model


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # padded with spaces, as the reference does
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_bytes(tmp_path: Path, data: bytes) -> ModelFile:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    return read_model(path)


def test_spans_are_the_tensors(tmp_path: Path) -> None:
    sizes = {
        "BF16": 2,
        "F16": 2,
        "F32": 4,
        "F64": 8,
        "I8": 1,
        "I16": 2,
        "I32": 4,
        "I64": 8,
        "U8": 1,
        "BOOL": 1,
    }
    sizes |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    arrays = {}
    for number, (dtype, size) in enumerate(sizes.items()):
        arrays[dtype] = np.random.default_rng(number).bytes(6 * size)
        header[f"layer.{dtype}"] = entry(dtype, [2, 3], len(data), len(data) + 6 * size)
        data += arrays[dtype]
    header["none"] = entry("F32", [0], len(data), len(data))
    header["later"] = entry("F128_NEW", [2], len(data), len(data) + 3)
    packed = pack(header, data + b"???")
    model = read_bytes(tmp_path, packed)
    assert (model.format, model.size) == ("safetensors", len(packed))
    assert [span.name for span in model.spans] == [f"layer.{dtype}" for dtype in sizes]
    for span, dtype in zip(model.spans, sizes, strict=True):
        assert span.shape == (2, 3)
        assert packed[span.offset : span.offset + span.length] == arrays[dtype]
    assert {span.dtype for span in model.spans} >= {"bfloat16", "float32", "int8", "bool", "float8_e4m3fn"}


F32 = entry("F32", [2], 0, 8)
DATA = bytes(8)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (pack(b'{"a": ', DATA), "not valid JSON"),
        (pack(b'{"a": [' + b"[" * 100_000, DATA), "not valid JSON"),
        (pack(b'{"a": 1' + b"0" * 5000 + b"}", DATA), "not valid JSON"),
        (pack(b'{"a": {}, "a": {}}', DATA), "a name occurs twice"),
        (pack({"a": 5}, DATA), "without a proper dtype"),
        (pack({"a": entry("F32", [-2], 0, 8)}, DATA), "without a proper dtype"),
        (pack({"a": {**F32, "data_offsets": [0, 8.0]}}, DATA), "without a proper dtype"),
        (pack({"a": {**F32, "data_offsets": [0, True]}}, DATA), "without a proper dtype"),
        (pack({"a": entry("F32", [3], 0, 8)}, DATA), "8 bytes, but F32 of shape .* needs 12"),
        (pack({"a": F32, "b": entry("F32", [1], 4, 8)}, DATA), "ends at"),
        (pack({"a": entry("F32", [1], 4, 8)}, DATA), "ends at 0"),
        (pack({"a": F32}, DATA + b"more"), "goes on to byte"),
        (pack({"a": entry("F32", [1 << 30, 1 << 30], 0, 8)}, DATA), "more elements"),
        ((1 << 30).to_bytes(8, "little") + b'{"a"', "more than the"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    with pytest.raises(SluiceError, match=problem) as caught:
        read_bytes(tmp_path, data)
    assert caught.value.code == "MODEL_FILE_INVALID"
