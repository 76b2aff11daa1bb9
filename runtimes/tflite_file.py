"""Verifies the structure of a TensorFlow Lite file before a library maps it.

tflite-runtime reads whatever offsets a file holds: a file cut short ends the process with SIGSEGV or
SIGBUS. So every table, vector and string that a runtime reads is checked to lie inside the file, as the
FlatBuffers verifier does: https://flatbuffers.dev/internals describes the encoding. Field numbers are
those of TensorFlow's schema.fbs.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from runtimes.interface import ModelRejected

IDENTIFIER = b"TFL3"

_MAX_TABLES = 250_000  # referred to in one file: offsets that share tables must not multiply without end
_MAX_FILE_BYTES = 2**31 - 1  # offsets are 32 bits, those to a vtable signed

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")


@dataclass(frozen=True)
class _Vector:
    element_bytes: int


@dataclass(frozen=True)
class _Table:
    name: str


@dataclass(frozen=True)
class _Tables:
    name: str


_STRING = _Vector(1)
_INTS = _Vector(4)
_OPAQUE = _Table("Opaque")

# For each table: its fields by number. A plain number is the size of a scalar in bytes.
_SCHEMA: dict[str, dict[int, int | _Vector | _Table | _Tables]] = {
    "Model": {
        0: 4,
        1: _Tables("OperatorCode"),
        2: _Tables("SubGraph"),
        3: _STRING,
        4: _Tables("Buffer"),
        5: _INTS,
        6: _Tables("Metadata"),
        7: _Tables("SignatureDef"),
    },
    "OperatorCode": {0: 1, 1: _STRING, 2: 4, 3: 4},
    "SubGraph": {0: _Tables("Tensor"), 1: _INTS, 2: _INTS, 3: _Tables("Operator"), 4: _STRING},
    "Tensor": {
        0: _INTS,
        1: 1,
        2: 4,
        3: _STRING,
        4: _Table("Quantization"),
        5: 1,
        6: _Table("Sparsity"),
        7: _INTS,
        8: 1,
    },
    "Quantization": {0: _INTS, 1: _INTS, 2: _INTS, 3: _Vector(8), 4: 1, 5: _OPAQUE, 6: 4},
    "Sparsity": {0: _INTS, 1: _INTS, 2: _Tables("DimensionMetadata")},
    "DimensionMetadata": {0: 1, 1: 4, 2: 1, 3: _OPAQUE, 4: 1, 5: _OPAQUE},
    # Options differ by operator; those with a vector that runtimes read (Reshape, Squeeze) are told apart.
    "Operator": {
        0: 4,
        1: _INTS,
        2: _INTS,
        3: 1,
        4: _OPAQUE,
        5: _Vector(1),
        6: 1,
        7: _Vector(1),
        8: _INTS,
        9: 8,
        10: 8,
        11: 1,
        12: _OPAQUE,
    },
    "Buffer": {0: _Vector(1), 1: 8, 2: 8},
    "Metadata": {0: _STRING, 1: 4},
    "SignatureDef": {0: _Tables("TensorMap"), 1: _Tables("TensorMap"), 2: _STRING, 4: 4},
    "TensorMap": {0: _STRING, 1: 4},
    "OptionsWithShape": {0: _INTS},
    "Opaque": {},
}
_OPTIONS_TYPE, _OPTIONS = 3, 4  # fields of Operator
_OPTIONS_WITH_SHAPE = (17, 30)  # BuiltinOptions: ReshapeOptions, SqueezeOptions


def verify(path: Path) -> None:
    """Checks the file's structure.

    Raises:
        ModelRejected: it cannot be read, is not a TensorFlow Lite file, or refers to bytes beyond its end.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise _rejected(path, "it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _verify(path, data)
    except OSError as error:
        raise ModelRejected(
            f"the model file {path} cannot be read: {error.strerror or error}", obj=str(path)
        ) from error


class _Damaged(Exception):
    """Something lies outside the file."""


def _verify(path: Path, data: mmap.mmap) -> None:
    if len(data) > _MAX_FILE_BYTES:
        raise _rejected(path, f"it has {len(data)} bytes; the format holds {_MAX_FILE_BYTES}")
    if data[4:8] != IDENTIFIER:
        raise _rejected(
            path, f"bytes 4 to 7 are {data[4:8]!r}, not {IDENTIFIER!r}: it is another kind of file"
        )
    try:
        _Verifier(data).run()
    except _Damaged as error:
        raise _rejected(path, str(error)) from error


def _rejected(path: Path, why: str) -> ModelRejected:
    return ModelRejected(
        f"{path} is not a whole TensorFlow Lite file: {why}",
        hint="compare its size and digest with the original",
        obj=str(path),
    )


class _Verifier:
    """Walks all tables from the root, without recursion: `pending` holds tables still to be visited."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.pending: list[tuple[str, int]] = []
        self.found = 0

    def run(self) -> None:
        self._add("Model", self._target(0, "the root"))
        while self.pending:
            self._table(*self.pending.pop())

    def _add(self, name: str, position: int) -> None:
        self.found += 1
        if self.found > _MAX_TABLES:
            raise _Damaged(f"it has more than {_MAX_TABLES} tables")
        self.pending.append((name, position))

    def _table(self, name: str, position: int) -> None:
        if position + 4 > self.size:
            raise _Damaged(self._beyond(f"a {name} table", position + 4))
        vtable = position - _I32.unpack_from(self.data, position)[0]
        if not 0 <= vtable <= self.size - 4:
            raise _Damaged(f"the {name} table at byte {position} has its layout at byte {vtable}")
        vtable_bytes, table_bytes = _U16.unpack_from(self.data, vtable)[0], self._u16(vtable + 2)
        if vtable_bytes < 4 or vtable_bytes % 2 or vtable + vtable_bytes > self.size:
            raise _Damaged(f"the layout at byte {vtable} claims {vtable_bytes} bytes")
        if position + table_bytes > self.size:
            raise _Damaged(self._beyond(f"a {name} table", position + table_bytes))

        def field(number: int, size: int) -> int | None:
            slot = 4 + 2 * number
            offset = self._u16(vtable + slot) if slot < vtable_bytes else 0
            if offset and offset + size > table_bytes:
                raise _Damaged(f"field {number} of the {name} table at byte {position} lies outside of it")
            return position + offset if offset else None

        for number, kind in _SCHEMA[name].items():
            place = field(number, kind if isinstance(kind, int) else 4)
            if place is None or isinstance(kind, int):
                continue
            what = f"field {number} of the {name} table at byte {position}"
            if name == "Operator" and number == _OPTIONS:
                options_type = field(_OPTIONS_TYPE, 1)
                if options_type is not None and self.data[options_type] in _OPTIONS_WITH_SHAPE:
                    kind = _Table("OptionsWithShape")
            self._field(kind, place, what)

    def _field(self, kind: _Vector | _Table | _Tables, place: int, what: str) -> None:
        target = self._target(place, what)
        if isinstance(kind, _Table):
            self._add(kind.name, target)
            return
        width = kind.element_bytes if isinstance(kind, _Vector) else 4
        if target + 4 > self.size:
            raise _Damaged(self._beyond(what, target + 4))
        count = _U32.unpack_from(self.data, target)[0]
        if target + 4 + count * width > self.size:
            raise _Damaged(self._beyond(what, target + 4 + count * width))
        if isinstance(kind, _Tables):
            for index in range(count):
                self._add(kind.name, self._target(target + 4 + 4 * index, what))

    def _target(self, place: int, what: str) -> int:
        """Where the offset stored at `place` points; not checked to lie inside the file."""
        if place + 4 > self.size:
            raise _Damaged(self._beyond(what, place + 4))
        return place + int(_U32.unpack_from(self.data, place)[0])

    def _u16(self, place: int) -> int:
        return int(_U16.unpack_from(self.data, place)[0])

    def _beyond(self, what: str, end: int) -> str:
        return f"{what} reaches to byte {end}, and the file ends at {self.size}"
