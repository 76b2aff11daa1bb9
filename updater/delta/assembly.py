"""Puts a block together: pieces and how each is coded become streams, instructions and a payload.

Streams are shared: small tensors of one kind put their planes into common streams, because a frame of its own
costs each of them a header and a table; large ones get their own, because their statistics differ. Literals
share one stream, coded as a patch against a window of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta import instructions, streams
from updater.delta.candidates import Candidate
from updater.delta.instructions import Copy, Instruction, Literal, Program, Tensor
from updater.delta.plan import Piece
from updater.delta.program.encoder import ProgramBytes
from updater.delta.stream_coder import Care, StreamCoder
from updater.delta.streams import Stream

Bytes = NDArray[np.uint8]

_FEATURES = {streams.PATCH: "patch", streams.LZMA: "lzma"}
OWN_STREAM_BYTES = 16 << 10  # from here on a tensor's plane is a stream of its own


@dataclass(frozen=True)
class Coding:
    """A piece and the way it is coded: a copy (`piece.equal`), a candidate, or a literal (None)."""

    piece: Piece
    candidate: Candidate | None


@dataclass(frozen=True)
class Encoded:
    """A block's payload, and what a decoder must understand and hold for it.

    Of a program also the bytes of its pools, and what these would take at the entropy of their symbols.
    """

    payload: bytes
    features: frozenset[str]
    stream_count: int
    stream_bytes: int
    instruction_count: int
    pool_bytes: int = 0
    entropy_bytes: float = 0.0

    def fits(self, length: int) -> bool:
        """Whether decoders accept the payload for a block of `length` target bytes."""
        return (
            len(self.payload) <= length + limits.BLOCK_OVERHEAD_BYTES
            and self.stream_count <= limits.MAX_STREAMS
            and self.stream_bytes <= limits.STREAM_EXPANSION * length + limits.STREAM_OVERHEAD_BYTES
            and self.instruction_count <= limits.MAX_INSTRUCTIONS
        )


class Payload:
    """Collects the streams of one block.

    Args:
        target: the target's bytes.
        own_bytes: planes of at least so many bytes become streams of their own.
    """

    def __init__(self, target: Bytes, own_bytes: int = OWN_STREAM_BYTES) -> None:
        self._target = target
        self._own_bytes = own_bytes
        self._streams: dict[tuple[object, ...], list[bytes]] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self._items: list[Instruction] = []

    def add(self, coding: Coding) -> None:
        """Appends a piece to the block."""
        piece, candidate = coding.piece, coding.candidate
        if piece.equal:
            assert piece.base_offset is not None
            self._items.append(Copy(piece.base_offset, piece.length))
        elif candidate is None:
            data = self._target[piece.offset : piece.offset + piece.length].tobytes()
            number = self._put(("literal",), data)
            last = self._items[-1] if self._items else None
            if isinstance(last, Literal):
                self._items[-1] = Literal(number, last.length + piece.length)
            else:
                self._items.append(Literal(number, piece.length))
        else:
            self._add_tensor(candidate)

    def _add_tensor(self, candidate: Candidate) -> None:
        item = candidate.item
        kind = (item.predictor, item.coding, item.kind.number)
        numbers = []
        for index, part in enumerate(candidate.parts):
            # Equal planes share a stream, where the second costs next to nothing.
            own = part if len(part) >= self._own_bytes else b""
            numbers.append(self._put((*kind, index, own), part))
        parameters = self._put(("parameters",), candidate.parameters) if candidate.parameters else 0
        self._items.append(replace(item, streams=tuple(numbers), parameters=parameters))

    def _put(self, key: tuple[object, ...], data: bytes) -> int:
        number = self._numbers.setdefault(key, len(self._numbers) + 1)
        self._streams.setdefault(key, []).append(data)
        return number

    def encode(self, block_offset: int, coder: StreamCoder, care: Care) -> Encoded:
        """Codes the streams."""
        coded = [coder.code(instructions.encode(self._items, block_offset), care)]
        for key, parts in self._streams.items():
            coded.append(coder.code(b"".join(parts), care, literal=key == ("literal",)))
        features = {_FEATURES[stream.coder] for stream in coded if stream.coder in _FEATURES}
        for item in self._items:
            if isinstance(item, Tensor):
                features.add("tensor")
                if item.requantise is not None:
                    features.add("requantise")
        return Encoded(
            streams.encode_table(coded, block_offset),
            frozenset(features),
            len(coded),
            sum(stream.length for stream in coded),
            len(self._items),
        )


def raw_block(data: bytes, block_offset: int) -> Encoded:
    """The payload that always fits: the block's bytes as they are."""
    listing = instructions.encode([Literal(1, len(data))], block_offset)
    table = [Stream(streams.RAW, len(listing), listing), Stream(streams.RAW, len(data), data)]
    payload = streams.encode_table(table, block_offset)
    return Encoded(payload, frozenset(), len(table), len(listing) + len(data), 1)


def program_block(program: ProgramBytes, length: int, block_offset: int) -> Encoded:
    """The payload of a block that a program writes."""
    data = program.data
    listing = instructions.encode([Program(1, len(data), length)], block_offset)
    table = [Stream(streams.RAW, len(listing), listing), Stream(streams.RAW, len(data), data)]
    payload = streams.encode_table(table, block_offset)
    return Encoded(
        payload,
        frozenset({"program", "tracking"} if program.tracks else {"program"}),
        len(table),
        len(listing) + len(data),
        1,
        program.pool_bytes,
        program.entropy_bytes,
    )
