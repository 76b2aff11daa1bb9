"""Streams that records share: each pool joins the symbols of one kind over all records.

A pool has its alphabet, its number of contexts, and raw bits beside its symbols. Joined, small tensors share
tables, and the lanes' states are paid for once. Parts of a coded pool: `tables`; `stream`, the logarithm of
its lanes and the rANS stream; `raw`, what of the bits did not fit into the lanes' payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import bits, rans, tables
from updater.delta.program.bits import BitReader

U8 = NDArray[np.uint8]
Ints = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """What a pool codes: symbols below `alphabet` in contexts below `contexts`."""

    alphabet: int
    contexts: int


@dataclass
class Pool:
    """Symbols, contexts and raw fields, as they are added by the encoder."""

    kind: Kind
    symbols: list[U8] = field(default_factory=list)
    contexts: list[Ints] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    fields: list[tuple[Ints, U8]] = field(default_factory=list)

    def add(self, symbols: U8, contexts: Ints, group: int, *fields: tuple[Ints, U8]) -> None:
        """Adds what one record has: symbols, their contexts in the record's group, raw (values, widths)."""
        self.symbols.append(symbols)
        self.contexts.append(contexts + np.uint16(self.kind.contexts * group))
        self.groups.append(group)
        self.fields += fields

    def encode(self) -> tuple[bytes, bytes, bytes]:
        """Tables, rANS stream, raw bytes."""
        symbols = np.concatenate(self.symbols) if self.symbols else np.empty(0, dtype=np.uint8)
        raw = bits.pack(self.fields)
        if not len(symbols):
            return b"", b"", raw
        contexts = np.concatenate(self.contexts)
        number = self.kind.contexts * (max(self.groups) + 1)
        model, sent = tables.build(symbols, contexts, number, self.kind.alphabet)
        lanes = rans.lanes_for(len(symbols), len(raw))
        capacity = rans.payload_capacity(lanes)
        stream = rans.encode(symbols, model.classes[contexts], model.tables, lanes, raw[:capacity])
        return sent, bytes([lanes.bit_length() - 1]) + stream, raw[capacity:]


class OpenPool:
    """A pool as the decoder takes from it.

    Args:
        kind: the pool's.
        parts: tables, stream and raw bytes.
        groups: of its records, in order.
        sizes: symbols of its records.

    Raises ProgramError for parts that no encoder writes.
    """

    def __init__(
        self, kind: Kind, parts: Sequence[bytes], groups: Sequence[int], sizes: Sequence[int]
    ) -> None:
        sent, self._stream, self._raw = parts
        self._kind = kind
        self._model = tables.read(sent, kind.contexts * (max(groups) + 1), kind.alphabet)
        self._classes = np.empty(sum(sizes), dtype=np.uint8)
        self._known = self._at = self._carried = 0
        self._symbols = self._classes[:0]
        self._bits = BitReader(b"")

    def tell(self, contexts: Ints, group: int) -> None:
        """Says the contexts of the next symbols, in the order of the records."""
        classes = self._model.classes[self._kind.contexts * group :][: self._kind.contexts]
        end = self._known + len(contexts)
        classes.take(contexts, out=self._classes[self._known : end])
        self._known = end

    def decode(self) -> None:
        """Decodes the symbols, once all their contexts were told."""
        if not self._stream or 1 << self._stream[0] > rans.MAX_LANES:
            raise rans.RansError("a pool names too many lanes")
        self._symbols, payload = rans.decode(
            self._stream[1:], len(self._classes), self._classes, self._model.tables, 1 << self._stream[0]
        )
        self._carried = len(payload)
        self._bits = BitReader(payload + self._raw)

    @property
    def bits(self) -> BitReader:
        """The raw bits."""
        return self._bits

    def end(self) -> None:
        """Refuses raw bits that no record took."""
        self._bits.end(self._carried)

    def take(self, count: int) -> U8:
        """The next symbols."""
        self._at += count
        return self._symbols[self._at - count : self._at]
