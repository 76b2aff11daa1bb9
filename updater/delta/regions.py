"""Describes a delta: for each tensor of the target, which instruction writes it and how many bytes it costs.

Names are not in a delta: they come from the spans of the target, or, where only the base is at hand, from
those of the base that the instructions read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from updater.delta import container, faults, instructions, streams, varint
from updater.delta.base import Base
from updater.delta.block import Block, OpenBlock, open_block
from updater.delta.container import Header
from updater.delta.guessing import known_spans
from updater.delta.instructions import PLAIN, SPARSE, Copy, Literal, Program, Tensor
from updater.delta.program.operands import ReadBase
from updater.delta.program.outline import outline
from updater.delta.tensors import GAP_ESCAPE
from updater.errors import os_errors
from updater.formats.span import TensorSpan
from updater.limits import BLOCK_OVERHEAD_BYTES, DecodeLimits

_HEAD_BYTES = 64  # more than a block's head has


@dataclass(frozen=True)
class Region:
    """A tensor of the target, or all that lies between tensors (without a name), and its way in the delta.

    Attributes:
        name: the tensor's name in the target.
        base_name: the name of the base's tensor that it is made from; "" if none.
        instruction: "copy", "literal", "patch", "program" or "tensor"; of several, the one that costs most.
        predictor: "same", "plain", "difference" or "requantise", or the operation of a program's record; ""
            for literal and patch, and for what a program writes between its records.
        dtype, shape: of the tensor.
        target_offset: of the first byte in the target.
        target_length: bytes in the target.
        coded_bytes: bytes in the delta; streams that several share are split by what each takes from them.
    """

    name: str
    base_name: str
    instruction: str
    predictor: str
    dtype: str
    shape: tuple[int, ...]
    target_offset: int
    target_length: int
    coded_bytes: int


@dataclass(frozen=True)
class _Step:
    """One instruction with its place and cost."""

    offset: int
    length: int
    instruction: str
    predictor: str
    base_offset: int | None
    cost: float


def describe(
    base: Path | None,
    delta: Path,
    target: Path | None = None,
    *,
    base_spans: Sequence[TensorSpan] | None = None,
    target_spans: Sequence[TensorSpan] | None = None,
) -> tuple[Region, ...]:
    """What a delta does, tensor by tensor, in the order of the target.

    Args:
        base: the base; None for a full copy.
        delta: the delta.
        target: the target, for its tensors' names; without it those of the base are used where bytes of the
            base are read.
        base_spans: the base's tensors, if already known.
        target_spans: the target's tensors, if already known.

    Raises:
        SluiceError: as `apply`, except for what only the target's digest shows.
    """
    old = base_spans if base_spans is not None else known_spans(base) if base is not None else ()
    new = target_spans if target_spans is not None else known_spans(target) if target is not None else ()
    source = Base(base)
    try:
        with os_errors("reading", delta), delta.open("rb") as file:
            steps = list(_steps(file, source))
    finally:
        source.close()
    if not new and target is None:
        new = _projected(steps, old)
    return _collect(steps, old, new)


def _steps(file: IO[bytes], source: Base) -> Iterator[_Step]:
    bounds = DecodeLimits()
    prefix = file.read(container.PREFIX.size)
    container.check_magic(prefix)
    if len(prefix) < container.PREFIX.size:
        raise faults.truncated("the delta ends inside its header")
    data = prefix + file.read(container.header_length(prefix, bounds) - len(prefix))
    if len(data) < container.header_length(prefix, bounds):
        raise faults.truncated("the delta ends inside its header")
    header = container.decode_header(data, bounds)
    source.open(header)
    offset = 0
    for number in range(header.block_count):
        block = _read_block(file, number, offset, header, container.header_checksum(data))
        opened = open_block(block, header.features, source.read, bounds)
        yield from _block_steps(opened, source.read, offset, len(block.payload))
        offset += block.target_length
    if file.read(2) != bytes([container.MARK_END]):
        raise faults.truncated("the delta does not end with its end marker")


def _read_block(file: IO[bytes], number: int, offset: int, header: Header, seed: int) -> Block:
    place = file.tell()
    try:
        head, length = container.scan_block_head(file.read(_HEAD_BYTES), number, header.block_size)
    except varint.Incomplete as error:
        raise faults.truncated(f"the delta ends inside the head of block {number}") from error
    file.seek(place + length)
    assert head.payload_length <= head.target_length + BLOCK_OVERHEAD_BYTES
    payload = file.read(head.payload_length)
    if len(payload) < head.payload_length:
        raise faults.truncated(f"the delta ends inside block {number}")
    if container.block_checksum(seed, number, head.fields, payload) != head.checksum:
        raise faults.corrupt(f"the checksum of block {number} does not match")
    return Block(payload, offset, head.target_length)


def _block_steps(opened: OpenBlock, read: ReadBase, offset: int, payload_length: int) -> Iterator[_Step]:
    rates = [len(stream.coded) / max(1, stream.length) for stream in opened.table]
    found = []
    for item in opened.instructions:
        if isinstance(item, Copy):
            found.append(_Step(offset, item.length, "copy", "same", item.base_offset, 0))
        elif isinstance(item, Literal):
            opened.readers[item.stream].take(item.length)
            name = streams.CODER_NAMES[opened.table[item.stream].coder]
            found.append(_Step(offset, item.length, name, "", None, item.length * rates[item.stream]))
        elif isinstance(item, Program):
            data = opened.readers[item.stream].take(item.size)
            for part in outline(read, data, offset, item.length):
                base_offset = part.base_offset if part.base_offset >= 0 else None
                found.append(
                    _Step(offset + part.at, part.length, "program", part.operation, base_offset, part.cost)
                )
        else:
            cost = sum(taken * rates[stream] for stream, taken in _taken(item, opened))
            base_offset = None if item.predictor == PLAIN else item.base_offset
            predictor = instructions.PREDICTOR_NAMES[item.predictor]
            found.append(_Step(offset, item.length, "tensor", predictor, base_offset, cost))
        offset += item.length
    # What no stream accounts for (tables, the instructions themselves) is shared by all.
    shared = (payload_length - sum(step.cost for step in found)) / max(1, len(found))
    for step in found:
        yield _Step(
            step.offset, step.length, step.instruction, step.predictor, step.base_offset, step.cost + shared
        )


def _taken(item: Tensor, opened: OpenBlock) -> Iterator[tuple[int, int]]:
    """The streams that a tensor instruction takes from, and how many bytes."""
    values, planes = item.count, item.streams
    if item.coding == SPARSE:
        gaps = opened.readers[item.streams[0]].take(item.gap_bytes)
        yield item.streams[0], len(gaps)
        values, planes = len(gaps) - gaps.count(GAP_ESCAPE), item.streams[1:]
    for stream in planes:
        opened.readers[stream].take(values)
        yield stream, values


def _projected(steps: Sequence[_Step], old: Sequence[TensorSpan]) -> list[TensorSpan]:
    """The base's tensors where the steps that read them put them in the target."""
    found: dict[int, TensorSpan] = {}
    for step in steps:
        if step.base_offset is None:
            continue
        for span in _inside(old, step.base_offset, step.base_offset + step.length):
            place = step.offset + span.offset - step.base_offset
            if span.offset >= step.base_offset and place not in found:
                found[place] = TensorSpan(span.name, span.dtype, span.shape, place, span.length)
    spans: list[TensorSpan] = []
    for place in sorted(found):
        if not spans or spans[-1].offset + spans[-1].length <= place:
            spans.append(found[place])
    return spans


def _inside(spans: Sequence[TensorSpan], start: int, end: int) -> Iterator[TensorSpan]:
    """The spans that overlap a range; spans are sorted and do not overlap."""
    index = max(0, bisect_right(spans, start, key=lambda span: span.offset) - 1)
    while index < len(spans) and spans[index].offset < end:
        if spans[index].offset + spans[index].length > start:
            yield spans[index]
        index += 1


class _Sum:
    """Adds up what belongs to one region."""

    def __init__(self) -> None:
        self.cost = 0.0
        self.length = 0
        self.first: int | None = None
        self.base_name = ""
        self.by_way: dict[tuple[str, str], float] = {}

    def add(self, step: _Step, offset: int, length: int, old: Sequence[TensorSpan]) -> None:
        cost = step.cost * length / step.length
        self.cost += cost
        self.length += length
        self.first = offset if self.first is None else self.first
        way = (step.instruction, step.predictor)
        # A copy costs next to nothing: bytes written break the tie.
        self.by_way[way] = self.by_way.get(way, 0.0) + cost + length * 1e-9
        if step.base_offset is not None and not self.base_name:
            start = step.base_offset + offset - step.offset
            self.base_name = next((span.name for span in _inside(old, start, start + 1)), "")


def _collect(
    steps: Sequence[_Step], old: Sequence[TensorSpan], new: Sequence[TensorSpan]
) -> tuple[Region, ...]:
    sums: dict[int, _Sum] = {}
    between = _Sum()
    for step in steps:
        end, place = step.offset + step.length, step.offset
        for span in _inside(new, place, end):
            if span.offset > place:
                between.add(step, place, span.offset - place, ())
                place = span.offset
            stop = min(end, span.offset + span.length)
            if stop > place:
                sums.setdefault(span.offset, _Sum()).add(step, place, stop - place, old)
                place = stop
        if place < end:
            between.add(step, place, end - place, ())
    by_offset = {span.offset: span for span in new if span.length}
    regions = [_region(found, by_offset[offset]) for offset, found in sums.items()]
    if between.length:
        regions.append(_region(between, None))
    return tuple(sorted(regions, key=lambda region: region.target_offset))


def _region(found: _Sum, span: TensorSpan | None) -> Region:
    instruction, predictor = max(found.by_way, key=lambda way: found.by_way[way])
    return Region(
        span.name if span else "",
        found.base_name,
        instruction,
        predictor,
        span.dtype if span else "",
        span.shape if span else (),
        found.first or 0,
        found.length,
        round(found.cost),
    )
