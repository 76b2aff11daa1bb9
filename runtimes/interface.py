"""The interface that every runtime implements, and the errors it raises.

A *runtime* is an inference library; a *model* is one file loaded by it. The rules, held by one
conformance suite over all runtimes (`edge_tests/conformance/test_runtimes.py`):

- `Model.run` takes every input by name, in the datatype and shape that `Model.inputs` describes, converts
  nothing silently (an int8 input wants int8 codes), and returns arrays that the caller owns.
- A dimension of -1 varies. Where the first dimension of all inputs and outputs is 1, a batch of any size
  is accepted too, and answered as if each sample had been sent alone.
- Several threads may call `run` on one model. `close` may be called twice; a `run` after it fails.
- Whatever the library raises leaves this room as one of the four errors below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

MAX_THREADS = 256  # threads of one model; more than any supported board has cores

CPU = "cpu"
# What the runtime may do to an ONNX graph before it runs it, from nothing to everything.
OPTIMIZATIONS = ("off", "basic", "extended", "all")


class RuntimeFailure(Exception):
    """What all errors of this room have in common.

    Args:
        message: what was being done, to what, and why it failed.
        hint: what helps; may be empty.
        obj: the object concerned: a path, a runtime or an input; may be empty.
    """

    def __init__(self, message: str, *, hint: str = "", obj: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.obj = obj

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RuntimeUnavailable(RuntimeFailure):
    """No library that is installed and works can do this; installing or configuring one helps."""


class ModelRejected(RuntimeFailure):
    """The file is not a model that this runtime can load."""


class InputInvalid(RuntimeFailure):
    """The caller's tensors do not fit the model; the same model answers other callers."""


class InferenceFailed(RuntimeFailure):
    """The library failed on inputs that fit, or the model is closed."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: Open Inference datatype ("FP32", "BYTES", …) and shape, -1 for what varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name!r} {self.datatype}{list(self.shape)}"


@dataclass(frozen=True)
class ExternalDelegate:
    """An accelerator in a shared library of its own, which TensorFlow Lite hands operators to.

    Attributes:
        name: the accelerator's, for example "edgetpu".
        library: path of the shared library, or its name where the loader finds it.
        options: for the library, names and values.
    """

    name: str
    library: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LoadOptions:
    """How to run a model.

    Args:
        threads: threads that one inference may use, 1 to MAX_THREADS.
        accelerators: what to run on, best first, in the words of `Probe.accelerators`. The first must be in
            use after loading, or loading fails: a library must not fall back to the CPU in silence.
        optimization: one of OPTIMIZATIONS; TensorFlow Lite files are optimised when they are converted.
        xnnpack: whether TensorFlow Lite hands what it can to XNNPACK, its delegate for processors.
        delegates: the external delegates of this box, of which `accelerators` may name some.

    Raises:
        ValueError: a value outside these bounds.
    """

    threads: int = 1
    accelerators: tuple[str, ...] = (CPU,)
    optimization: str = OPTIMIZATIONS[-1]
    xnnpack: bool = True
    delegates: tuple[ExternalDelegate, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads must be 1 to {MAX_THREADS}, not {self.threads}")
        if not self.accelerators:
            raise ValueError("accelerators must name at least one, for example 'cpu'")
        if self.optimization not in OPTIMIZATIONS:
            raise ValueError(f"optimization must be one of {OPTIMIZATIONS}, not {self.optimization!r}")


@dataclass(frozen=True)
class Probe:
    """What one real inference on a tiny model showed.

    Attributes:
        runtime: the runtime's name.
        version: the library's version; empty if it could not be imported.
        formats: the model formats it loads.
        accelerators: those on which the inference gave the right answer; empty if none did.
        error: why it cannot be used; empty if it can.
        hint: what helps then; may be empty.
        passed_over: why external delegates of the box are not among them; one sentence each.
    """

    runtime: str
    version: str
    formats: tuple[str, ...]
    accelerators: tuple[str, ...]
    error: str = ""
    hint: str = ""
    passed_over: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return not self.error


class Model(ABC):
    """A loaded model."""

    runtime: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One inference.

        Args:
            inputs: an array for each of `self.inputs`, by name. FP32 is float32 and so on; BYTES is an object
                array of bytes or str; BF16 is uint16 holding the raw bits.

        Returns:
            An array for each of `self.outputs`, by name; BYTES as an object array of bytes.

        Raises:
            InputInvalid: an input is missing, unknown, or has another datatype, rank or dimension.
            InferenceFailed: the library failed, or the model is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back the model's memory and threads once inferences that are under way have ended."""

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Runtime(ABC):
    """An inference library."""

    name: str
    formats: tuple[str, ...]

    @abstractmethod
    def probe(self) -> Probe:
        """Runs the tiny model that ships with this package.

        Raises:
            RuntimeUnavailable: the library is missing, cannot be imported, or answers wrongly.
        """

    @abstractmethod
    def check_accelerator(self, accelerator: str, delegates: tuple[ExternalDelegate, ...] = ()) -> None:
        """Runs the tiny model on this accelerator, all of it; an external delegate runs what it takes.

        Raises:
            RuntimeUnavailable: this build has no code for it, or the answer is missing or wrong.
        """

    @abstractmethod
    def load(self, path: Path, options: LoadOptions) -> Model:
        """Loads a file.

        Raises:
            ModelRejected: the file cannot be read, is damaged, or needs what the library lacks.
            RuntimeUnavailable: the library, or an accelerator that `options` asks for, is missing.
        """
