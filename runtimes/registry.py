"""The runtimes there are, which of them work here, and which one loads a file.

A format's runtimes are tried in the order of `RUNTIMES`. What a probe found is kept for the life of the
process: a package that is installed later counts after a restart. Probing imports the library into this
process; a process that must stay small, or outlive a library that crashes, asks `runtimes.survey`
instead.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from runtimes.detect import ONNX, TFLITE, detect_format
from runtimes.interface import LoadOptions, Model, ModelRejected, Probe, Runtime, RuntimeUnavailable
from runtimes.litert import LiteRt
from runtimes.onnx_runtime import OnnxRuntime
from runtimes.tflite_legacy import TfliteRuntime

RUNTIMES: tuple[Runtime, ...] = (OnnxRuntime(), LiteRt(), TfliteRuntime())
FORMATS: tuple[str, ...] = (ONNX, TFLITE)
DEFAULT_OPTIONS = LoadOptions()


@cache
def probe(name: str) -> Probe:
    """What one runtime can do here; `Probe.error` says why if it cannot be used.

    Raises:
        RuntimeUnavailable: no runtime has that name.
    """
    runtime = _named(name)
    try:
        return runtime.probe()
    except RuntimeUnavailable as error:
        return Probe(runtime.name, "", runtime.formats, (), error.message, error.hint)


def probe_all() -> list[Probe]:
    """One real inference in each runtime."""
    return [probe(runtime.name) for runtime in RUNTIMES]


def select(format: str, preferred: str = "") -> Runtime:  # noqa: A002 (the word for it everywhere)
    """The first runtime that loads `format` and works here.

    Args:
        format: "onnx" or "tflite".
        preferred: the name of a runtime to try first; "" for none.

    Raises:
        RuntimeUnavailable: none does, and the message says why for each; or `preferred` is no such runtime.
    """
    candidates = [runtime for runtime in RUNTIMES if format in runtime.formats]
    if not candidates:
        raise RuntimeUnavailable(
            f"no runtime loads the format {format!r}", hint=f"formats are {', '.join(FORMATS)}", obj=format
        )
    if preferred:
        if _named(preferred) not in candidates:
            raise RuntimeUnavailable(
                f"{preferred} does not load {format} files",
                hint=f"those that do: {', '.join(runtime.name for runtime in candidates)}",
                obj=preferred,
            )
        candidates.sort(key=lambda runtime: runtime.name != preferred)
    failures = []
    for runtime in candidates:
        result = probe(runtime.name)
        if result.usable:
            return runtime
        failures.append(result)
    raise RuntimeUnavailable(
        f"no runtime for {format} works here: {'; '.join(failure.error for failure in failures)}",
        hint=" or ".join(dict.fromkeys(failure.hint for failure in failures if failure.hint)),
        obj=format,
    )


def load(
    path: Path,
    *,
    format: str = "",  # noqa: A002
    preferred: str = "",
    options: LoadOptions = DEFAULT_OPTIONS,
) -> Model:
    """Loads a file with the runtime that `select` gives.

    Args:
        path: the model file; its name does not matter.
        format: what it is said to be; "" to tell from its content.
        preferred: as for `select`.
        options: how to run it.

    Raises:
        ModelRejected: the file cannot be read, is of another format than said, or the runtime refuses it.
        RuntimeUnavailable: no runtime for it works here, or lacks the accelerator asked for.
    """
    detected = detect_format(path)
    if not detected:
        raise ModelRejected(
            f"{path} is neither an ONNX nor a TensorFlow Lite file",
            hint="export the model to one of them",
            obj=str(path),
        )
    if format and format != detected:
        raise ModelRejected(
            f"{path} is said to be {format}, and its content is {detected}",
            hint="correct the variant's format",
            obj=str(path),
        )
    return select(detected, preferred).load(path, options)


def _named(name: str) -> Runtime:
    for runtime in RUNTIMES:
        if runtime.name == name:
            return runtime
    raise RuntimeUnavailable(
        f"there is no runtime {name!r}",
        hint=f"runtimes are {', '.join(runtime.name for runtime in RUNTIMES)}",
        obj=name,
    )
