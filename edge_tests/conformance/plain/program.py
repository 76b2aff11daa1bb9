"""Programs: their parts, the order of decoding, and what they write."""

from __future__ import annotations

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import check
from edge_tests.conformance.plain.operation import FOLLOWING, Base, Operands, base_bytes, predict
from edge_tests.conformance.plain.pool import POOLS, Pool
from edge_tests.conformance.plain.reader import Reader
from edge_tests.conformance.plain.record import EXCEPTIONS, POOL, SPARSE, Record, read_records
from edge_tests.conformance.plain.residual import (
    changes,
    contexts,
    differences,
    groups,
    plain_words,
    pools_of,
)
from edge_tests.conformance.plain.skeleton import Window, decode_skeleton
from edge_tests.conformance.plain.tensor import FLOAT, UNSIGNED, order, unorder

PREDICTED = ("quantised", "bias", "rescaled", "codes", "cast", "pruned")


def run_program(data: bytes, offset: int, length: int, base: bytes) -> bytes:
    """The bytes that a program writes at `offset` of the target."""
    reader = Reader(data, "a program")
    record_bytes = reader.varint()
    begin, size = offset + reader.signed(), reader.varint()
    check(size <= limits.MAX_WINDOW_BYTES, "a window is too long")
    mask = reader.byte()
    check(mask < 1 << len(POOLS), "a pool that is not known")
    there = [name for bit, (name, _, _) in enumerate(POOLS) if mask >> bit & 1]
    sizes = {name: [reader.varint() for _ in range(3)] for name in there}
    records = read_records(reader.take(record_bytes), offset, length)
    parts = {name: [reader.take(size) for size in sizes[name]] for name in there}
    skeleton = reader.take(reader.left())
    run = Run(records, parts, Base(base))
    run.check_share(size, length)
    run.decode()
    window = Window(b"", 0)
    if size:
        check(begin >= 0 and begin + size <= len(base), "a window lies outside the base")
        window = Window(base[begin : begin + size], begin)
    between = decode_skeleton(skeleton, length - sum(record.length for record in records), window, records)
    return run.joined(between, length)


class Run:
    """One run of a program: the elements of its records, as words, when `decode` is done."""

    def __init__(self, records: list[Record], parts: dict[str, list[bytes]], base: Base) -> None:
        self.records = records
        self.parts = parts
        self.base = base
        self.operands = Operands(records, base)
        self.words: dict[int, list[int]] = {}

    def check_share(self, window: int, length: int) -> None:
        """Refuses programs that read too much of the base."""
        total = window
        for record in self.records:
            scales = 0
            if record.op == "rescaled" and 0 <= record.one < len(self.records):
                scales = self.records[record.one].count
            total += base_bytes(record, scales)
        most = limits.OPERAND_EXPANSION * length + limits.OPERAND_OVERHEAD_BYTES
        check(total <= most, "a program reads too much of the base")

    def decode(self) -> None:
        """Works out all records but copies of the target."""
        used = {name for record in self.records for name in pools_of(record)}
        check(used == set(self.parts), "pools and records do not fit each other")
        for number, record in enumerate(self.records):
            if record.op == "same":
                self._know(number, self.base.words(record.base or 0, record.count, record.width))
        self._decode_floats()
        for number, record in enumerate(self.records):
            if record.op in FOLLOWING:
                self.words[number] = self.operands.get(number, record.type)
        self._decode_predicted()

    def _know(self, number: int, words: list[int]) -> None:
        self.words[number] = self.operands.known[number] = words

    def _open(self, name: str, members: list[int], known: list[list[int]]) -> Pool:
        """The pool of some records, the contexts of each being known."""
        alphabet, count = next((a, c) for pool, a, c in POOLS if pool == name)
        found = groups(name, [self.records[number] for number in members])
        joined = []
        for group, own in zip(found, known, strict=True):
            joined += [count * group + context for context in own]
        return Pool(self.parts[name], alphabet, joined, count * (max(found) + 1))

    def _of_pool(self, name: str) -> list[int]:
        return [number for number, record in enumerate(self.records) if name in pools_of(record)]

    def _decode_floats(self) -> None:
        for name in ("float", "half"):
            members = self._of_pool(name)
            if not members:
                continue
            guesses = [predict(self.records[n], self.base, self.operands)[0] for n in members]
            known = [contexts(name, self.records[n], w, [], 0) for n, w in zip(members, guesses, strict=True)]
            pool = self._open(name, members, known)
            for number, guess in zip(members, guesses, strict=True):
                record = self.records[number]
                added = differences(record, pool)
                self._know(number, [_sum(record, w, d) for w, d in zip(guess, added, strict=True)])
            pool.bits.end()
        members = self._of_pool("plain")
        if members:
            known = [contexts("plain", self.records[n], [], [], k) for k, n in enumerate(members)]
            pool = self._open("plain", members, known)
            for number in members:
                self._know(number, plain_words(self.records[number], pool))
            pool.bits.end()

    def _decode_predicted(self) -> None:
        members = [n for n, record in enumerate(self.records) if record.op in PREDICTED]
        guesses = {n: predict(self.records[n], self.base, self.operands) for n in members}
        pools = {}
        for name in ("wide", "codes", "gaps", "sizes"):
            mine = self._of_pool(name)
            if mine:
                known = [contexts(name, self.records[n], *guesses[n], 0) for n in mine]
                pools[name] = self._open(name, mine, known)
        for number in members:
            record, words = self.records[number], guesses[number][0]
            added = [(0, 0)]
            if record.residual == EXCEPTIONS:
                added = record.exceptions
            elif record.residual == SPARSE:
                added = changes(record, pools["gaps"], pools["sizes"])
            elif record.residual == POOL:
                added = list(enumerate(differences(record, pools[pools_of(record)[0]])))
            out = [_sum(record, word, 0) for word in words]
            for place, difference in added:
                out[place] = _sum(record, words[place], difference)
            self.words[number] = out
        for pool in pools.values():
            pool.bits.end()

    def joined(self, between: bytes, length: int) -> bytes:
        """Records and skeleton, put together."""
        out = bytearray()
        used = 0
        for number, record in enumerate(self.records):
            if record.op == "given":
                continue
            gap = record.at - len(out)
            out += between[used : used + gap]
            used += gap
            if record.op == "self":
                begin = record.base if record.base is not None else -1
                check(0 <= begin <= record.at - record.length, "a copy of what is not written yet")
                out += out[begin : begin + record.length]
                continue
            for word in self.words[number]:
                out += word.to_bytes(record.width, "little")
        out += between[used:]
        check(len(out) == length, "a program writes another length than it says")
        return bytes(out)


def _sum(record: Record, word: int, difference: int) -> int:
    """A prediction and a difference, modulo the element's width."""
    bits = 8 * record.width
    reading = FLOAT if record.op in ("float", "cast", "pruned") else UNSIGNED
    return unorder((order(word, reading, bits) + difference) % (1 << bits), reading, bits)
