"""ONNX external data: tensors whose elements lie in another file beside the model.

A model names that file itself, so the name is hostile input: only a plain relative path that stays below the
model's directory is taken. The names are checked as text; nothing is opened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from updater.formats.layout import arrange, byte_length
from updater.formats.onnx_tensor import Tensor
from updater.formats.source import Source
from updater.formats.span import Quantisation, TensorSpan

_IN_MEMORY = "_ORT_MEM_ADDR_"  # ONNX Runtime's mark for an address instead of a file


@dataclass(frozen=True)
class External:
    """One tensor's place in another file.

    Attributes:
        location: the other file, as a path relative to the model's directory, "./" removed.
        offset: bytes from the start of that file.
        length: bytes.
        span: the tensor there; None when its elements are no array to us.
        at: byte of the model file where the tensor is described.
    """

    location: str
    offset: int
    length: int
    span: TensorSpan | None
    at: int


def locate(source: Source, tensor: Tensor, name: str, parameters: Quantisation | None) -> External:
    """Reads a tensor's external_data entries. Raises MODEL_FILE_INVALID."""
    entries = tensor.external or {}
    location = _checked(source, tensor, entries.get("location", ""))
    offset = _number(source, tensor, "offset", entries.get("offset", "0"))
    wanted = None if tensor.dtype is None else byte_length(tensor.dtype, tensor.count)
    length = _number(source, tensor, "length", entries.get("length", str(wanted or 0)))
    if wanted is not None and length != wanted:
        raise source.invalid(
            f"{tensor.what} at byte {tensor.at} has {length} bytes in {location}, but {tensor.dtype} of "
            f"shape {list(tensor.shape)} needs {wanted}"
        )
    span = None
    if tensor.dtype is not None:
        span = TensorSpan(name, tensor.dtype, tensor.shape, offset, length, parameters)
    return External(location, offset, length, span, tensor.at)


def external_spans_of(
    source: Source, location: str, tensors: list[External], size: int | None
) -> tuple[TensorSpan, ...]:
    """The spans in one external file of `size` bytes (None: not there, so not checked).

    Raises:
        SluiceError: MODEL_FILE_TRUNCATED if the file ends before a tensor does.
    """
    for tensor in tensors:
        if size is not None and tensor.offset + tensor.length > size:
            raise Source(b"", source.path.parent / location).truncated(
                f"the model's tensor at byte {tensor.at} has its elements from byte {tensor.offset} to byte "
                f"{tensor.offset + tensor.length}",
                size=size,
            )
    return arrange(tensor.span for tensor in tensors if tensor.span is not None)


def _checked(source: Source, tensor: Tensor, location: str) -> str:
    path = PurePosixPath(location)
    problem = ""
    if not location or str(path) == ".":
        problem = "names no file"
    elif path.is_absolute() or "\\" in location or ":" in location or not location.isprintable():
        problem = f"names {location!r}, which is no plain relative path"
    elif ".." in path.parts:
        problem = f"names {location!r}, which leads out of the model's directory"
    elif _IN_MEMORY in location:
        problem = f"names {location!r}, an address in memory"
    if problem:
        raise source.invalid(
            f"the external data of {tensor.what} at byte {tensor.at} {problem}",
            hint="save the model again with its external data in one file beside it",
        )
    return str(path)


def _number(source: Source, tensor: Tensor, key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise source.invalid(
            f"the external data of {tensor.what} at byte {tensor.at} has the {key} {text[:40]!r}, "
            "which is no number of bytes"
        )
    return int(text)
