"""A model file, mapped into memory and read in place; and the words of the errors that its bytes cause.

Nothing is read ahead or copied whole: a reader touches the pages that hold structure and passes over the
ones that hold weights. The file must not shrink while it is mapped (the store's files never change).
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors
from updater.formats import limits


@dataclass
class Source:
    """Bytes to read, the name to give them in errors, and how much may still be taken out of them.

    Attributes:
        data: the file's bytes; indexing gives an int, slicing copies.
        path: the file, for errors.
        text_left: bytes of names that may still be read.
        parameters_left: scales and zero points that may still be decoded.
    """

    data: mmap.mmap | bytes
    path: Path
    text_left: int = limits.MAX_TEXT_BYTES
    parameters_left: int = limits.MAX_ALL_QUANTISATION_PARAMETERS

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def truncated(self, message: str, *, size: int | None = None) -> SluiceError:
        """The error for a file that ends, at `size` or its own, before what its structure announces."""
        end = self.size if size is None else size
        return SluiceError(
            errors_pb2.MODEL_FILE_TRUNCATED,
            f"reading {self.path}: {message}, but the file ends at byte {end}",
            hint="the file was cut short, or a length in it is damaged: copy or export it again",
            obj=str(self.path),
        )

    def invalid(self, message: str, *, hint: str = "") -> SluiceError:
        """The error for a file that contradicts its own format."""
        return SluiceError(
            errors_pb2.MODEL_FILE_INVALID,
            f"reading {self.path}: {message}",
            hint=hint or "the file is damaged or its exporter is broken: export the model again",
            obj=str(self.path),
        )

    def text(self, start: int, end: int, what: str) -> str:
        """UTF-8 text at [start, end); bytes that are no UTF-8 become U+FFFD. Refuses overlong names."""
        if end - start > limits.MAX_NAME_BYTES:
            raise self.invalid(
                f"{what} at byte {start} has {end - start} bytes, "
                f"more than the {limits.MAX_NAME_BYTES} allowed"
            )
        self.spend_text(end - start, what, start)
        return self.data[start:end].decode("utf-8", "replace")

    def spend_text(self, length: int, what: str, at: int) -> None:
        """Counts `length` bytes of names; raises MODEL_FILE_INVALID when there were too many."""
        self.text_left -= length
        if self.text_left < 0:
            raise self.invalid(
                f"with {what} at byte {at} the names have more than the {limits.MAX_TEXT_BYTES} bytes allowed"
            )

    def spend_parameters(self, count: int) -> bool:
        """Counts scales and zero points; whether these may still be decoded."""
        if count > min(self.parameters_left, 2 * limits.MAX_QUANTISATION_PARAMETERS):
            return False
        self.parameters_left -= count
        return True


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Maps a file read-only for the length of the block.

    Raises:
        SluiceError: IO_FAILED if it cannot be opened; MODEL_FILE_INVALID if it is no regular file.
    """
    with os_errors("reading", path):
        is_file = stat.S_ISREG(path.stat().st_mode)  # opening a pipe would wait for its writer
    if not is_file:
        raise Source(b"", path).invalid("this is not a regular file", hint="give the path of a model file")
    with os_errors("reading", path), path.open("rb") as file:
        # An empty file cannot be mapped.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    try:
        yield Source(data, path)
    finally:
        if isinstance(data, mmap.mmap):
            data.close()
