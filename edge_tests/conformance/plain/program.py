"""Programs: their parts, the order of decoding, and what they write."""

from __future__ import annotations

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import OVER_LIMIT, check
from edge_tests.conformance.plain.operation import (
    FOLLOWING,
    Base,
    Operands,
    base_bytes,
    corrected,
    predict,
    stepped,
)
from edge_tests.conformance.plain.pool import POOLS, Pool
from edge_tests.conformance.plain.rans import decode_symbols, payload_bytes
from edge_tests.conformance.plain.reader import Reader
from edge_tests.conformance.plain.record import (
    EXCEPTIONS,
    POOL,
    PREDICTED,
    SPARSE,
    Record,
    read_records,
)
from edge_tests.conformance.plain.residual import (
    changes,
    contexts,
    differences,
    groups,
    plain_words,
    pools_of,
)
from edge_tests.conformance.plain.skeleton import Window, decode_skeleton
from edge_tests.conformance.plain.table import Table, read_tables

MOST_TABLES = 1024


def run_program(data: bytes, offset: int, length: int, base: bytes, tracks: bool) -> bytes:
    """The bytes that a program writes at `offset` of the target; `tracks`: the feature tracking is named."""
    reader = Reader(data, "a program")
    record_bytes, row_bytes = reader.varint(), reader.varint()
    begin, size = offset + reader.signed(), reader.varint()
    check(size <= limits.MAX_WINDOW_BYTES, "a window is too long", OVER_LIMIT)
    mask = reader.byte()
    check(mask < 1 << len(POOLS), "a pool that is not known")
    there = [name for bit, (name, _, _) in enumerate(POOLS) if mask >> bit & 1]
    sizes = {name: (reader.varint(), reader.varint()) for name in there}
    stream_bytes = reader.varint() if there else 0
    records = read_records(reader.take(record_bytes), reader.take(row_bytes), offset, length)
    tables = {name: reader.take(sizes[name][0]) for name in there}
    stream = reader.take(stream_bytes)
    raw_sizes = {name: sizes[name][1] for name in there}
    raw = reader.take(max(0, sum(raw_sizes.values()) - payload_bytes(stream))) if there else b""
    skeleton = reader.take(reader.left())
    run = Run(records, Base(base), length)
    run.check_share(size, length)
    check(size == 0 or (begin >= 0 and begin + size <= len(base)), "a window lies outside the base")
    if there or any(pools_of(record) for record in records):
        run.open_pools(tables, stream, raw_sizes, raw)
    run.decode()
    window = Window(base[begin : begin + size] if size else b"", begin)
    size = length - sum(record.length for record in records)
    between = decode_skeleton(skeleton, size, window, records, tracks)
    return run.joined(between, length)


class Run:
    """One run of a program: the elements of its records, as words, when `decode` is done."""

    def __init__(self, records: list[Record], base: Base, length: int) -> None:
        self.records = records
        self.length = length
        self.base = base
        self.operands = Operands(records, base)
        self.words: dict[int, list[int]] = {}
        self.pools: dict[str, Pool] = {}

    def check_share(self, window: int, length: int) -> None:
        """Refuses programs that read too much of the base."""
        total = window + sum(base_bytes(record) for record in self.records)
        most = limits.OPERAND_EXPANSION * length + limits.OPERAND_OVERHEAD_BYTES
        check(total <= most, "a program reads too much of the base", OVER_LIMIT)

    def open_pools(
        self, tables: dict[str, bytes], stream: bytes, raw_sizes: dict[str, int], raw: bytes
    ) -> None:
        """Decodes the symbols of all pools."""
        used = {name for record in self.records for name in pools_of(record)}
        check(used == set(tables), "pools and records do not fit each other")
        opened: dict[str, list[Table]] = {}
        for name, alphabet, count in POOLS:
            if name in used:
                opened[name] = self._tables(name, tables[name], alphabet, count)
        every = [table for name in opened for table in opened[name]]
        check(len({id(table) for table in every}) <= MOST_TABLES, "too many tables")
        symbols, payload = decode_symbols(stream, every)
        total = sum(raw_sizes.values())
        check(not any(payload[total:]), "lanes carry what no pool has")
        raw = payload[:total] + raw
        for name, own in opened.items():
            size = raw_sizes[name]
            self.pools[name] = Pool(symbols[: len(own)], raw[:size])
            symbols, raw = symbols[len(own) :], raw[size:]

    def _tables(self, name: str, sent: bytes, alphabet: int, count: int) -> list[Table]:
        """The table of each symbol of a pool."""
        members = [number for number, record in enumerate(self.records) if name in pools_of(record)]
        found = groups(name, [self.records[number] for number in members])
        by_context = read_tables(sent, count * (max(found) + 1), alphabet, self.length)
        out = []
        for place, (number, group) in enumerate(zip(members, found, strict=True)):
            record = self.records[number]
            words: list[int] = []
            lost: list[int] = []
            if record.op in ("float", "codes"):
                words, lost = predict(record, self.base, self.operands)
            own = contexts(name, record, words, lost or [16] * record.count, place)
            out += [by_context[count * group + context] for context in own]
        return out

    def decode(self) -> None:
        """Works out all records but copies of the target."""
        for number, record in enumerate(self.records):
            if record.op == "same":
                self._know(number, self.base.source(record))
            elif record.op == "float":
                self._know(number, self._predicted(record))
            elif record.op == "plain":
                self._know(number, plain_words(record, self.pools["plain"]))
        for number, record in enumerate(self.records):
            if record.op in FOLLOWING:
                self.words[number] = self.operands.get(number, FOLLOWING)
        for number, record in enumerate(self.records):
            if record.op in PREDICTED:
                self.words[number] = self._predicted(record)
        for pool in self.pools.values():
            pool.bits.end()

    def _know(self, number: int, words: list[int]) -> None:
        self.words[number] = self.operands.known[number] = words

    def _predicted(self, record: Record) -> list[int]:
        """The elements of a record: predictions and what is added to them."""
        words, _ = predict(record, self.base, self.operands)
        added: list[tuple[int, int]] = []
        if record.residual == EXCEPTIONS:
            added = record.exceptions
        elif record.residual == SPARSE:
            added = changes(record, self.pools["gaps"], self.pools["sizes"])
        elif record.residual == POOL:
            added = differences(record, self.pools[pools_of(record)[0]])
        if record.op == "stepped":
            words, added = stepped(record, words, added), record.exceptions
        return corrected(record, words, added)

    def joined(self, between: bytes, length: int) -> bytes:
        """Records and skeleton, put together."""
        out = bytearray()
        used = 0
        for number, record in enumerate(self.records):
            if record.silent:
                continue
            gap = record.at - len(out)
            out += between[used : used + gap]
            used += gap
            if record.op == "self":
                begin = record.base if record.base is not None else -1
                check(0 <= begin <= record.at - record.length, "a copy of what is not written yet")
                out += out[begin : begin + record.length]
                continue
            words = self.words[number]
            if record.bits < 8:  # two to a byte
                words = [one + 16 * two for one, two in zip(words[::2], [*words[1::2], 0], strict=False)]
            for word in words:
                out += word.to_bytes((record.bits + 7) // 8, "little")
        out += between[used:]
        check(len(out) == length, "a program writes another length than it says")
        return bytes(out)
