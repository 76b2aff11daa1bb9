"""Where a TFLite file keeps its quantisation: arrays outside every tensor, and which tensors meet in
operators.

Used by the encoder only. A scale array of a bias equals input scale times weight scale; to see that, the
tensors
that an operator reads are needed besides the places of the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

from updater.formats import limits
from updater.formats.flatbuffer import Flatbuffer, Table
from updater.formats.source import Source

_ARRAYS = (("min", 0, 4), ("max", 1, 4), ("scale", 2, 4), ("zero", 3, 8))


@dataclass(frozen=True)
class Array:
    """Numbers in the file: byte offset and count."""

    offset: int
    count: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as the metadata sees it; `arrays` by "min", "max", "scale", "zero" where they are there."""

    index: int
    name: str
    shape: tuple[int, ...]
    type: int
    axis: int
    data: Array
    arrays: dict[str, Array]


@dataclass(frozen=True)
class Operator:
    """What an operator reads and writes: indices of tensors, -1 where left out."""

    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read(source: Source) -> tuple[list[Tensor], list[Operator]]:
    """Tensors and operators of a file that updater.formats.tflite accepts, numbered over its subgraphs."""
    model = Flatbuffer(source).root("the model table")
    buffers = [
        buffer.vector(0, 1, "the data") for buffer in model.tables(4, "buffer {}".format, limits.MAX_TENSORS)
    ]
    tensors: list[Tensor] = []
    operators: list[Operator] = []
    for number, subgraph in enumerate(model.tables(2, "subgraph {}".format, limits.MAX_TENSORS)):
        prefix, first = f"{number}/" if number else "", len(tensors)
        for table in subgraph.tables(0, "tensor {}".format, limits.MAX_TENSORS):
            tensors.append(_tensor(len(tensors), prefix, table, buffers))
        for table in subgraph.tables(3, "operator {}".format, limits.MAX_NODES):
            ends = [
                tuple(
                    int(value) + first if value >= 0 else -1
                    for value in table.numbers(field, "i", "the ends", 1 << 16) or ()
                )
                for field in (1, 2)
            ]
            operators.append(Operator(table.scalar(0, "I"), ends[0], ends[1]))
    return tensors, operators


def _tensor(index: int, prefix: str, table: Table, buffers: list[tuple[int, int]]) -> Tensor:
    quantised = table.table(4, "the quantisation")
    arrays = {}
    axis = 0
    if quantised is not None:
        axis = quantised.scalar(6, "i")
        for name, field, width in _ARRAYS:
            start, count = quantised.vector(field, width, name)
            if count:
                arrays[name] = Array(start, count)
    shape = tuple(int(size) for size in table.numbers(0, "i", "the shape", limits.MAX_RANK) or ())
    place = table.scalar(2, "I")
    start, count = buffers[place] if place < len(buffers) else (0, 0)
    return Tensor(
        index,
        prefix + table.text(3, "the name"),
        shape,
        table.scalar(1, "b"),
        axis,
        Array(start, count),
        arrays,
    )
