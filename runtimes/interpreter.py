"""TensorFlow Lite's `Interpreter` behind the interface: one piece of code for the two packages that ship it.

Names: a model's SignatureDef gives the names of its inputs and outputs if it describes the primary
subgraph ("serving_default" first, then in the file's order); else they are the tensor names; else, where
those are empty or not unique, "input_0", "output_0" and so on.

Batches: a first dimension that varies is resized. For a file with a fixed batch of one, resizing is
faster than running sample by sample but is not always right (a reshape to a constant may mix samples). So
the first batch is answered sample by sample, then also by resizing, and only if both agree are later ones
answered by resizing.

External delegates: the accelerator's library is loaded with the options that the box has for it. It must
answer the tiny model right, as far as it takes that, and must take at least one of the model's own operators;
the others run on the CPU, without XNNPACK, so that it can be told who took what.

An interpreter serves one caller at a time: `run` and `close` hold a lock. After a failure it is made
anew, because its state is then unknown.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import probing, tflite_file
from runtimes.datatypes import BYTES, bytes_elements, of_dtype
from runtimes.detect import TFLITE
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

_PREFERRED_SIGNATURE = "serving_default"
_DELEGATED = "DELEGATE"

# How far answers by resizing may lie from those sample by sample: kernels for other sizes add up in another
# order.
_RELATIVE_TOLERANCE = 1e-3
_ABSOLUTE_TOLERANCE = 1e-5
_CODE_TOLERANCE = 1  # of integer outputs, which are rounded


class InterpreterRuntime(Runtime):
    """A package that ships `Interpreter`."""

    formats = (TFLITE,)
    distribution: str  # the package's name on PyPI
    module: str  # that has the class
    install: str  # the command that helps

    def probe(self) -> Probe:
        self._interpreter_class()
        try:
            model = self.load(probing.MODELS[TFLITE], LoadOptions())
        except ModelRejected as error:
            raise RuntimeUnavailable(
                f"{self.name} does not load a tiny model: {error.message}", hint=self.install, obj=self.name
            ) from error
        with model:
            probing.check(model)
        return Probe(self.name, self.version(), self.formats, (CPU,))

    def check_accelerator(self, accelerator: str, delegates: tuple[ExternalDelegate, ...] = ()) -> None:
        if accelerator == CPU:
            self.probe()
            return
        delegate = self._delegate(accelerator, delegates)
        try:
            model = self._open(probing.MODELS[TFLITE], LoadOptions(), delegate, takes_some=False)
        except ModelRejected as error:
            raise RuntimeUnavailable(
                f"{accelerator} does not take part in a tiny model: {error.message}", obj=accelerator
            ) from error
        with model:
            probing.check(model)

    def load(self, path: Path, options: LoadOptions) -> Model:
        first = options.accelerators[0]
        delegate = None if first == CPU else self._delegate(first, options.delegates)
        return self._open(path, options, delegate, takes_some=True)

    def _open(
        self, path: Path, options: LoadOptions, delegate: ExternalDelegate | None, *, takes_some: bool
    ) -> Model:
        interpreter_class = self._interpreter_class()
        tflite_file.verify(path)
        settings: dict[str, Any] = {}
        if not options.xnnpack or delegate is not None:
            resolvers = importlib.import_module(self.module).OpResolverType
            settings["experimental_op_resolver_type"] = resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES

        def create() -> Any:
            if delegate is not None:
                settings["experimental_delegates"] = [self._load_delegate(delegate)]
            interpreter = interpreter_class(model_path=str(path), num_threads=options.threads, **settings)
            settings.pop("experimental_delegates", None)  # it is the interpreter's, and ends with it
            interpreter.allocate_tensors()
            if delegate is not None and takes_some and not _delegates(interpreter):
                raise RuntimeUnavailable(
                    f"{delegate.name} takes none of the operators of {path}",
                    hint="compile the model for it",
                    obj=delegate.name,
                )
            return interpreter

        try:
            return InterpreterModel(self.name, create)
        except RuntimeFailure:
            raise
        except Exception as error:
            raise ModelRejected(
                f"{self.name} {self.version()} refused the model {path}: {error}",
                hint="check that its operators are known to this version",
                obj=str(path),
            ) from error

    def _delegate(self, name: str, delegates: tuple[ExternalDelegate, ...]) -> ExternalDelegate:
        for delegate in delegates:
            if delegate.name == name:
                return delegate
        names = ", ".join((CPU, *(delegate.name for delegate in delegates)))
        raise RuntimeUnavailable(f"{self.name} has no accelerator {name!r}", hint=f"it has {names}", obj=name)

    def _load_delegate(self, delegate: ExternalDelegate) -> Any:
        try:
            return importlib.import_module(self.module).load_delegate(
                delegate.library, dict(delegate.options)
            )
        except Exception as error:
            why = " ".join(str(error).split())
            raise RuntimeUnavailable(
                f"{delegate.name}: {self.name} cannot load the delegate {delegate.library}: {why}",
                hint="install the library, plug the device in, and check inference.delegates",
                obj=delegate.name,
            ) from error

    def version(self) -> str:
        """The package's version; "unknown" if it was copied onto the box without its metadata."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "unknown"

    def _interpreter_class(self) -> Any:
        try:
            return importlib.import_module(self.module).Interpreter
        except Exception as error:
            raise RuntimeUnavailable(
                f"{self.name} cannot be imported: {error}", hint=self.install, obj=self.name
            ) from error


class InterpreterModel(Model):
    """One interpreter.

    Args:
        runtime: the runtime's name.
        create: makes a new interpreter on the file, its tensors allocated.
    """

    def __init__(self, runtime: str, create: Callable[[], Any]) -> None:
        self.runtime = runtime
        self._create = create
        self._lock = threading.Lock()
        self._closed = False
        self._interpreter: Any = create()
        inputs, outputs = _named_tensors(self._interpreter)
        self.inputs = tuple(_spec(name, details) for name, details in inputs.items())
        self.outputs = tuple(_spec(name, details) for name, details in outputs.items())
        self._input_index = {name: int(details["index"]) for name, details in inputs.items()}
        self._output_index = {name: int(details["index"]) for name, details in outputs.items()}
        self._allocated = {name: _dimensions(details["shape"]) for name, details in inputs.items()}
        self._shapes = dict(self._allocated)  # what the inputs are resized to now
        self._any_batch = splits_by_sample(self.inputs, self.outputs)
        self._check = InputCheck(self.inputs, any_batch=self._any_batch)
        self._resizes: bool | None = None  # whether resizing answers batches rightly; None: not known yet

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        arrays = self._check(inputs)
        for name, array in arrays.items():
            if 0 in array.shape:
                raise InputInvalid(
                    f"the input {name!r} is empty: shape {list(array.shape)}",
                    hint=f"{self.runtime} takes no dimension of zero",
                    obj=name,
                )
        with self._lock:
            if self._closed:
                raise InferenceFailed("the model is closed", hint="load it again")
            if self._any_batch and next(iter(arrays.values())).shape[0] != 1:
                return self._run_batch(arrays)
            return self._infer(arrays)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._interpreter = None

    def _run_batch(self, arrays: Arrays) -> Arrays:
        if self._resizes:
            return self._infer(arrays)
        answers = run_each(arrays, self._infer)
        if self._resizes is None and _samples_differ(answers):
            try:
                self._resizes = _agree(self._infer(arrays), answers)
            except InferenceFailed:
                self._resizes = False
        return answers

    def _infer(self, arrays: Arrays) -> Arrays:
        try:
            if self._interpreter is None:
                self._interpreter = self._create()
                self._shapes = dict(self._allocated)
            self._resize(arrays)
            for name, array in arrays.items():
                self._interpreter.set_tensor(self._input_index[name], array)
            self._interpreter.invoke()
            answers = {
                name: self._interpreter.get_tensor(index) for name, index in self._output_index.items()
            }
        except Exception as error:
            self._interpreter = None
            raise InferenceFailed(
                f"{self.runtime} failed during inference: {error}",
                hint="the inputs fit the model's description; test the model with them where it was exported",
            ) from error
        for spec in self.outputs:
            if spec.datatype == BYTES:
                answers[spec.name] = bytes_elements(answers[spec.name])
        return answers

    def _resize(self, arrays: Arrays) -> None:
        changed = {name: array.shape for name, array in arrays.items() if array.shape != self._shapes[name]}
        for name, shape in changed.items():
            self._interpreter.resize_tensor_input(self._input_index[name], shape)
        if changed:
            self._interpreter.allocate_tensors()
            self._shapes.update(changed)


def _delegates(interpreter: Any) -> bool:
    """Whether a delegate took any operator. Those that it took are one operator of this name."""
    return any(operator["op_name"] == _DELEGATED for operator in interpreter._get_ops_details())


def _named_tensors(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of the primary subgraph's inputs and outputs, by the names that this module promises."""
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    keys = list(interpreter.get_signature_list())
    for key in sorted(keys, key=lambda key: key != _PREFERRED_SIGNATURE):
        signature = interpreter.get_signature_runner(key)
        named_inputs, named_outputs = signature.get_input_details(), signature.get_output_details()
        if _same_tensors(named_inputs, inputs) and _same_tensors(named_outputs, outputs):
            return named_inputs, named_outputs
    return _by_tensor_name(inputs, "input"), _by_tensor_name(outputs, "output")


def _same_tensors(named: Mapping[str, Any], tensors: list[Any]) -> bool:
    """Whether a signature covers exactly the primary subgraph's tensors, not those of another subgraph."""
    return sorted((int(t["index"]), t["name"]) for t in named.values()) == sorted(
        (int(t["index"]), t["name"]) for t in tensors
    )


def _by_tensor_name(tensors: list[Any], role: str) -> dict[str, Any]:
    names = [tensor["name"] for tensor in tensors]
    if len(set(names)) < len(names) or "" in names:
        names = [f"{role}_{index}" for index in range(len(tensors))]
    return dict(zip(names, tensors))


def _dimensions(shape: Any) -> tuple[int, ...]:
    return tuple(int(dimension) for dimension in shape)


def _spec(name: str, details: Any) -> TensorSpec:
    dtype = np.dtype(details["dtype"])
    datatype = of_dtype(dtype)
    if not datatype:
        raise ModelRejected(
            f"{name!r} is of type {dtype}, which the Open Inference Protocol cannot carry",
            hint="export the model with plain tensors as inputs and outputs",
            obj=name,
        )
    signature = _dimensions(details["shape_signature"])
    return TensorSpec(name, datatype, signature or _dimensions(details["shape"]))


def _samples_differ(answers: Arrays) -> bool:
    """Whether a batch can show that resizing keeps samples apart: equal samples would hide a mix-up."""
    return any(bool((array[1:] != array[:1]).any()) for array in answers.values())


def _agree(resized: Arrays, looped: Arrays) -> bool:
    for name, expected in looped.items():
        answer = resized[name]
        if answer.shape != expected.shape:
            return False
        if expected.dtype.kind in "fc":
            close = np.allclose(
                answer, expected, rtol=_RELATIVE_TOLERANCE, atol=_ABSOLUTE_TOLERANCE, equal_nan=True
            )
        elif expected.dtype.kind in "iu":
            steps = np.abs(answer.astype(np.float64) - expected.astype(np.float64))
            close = bool((steps <= _CODE_TOLERANCE).all())
        else:
            close = bool((answer == expected).all())
        if not close:
            return False
    return True
