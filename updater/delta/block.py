"""Decodes one block: its payload and the base give the next bytes of the target.

Order: read the stream table, decode the streams, run the instructions, refuse anything left over. Rules: a
block needs no other block; nothing is allocated before its length was compared with a limit; whatever the
payload holds, the outcome is the block's bytes or a SluiceError with a DELTA code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from updater import limits
from updater.delta import faults, program, streams, tensors
from updater.delta.instructions import PLAIN, Copy, Decoder, Instruction, Literal, Program
from updater.delta.streams import ReadBase, Stream
from updater.delta.varint import Reader
from updater.limits import DecodeLimits


@dataclass(frozen=True)
class Block:
    """A block whose checksum held.

    Attributes:
        payload: its coded bytes.
        target_offset: of its first byte in the target.
        target_length: bytes that it writes.
    """

    payload: bytes
    target_offset: int
    target_length: int


@dataclass(frozen=True)
class OpenBlock:
    """A block whose streams are decoded: what both the applier and `describe` walk through."""

    table: Sequence[Stream]
    readers: Sequence[Reader]
    instructions: Iterator[Instruction]


def open_block(block: Block, features: Sequence[str], read_base: ReadBase, bounds: DecodeLimits) -> OpenBlock:
    """Decodes a block's streams. Raises SluiceError with a DELTA code."""
    table = streams.decode_table(
        block.payload, block.target_offset, block.target_length, bounds.window_bytes, features
    )
    readers = [
        Reader(streams.decode(stream, read_base), f"stream {number} of a block")
        for number, stream in enumerate(table)
    ]
    listing = Decoder(
        readers[0].take(readers[0].left), block.target_offset, readers, features, bounds.instructions
    )
    return OpenBlock(table, readers, iter(listing))


def decode_block(
    block: Block,
    features: Sequence[str],
    read_base: ReadBase,
    write: Callable[[bytes | memoryview], None],
    bounds: DecodeLimits,
) -> None:
    """Writes a block's part of the target through `write`, in order, in one or more pieces.

    Args:
        block: the block.
        features: those that the header names.
        read_base: gives bytes of the base, or raises DELTA_INVALID for a range outside it.
        write: takes the next bytes of the target.
        bounds: the decoder's limits.

    Raises SluiceError with a DELTA code; what was written by then must be thrown away.
    """
    opened = open_block(block, features, read_base, bounds)
    left = block.target_length

    def take(stream: int, length: int) -> bytes:
        return opened.readers[stream].take(length)

    for item in opened.instructions:
        if item.length > left:
            raise faults.invalid(f"an instruction writes {item.length} bytes where its block has {left} left")
        left -= item.length
        if isinstance(item, Copy):
            for start in range(0, item.length, limits.BASE_READ_BYTES):
                length = min(limits.BASE_READ_BYTES, item.length - start)
                write(read_base(item.base_offset + start, length))
        elif isinstance(item, Literal):
            write(take(item.stream, item.length))
        elif isinstance(item, Program):
            offset = block.target_offset + block.target_length - left - item.length
            data = opened.readers[item.stream].view(item.size)
            write(program.run(read_base, data, offset, item.length, "tracking" in features))
        else:
            base = None
            if item.predictor != PLAIN:
                base = np.frombuffer(read_base(item.base_offset, item.length), dtype=np.uint8)
            write(tensors.decode(item, base, take).tobytes())
    if left:
        raise faults.invalid(f"a block writes {left} bytes less than its head says")
    for reader in opened.readers:
        reader.end()
