"""Deltas made by hand for the tests: every instruction, and programs of chosen records, small.

A program is made in two steps: the engine runs one whose records add nothing, which shows what they predict;
then the target is moved away from that, as far as the records' residuals allow, and coded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from updater.delta import container, instructions, streams, tensors
from updater.delta.elements import ELEMENT_TYPES
from updater.delta.instructions import Instruction, Requantise, Tensor
from updater.delta.program import body, predictors, run, skeleton, skeletons, tracking, writer
from updater.delta.program.activity import Activity
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.body import Place
from updater.delta.program.operands import Operands
from updater.delta.program.piece import Piece
from updater.delta.program.records import (
    DTYPES,
    EXACT,
    EXCEPTIONS,
    FLOAT,
    GIVEN,
    PLAIN,
    POOL,
    SPARSE,
    STEPPED,
    Record,
)
from updater.delta.streams import Stream

FEATURES = ("lzma", "patch", "program", "requantise", "tensor", "tracking")
BLOCK_BYTES = 1 << 20
PROGRAM_OFFSET = 50


@dataclass(frozen=True)
class Case:
    """A delta with what it is made of and makes.

    Attributes:
        name: of the case.
        base, delta, target: the files.
        program: the program in it, which writes all of the target from `PROGRAM_OFFSET` on; else empty.
    """

    name: str
    base: bytes
    delta: bytes
    target: bytes
    program: bytes = b""


class Reading:
    """Reads a base as the engine does, and keeps no more than that."""

    def __init__(self, base: bytes) -> None:
        self.base = base

    def __call__(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(self.base)
        return self.base[offset : offset + length]


def joined(
    name: str, base: bytes, target: bytes, payloads: Sequence[tuple[bytes, int]], program: bytes = b""
) -> Case:
    """A delta of blocks, each given as its payload and its target length."""
    digests = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in (base, target)]
    header = container.Header(
        digests[0],
        len(base),
        digests[1],
        len(target),
        BLOCK_BYTES,
        len(payloads),
        FEATURES,
    )
    out = container.encode_header(header)
    seed = container.header_checksum(out)
    for number, (payload, length) in enumerate(payloads):
        out += container.encode_block(seed, number, length, payload)
    return Case(name, base, out + bytes([container.MARK_END]), target, program)


def payload_of(listing: Sequence[Instruction], others: Sequence[Stream], offset: int) -> bytes:
    """The payload of a block."""
    coded = instructions.encode(listing, offset)
    return streams.encode_table([Stream(streams.RAW, len(coded), coded), *others], offset)


def tensor_case(number: int, predictor: int, coding: int, seed: int) -> Case:
    """A tensor of one element type, with few large and many small differences, in a second block."""
    random = np.random.default_rng(seed)
    kind, count = ELEMENT_TYPES[number], 700
    base = random.bytes(100 + count * kind.width)
    shape = None
    if predictor == instructions.REQUANTISE:
        shape = Requantise(5, 7, 9, (300, 512, 700), (0, 1, -1), (-3, 0, 9))
    old = np.frombuffer(base, np.uint8, offset=100)
    guess = tensors.predict(kind, count, None if predictor == instructions.PLAIN else old, shape)
    words = np.frombuffer(random.bytes(count * kind.width), kind.dtype).copy()
    near = random.random(count) < 0.9
    words[near] = guess[near] + random.integers(0, 2, int(near.sum())).astype(kind.dtype)
    folded = tensors.residual(words, guess, kind)
    gaps = b""
    if coding == instructions.SPARSE:
        gaps, folded = tensors.sparse(folded)
    planes = tensors.planes(folded)
    numbers = instructions.encode_parameters(shape) if shape is not None else b""
    first = 3 if coding == instructions.SPARSE else 2
    places = tuple(range(first, first + kind.width))
    item = Tensor(
        predictor, coding, kind, count, 100 if predictor else 0, len(gaps),
        (2, *places) if coding == instructions.SPARSE else places, shape, 1 if shape else 0,
    )  # fmt: skip
    parts = [numbers, gaps, *planes] if coding == instructions.SPARSE else [numbers, *planes]
    start = base[:100]
    copy = payload_of([instructions.Copy(0, 100)], [], 0)
    payload = payload_of([item], [streams.compress(part, 3) for part in parts], 100)
    name = f"tensor of type {number}, predictor {predictor}, coding {coding}"
    return joined(name, base, start + words.tobytes(), [(copy, 100), (payload, count * kind.width)])


def stream_case() -> Case:
    """Copies, literals and all coders of streams, with a window of two ranges."""
    random = np.random.default_rng(5)
    base = random.bytes(3000)
    text = b"".join(b"line %d of a text; " % number for number in range(60))
    moved = base[2000:2600] + text[:40] + base[100:400]
    ranges = ((1900, 900), (50, 500))
    window = b"".join(base[start : start + length] for start, length in ranges)
    patch = streams.compress_patch(moved, window, ranges, 19)
    listing: list[Instruction] = [
        instructions.Copy(700, 200),
        instructions.Literal(1, len(text)),
        instructions.Copy(10, 50),
        instructions.Literal(2, len(moved) - 100),
        instructions.Literal(3, 9),
        instructions.Literal(2, 100),
    ]
    others = [streams.compress(text, 19), patch, Stream(streams.RAW, 9, base[:9])]
    target = base[700:900] + text + base[10:60] + moved[:-100] + base[:9] + moved[-100:]
    return joined("streams", base, target, [(payload_of(listing, others, 0), len(target))])


def program_case(
    name: str, base: bytes, records: Sequence[Record], between: bytes, way: int, seed: int
) -> Case:
    """A program behind some copied bytes, whose records begin behind each other with 11 bytes between them.

    Args:
        name: of the case.
        base: the base.
        records: without their places; exceptions and changes are made here, for records that have such.
        between: begin of the skeleton; filled up with bytes of the base.
        way: how the skeleton is coded.
        seed: of random numbers.
    """
    random = np.random.default_rng(seed)
    placed, at = [], 0
    for record in records:
        at += 0 if record.op == GIVEN else 11
        placed.append(replace(record, at=at, activity=_activity(record)))
        at += placed[-1].length
    length = at + max(37, len(between))
    size = length - sum(record.length for record in placed)
    filler = (between + base * (size // max(1, len(base)) + 1))[:size]
    place = Place(PROGRAM_OFFSET, length, 3, min(len(base) - 3, 60_000))
    plain = [
        replace(record, used=record.used[:0])
        if record.op in (FLOAT, PLAIN, STEPPED)
        else replace(record, residual=EXACT, activity=None)
        for record in placed
    ]
    target = _woven(placed, filler, random.bytes(length))
    for record in placed:
        if record.op == FLOAT:
            target[record.at : record.at + record.length] = _near(base, record, random)
        if record.op == STEPPED:
            target[record.at : record.at + record.length] = _stepped(base, record, random)
    program = _coded(base, bytes(target), place, plain, way)
    target = bytearray(run(Reading(base), program, place.offset, length))
    final = [_moved(target, record, random) for record in placed]
    program = _coded(base, bytes(target), place, final, way)
    target = bytearray(run(Reading(base), program, place.offset, length))  # with exceptions
    return wrapped(name, base, program, bytes(target))


def wrapped(name: str, base: bytes, program: bytes, target: bytes) -> Case:
    """A delta of a copied block and a block with a program that writes `target`."""
    stream = Stream(streams.RAW, len(program), program)
    first = payload_of([instructions.Copy(0, PROGRAM_OFFSET)], [], 0)
    item = instructions.Program(1, len(program), len(target))
    payload = payload_of([item], [stream], PROGRAM_OFFSET)
    start = base[:PROGRAM_OFFSET]
    blocks = [(first, PROGRAM_OFFSET), (payload, len(target))]
    return joined(name, base, start + target, blocks, program)


def _activity(record: Record) -> Activity | None:
    if record.residual != POOL:
        return None
    rows, columns = np.arange(record.rows) % 5 - 2, np.arange(record.columns) % 7 - 20
    return Activity(rows if record.rows > 3 else rows[:1], columns if record.columns % 2 else columns[:1])


def _woven(records: Sequence[Record], filler: bytes, noise: bytes) -> bytearray:
    out, used, end = bytearray(noise), 0, 0
    for record in [*records, None]:
        at = len(out) if record is None else record.at
        out[end:at] = filler[used : used + at - end]
        used += at - end
        end = at + (0 if record is None else record.length)
    return out


def _near(base: bytes, record: Record, random: np.random.Generator) -> bytes:
    """Words close to those of the base, but for some."""
    kind = np.dtype(f"<u{DTYPES[record.dtype].itemsize}")
    words = np.frombuffer(base, kind, count=record.count, offset=record.base).copy()
    words += random.integers(0, 5000, record.count).astype(kind)
    words[::17] = np.frombuffer(random.bytes(record.count * kind.itemsize), kind)[::17]
    return words.tobytes()


def _used(record: Record) -> NDArray[np.bool_]:
    """Some of the rows of a record that names rows."""
    used = np.zeros(record.rows if len(record.used) else 0, dtype=bool)
    used[:: max(1, record.rows // 3)] = True
    return used


def _stepped(base: bytes, record: Record, random: np.random.Generator) -> bytes:
    """The base's words with steps added in the rows that may change."""
    whole, used = Piece.whole(record.rows, record.columns), _used(record)
    codes = np.rint(random.normal(0, 2, record.count) ** 3).clip(-350, 350).astype(np.int16)
    if len(used):
        codes.reshape(record.rows, -1)[~used] = 0
    words = predictors.floats(Operands(Reading(base)), record, whole)
    with np.errstate(all="ignore"):
        return predictors.stepped(record, words, codes, whole).astype(words.dtype).tobytes()


def _moved(target: bytearray, record: Record, random: np.random.Generator) -> Record:
    """Moves the record's elements in the target away from the prediction, as its residual may say."""
    used = _used(record)
    if record.op == STEPPED:
        return replace(record, used=used, exceptions=[(3, -7), (record.count - 1, 1)])
    if record.op in (FLOAT, PLAIN):
        return replace(record, used=used)
    if record.residual == EXACT:
        return record
    if record.residual == EXCEPTIONS:
        places = np.unique(random.integers(0, record.count, 5)).tolist()
        return replace(record, exceptions=[(place, int(random.integers(-90, 90))) for place in places])
    kind = DTYPES[record.dtype]
    elements = np.frombuffer(target, kind, count=record.count, offset=record.at)
    allowed = np.flatnonzero(np.repeat(used, record.columns)) if len(used) else np.arange(record.count)
    if record.residual == POOL:
        step = 40 if kind.itemsize == 1 else 1 << 30 if kind.itemsize == 4 else 1 << 14
        moved = elements.astype(np.float64)
        moved[allowed] += np.rint(random.normal(0, 1, len(allowed)) ** 7 * step)
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        _put(target, record, np.clip(moved, low, high).astype(kind))
        return replace(record, used=used)
    assert record.residual == SPARSE
    places = np.unique(np.append(allowed[:40], allowed[-1]))
    values = elements.astype(np.int64)
    signs = np.where(values[places] > 0, -1, 1)
    values[places] += signs * np.where(np.arange(len(places)) % 9 == 0, 100, 1 + np.arange(len(places)) % 5)
    _put(target, record, values.astype(kind))
    return replace(record, used=used, changed=len(places))


def _put(target: bytearray, record: Record, values: NDArray[np.generic]) -> None:
    target[record.at : record.at + record.length] = values.tobytes()


def _coded(base: bytes, target: bytes, place: Place, records: list[Record], way: int) -> bytes:
    """The program, its skeleton coded in the way wanted."""
    with np.errstate(all="ignore"):  # there are NaNs among the numbers
        program = writer.encode(Reading(base), target, [place], records, 3, False)[0]
    opened = body.open_body(program, place.offset, len(target))
    known = body.Known(Operands(Reading(base)), place, records)
    between = body.outside(target, records)
    ways = {
        0: lambda: between,
        1: lambda: streams.compress_patch(between, known.rest, ((0, len(known.rest)),), 3).coded,
        2: lambda: streams.compress_patch(between, known.whole, ((0, len(known.whole)),), 3).coded,
        3: lambda: _modelled(skeleton.code, known.rest, between),
        4: lambda: _modelled(tracking.code, known.rest, between),
    }
    frame = bytes([way]) + ways[way]()
    assert bytes(skeletons.decode(known, frame, len(between))) == between
    return program[: len(program) - len(opened.skeleton)] + frame


def _modelled(code: Callable[[Coder, bytes, int, bytes], bytes], rest: bytes, between: bytes) -> bytes:
    coder = Coder(limit=250, budget=decisions(len(between)))
    code(coder, rest, len(between), between)
    return coder.finish()
