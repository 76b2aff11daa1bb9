"""Tables of frequencies, and which context has which."""

from __future__ import annotations

from edge_tests.conformance.plain.arithmetic import Arithmetic, budget
from edge_tests.conformance.plain.fault import check

TOTAL = 4096
TABLE_LIMIT = 60
MOST_TABLES = 255
OCTAVES = 16
MOST_FINENESS = 4
STEPS = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)


class Table:
    """Frequencies of symbols, and the sums before each."""

    def __init__(self, frequency: list[int]) -> None:
        self.frequency = frequency
        self.start = [sum(frequency[:symbol]) for symbol in range(len(frequency))]
        self._symbols: list[int] = []
        for symbol, count in enumerate(frequency):
            self._symbols += [symbol] * count

    def symbol(self, slot: int) -> int:
        """The symbol whose range a slot lies in."""
        return self._symbols[slot]


def read_tables(data: bytes, contexts: int, alphabet: int, length: int) -> list[Table]:
    """The table of each context, in a program of `length` bytes."""
    coder = Arithmetic(data, TABLE_LIMIT, budget(length))
    count = coder.unsigned("number")
    check(1 <= count <= MOST_TABLES, "the number of tables is out of its range")
    fineness = 1 << coder.plain(2)
    check(fineness <= MOST_FINENESS, "levels are too fine")
    numbers = _read_map(coder, contexts, count) if count > 1 else [0] * contexts
    tables = [
        Table(frequencies(levels, fineness)) for levels in _read_levels(coder, count, alphabet, fineness)
    ]
    coder.end()
    return [tables[number] for number in numbers]


def _read_map(coder: Arithmetic, contexts: int, count: int) -> list[int]:
    numbers: list[int] = []
    newest = -1
    while len(numbers) < contexts:
        run = 1 + coder.unsigned("run")
        check(len(numbers) + run <= contexts, "a run leads beyond the last context")
        if newest + 1 < count and coder.bit("new"):
            newest += 1
            table = newest
        else:
            table = coder.plain(1 if newest < 0 else newest.bit_length())
            check(table <= newest, "a context names a table that is not there")
        numbers += [table] * run
    return numbers


def _read_levels(coder: Arithmetic, count: int, alphabet: int, fineness: int) -> list[list[int]]:
    out: list[list[int]] = []
    first, last, above = 0, -1, [0] * alphabet
    for _ in range(count):
        first += coder.signed("first")
        last += coder.signed("last")
        check(0 <= first <= last < alphabet, "a table's symbols lie outside their alphabet")
        holes = coder.bit("holes")
        level = [0] * alphabet
        for symbol in range(first, last + 1):
            left = level[symbol - 1] if symbol > first else 0
            up = above[symbol]
            corner = above[symbol - 1] if symbol > 0 else 0
            if holes and not coder.bit("used", left > 0, up > 0):
                continue
            if left and up and corner:
                guess = min(max(left, up), max(min(left, up), left + up - corner))
                kind = 0
            else:
                guess, kind = left or up or 1, 1
            level[symbol] = guess + coder.signed("level", kind)
            check(1 <= level[symbol] <= OCTAVES * fineness, "a level is out of its range")
        check(any(level), "a table without symbols")
        out.append(level)
        above = level
    return out


def frequencies(levels: list[int], fineness: int) -> list[int]:
    """Frequencies that sum to 4096, from the levels of symbols."""
    weights = []
    for level in levels:
        step = (level - 1) * (8 // fineness)
        weights.append(STEPS[step % 8] << (step // 8) if level else 0)
    total = sum(weights)
    out = [max(1, weight * TOTAL // total) if weight else 0 for weight in weights]
    missing = TOTAL - sum(out)
    if missing > 0:
        out[out.index(max(out))] += missing
    while missing < 0:
        largest = out.index(max(out))
        take = min(-missing, max(1, out[largest] // 2))
        out[largest] -= take
        missing += take
    return out
