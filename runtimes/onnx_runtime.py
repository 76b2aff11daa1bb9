"""ONNX Runtime (PyPI `onnxruntime`) behind the interface.

One session a model: sequential, one inter-op thread, as many intra-op threads as asked. Sessions may be
run by several threads at once. A session whose first execution provider is not the wanted one is refused,
because the library falls back to the CPU with no more than a log line.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import probing
from runtimes.datatypes import BF16, BYTES, bytes_elements
from runtimes.detect import ONNX
from runtimes.inputs import Arrays, InputCheck, run_each, splits_by_sample
from runtimes.interface import (
    CPU,
    ExternalDelegate,
    InferenceFailed,
    InputInvalid,
    LoadOptions,
    Model,
    ModelRejected,
    Probe,
    Runtime,
    RuntimeFailure,
    RuntimeUnavailable,
    TensorSpec,
)

NAME = "onnxruntime"

_PROVIDER_SUFFIX = "ExecutionProvider"
_REMOTE = "azure"  # a provider in every build that calls a server: no accelerator of this box
# On the CPU every logged error is also raised; elsewhere the log alone says why a provider is not used.
_LOG_ERRORS, _LOG_FATAL = 3, 4
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_TENSOR_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16

_LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": BF16,
    "tensor(string)": BYTES,
}


class OnnxRuntime(Runtime):
    """The library; importing it waits for the first probe or load."""

    name = NAME
    formats = (ONNX,)

    def probe(self) -> Probe:
        library = _library()
        working = [CPU]
        self._check(LoadOptions())
        for accelerator in _accelerators(library):
            if accelerator != CPU and self._works_on(accelerator):
                working.insert(0, accelerator)
        return Probe(self.name, str(library.__version__), self.formats, tuple(working))

    def load(self, path: Path, options: LoadOptions) -> Model:
        return OnnxModel(_open_session(path, options, strict=False))

    def check_accelerator(
        self,
        accelerator: str,
        delegates: tuple[ExternalDelegate, ...] = (),  # noqa: ARG002 - these are TensorFlow Lite's
    ) -> None:
        if accelerator == _REMOTE:
            raise RuntimeUnavailable(f"{_REMOTE} is a server, not an accelerator of this box", obj=_REMOTE)
        self._check(LoadOptions(accelerators=(accelerator,)), strict=accelerator != CPU)

    def _check(self, options: LoadOptions, *, strict: bool = False) -> None:
        try:
            model = OnnxModel(_open_session(probing.MODELS[ONNX], options, strict=strict))
        except ModelRejected as error:
            raise RuntimeUnavailable(
                f"{self.name} does not load a tiny model: {error.message}", hint="reinstall it", obj=self.name
            ) from error
        with model:
            probing.check(model)

    def _works_on(self, accelerator: str) -> bool:
        """Whether all of the tiny model runs there, nothing of it on the CPU."""
        try:
            self.check_accelerator(accelerator)
        except RuntimeFailure:
            return False
        return True


class OnnxModel(Model):
    """A session."""

    runtime = NAME

    def __init__(self, session: Any) -> None:
        self.inputs = tuple(_spec(argument) for argument in session.get_inputs())
        self.outputs = tuple(_spec(argument) for argument in session.get_outputs())
        self._session = session
        self._names = [spec.name for spec in self.outputs]
        self._has_strings = any(spec.datatype == BYTES for spec in self.inputs)
        self._gives_strings = any(spec.datatype == BYTES for spec in self.outputs)
        self._any_batch = splits_by_sample(self.inputs, self.outputs)
        self._check = InputCheck(self.inputs, any_batch=self._any_batch)
        # NumPy has no BF16, so such a model's tensors cross as raw bits in the library's own values.
        self._raw = any(spec.datatype == BF16 for spec in (*self.inputs, *self.outputs))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        session = self._session
        if session is None:
            raise InferenceFailed("the model is closed", hint="load it again")
        arrays = self._check(inputs)
        if self._has_strings:
            arrays = {
                spec.name: _decoded(spec.name, arrays[spec.name])
                if spec.datatype == BYTES
                else arrays[spec.name]
                for spec in self.inputs
            }
        infer = self._infer_raw if self._raw else self._infer
        if self._any_batch and next(iter(arrays.values())).shape[0] != 1:
            return run_each(arrays, lambda sample: infer(session, sample))
        return infer(session, arrays)

    def close(self) -> None:
        self._session = None

    def _infer(self, session: Any, arrays: Arrays) -> Arrays:
        try:
            answers = session.run(self._names, arrays)
        except Exception as error:
            raise _failed(error) from error
        if not self._gives_strings:
            return dict(zip(self._names, answers))
        return {
            spec.name: bytes_elements(answer) if spec.datatype == BYTES else answer
            for spec, answer in zip(self.outputs, answers)
        }

    def _infer_raw(self, session: Any, arrays: Arrays) -> Arrays:
        value = importlib.import_module("onnxruntime").OrtValue
        try:
            feed = {
                spec.name: value.ortvalue_from_numpy_with_onnx_type(arrays[spec.name], _TENSOR_BFLOAT16)
                if spec.datatype == BF16
                else value.ortvalue_from_numpy(arrays[spec.name])
                for spec in self.inputs
            }
            answers = session.run_with_ort_values(self._names, feed)
            return {
                spec.name: _raw_bits(answer) if spec.datatype == BF16 else answer.numpy()
                for spec, answer in zip(self.outputs, answers)
            }
        except Exception as error:
            raise _failed(error) from error


def _library() -> Any:
    # Read at import. Without it 1.31 keeps a device id and usage events for its maker's server below $HOME.
    os.environ.setdefault(_NO_TELEMETRY, "1")
    try:
        return importlib.import_module("onnxruntime")
    except Exception as error:
        raise RuntimeUnavailable(
            f"{NAME} cannot be imported: {error}", hint="pip install 'sluice[onnx]'", obj=NAME
        ) from error


def _accelerators(library: Any) -> list[str]:
    """Names of what this build has code for, "CUDAExecutionProvider" as "cuda"; not a proof that it works."""
    return [provider.removesuffix(_PROVIDER_SUFFIX).lower() for provider in library.get_available_providers()]


def _providers(library: Any, accelerators: Sequence[str]) -> list[str]:
    known = dict(zip(_accelerators(library), library.get_available_providers()))
    if accelerators[0] not in known:
        raise RuntimeUnavailable(
            f"this build of {NAME} has no accelerator {accelerators[0]!r}",
            hint=f"it has {', '.join(known)}",
            obj=accelerators[0],
        )
    return [known[accelerator] for accelerator in accelerators if accelerator in known]


def _open_session(path: Path, options: LoadOptions, *, strict: bool) -> Any:
    """A session on `path`.

    Args:
        path: the model file.
        options: how to run it.
        strict: refuse a model of which any part would run on the CPU when that is not asked for.
    """
    library = _library()
    providers = _providers(library, options.accelerators)
    settings = library.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    level = _LEVELS[options.optimization]
    settings.graph_optimization_level = getattr(library.GraphOptimizationLevel, level)
    settings.log_severity_level = _LOG_FATAL if options.accelerators == (CPU,) else _LOG_ERRORS
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file is called
    if strict:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = library.InferenceSession(
            str(path), sess_options=settings, providers=providers, enable_fallback=0
        )
    except Exception as error:
        raise ModelRejected(
            f"{NAME} {library.__version__} refused the model {path}: {error}",
            hint="check that the file is complete and that its operators and opset are known to this version",
            obj=str(path),
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise RuntimeUnavailable(
            f"{NAME} fell back from {providers[0]} to {session.get_providers()[0]}",
            hint="install the accelerator's libraries, or load with accelerators=('cpu',)",
            obj=options.accelerators[0],
        )
    return session


def _spec(argument: Any) -> TensorSpec:
    datatype = _DATATYPES.get(argument.type)
    if datatype is None:
        raise ModelRejected(
            f"{argument.name!r} is a {argument.type}, which the Open Inference Protocol cannot carry",
            hint="export the model with plain tensors as inputs and outputs",
            obj=argument.name,
        )
    shape = tuple(
        dimension if isinstance(dimension, int) and dimension >= 0 else -1 for dimension in argument.shape
    )
    return TensorSpec(argument.name, datatype, shape)


def _decoded(name: str, array: NDArray[np.object_]) -> NDArray[np.object_]:
    """`array` of bytes as str: the library's Python interface carries strings as UTF-8 text only."""
    elements = np.empty(array.size, np.object_)
    for index, element in enumerate(array.ravel()):
        try:
            elements[index] = element.decode()
        except UnicodeDecodeError as error:
            raise InputInvalid(
                f"element {index} of the input {name!r} is not UTF-8: {error.reason} at byte {error.start}",
                hint=f"{NAME} takes strings as UTF-8; send binary data as UINT8",
                obj=name,
            ) from error
    return elements.reshape(array.shape)


def _raw_bits(value: Any) -> NDArray[np.uint16]:
    """A BF16 answer's bits; the library has no conversion to NumPy for them."""
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(raw), np.uint16).reshape(value.shape())


def _failed(error: Exception) -> InferenceFailed:
    return InferenceFailed(
        f"{NAME} failed during inference: {error}",
        hint="the inputs fit the model's description; test the model with them where it was exported",
    )
