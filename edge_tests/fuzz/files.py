"""Bytes as model files: what the readers make of them, for the fuzzer.

For any bytes: a reader says what is wrong with the file, or gives spans that lie in it, in order and without
overlap; and so do the stored entries of what may be a zip file, which are never an error.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from edge_tests.fuzz.examine import BrokenWordError
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.formats import onnx, safetensors, stored_zip, tflite
from updater.formats.source import Source
from updater.formats.span import TensorSpan
from updater.formats.stored_zip import Entry

READERS: tuple[ModuleType, ...] = (tflite, safetensors, onnx)
REASONS = (errors_pb2.MODEL_FILE_INVALID, errors_pb2.MODEL_FILE_TRUNCATED)
MOST_BYTES = 1 << 12  # of a fuzzed file
_FIXTURES = Path(__file__).resolve().parents[1] / "conformance" / "fixtures"
_WIDE = b"\x01\x00\x10\x00" + (5).to_bytes(8, "little") * 2  # a zip64 field: both sizes of an entry


@cache
def seeds() -> tuple[bytes, ...]:
    """A small file of each kind, for a fuzzer to begin with."""
    models = [path.read_bytes() for path in sorted(_FIXTURES.iterdir())]
    head = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    head += b'"b":{"dtype":"I8","shape":[],"data_offsets":[8,9]}}'
    tensors = len(head).to_bytes(8, "little") + head + bytes(9)
    archives = []
    for names in (("a/data/0", "a/data/1"), ("w.npy",), ()):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for order, name in enumerate(names):
                archive.writestr(name, bytes(20 * (order + 1)))
            packed = zipfile.ZipInfo("version")
            packed.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(packed, b"3" * 40)
        archives.append(file.getvalue())
    return tuple(data for data in (*models, tensors, *archives, _zip64()) if len(data) <= MOST_BYTES)


def _zip64() -> bytes:
    """A zip file whose sizes are in zip64 fields, and whose directory is in a zip64 record."""
    most, name, data = 0xFFFFFFFF, b"w", b"12345"
    local = b"PK\x03\x04" + _number(45, 2) + bytes(20) + _number(1, 2) + _number(0, 2) + name + data
    central = b"PK\x01\x02" + _number(45, 2) * 2 + bytes(12) + _number(most, 4) * 2 + _number(1, 2)
    central += _number(len(_WIDE), 2) + bytes(10) + _number(0, 4) + name + _WIDE
    place = len(local)
    record = b"PK\x06\x06" + _number(44, 8) + _number(45, 2) * 2 + bytes(8) + _number(1, 8) * 2
    record += _number(len(central), 8) + _number(place, 8)
    locator = b"PK\x06\x07" + bytes(4) + _number(place + len(central), 8) + _number(1, 4)
    end = b"PK\x05\x06" + bytes(4) + _number(0xFFFF, 2) * 2 + _number(most, 4) * 2 + bytes(2)
    return local + central + record + locator + end


def _number(value: int, size: int) -> bytes:
    """An unsigned number, little-endian."""
    return value.to_bytes(size, "little")


def examine_file(data: bytes) -> str:
    """What became of it: "refused", "opaque", "read" or "entries". Raises BrokenWordError."""
    _check(stored_zip.entries(memoryview(data)), len(data))
    source = Source(data, Path("fuzzed"))
    found = next((reader for reader in READERS if reader.matches(source)), None)
    if found is None:
        return "entries" if stored_zip.entries(memoryview(data)) else "opaque"
    try:
        spans = onnx.read(source).spans if found is onnx else found.read(source)
    except SluiceError as error:
        if error.reason not in REASONS:
            raise BrokenWordError(f"a file is refused as {error.reason}") from error
        return "refused"
    _check(spans, len(data))
    return "read"


def _check(found: Sequence[TensorSpan | Entry], size: int) -> None:
    end = 0
    for part in found:
        if part.offset < end or part.length < 0 or part.offset + part.length > size:
            raise BrokenWordError(f"{part} lies outside a file of {size} bytes, or in the part before it")
        end = part.offset + part.length
