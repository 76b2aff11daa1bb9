"""Golden files: inputs and the outputs expected of them, as an .npz archive; checked before publishing.

Keys are `input.<name>` and `output.<name>`, at least one of each; every array has a leading batch dimension,
the same for all. A box runs the inputs through the new version and compares before it switches, so a golden
file that is wrong would keep every box from updating: it is refused here, where someone can mend it.

The archive may come from anyone: sizes are compared with the archive's own before anything is allocated, and
pickled objects are never loaded.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors

MAX_GOLDEN_BYTES = 64 << 20  # of all arrays of one golden file together, uncompressed
MAX_GOLDEN_ARRAYS = 64  # what a box takes
INPUT, OUTPUT = "input.", "output."
_KINDS = "biufSU"  # booleans, integers, floats, texts

_HOW = "write it with numpy.savez(path, **{'input.<name>': x, 'output.<name>': y})"


@dataclass(frozen=True)
class Golden:
    """What a golden file holds.

    Attributes:
        inputs: tensor name to shape, the batch dimension first.
        outputs: the same for the outputs.
        batch: size of the leading dimension of every array.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    batch: int


def check_golden(path: Path) -> Golden:
    """Reads and checks a golden file.

    Raises SluiceError(MODEL_FILE_INVALID) that names the array, or IO_FAILED.
    """
    with os_errors("reading the golden file", path):
        try:
            with zipfile.ZipFile(path) as archive:
                _check_sizes(path, archive)
            with np.load(path, allow_pickle=False) as arrays:
                return _check_arrays(path, {key: arrays[key] for key in arrays.files})
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
            raise _invalid(path, f"is not a readable .npz archive: {error}") from error


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Compares what each array claims with what the archive holds, before anything is allocated."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if len(members) > MAX_GOLDEN_ARRAYS:
        raise _invalid(path, f"has {len(members)} arrays; at most {MAX_GOLDEN_ARRAYS} are allowed")
    if total > MAX_GOLDEN_BYTES:
        raise _invalid(
            path, f"unpacks to {total} bytes; at most {MAX_GOLDEN_BYTES} are allowed: use fewer samples"
        )
    for member in members:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            if dtype.kind not in _KINDS:
                raise _invalid(
                    path, f"array {member.filename!r} has type {dtype}, which is not numbers or text"
                )
            if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                raise _invalid(
                    path, f"array {member.filename!r} does not have the size that its header states"
                )


def _check_arrays(path: Path, arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> Golden:
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    batches: dict[int, str] = {}
    for key, array in arrays.items():
        prefix = next(
            (prefix for prefix in (INPUT, OUTPUT) if key.startswith(prefix) and key != prefix), None
        )
        if prefix is None:
            raise _invalid(path, f"has the key {key!r}; keys are 'input.<name>' and 'output.<name>'")
        if array.ndim == 0 or array.shape[0] == 0:
            raise _invalid(
                path, f"array {key!r} has shape {array.shape}; the first dimension is the batch, 1 or more"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _invalid(path, f"array {key!r} holds NaN or infinity, which nothing can be compared with")
        (inputs if prefix == INPUT else outputs)[key[len(prefix) :]] = array.shape
        batches.setdefault(array.shape[0], key)
    for kind, found in ((INPUT, inputs), (OUTPUT, outputs)):
        if not found:
            raise _invalid(path, f"has no '{kind}<name>' array; at least one is needed")
    if len(batches) > 1:
        seen = ", ".join(f"{key!r} has {batch}" for batch, key in batches.items())
        raise _invalid(path, f"mixes batch sizes: {seen}; every array needs the same first dimension")
    return Golden(inputs, outputs, next(iter(batches)))


def _invalid(path: Path, why: str) -> SluiceError:
    return SluiceError(errors_pb2.MODEL_FILE_INVALID, f"golden file {path} {why}", hint=_HOW, obj=str(path))
