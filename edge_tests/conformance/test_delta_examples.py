"""The examples of docs/delta-format/programs.md, against the engine and against the plain decoder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from edge_tests.conformance.plain.arithmetic import Arithmetic
from edge_tests.conformance.plain.pool import Bits, read_token
from edge_tests.conformance.plain.rans import decode_symbols
from edge_tests.conformance.plain.table import Table, frequencies
from updater.delta.program import bits, bytemodel, rans, records, tables, tokens
from updater.delta.program.arithmetic import Coder

TYPES = ("f32", "i8", "u8", "i32", "i64", "f16", "bf16", "i4", "u4")
WHOLE = TYPES[:7]  # bytes: what the document calls all
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "delta-format" / "programs.md").read_text("utf-8")


def section(title: str) -> str:
    return TEXT.split(f"### Example: {title}\n")[1].split("\n### ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, but for its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [
        [cell.strip().strip("`").replace(chr(0x2212), "-") for cell in line[1:-1].split("|")]
        for line in lines
    ]


class Recorder(Arithmetic):
    """A decoder that writes down each decision as the document does."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, 30, 1000)
        self.rows: list[list[str]] = []

    def decide(self, probability: int) -> int:
        before = [f"{value:08x}" for value in (self.low, self.high, self.code)]
        bit = super().decide(probability)
        self.rows.append([*before, str(probability), str(bit), ""])
        return bit

    def bit(self, *context: object) -> int:
        bit = super().bit(*context)
        (name,), *rest = context
        self.rows[-1][-1] = "(" + ", ".join([f'"{name}"', f'"{rest[0]}"', *map(str, rest[1:])]) + ")"
        return bit


def test_the_arithmetic_coder_goes_through_the_documents_decisions() -> None:
    text = section("arithmetic coder")
    data = bytes.fromhex(re.findall(r"From the bytes `([0-9a-f ]+)`", text)[0])
    coder = Recorder(data)
    assert [coder.unsigned("a"), coder.unsigned("a"), coder.signed("b"), coder.plain(4)] == [2, 2, -3, 9]
    assert coder.rows == rows(text)
    writer = Coder(limit=30)
    writer.unsigned("a", 2)
    writer.unsigned("a", 2)
    writer.signed("b", -3)
    writer.bits(9, 4)
    assert writer.finish() == data


def test_tokens_are_the_documents() -> None:
    table = rows(section("tokens"))
    assert len(table) > 8
    for number, token, sign, rest in table:
        read = Bits(int(rest + sign or "0", 2).to_bytes(5, "little"))
        assert read_token(int(token), read) == int(number)
        assert read.at == len(sign + rest)
        symbols, fields, widths = tokens.encode(np.array([int(number)], dtype=np.int32))
        assert symbols.tolist() == [int(token)]
        assert bits.pack([(fields, widths)]) == read.data[: (read.at + 7) // 8]


def test_frequencies_are_the_documents() -> None:
    text = " ".join(section("frequencies").split())
    levels, found = (
        [int(number) for number in numbers.split(",")]
        for numbers in re.findall(r"the levels ([\d, ]+) give the frequencies ([\d, ]+)", text)[0]
    )
    assert frequencies(levels, 2) == found
    assert tables.frequencies(np.array([levels]), 2).tolist() == [found]
    assert sum(found) == 4096


def test_rans_goes_through_the_documents_steps() -> None:
    text = section("rANS")
    stream = bytes.fromhex(re.findall(r"\n    ([0-9a-f ]+)\n", text)[0])
    payload = bytes.fromhex(re.findall(r"The payload is `([0-9a-f ]+)`", text)[0])
    frequency = [2048, 1024, 1024]
    steps = rows(text)
    symbols, found = decode_symbols(stream, [Table(frequency)] * len(steps))
    assert symbols == [int(step[4]) for step in steps]
    assert found == payload
    states = {step[1]: step[2] for step in steps[1::-1]}
    for _, lane, before, slot, symbol, word, after in steps:
        assert states[lane] == before
        state, start = int(before, 16), sum(frequency[: int(symbol)])
        assert state & 4095 == int(slot)
        state = frequency[int(symbol)] * (state >> 12) + int(slot) - start
        if word:
            state = state << 16 | int.from_bytes(bytes.fromhex(word), "little")
        assert f"{state:08x}" == after
        states[lane] = after
    assert any(step[5] for step in steps)
    model = rans.Tables(np.array([frequency], dtype=np.uint32))
    coded = rans.encode(np.array(symbols, dtype=np.uint8), None, model, 2, payload)
    assert bytes([1]) + coded == stream


def test_lists_of_the_document_are_those_of_the_code() -> None:
    """Operations with their types, pools, element types and constants."""
    operations: dict[int, tuple[str, set[str]]] = {}
    for number, name, types, *_ in rows(TEXT.split("\n## Operations\n")[1].split("\n\n")[0]):
        known = operations.setdefault(int(number), (name, set()))
        assert known[0] == name
        known[1].update(WHOLE if types == "all" else types.split(", "))
    assert [operations[number][0] for number in sorted(operations)] == list(records.NAMES)
    for number, (name, types) in operations.items():
        allowed = records._KINDS_OF.get(number, records._ANY)
        assert {TYPES[kind] for kind in allowed} == types, name
    pools = rows(TEXT.split("| k | pool |")[1].split("\n\n")[0].replace("\n", "\n|\n", 1))
    found = {
        name: (int(alphabet), int(contexts.replace(",", ""))) for _, name, alphabet, contexts, _ in pools
    }
    assert found == {name: (kind.alphabet, kind.contexts) for name, kind in records.KINDS.items()}
    for name, values in (("C", bytemodel._CURVE[:33]), ("G", tables._FRACTIONS)):
        listed = re.findall(rf"    {name} = \(([\d,\s]+)\)", TEXT)[0]
        assert tuple(map(int, listed.split(","))) == values
