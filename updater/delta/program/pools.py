"""Symbols that records share: each pool joins those of one kind, and one rANS stream codes all pools.

A pool has its alphabet, its contexts with the tables that serve them, and raw bits beside its symbols.
Joined, small tensors share tables, and the stream's lanes are paid for once. What a program holds, in this
order: for each pool its tables; the stream (the logarithm of its lanes, then the rANS stream of all symbols,
pool by pool); the raw bits of all pools, without the bytes that the lanes carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import bits, rans, tables
from updater.delta.program.bits import BitReader
from updater.delta.program.rans import RansError

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
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
    groups: int = 1
    fields: list[tuple[Ints, U8]] = field(default_factory=list)

    def add(self, symbols: U8, contexts: Ints, group: int, *fields: tuple[Ints, U8]) -> None:
        """Adds what one record has: symbols, their contexts in the record's group, raw (values, widths)."""
        self.symbols.append(symbols)
        self.contexts.append(contexts + np.uint16(self.kind.contexts * group))
        self.groups = max(self.groups, group + 1)
        self.fields += fields


@dataclass(frozen=True)
class Packed:
    """Coded pools.

    Attributes:
        tables: by name, the tables as they are sent.
        raw_sizes: by name, bytes of raw bits.
        stream: the lanes' logarithm and the rANS stream.
        raw: the raw bits that the stream does not carry.
        entropy: bytes that the symbols take by their own frequencies in each table, and the raw bits; only
            the encoder knows.
    """

    tables: dict[str, bytes]
    raw_sizes: dict[str, int]
    stream: bytes | memoryview
    raw: bytes | memoryview
    entropy: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self.tables.values())) + len(self.stream) + len(self.raw)


def encode(pools: Mapping[str, Pool], budget: int) -> Packed:
    """Codes the pools that have symbols; each one's tables take `budget` decisions at most."""
    used = {name: pool for name, pool in pools.items() if pool.symbols}
    if not used:
        return Packed({}, {}, b"", b"")
    sent, raws, frequencies = {}, {}, []
    symbols, classes, count = [], [], 0
    for name, pool in used.items():
        joined, contexts = np.concatenate(pool.symbols), np.concatenate(pool.contexts)
        model, sent[name] = tables.build(
            joined, contexts, pool.kind.contexts * pool.groups, pool.kind.alphabet, budget
        )
        raws[name] = bits.pack(pool.fields)
        symbols.append(joined)
        classes.append(model.classes.astype(np.uint16)[contexts] + np.uint16(count))
        frequencies.append(model.frequencies)
        count += len(model.frequencies)
    joined_tables = rans.join(frequencies)
    raw = b"".join(raws.values())
    every, tables_of = np.concatenate(symbols), np.concatenate(classes)
    size = int(joined_tables.cost(every, tables_of)) + len(raw)
    lanes = rans.lanes_for(size, len(raw), len(every))
    capacity = rans.payload_capacity(lanes)
    stream = rans.encode(every, tables_of, joined_tables, lanes, raw[:capacity])
    sizes = {name: len(part) for name, part in raws.items()}
    entropy = joined_tables.entropy(every, tables_of) + len(raw)
    return Packed(sent, sizes, bytes([lanes.bit_length() - 1]) + stream, raw[capacity:], entropy)


@dataclass
class OpenPool:
    """A pool as the decoder takes from it; symbols and bits are there after `OpenPools.decode`."""

    classes: Ints  # [contexts] the table of each
    contexts: int  # of a group
    told: list[Ints] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)  # bytes of each part told, its symbols alone
    symbols: U8 = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    bits: BitReader = field(default_factory=lambda: BitReader(b""))
    _at: int = 0

    def tell(self, contexts: Ints, group: int) -> None:
        """Says the contexts of the next symbols, in the order of the records."""
        mine = self.classes[self.contexts * group : self.contexts * (group + 1)]
        self.told.append(mine.take(contexts))

    def take(self, count: int) -> U8:
        """The next symbols."""
        self._at += count
        return self.symbols[self._at - count : self._at]


class OpenPools:
    """The pools of a program.

    Args:
        packed: what the program holds of them.
        kinds: by name, those that are there.
        groups: by name, how many groups of contexts.
        budget: decisions that the tables of each take at most.

    Raises ProgramError for parts that no encoder writes.
    """

    def __init__(
        self, packed: Packed, kinds: Mapping[str, Kind], groups: Mapping[str, int], budget: int
    ) -> None:
        self._packed = packed
        self._frequencies: list[NDArray[np.uint32]] = []
        self._pools: dict[str, OpenPool] = {}
        count = 0
        for name, sent in packed.tables.items():
            if name not in groups:
                raise RansError("a program has a pool that no record takes from")
            model = tables.read(sent, kinds[name].contexts * groups[name], kinds[name].alphabet, budget)
            classes = model.classes.astype(np.uint16) + np.uint16(count)
            self._pools[name] = OpenPool(classes, kinds[name].contexts)
            self._frequencies.append(model.frequencies)
            count += len(model.frequencies)
        if count <= 256:
            for pool in self._pools.values():
                pool.classes = pool.classes.astype(np.uint8)

    def __getitem__(self, name: str) -> OpenPool:
        if name not in self._pools:
            raise RansError("a record takes from a pool that is not there")
        return self._pools[name]

    def decode(self, account: bool = False) -> None:
        """Decodes the symbols, once all contexts were told; `account` also fills the pools' costs."""
        if not self._pools:
            return
        stream = self._packed.stream
        if not stream or 1 << stream[0] > rans.MAX_LANES:
            raise RansError("a program names too many lanes")
        told = [part for pool in self._pools.values() for part in pool.told]
        classes = np.concatenate(told) if told else np.empty(0, dtype=np.uint16)
        lengths = [list(map(len, pool.told)) for pool in self._pools.values()]
        for pool in self._pools.values():
            pool.told.clear()
        joined = rans.join(self._frequencies)
        symbols, payload = rans.decode(stream[1:], len(classes), classes, joined, 1 << stream[0])
        total = sum(self._packed.raw_sizes.values())
        if any(payload[total:]):
            raise RansError("the lanes of a program carry what no pool has")
        raw = memoryview(b"".join((payload[:total], self._packed.raw)))
        at = place = 0
        for (name, pool), parts in zip(self._pools.items(), lengths):
            pool.symbols = symbols[at : at + sum(parts)]
            for size in parts:
                if account:
                    pool.costs.append(joined.cost(symbols[at : at + size], classes[at : at + size]))
                at += size
            pool.bits = BitReader(raw[place : place + self._packed.raw_sizes[name]])
            place += self._packed.raw_sizes[name]

    def end(self) -> None:
        """Refuses raw bits that no record took."""
        for pool in self._pools.values():
            pool.bits.end()
