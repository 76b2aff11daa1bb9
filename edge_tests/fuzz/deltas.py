"""Deltas out of choices: a valid test vector with changes inside its structure, or an invented block.

Whatever is changed, lengths and checksums are made right afterwards, unless the change is one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from edge_tests.conformance import index
from edge_tests.conformance.index import VECTORS
from edge_tests.conformance.vectors import build, programs
from edge_tests.conformance.vectors.build import Block, Header
from edge_tests.fuzz.choices import Choices
from edge_tests.fuzz.programs import change, invent, spoil
from updater import limits
from updater.delta import container, streams
from updater.delta.instructions import Decoder, Program
from updater.delta.streams import Stream
from updater.delta.varint import Reader
from updater.digests import raw
from updater.errors import SluiceError
from updater.limits import DecodeLimits

LARGEST_TARGET = 1 << 15  # of a vector that is changed
_INVENTED = (1, 4, 64, 300, 1000)  # bytes that an invented block writes


@dataclass(frozen=True)
class Case:
    """What the decoder is given."""

    base: bytes | None
    delta: bytes


@dataclass(frozen=True)
class Sample:
    """A valid vector taken apart."""

    base: bytes | None
    header: container.Header
    blocks: tuple[tuple[bytes, int], ...]


@cache
def samples() -> tuple[Sample, ...]:
    """The valid vectors, small ones only, by their names."""
    found = []
    for vector in sorted(index.load(), key=lambda vector: vector.name):
        if vector.errors or vector.size > LARGEST_TARGET:
            continue
        base = (VECTORS / vector.base).read_bytes() if vector.base is not None else None
        found.append(take_apart(base, (VECTORS / vector.delta).read_bytes()))
    return tuple(found)


def take_apart(base: bytes | None, data: bytes) -> Sample:
    """The header and the blocks of a sound delta."""
    bounds = DecodeLimits()
    at = container.header_length(data[: container.PREFIX.size], bounds)
    header = container.decode_header(data[:at], bounds)
    blocks = []
    for number in range(header.block_count):
        head, length = container.scan_block_head(data[at:], number, header.block_size)
        at += length
        blocks.append((data[at : at + head.payload_length], head.target_length))
        at += head.payload_length
    return Sample(base, header, tuple(blocks))


def case_of(data: bytes) -> Case:
    """The delta that choices lead to."""
    choices = Choices(data)
    if choices.below(3) == 0:
        return _invented(choices)
    sample = choices.one(samples())
    if choices.below(8) == 0 or not sample.blocks:
        return _other_container(sample, choices)
    number = choices.below(len(sample.blocks))
    payload, length = sample.blocks[number]
    offset = sum(size for _, size in sample.blocks[:number])
    blocks = list(sample.blocks)
    blocks[number] = (_other_payload(sample, payload, offset, length, choices), length)
    return Case(sample.base, put_together(sample.header, blocks))


def put_together(header: container.Header, blocks: list[tuple[bytes, int]]) -> bytes:
    """The inverse of `take_apart`."""
    start = container.encode_header(header)
    seed = container.header_checksum(start)
    body = (
        container.encode_block(seed, number, size, payload) for number, (payload, size) in enumerate(blocks)
    )
    return start + b"".join(body) + bytes([container.MARK_END])


def _other_container(sample: Sample, choices: Choices) -> Case:
    """Another header, head or file around the same payloads."""
    old = sample.header
    header = Header(
        sample.base, b"", old.block_count, old.block_size, old.features,
        target_digest=raw(old.target_digest), target_size=old.target_size,
    )  # fmt: skip
    blocks = [Block(payload, size) for payload, size in sample.blocks]
    number = choices.below(max(1, len(blocks)))
    kind = choices.below(12)
    changes: list[Callable[[], object]] = [
        lambda: {"block_count": choices.number()},
        lambda: {"block_size": choices.number()},
        lambda: {"target_size": choices.number()},
        lambda: {"base_size": choices.number()},
        lambda: {"flags": choices.small()},
        lambda: {"version": choices.small()},
        lambda: {"feature_count": choices.number()},
        lambda: {"features": (*old.features, choices.bytes(choices.below(40)))},
        lambda: {"behind": choices.bytes(1 + choices.below(4))},
    ]
    if kind < len(changes):
        changed = changes[kind]()
        assert isinstance(changed, dict)
        return Case(sample.base, build.delta(replace(header, **changed), blocks))
    if kind == 9 and blocks:
        blocks[number] = replace(blocks[number], target_length=choices.number())
    elif kind == 10 and blocks:
        blocks[number] = replace(blocks[number], payload_length=choices.number())
    else:
        return Case(sample.base, spoil(build.delta(header, blocks), choices))
    return Case(sample.base, build.delta(header, blocks))


def _other_payload(sample: Sample, payload: bytes, offset: int, length: int, choices: Choices) -> bytes:
    """A payload with one of its streams changed, or its table."""
    header, base = sample.header, sample.base or b""
    if choices.rarely():
        return spoil(payload, choices)
    table = streams.decode_table(payload, offset, length, limits.MAX_WINDOW_BYTES, header.features)
    number = choices.below(len(table))
    contents = [streams.decode(stream, lambda at, size: base[at : at + size]) for stream in table]
    content = contents[number]
    if number and "program" in header.features and len(table) == 2 and choices.below(8):
        item = _program_of(contents[0], offset, sample.header)
        place = offset + length - item.length
        content = change(programs.take_apart(content, item.length, place), item.length, place, choices)
        before = contents[0][: -len(build.program(1, item.size, item.length))]
        # The instruction says how long the program is.
        contents[0] = before + build.program(1, len(content), item.length)
        table[0] = replace(table[0], coder=streams.RAW, coded=contents[0], length=len(contents[0]))
    else:
        content = spoil(content, choices)
    kind = choices.below(6)
    if kind < 3:
        table[number] = Stream(streams.RAW, len(content), content)
    elif kind == 3:
        table[number] = Stream(streams.ZSTD, len(content), build.frame(content))
    elif kind == 4 and base:
        window = ((choices.below(len(base)), 1 + choices.below(300)),)
        known = base[window[0][0] : sum(window[0])]
        table[number] = Stream(streams.PATCH, len(content), build.frame(content, known), window)
    else:
        coded = spoil(build.frame(content), choices)
        table[number] = Stream(streams.ZSTD, len(content), coded)
    return streams.encode_table(table, offset)


def _program_of(listing: bytes, offset: int, header: container.Header) -> Program:
    """The program that ends a listing of a block of two streams."""
    readers = [Reader(b"", "")] * 2
    (*_, item) = Decoder(listing, offset, readers, header.features, limits.MAX_INSTRUCTIONS)
    assert isinstance(item, Program)
    return item


@cache
def _base() -> bytes:
    """Bytes that are floats, codes and text, for invented blocks."""
    return b"layer 0: weights; " * 8 + random.Random(5).randbytes(1000) + bytes(100)


def _invented(choices: Choices) -> Case:
    """One block: a program, or instructions with the streams that they need."""
    base, length = _base(), choices.one(_INVENTED)
    if choices.below(3):
        try:
            program = invent(base, length, 0, choices)
        except SluiceError:
            program = choices.bytes(20)
        payload = programs.block(program, length)
    else:
        payload = _instructions(base, length, choices)
    header = Header(base, bytes(length), 1, 4096, container.FEATURES)
    return Case(base, build.delta(header, [Block(payload, length)]))


def _instructions(base: bytes, length: int, choices: Choices) -> bytes:
    """Instructions that write the block; each that needs bytes has streams of its own."""
    listing, parts, left, cursor = b"", [], length, 0
    while left > 0 and choices.left:
        wrong = choices.rarely()
        size = choices.number() if wrong else 1 + choices.below(left)
        kind = choices.below(3)
        if kind == 0:
            distance = choices.signed() if wrong else choices.below(len(base)) - cursor
            listing += build.copy(distance, size)
            cursor += distance + size
        elif kind == 1:
            parts.append(choices.bytes(min(size, 5000)))
            listing += build.literal(len(parts), size)
            cursor += size
        else:
            listing += _tensor(size, parts, choices)
            cursor += size
        left -= size
    if left > 0:
        listing += build.copy(-cursor, left)
    return build.payload(listing, *map(build.raw, parts))


def _tensor(size: int, parts: list[bytes], choices: Choices) -> bytes:
    kind, coding, predictor = choices.below(13), choices.below(2), choices.below(3)
    width = 1 << kind // 3
    count = max(1, size // width)
    numbers = []
    gaps = choices.bytes(choices.below(8)) if coding else b""
    values = len(gaps) - gaps.count(255) if coding else min(count, 2000)
    for part in [gaps] * coding + [choices.bytes(values) for _ in range(width)]:
        parts.append(part)
        numbers.append(len(parts))
    shape: tuple[int, ...] = ()
    if predictor == 2:
        channels = 1 + choices.below(4)
        parts.append(b"".join(build.signed(choices.signed()) for _ in range(channels + 2)))
        shape = (
            len(parts),
            choices.number(),
            1 + choices.number(),
            channels,
            choices.below(64),
            choices.below(3),
        )
    return build.Tensor(predictor, coding, kind, count, numbers, choices.signed(), len(gaps), shape).encode()
