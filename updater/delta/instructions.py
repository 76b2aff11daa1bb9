"""The instructions of a block: what each says, and how they are written in the block's instruction stream.

Each instruction writes the next bytes of the target. A cursor in the base goes along: it starts at the
block's offset in the target; an instruction that reads the base says how far its range lies from the cursor;
every instruction then moves the cursor on by the bytes that it wrote. So files laid out alike need few bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from updater import limits
from updater.delta import faults, varint
from updater.delta.elements import ELEMENT_TYPES, ElementType
from updater.delta.varint import Reader

COPY, LITERAL, TENSOR, PROGRAM = 0, 1, 2, 3
PLAIN, DIFFERENCE, REQUANTISE = 0, 1, 2
PREDICTOR_NAMES = ("plain", "difference", "requantise")
DENSE, SPARSE = 0, 1

MAX_MULTIPLIER = 1 << 30
MAX_SHIFT = 62
MAX_ZERO_POINT = 1 << 31


@dataclass(frozen=True)
class Copy:
    """Bytes of the base."""

    base_offset: int
    length: int


@dataclass(frozen=True)
class Literal:
    """The next bytes of a stream."""

    stream: int
    length: int


@dataclass(frozen=True)
class Requantise:
    """How old codes become predicted new codes; docs/delta-format.md has the arithmetic.

    Attributes:
        start: where in the tensor the instruction's first element lies, counted in elements.
        inner: elements that follow each other in one channel.
        shift: binary digits behind the point of the multipliers.
        multipliers: old scale / new scale, times 2^shift, for each channel; 1 <= m <= 2^30.
        old_zero: zero points of the old codes: one, or one a channel.
        new_zero: zero points of the new codes: as many.
    """

    start: int
    inner: int
    shift: int
    multipliers: tuple[int, ...]
    old_zero: tuple[int, ...]
    new_zero: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """Predicted elements and their residual.

    Attributes:
        predictor: PLAIN, DIFFERENCE or REQUANTISE.
        coding: DENSE (a byte plane for each byte of an element) or SPARSE (gaps, then planes of the values).
        kind: the element type of base and target.
        count: elements.
        base_offset: where the base's elements begin; 0 for PLAIN.
        gap_bytes: bytes taken from the stream of gaps; 0 for DENSE.
        streams: for SPARSE first the stream of the gaps; then one for each byte of an element, lowest first.
        requantise: for REQUANTISE only.
        parameters: the stream that holds the numbers of `requantise`; 0 otherwise.
    """

    predictor: int
    coding: int
    kind: ElementType
    count: int
    base_offset: int
    gap_bytes: int
    streams: tuple[int, ...]
    requantise: Requantise | None = None
    parameters: int = 0

    @property
    def length(self) -> int:
        return self.count * self.kind.width


@dataclass(frozen=True)
class Program:
    """Bytes that a program writes (updater.delta.program): `size` bytes of a stream; one in a block."""

    stream: int
    size: int
    length: int


Instruction = Copy | Literal | Tensor | Program


def encode(instructions: Sequence[Instruction], block_offset: int) -> bytes:
    """The instruction stream of a block that begins at `block_offset` of the target."""
    out = bytearray()
    cursor = block_offset
    for item in instructions:
        if isinstance(item, Copy):
            out.append(COPY)
            out += varint.encode_signed(item.base_offset - cursor) + varint.encode(item.length)
            cursor = item.base_offset + item.length
        elif isinstance(item, Literal):
            out.append(LITERAL)
            out += varint.encode(item.stream) + varint.encode(item.length)
            cursor += item.length
        elif isinstance(item, Program):
            out.append(PROGRAM)
            for value in (item.stream, item.size, item.length):
                out += varint.encode(value)
            cursor += item.length
        else:
            out += bytes([TENSOR, item.predictor, item.coding, item.kind.number]) + varint.encode(item.count)
            if item.predictor != PLAIN:
                out += varint.encode_signed(item.base_offset - cursor)
                cursor = item.base_offset
            if item.coding == SPARSE:
                out += varint.encode(item.gap_bytes)
            for stream in item.streams:
                out += varint.encode(stream)
            if item.requantise is not None:
                shape = item.requantise
                for value in (item.parameters, shape.start, shape.inner, len(shape.multipliers), shape.shift):
                    out += varint.encode(value)
                out.append(len(shape.old_zero) > 1)
            cursor += item.length
    return bytes(out)


def encode_parameters(shape: Requantise) -> bytes:
    """The numbers of a requantisation, as they lie in its parameter stream."""
    one = 1 << shape.shift
    out = bytearray()
    for multiplier in shape.multipliers:
        out += varint.encode_signed(multiplier - one)
    for zero in (*shape.old_zero, *shape.new_zero):
        out += varint.encode_signed(zero)
    return bytes(out)


class Decoder:
    """Reads a block's instruction stream, one instruction after the other.

    Args:
        data: the instruction stream.
        block_offset: of the block's first byte in the target.
        parameters: for each stream of the block a reader, shared with whoever else takes from that stream.
        features: those that the header names.
        max_instructions: the decoder's limit.
    """

    def __init__(
        self,
        data: bytes,
        block_offset: int,
        parameters: Sequence[Reader],
        features: Sequence[str],
        max_instructions: int,
    ) -> None:
        self._reader = Reader(data, "the instruction stream")
        self._cursor = block_offset
        self._streams = parameters
        self._features = features
        self._limit = max_instructions
        self._programs = 0

    def __iter__(self) -> Iterator[Instruction]:
        """Raises SluiceError(DELTA_INVALID | DELTA_LIMIT_EXCEEDED | DELTA_UNSUPPORTED)."""
        done = 0
        while self._reader.left:
            done += 1
            if done > self._limit:
                raise faults.over_limit("instructions in a block", done, self._limit)
            yield self._next()

    def _next(self) -> Instruction:
        reader = self._reader
        opcode = reader.byte()
        if opcode == COPY:
            offset = self._base_offset()
            length = self._positive("length of a copy")
            self._cursor = offset + length
            return Copy(offset, length)
        if opcode == LITERAL:
            stream = self._stream()
            length = self._positive("length of a literal")
            self._cursor += length
            return Literal(stream, length)
        if opcode == TENSOR:
            return self._tensor()
        if opcode == PROGRAM:
            return self._program()
        raise faults.unsupported(f"the delta has an instruction {opcode} that this decoder lacks")

    def _program(self) -> Program:
        if "program" not in self._features:
            raise faults.invalid("a block has a program, but the header does not name that feature")
        if self._programs:
            raise faults.invalid("a block has more than one program")
        self._programs += 1
        item = Program(self._stream(), self._positive("size of a program"), self._positive("length"))
        self._cursor += item.length
        return item

    def _tensor(self) -> Tensor:
        reader = self._reader
        if "tensor" not in self._features:
            raise faults.invalid(
                "a block has a tensor instruction, but the header does not name that feature"
            )
        predictor, coding, number = reader.take(3)
        if predictor > REQUANTISE or coding > SPARSE or number >= len(ELEMENT_TYPES):
            raise faults.unsupported(
                f"the delta has a predictor {predictor}, coding {coding} or element type {number} "
                "that this decoder lacks"
            )
        kind = ELEMENT_TYPES[number]
        count = self._positive("count of elements")
        base_offset = 0
        if predictor != PLAIN:
            base_offset = self._cursor = self._base_offset()
        gap_bytes = reader.varint() if coding == SPARSE else 0
        streams = tuple(self._stream() for _ in range(kind.width + (coding == SPARSE)))
        shape, parameters = self._requantise(kind) if predictor == REQUANTISE else (None, 0)
        self._cursor += count * kind.width
        return Tensor(predictor, coding, kind, count, base_offset, gap_bytes, streams, shape, parameters)

    def _requantise(self, kind: ElementType) -> tuple[Requantise, int]:
        reader = self._reader
        if "requantise" not in self._features:
            raise faults.invalid("a block requantises, but the header does not name that feature")
        if kind.reading == "float" or kind.width > 4:
            raise faults.invalid(f"elements of type {kind.number} cannot be requantised")
        parameters = self._stream()
        start, inner = reader.varint(), self._positive("inner size of a channel")
        channels, shift, many = self._positive("channels"), reader.varint(), reader.byte()
        if channels > limits.MAX_CHANNELS:
            raise faults.over_limit("channels", channels, limits.MAX_CHANNELS)
        if shift > MAX_SHIFT or many > 1 or max(start, inner) > limits.MAX_TARGET_BYTES:
            raise faults.invalid("a requantisation has numbers out of their range")
        numbers = self._streams[parameters]
        multipliers = tuple(numbers.signed() + (1 << shift) for _ in range(channels))
        zeros = channels if many else 1
        old_zero = tuple(numbers.signed() for _ in range(zeros))
        new_zero = tuple(numbers.signed() for _ in range(zeros))
        if min(multipliers) < 1 or max(multipliers) > MAX_MULTIPLIER:
            raise faults.invalid(f"a multiplier lies outside 1 to {MAX_MULTIPLIER}")
        if max(map(abs, (*old_zero, *new_zero))) > MAX_ZERO_POINT:
            raise faults.invalid("a zero point does not fit 32 bits")
        return Requantise(start, inner, shift, multipliers, old_zero, new_zero), parameters

    def _positive(self, what: str) -> int:
        value = self._reader.varint()
        if not 1 <= value <= limits.MAX_TARGET_BYTES:
            raise faults.invalid(f"an instruction has a {what} of {value}")
        return value

    def _base_offset(self) -> int:
        offset = self._cursor + self._reader.signed()
        if offset < 0:
            raise faults.invalid(f"an instruction reads the base at {offset}")
        return offset

    def _stream(self) -> int:
        stream = self._reader.varint()
        if not 1 <= stream < len(self._streams):
            raise faults.invalid(
                f"an instruction names stream {stream}; the block has 1 to {len(self._streams) - 1}"
            )
        return stream
