"""Streams that records share: each pool joins the symbols of one kind over all records and codes them at
once.

A pool has its alphabet, its number of contexts, and raw bits beside its symbols (signs, nibbles). Joined,
small
tensors share tables and the lanes' states are paid once. Order in a coded pool: count of raw bytes, table
bytes and
rANS bytes are in the caller's index; here: `tables`, `stream`, `raw` (what did not fit into the lanes'
payload).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import rans, tables, tokens
from updater.delta.program.arithmetic import Coder

U8 = NDArray[np.uint8]
Ints = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """What a pool codes: symbols below `alphabet` in contexts below `contexts`."""

    alphabet: int
    contexts: int


@dataclass
class Pool:
    """Symbols, contexts, sign bits and nibbles, as they are added by the encoder."""

    kind: Kind
    symbols: list[Ints] = field(default_factory=list)
    contexts: list[Ints] = field(default_factory=list)
    bits: list[U8] = field(default_factory=list)
    nibbles: list[U8] = field(default_factory=list)

    def add(self, symbols: Ints, contexts: Ints, bits: U8 | None = None, nibbles: U8 | None = None) -> None:
        """Adds what one record has."""
        self.symbols.append(symbols.reshape(-1))
        self.contexts.append(contexts.reshape(-1))
        if bits is not None:
            self.bits.append(bits)
        if nibbles is not None:
            self.nibbles.append(nibbles)

    def counts(self) -> tuple[int, int]:
        """Nibbles and bits that the pool holds raw."""
        return sum(map(len, self.nibbles)), sum(map(len, self.bits))

    def encode(self, grouping: list[int] | None = None) -> tuple[bytes, bytes, bytes]:
        """Tables, rANS stream, raw bytes; `grouping` has a group for each record added."""
        symbols = np.concatenate(self.symbols) if self.symbols else np.empty(0, dtype=np.uint8)
        raw = _pack(self.bits, self.nibbles)
        if not len(symbols):
            return b"", b"", raw
        contexts, number = _grouped(self.kind, self.contexts, grouping)
        model, sent = tables.build(symbols, contexts, number, self.kind.alphabet)
        lanes = rans.lanes_for(len(symbols), len(raw))
        capacity = rans.payload_capacity(lanes)
        stream = rans.encode(symbols, model.classes[contexts], model.tables, lanes, raw[:capacity])
        return sent, bytes([lanes.bit_length() - 1]) + stream, raw[capacity:]


def _grouped(kind: Kind, contexts: list[Ints], grouping: list[int] | None) -> tuple[Ints, int]:
    """Contexts moved apart by group, and how many there can be."""
    grouping = grouping or [0] * len(contexts)
    moved = [item.reshape(-1) + np.uint16(kind.contexts * group) for item, group in zip(contexts, grouping)]
    return np.concatenate(moved), kind.contexts * (max(grouping) + 1)


def _pack(bits: list[U8], nibbles: list[U8]) -> bytes:
    sign = np.concatenate(bits) if bits else np.empty(0, dtype=np.uint8)
    half = np.concatenate(nibbles) if nibbles else np.empty(0, dtype=np.uint8)
    half = np.append(half, np.zeros(len(half) % 2, dtype=np.uint8))
    return (half[0::2] | half[1::2] << 4).astype(np.uint8).tobytes() + np.packbits(
        sign, bitorder="little"
    ).tobytes()


@dataclass
class OpenPool:
    """A pool as the decoder takes from it."""

    symbols: U8
    _raw: bytes
    _at: int = 0
    _bit_at: int = 0
    _nibble_at: int = 0
    _bits: U8 = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    _nibbles: U8 = field(default_factory=lambda: np.empty(0, dtype=np.uint8))

    def split(self, nibble_count: int, bit_count: int) -> None:
        """Says how many nibbles and bits the raw bytes hold: what the symbols imply."""
        edge = (nibble_count + 1) // 2
        packed = np.frombuffer(self._raw[:edge], dtype=np.uint8)
        self._nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:nibble_count]
        body = np.frombuffer(self._raw[edge : edge + (bit_count + 7) // 8], dtype=np.uint8)
        self._bits = np.unpackbits(body, bitorder="little")[:bit_count]
        if len(self._bits) < bit_count or len(self._nibbles) < nibble_count:
            raise rans.RansError("a pool has too few raw bytes")

    def take(self, count: int) -> U8:
        self._at += count
        return self.symbols[self._at - count : self._at]

    def bits(self, count: int) -> U8:
        self._bit_at += count
        return self._bits[self._bit_at - count : self._bit_at]

    def nibbles(self, count: int) -> U8:
        self._nibble_at += count
        return self._nibbles[self._nibble_at - count : self._nibble_at]


def open_pool(
    kind: Kind, contexts: list[Ints], parts: list[bytes], grouping: list[int] | None = None
) -> OpenPool:
    """Decodes a pool whose records' contexts are known; `parts` are tables, stream and raw bytes."""
    sent, stream, raw = parts
    if not sum(map(len, contexts)):
        return OpenPool(np.empty(0, dtype=np.uint8), raw)
    joined, number = _grouped(kind, contexts, grouping)
    model = tables.read(sent, number, kind.alphabet)
    if not stream or 1 << stream[0] > rans.MAX_LANES:
        raise rans.RansError("a pool names too many lanes")
    symbols, payload = rans.decode(
        stream[1:], len(joined), model.classes[joined], model.tables, 1 << stream[0]
    )
    return OpenPool(symbols, payload + raw)


__all__ = ["Coder", "Kind", "OpenPool", "Pool", "open_pool", "tokens"]
