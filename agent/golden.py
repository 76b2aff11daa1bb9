"""Golden check and warm-up: whether a freshly loaded model answers, and answers as its publisher saw it.

A golden file is an .npz archive with arrays "input.<name>" and "output.<name>". The check runs the model on
the inputs and compares each output by cosine similarity, relative error (of norms) and largest absolute
error; the tolerance, for all outputs or for single ones, comes from the version's manifest. A tolerance is
needed because the same model differs in the last bits between processors.

The file is untrusted input: sizes are checked against limits before memory is taken, no pickled objects are
loaded. NaN matches NaN and nothing else; infinities match the same infinity; two outputs that are all zero
have cosine 1, and one alone has 0. Outputs of byte strings and of booleans must be equal.

A golden name that the model does not have is matched if the golden file and the model have exactly one such
tensor left (converters rename). Numbers are converted to the model's datatype where that loses nothing but
floating-point precision.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from agent.limits import (
    MAX_GOLDEN_ARRAYS,
    MAX_GOLDEN_BYTES,
    MAX_GOLDEN_FILE_BYTES,
    MAX_REQUEST_S,
    MAX_TENSOR_DIMENSIONS,
    MAX_WARM_UP_BYTES,
)
from agent.worker import Worker
from agent.worker_spec import WorkerDied
from runtimes.datatypes import BYTES, bytes_elements, to_dtype
from runtimes.inputs import splits_by_sample
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors
from updater.manifest import Bounds, Tolerance

Arrays = dict[str, NDArray[Any]]

_INPUT, _OUTPUT = "input.", "output."


@dataclass(frozen=True)
class OutputResult:
    """How one output compares.

    Attributes:
        name: of the model's output.
        cosine: cosine similarity of all elements, -1 to 1.
        max_abs_error: largest absolute difference; infinite where a NaN or infinity is not matched, or where
            elements that must be equal are not.
        relative_error: norm of the difference to that of what was expected; infinite as above.
        passed: whether all are within the tolerance.
        why: what else is wrong, e.g. another shape; empty if nothing is.
    """

    name: str
    cosine: float
    max_abs_error: float
    relative_error: float
    passed: bool
    why: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.name}: cosine {self.cosine:.6f}, relative error {self.relative_error:.4g}, "
            f"largest error {self.max_abs_error:.6g}"
        )
        return f"{text} ({self.why})" if self.why else text


@dataclass(frozen=True)
class GoldenResult:
    """The outputs' results, in the model's order."""

    outputs: tuple[OutputResult, ...]

    @property
    def passed(self) -> bool:
        return all(output.passed for output in self.outputs)

    @property
    def cosine(self) -> float:
        """The least of all outputs."""
        return min(output.cosine for output in self.outputs)

    @property
    def max_abs_error(self) -> float:
        """The largest of all outputs."""
        return max(output.max_abs_error for output in self.outputs)


def check_golden(
    worker: Worker, path: Path, tolerance: Tolerance, timeout_s: float = MAX_REQUEST_S
) -> GoldenResult:
    """Runs the golden inputs and compares the outputs.

    Args:
        worker: with the model loaded.
        path: the golden file.
        tolerance: from the manifest.
        timeout_s: for the inference, seconds.

    Raises:
        SluiceError: GOLDEN_MISMATCH, with the figures of each output, or naming what is wrong with the file;
            IO_FAILED; and what `Worker.infer` raises, but for INPUT_INVALID.
    """
    inputs, expected = read_golden(path)
    name = str(worker.spec)
    names = [spec.name for spec in worker.outputs]
    strangers = sorted(set(tolerance.outputs) - set(names))
    if strangers:
        raise _mismatch(f"the tolerance has bounds for outputs {strangers}, and {name} has {names}", name)
    given = convert_inputs(worker, inputs)
    wanted = _rename(expected, worker.outputs, "output", name)
    try:
        answered = worker.infer(given, timeout_s)
    except SluiceError as error:
        if error.reason != errors_pb2.INPUT_INVALID:
            raise
        raise _mismatch(f"the golden inputs do not fit {error.message}", name) from error
    result = GoldenResult(
        tuple(
            _judge(spec.name, answered[spec.name], wanted[spec.name], tolerance.of(spec.name))
            for spec in worker.outputs
            if spec.name in wanted
        )
    )
    if not result.passed:
        figures = "; ".join(
            str(output) if output.passed else f"{output} (wanted: {_wanted(tolerance.of(output.name))})"
            for output in result.outputs
        )
        raise _mismatch(f"{name} answers its golden inputs outside the tolerance: {figures}", name)
    return result


def _judge(name: str, answered: NDArray[Any], expected: NDArray[Any], bounds: Bounds) -> OutputResult:
    absolute, relative = bounds.max_abs_error, bounds.max_relative_error
    return compare(
        name,
        answered,
        expected,
        float(bounds.cosine_min),
        float(absolute) if absolute else None,
        float(relative) if relative else None,
    )


def _wanted(bounds: Bounds) -> str:
    texts = [f"cosine of at least {bounds.cosine_min}"]
    if bounds.max_relative_error:
        texts.append(f"relative error of at most {bounds.max_relative_error}")
    if bounds.max_abs_error:
        texts.append(f"error of at most {bounds.max_abs_error}")
    return ", ".join(texts)


def convert_inputs(worker: Worker, inputs: Arrays) -> Arrays:
    """A golden file's inputs as the model takes them. Raises SluiceError(GOLDEN_MISMATCH)."""
    name = str(worker.spec)
    return _convert(_rename(inputs, worker.inputs, "input", name), worker.inputs, name)


def warm_up(worker: Worker, timeout_s: float = MAX_REQUEST_S, batch_sizes: Iterable[int] = (1,)) -> None:
    """One inference by each process for each batch size, on zeros; varying dimensions are 1, the first that.

    Batch sizes other than 1 are left out where the model has no varying first dimension.

    Raises:
        SluiceError: OUT_OF_MEMORY when the worker was killed, WARM_UP_FAILED for whatever else went wrong.
    """
    for batch_size in batch_sizes:
        if batch_size != 1 and not _takes_batches(worker):
            continue
        try:
            inputs = worker.check(blank_inputs(worker.inputs, batch_size))
            with worker.in_use():
                for instance in worker.instances:
                    instance.run([inputs], timeout_s)
        except SluiceError as error:
            killed = isinstance(error, WorkerDied) and error.killed
            raise SluiceError(
                errors_pb2.OUT_OF_MEMORY if killed else errors_pb2.WARM_UP_FAILED,
                f"{worker.spec} failed its first inference (batch {batch_size}): {error.message}",
                hint="it is tried again" if killed else "the model loads but cannot run on this box",
                obj=str(worker.spec),
            ) from error


def blank_inputs(specs: Sequence[TensorSpec], batch_size: int) -> Arrays:
    """Zeros, or empty byte strings, for each input. Raises SluiceError(LIMIT_EXCEEDED) if that is much."""
    shapes = {
        spec.name: tuple(
            batch_size if axis == 0 and size in (-1, 1) else max(size, 1)
            for axis, size in enumerate(spec.shape)
        )
        for spec in specs
    }
    total = sum(math.prod(shapes[spec.name]) * to_dtype(spec.datatype).itemsize for spec in specs)
    if total > MAX_WARM_UP_BYTES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"inputs for a batch of {batch_size} take {total} bytes; at most {MAX_WARM_UP_BYTES} are made",
        )
    return {
        spec.name: np.full(shapes[spec.name], b"", np.object_)
        if spec.datatype == BYTES
        else np.zeros(shapes[spec.name], to_dtype(spec.datatype))
        for spec in specs
    }


def compare(
    name: str,
    answered: NDArray[Any],
    expected: NDArray[Any],
    cosine_min: float,
    max_abs_error: float | None,
    max_relative_error: float | None = None,
) -> OutputResult:
    """Compares one output with what was expected; pure, see the rules in the module's docstring."""
    if answered.shape != expected.shape:
        why = f"its shape is {list(answered.shape)}, and {list(expected.shape)} was expected"
        return OutputResult(name, 0.0, math.inf, math.inf, passed=False, why=why)
    exact = not (_is_number(answered) and _is_number(expected))
    if exact:
        equal = bool(np.array_equal(_comparable(answered), _comparable(expected)))
        cosine, error, relative = (1.0, 0.0, 0.0) if equal else (0.0, math.inf, math.inf)
    else:
        cosine, error, relative = _similarity(answered.astype(np.float64), expected.astype(np.float64))
    passed = (
        cosine >= cosine_min
        and error < math.inf
        and (max_abs_error is None or error <= max_abs_error)
        and (max_relative_error is None or relative <= max_relative_error)
    )
    return OutputResult(name, cosine, error, relative, passed)


def _similarity(answered: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float, float]:
    """Cosine similarity, largest absolute error and relative error."""
    a, b = answered.reshape(-1), expected.reshape(-1)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    both_finite = np.isfinite(a) & np.isfinite(b)
    if not bool(np.all(same | both_finite)):
        return 0.0, math.inf, math.inf
    a, b = a[both_finite], b[both_finite]
    if not a.size:
        return 1.0, 0.0, 0.0
    # Scaled first: squares of large values overflow.
    largest_a, largest_b = float(np.abs(a).max()), float(np.abs(b).max())
    error = float(np.abs(a / 2 - b / 2).max()) * 2
    if not largest_a or not largest_b:
        return (1.0, error, 0.0) if largest_a == largest_b else (0.0, error, math.inf if largest_a else 1.0)
    u, v = a / largest_a, b / largest_b
    size_a, size_b = math.sqrt(float(u @ u)), math.sqrt(float(v @ v))
    cosine = max(-1.0, min(1.0, float(u @ v) / (size_a * size_b)))
    ratio = largest_a / largest_b
    difference = u * ratio - v if ratio < 1 else u - v / ratio
    relative = math.sqrt(float(difference @ difference)) / size_b * max(1.0, ratio)
    return cosine, error, relative


def read_golden(path: Path) -> tuple[Arrays, Arrays]:
    """Inputs and outputs of a golden file by name.

    Raises:
        SluiceError: GOLDEN_MISMATCH saying what is wrong with the file, or IO_FAILED.
    """
    with os_errors("reading the golden file", path), path.open("rb") as file:
        data = file.read(MAX_GOLDEN_FILE_BYTES + 1)
    if len(data) > MAX_GOLDEN_FILE_BYTES:
        raise _bad_file(path, f"has more than the {MAX_GOLDEN_FILE_BYTES} bytes that are allowed")
    try:
        arrays = _read_archive(data, path)
    except SluiceError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many kinds on damaged bytes
        raise _bad_file(path, f"is damaged or is no .npz archive: {type(error).__name__}: {error}") from error
    if not arrays[_OUTPUT]:
        raise _bad_file(path, "has no array output.<name>")
    return arrays[_INPUT], arrays[_OUTPUT]


def _read_archive(data: bytes, path: Path) -> dict[str, Arrays]:
    """The arrays under both prefixes."""
    arrays: dict[str, Arrays] = {_INPUT: {}, _OUTPUT: {}}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if len(members) > MAX_GOLDEN_ARRAYS or total > MAX_GOLDEN_BYTES:
            raise _bad_file(
                path,
                f"holds {len(members)} arrays of {total} bytes; at most {MAX_GOLDEN_ARRAYS} of "
                f"{MAX_GOLDEN_BYTES} are allowed",
            )
        for member in members:
            key = member.filename.removesuffix(".npy")
            kind = next((prefix for prefix in arrays if key.startswith(prefix)), None)
            if kind is None or key.removeprefix(kind) in arrays[kind]:
                raise _bad_file(
                    path, f"has the key {key[:80]!r}: use input.<name> or output.<name>, each once"
                )
            with archive.open(member) as file:
                arrays[kind][key.removeprefix(kind)] = _read_array(file, member.file_size)
    return arrays


def _read_array(file: IO[bytes], size: int) -> NDArray[Any]:
    """One .npy member of `size` bytes; numpy.load would allocate what the header claims before it reads."""
    data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"a member is {len(data)} bytes long, and {size} were announced")
    header = io.BytesIO(data)
    version = npy.read_magic(header)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its .npy version {version} is not known")
    shape, fortran, dtype = read(header)
    if dtype.hasobject or dtype.kind not in "biufSU":
        raise ValueError(f"dtype {dtype} is not allowed: numbers, booleans and fixed-width strings are")
    if len(shape) > MAX_TENSOR_DIMENSIONS or math.prod(shape) * dtype.itemsize != size - header.tell():
        raise ValueError(
            f"shape {list(shape)} of {dtype} does not fit the {size - header.tell()} bytes given"
        )
    elements = np.frombuffer(memoryview(data)[header.tell() :], dtype)
    array = elements.reshape(shape, order="F" if fortran else "C")
    return bytes_elements(array) if dtype.kind in "SU" else array.astype(dtype.newbyteorder("="))


def _rename(arrays: Arrays, specs: Sequence[TensorSpec], what: str, model: str) -> Arrays:
    """The arrays under the model's names; a single stranger takes the single name left."""
    names = [spec.name for spec in specs]
    strangers = [name for name in arrays if name not in names]
    free = [name for name in names if name not in arrays]
    renamed = {name: array for name, array in arrays.items() if name in names}
    if len(strangers) == 1 and len(free) == 1:
        renamed[free[0]] = arrays[strangers[0]]
    elif strangers or (free and what == "input"):
        raise _mismatch(
            f"the golden file has {what}s {sorted(arrays)}, and {model} has {names}: the names must match, "
            "unless there is exactly one",
            model,
        )
    return renamed


def _convert(arrays: Arrays, specs: Sequence[TensorSpec], model: str) -> Arrays:
    """The arrays in the model's datatypes."""
    converted: Arrays = {}
    for spec in specs:
        array = arrays[spec.name]
        wanted = to_dtype(spec.datatype)
        if array.dtype != wanted:
            fits = _is_number(array) and wanted.kind in "iuf" and spec.datatype != "BF16"
            with np.errstate(all="ignore"):
                cast = array.astype(wanted) if fits else array
            both_floats = array.dtype.kind == "f" and wanted.kind == "f"
            if not fits or not (both_floats or np.array_equal(cast, array)):
                raise _mismatch(
                    f"the golden input {spec.name!r} is {array.dtype}, and {model} wants {spec}: its values "
                    "cannot be converted without loss",
                    model,
                )
            array = cast
        converted[spec.name] = array
    return converted


def _takes_batches(worker: Worker) -> bool:
    specs = worker.inputs
    varies = bool(specs) and all(spec.shape[:1] == (-1,) for spec in specs)
    return varies or splits_by_sample(specs, worker.outputs)


def _is_number(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "iuf"


def _comparable(array: NDArray[Any]) -> NDArray[Any]:
    return bytes_elements(array) if array.dtype.kind in "OSU" else array


def _mismatch(why: str, model: str) -> SluiceError:
    return SluiceError(
        errors_pb2.GOLDEN_MISMATCH,
        why,
        hint="publish a version whose golden file was made from its own outputs, or widen its tolerance",
        obj=model,
    )


def _bad_file(path: Path, why: str) -> SluiceError:
    return _mismatch(f"the golden file {path} {why}", str(path))
