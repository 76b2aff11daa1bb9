"""A part of a record's matrix that is worked on at a time: whole rows, or a range of one long row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.bits import CHUNK


@dataclass(frozen=True)
class Piece:
    """Elements that follow each other: rows [first_row, last_row) of columns [first_column, last_column).

    Attributes:
        width: columns of the whole matrix.
    """

    first_row: int
    last_row: int
    first_column: int
    last_column: int
    width: int

    @staticmethod
    def whole(rows: int, columns: int) -> Piece:
        """All of a matrix."""
        return Piece(0, rows, 0, columns, columns)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.last_row)

    @property
    def columns(self) -> slice:
        return slice(self.first_column, self.last_column)

    @property
    def shape(self) -> tuple[int, int]:
        return self.last_row - self.first_row, self.last_column - self.first_column

    def of_rows(self, values: NDArray[Any], chosen: NDArray[np.bool_]) -> NDArray[Any]:
        """Of the piece's values, flat, those in the chosen rows of the matrix; all if none are named."""
        if not len(chosen):
            return values
        return values.reshape(self.shape)[chosen[self.rows]].reshape(-1)

    @property
    def count(self) -> int:
        """Elements."""
        return (self.last_row - self.first_row) * (self.last_column - self.first_column)

    @property
    def start(self) -> int:
        """The first element, counted over the matrix."""
        return self.first_row * self.width + self.first_column


def pieces(rows: int, columns: int) -> Iterator[Piece]:
    """The pieces of a matrix in the order of its elements, of up to `CHUNK` elements."""
    if columns >= CHUNK:
        for row in range(rows):
            for start in range(0, columns, CHUNK):
                yield Piece(row, row + 1, start, min(columns, start + CHUNK), columns)
        return
    step = max(1, CHUNK // max(1, columns))
    for row in range(0, rows, step):
        yield Piece(row, min(rows, row + step), 0, columns, columns)
