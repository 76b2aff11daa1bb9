"""Which format a file has, and the spans of its tensors.

Any file may be asked about. The content decides: a TFLite identifier, a safetensors header, or the fields of
an ONNX model; everything else is opaque, which is no error. The name counts in one case only: a file that
is too short for its content to tell is refused as truncated if its suffix, or the caller, says what it is.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from updater.errors import os_errors
from updater.formats import onnx, safetensors, tflite
from updater.formats.onnx_external import external_spans_of
from updater.formats.source import Source, open_source
from updater.formats.span import ModelFile, TensorSpan

_FORMATS: dict[str, ModuleType] = {"tflite": tflite, "safetensors": safetensors, "onnx": onnx}


def detect_format(path: Path) -> str:
    """Names the format by the file's content: "onnx", "tflite", "safetensors" or "opaque".

    A file that begins as its format does has that format, even if it is damaged further on.

    Raises:
        SluiceError: IO_FAILED; MODEL_FILE_INVALID if the path is no regular file.
    """
    with open_source(path) as source:
        return _detect(source)


def read_model(path: Path, *, expected: str = "") -> ModelFile:
    """Finds the tensor spans of a model file.

    Args:
        path: the file.
        expected: the format that the file must have, e.g. as a manifest says; "" takes any.

    Raises:
        SluiceError: MODEL_FILE_TRUNCATED or MODEL_FILE_INVALID if the file contradicts its own format or has
            not the expected one; IO_FAILED.
    """
    with open_source(path) as source:
        found = _detect(source)
        named = expected or path.suffix.lower().removeprefix(".")
        if found == "opaque" and named in _FORMATS and _FORMATS[named].may_begin(source):
            raise source.truncated(f"this should be a model in {named} format")
        if expected and found != expected:
            described = "in no format that is known" if found == "opaque" else f"in {found} format"
            raise source.invalid(
                f"the model should be in {expected} format, but the file is {described}",
                hint="check that this is the right file, and the format that is stated for it",
            )
        if found == "onnx":
            model = onnx.read(source)
            return ModelFile(found, source.size, model.spans, tuple(sorted(model.external)))
        spans = () if found == "opaque" else _FORMATS[found].read(source)
        return ModelFile(found, source.size, spans)


def external_spans(path: Path) -> dict[str, tuple[TensorSpan, ...]]:
    """Finds the spans that an ONNX model has in external data files.

    Returns:
        By file name relative to the model's directory: the spans in that file. Files that are not there are
        listed all the same. A file that is there must be long enough. Empty for other formats.

    Raises:
        SluiceError: as `read_model`; MODEL_FILE_TRUNCATED also when an external file is too short.
    """
    with open_source(path) as source:
        if _detect(source) != "onnx":
            return {}
        found = {}
        for location, tensors in sorted(onnx.read(source).external.items()):
            beside = path.parent / location
            with os_errors("reading", beside):
                size = beside.stat().st_size if beside.exists() else None
            found[location] = external_spans_of(source, location, tensors, size)
        return found


def _detect(source: Source) -> str:
    return next((name for name, module in _FORMATS.items() if module.matches(source)), "opaque")
