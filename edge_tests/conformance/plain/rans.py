"""Interleaved rANS, as a decoder."""

from __future__ import annotations

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import OVER_LIMIT, check
from edge_tests.conformance.plain.table import TOTAL, Table

MOST_LOGARITHM = 14


def payload_bytes(stream: bytes) -> int:
    """The bytes that a stream carries."""
    check(len(stream) >= 1 and stream[0] <= MOST_LOGARITHM, "the number of lanes is out of its range")
    return 2 << stream[0]


def decode_symbols(stream: bytes, tables: list[Table]) -> tuple[list[int], bytes]:
    """The symbols, each coded with its table, and the payload."""
    lanes = payload_bytes(stream) // 2
    check(len(tables) <= lanes * limits.MAX_LANE_SYMBOLS, "too many symbols in a lane", OVER_LIMIT)
    states, at = _states(stream, lanes)
    symbols = []
    for index, table in enumerate(tables):
        state = states[index % lanes]
        slot = state & (TOTAL - 1)
        symbol = table.symbol(slot)
        state = table.frequency[symbol] * (state >> 12) + slot - table.start[symbol]
        if state < 1 << 16:
            check(at + 2 <= len(stream), "a stream ends before its symbols")
            state = state << 16 | int.from_bytes(stream[at : at + 2], "little")
            at += 2
        states[index % lanes] = state
        symbols.append(symbol)
    check(at == len(stream), "a stream goes on behind its symbols")
    check(all(state >> 16 == 1 for state in states), "a stream does not end where its symbols do")
    return symbols, b"".join((state & 0xFFFF).to_bytes(2, "little") for state in states)


def _states(stream: bytes, lanes: int) -> tuple[list[int], int]:
    head = 1 + (lanes + 1) // 2
    check(len(stream) >= head, "a stream ends inside its states")
    sizes = []
    for lane in range(lanes):
        byte = stream[1 + lane // 2]
        sizes.append((byte >> 4 if lane % 2 else byte & 15) + 16)
    end = head + (sum(sizes) + 7) // 8
    check(len(stream) >= end, "a stream ends inside its states")
    bits = int.from_bytes(stream[head:end], "little")
    states = []
    check(lanes > 1 or stream[1] >> 4 == 0, "padding that is not zero")
    for size in sizes:
        states.append(1 << size | bits & ((1 << size) - 1))
        bits >>= size
    check(bits == 0, "padding that is not zero")
    return states, end
