"""Interleaved rANS over arrays of symbols, each with the number of the table that codes it.

The coder is the range variant of asymmetric numeral systems (J. Duda, arXiv:1311.2540), interleaved over N
lanes (F. Giesen, arXiv:1402.3392) so that NumPy works on N symbols at a time. Symbol i belongs to lane i
mod N;
step t handles symbols t*N to t*N + N - 1. A lane's state is an integer in [2^16, 2^32), tables have 12 bits,
renormalisation moves 16-bit words. The encoder works from the last step to the first, so that the decoder
reads
words forward, within a step by lane. The encoder's first states are 2^16 + 16 bits of payload: bytes that
would
be stored raw travel in the room that the lanes need anyhow, and the decoder finds them in its last states.

Stream: the N states that the decoder begins with (a plane of 4-bit sizes, then the bits below each state's
top
bit, lowest first), then the words as u16 little-endian. All integers; nothing rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater import limits
from updater.delta.program.bits import BitReader
from updater.delta.program.operands import LimitError, ProgramError

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
MAX_LANES = 1 << 14
MAX_TABLES = 1024  # of a stream; the decoder takes 16 KiB for each
LANE_BYTES = 256  # of a stream for each lane: fewer lanes cost less, more decode faster
BARE_LANE_BYTES = 2048  # the same where lanes have no payload to carry
MAX_STEPS = limits.MAX_LANE_SYMBOLS
MAX_SYMBOLS = 256  # of a table
LOW = 1 << 16  # states lie in [LOW, LOW << 16)
SEED_BYTES = 2  # payload a lane carries

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
Symbols = NDArray[Any]


class RansError(ProgramError):
    """A stream that no encoder writes."""


@dataclass(frozen=True)
class Tables:
    """Frequencies of T tables over A symbols.

    Attributes:
        frequencies: [T, A] uint32; each row sums to 4096, zeros for symbols that do not occur.
    """

    frequencies: U32

    def _counts(self, symbols: Symbols, tables: Symbols) -> NDArray[np.float64]:
        index = tables.astype(np.int64) * self.frequencies.shape[1] + symbols
        counts = np.bincount(index, minlength=self.frequencies.size).astype(np.float64)
        return counts.reshape(self.frequencies.shape)

    def cost(self, symbols: Symbols, tables: Symbols) -> float:
        """Bytes that symbols [n], each with its table, take in a stream."""
        share = np.maximum(self.frequencies, 1) / TOTAL
        return float(-(self._counts(symbols, tables) * np.log2(share)).sum() / 8)

    def entropy(self, symbols: Symbols, tables: Symbols) -> float:
        """Bytes that they would take by their own frequencies in each table."""
        counts = self._counts(symbols, tables)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return float(-(counts * np.log2(np.where(counts > 0, share, 1))).sum() / 8)

    def starts(self) -> U32:
        """[T, A]: the sums of the frequencies before each symbol."""
        sums: U32 = (np.cumsum(self.frequencies, axis=1) - self.frequencies).astype(np.uint32)
        return sums

    def slots(self) -> U32:
        """[T * 4096]: for each slot (frequency - 1) << 20 | (slot - start) << 8 | symbol."""
        count, alphabet = self.frequencies.shape
        if alphabet > MAX_SYMBOLS or not (self.frequencies.sum(axis=1, dtype=np.int64) == TOTAL).all():
            raise RansError("a table has more than 256 symbols or does not sum to 4096")
        symbol = np.repeat(np.tile(np.arange(alphabet), count), self.frequencies.reshape(-1))
        table = np.repeat(np.arange(count), TOTAL)
        offset = np.tile(np.arange(TOTAL), count) - self.starts()[table, symbol]
        packed: U32 = np.asarray(
            (self.frequencies[table, symbol].astype(np.uint32) - np.uint32(1)) << np.uint32(20)
            | offset.astype(np.uint32) << np.uint32(8)
            | symbol.astype(np.uint32)
        )
        return packed


def join(frequencies: Sequence[U32]) -> Tables:
    """The tables of several alphabets as one numbered through. Raises RansError if they are too many."""
    count, alphabet = sum(map(len, frequencies)), max(part.shape[1] for part in frequencies)
    if count > MAX_TABLES:
        raise RansError(f"{count} tables; a stream has {MAX_TABLES} at most")
    out, at = np.zeros((count, alphabet), dtype=np.uint32), 0
    for part in frequencies:
        out[at : at + len(part), : part.shape[1]] = part
        at += len(part)
    return Tables(out)


def lanes_for(size: int, payload: int, count: int) -> int:
    """Lanes for a stream: a power of two, 1 to 16,384, as many as cost a thousandth or two of `size` bytes.

    A lane costs half a byte while there is payload to carry, else two and a half. There are never more lanes
    than one for each eight of `count` symbols, nor so few that a lane codes more than MAX_STEPS.
    """
    most = max(1, min(size // LANE_BYTES, count // 8, MAX_LANES))
    lanes = 1 << (most.bit_length() - 1)
    while lanes > 1 and SEED_BYTES * lanes > payload and lanes > size // BARE_LANE_BYTES:
        lanes //= 2
    return max(lanes, min(MAX_LANES, 1 << max(0, (count // MAX_STEPS).bit_length())))


def payload_capacity(lanes: int) -> int:
    """Bytes of payload that a stream of `lanes` carries for nothing."""
    return SEED_BYTES * lanes


def encode(
    symbols: Symbols, contexts: Symbols | None, tables: Tables, lanes: int, payload: bytes = b""
) -> bytes:
    """Codes symbols.

    Args:
        symbols: [n] integers below A whose frequency in their table is not zero.
        contexts: [n] integers below T; None when there is one table.
        tables: the tables.
        lanes: a power of two, as `lanes_for` says.
        payload: up to `payload_capacity(lanes)` bytes to carry; filled up with zeros.
    """
    count = len(symbols)
    if count == 0:
        return b""
    seeds = np.frombuffer(payload.ljust(SEED_BYTES * lanes, b"\0"), dtype="<u2")
    state = (seeds.astype(np.uint64)) + np.uint64(LOW)
    alphabet = tables.frequencies.shape[1]
    frequencies = tables.frequencies.reshape(-1).astype(np.uint64)
    starts = tables.starts().reshape(-1).astype(np.uint64)
    words: list[U16] = []
    for begin in range((count - 1) // lanes * lanes, -1, -lanes):
        piece = symbols[begin : begin + lanes].astype(np.int64)
        if contexts is not None:
            piece += contexts[begin : begin + lanes].astype(np.int64) * alphabet
        frequency, start = frequencies[piece], starts[piece]
        active = state[: len(piece)]
        full = active >= frequency << np.uint64(20)
        words.append((active[full] & np.uint64(0xFFFF)).astype(np.uint16))
        active = np.where(full, active >> np.uint64(16), active)
        quotient = active // frequency
        state[: len(piece)] = (
            (quotient << np.uint64(PROBABILITY_BITS)) + active - quotient * frequency + start
        )
    words.reverse()
    return _pack_states(state.astype(np.uint32)) + np.concatenate(words).astype("<u2").tobytes()


def decode(
    data: bytes | memoryview, count: int, contexts: Symbols | None, tables: Tables, lanes: int
) -> tuple[U8, bytes]:
    """The symbols and the payload of a stream; takes all of `data`. Raises RansError.

    Args:
        data: what `encode` gave.
        count: symbols.
        contexts: [count] integers below T, or None.
        tables: the tables.
        lanes: as given to `encode`.
    """
    if count == 0:
        if data:
            raise RansError("a stream of no symbols has bytes")
        return np.empty(0, dtype=np.uint8), b""
    if count > lanes * MAX_STEPS:  # a step takes its time however few lanes it moves
        raise LimitError("symbols in each lane", -(-count // lanes), MAX_STEPS)
    state, used = _unpack_states(data, lanes)
    if (len(data) - used) % 2:
        raise RansError("a stream ends inside a word")
    words = np.frombuffer(data, dtype="<u2", offset=used)
    slots = tables.slots()
    out = np.empty(count, dtype=np.uint8)
    at = 0
    mask, shift = np.uint32(TOTAL - 1), np.uint32(PROBABILITY_BITS)
    for begin in range(0, count, lanes):
        end = min(count, begin + lanes)
        active = state[: end - begin]
        index = active & mask
        if contexts is not None:
            index |= contexts[begin:end].astype(np.uint32) << shift
        entry = slots[index]
        out[begin:end] = entry.astype(np.uint8)  # the low byte
        active >>= shift
        active *= (entry >> np.uint32(20)) + np.uint32(1)
        active += entry >> np.uint32(8) & mask
        low = np.flatnonzero(active < LOW)
        if len(low):
            more = words[at : at + len(low)]
            if len(more) < len(low):
                raise RansError("a stream ends before its symbols")
            at += len(low)
            active[low] = active[low] << np.uint32(16) | more
    if at != len(words) or (state >> np.uint32(16) != 1).any():
        raise RansError("a stream does not end where its symbols do")
    return out, (state & np.uint32(0xFFFF)).astype("<u2").tobytes()


def _pack_states(state: U32) -> bytes:
    sizes = np.zeros(len(state), dtype=np.uint8)  # bits below the top bit, less 16
    for bit in range(17, 32):
        sizes += (state >> np.uint32(bit)) > 0
    nibbles = np.append(sizes, np.zeros(len(sizes) % 2, dtype=np.uint8))
    head = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()
    bits = (state[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.uint8)
    keep = np.arange(32) < sizes[:, None] + 16
    return head + np.packbits(bits[keep], bitorder="little").tobytes()


def _unpack_states(data: bytes | memoryview, lanes: int) -> tuple[U32, int]:
    head = (lanes + 1) // 2
    packed = np.frombuffer(data[:head], dtype=np.uint8)
    if len(packed) < head:
        raise RansError("a stream ends inside its states")
    sizes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:lanes]
    total = int(sizes.sum(dtype=np.int64)) + 16 * lanes
    body = data[head : head + (total + 7) // 8]
    if len(body) < (total + 7) // 8:
        raise RansError("a stream ends inside its states")
    if lanes % 2 and packed[-1] >> 4:
        raise RansError("the padding of a stream's states is not zero")
    reader = BitReader(body)
    widths = sizes + np.uint8(16)
    state = reader.take(widths) | np.uint32(1) << widths.astype(np.uint32)
    reader.end()
    return state, head + (total + 7) // 8
