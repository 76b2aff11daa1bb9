"""docs/delta-format.md says what the code does: its worked example, its numbers and its list of rules."""

from __future__ import annotations

import ast
import re
import struct
from pathlib import Path

import numpy as np

from updater import delta, limits
from updater.delta import container, instructions, streams, tensors
from updater.delta.elements import ELEMENT_TYPES
from updater.delta.instructions import Copy, Literal, Requantise, Tensor
from updater.delta.streams import Stream
from updater.digests import digest_bytes

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "delta-format.md").read_text()
PROGRAMS = (ROOT / "docs" / "delta-format" / "programs.md").read_text()

BASE = b"model v1\n" + struct.pack("<4f", 1.0, -2.0, 0.5, 4.0)
TARGET = b"model v2\n" + struct.pack("<4f", 1.0, -2.0000002384185791015625, 0.5, 4.0)


def worked_example() -> bytes:
    """The delta of the specification's last section, put together by hand."""
    header = container.Header(
        digest_bytes(BASE), len(BASE), digest_bytes(TARGET), len(TARGET), 4096, 1, ("tensor",)
    )
    tensor = Tensor(instructions.DIFFERENCE, instructions.SPARSE, ELEMENT_TYPES[8], 4, 9, 1, (2, 3, 3, 3, 3))
    listing = instructions.encode([Copy(0, 7), Literal(1, 2), tensor], 0)
    table = [Stream(streams.RAW, len(part), part) for part in (listing, b"2\n", b"\x01", bytes(4))]
    start = container.encode_header(header)
    seed = container.header_checksum(start)
    block = container.encode_block(seed, 0, len(TARGET), streams.encode_table(table, 0))
    return start + block + bytes([container.MARK_END])


def dumped() -> bytes:
    """The bytes of the worked example as the document prints them."""
    data = bytearray()
    section = TEXT.split("## Worked example")[1].split("```")[1]
    for line in section.splitlines():
        if found := re.match(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)(?:  .*)?$", line):
            assert int(found[1], 16) == len(data), line
            data += bytes.fromhex(found[2])
    return bytes(data)


def test_worked_example_is_what_the_code_writes_and_reads(tmp_path: Path) -> None:
    assert dumped().hex(" ") == worked_example().hex(" ")
    (tmp_path / "base").write_bytes(BASE)
    (tmp_path / "delta").write_bytes(dumped())
    assert delta.apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out") == digest_bytes(TARGET)
    assert (tmp_path / "out").read_bytes() == TARGET


def test_limits_of_the_document_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([\d,]+) \|", TEXT, re.MULTILINE)
    assert len(rows) >= 12
    for name, value in rows:
        assert getattr(limits, name) == int(value.replace(",", "")), name


def test_features_of_the_document_are_those_of_the_code() -> None:
    section = TEXT.split("## Features")[1].split("##")[0]
    assert tuple(re.findall(r"^\| `([a-z]+)` \|", section, re.MULTILINE)) == delta.FEATURES


def test_element_types_of_the_document_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d) \| (unsigned|signed|float) \|", TEXT, re.MULTILINE)
    assert [(int(number), int(width), reading) for number, width, reading in rows] == [
        (kind.number, kind.width, kind.reading) for kind in ELEMENT_TYPES
    ]


def test_every_must_cites_a_test_that_exists() -> None:
    tests = {
        node.name
        for path in (ROOT / "edge_tests").rglob("test_delta_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    rules = re.findall(
        r"^\d+\. .*?(?=^\d+\. |^#|\Z)", TEXT.split("## Rules")[1].split("\n## ")[0], re.M | re.S
    )
    assert len(rules) >= 15
    for rule in rules:
        cited = re.findall(r"`(test_\w+)`", rule)
        assert cited, rule
        assert set(cited) <= tests, rule


def test_key_words_outside_the_rules_name_their_rule() -> None:
    rules = len(re.findall(r"^\d+\. ", TEXT.split("## Rules")[1].split("\n## ")[0], re.M))
    prose = re.sub(r"\n## Rules\n.*?\n## ", "\n\n## ", TEXT, flags=re.S) + PROGRAMS
    sentences = re.split(r"\n\n|\n[|*-]|(?<=[.:])\s+(?=[A-Z*])", prose)
    binding = [text for text in sentences if re.search(r"\b(MUST|SHOULD|MAY)\b", text)]
    assert len(binding) > 10
    for sentence in binding:
        if "the meaning of RFC 2119" in sentence:
            continue
        cited = re.findall(r"\(rules? ([\d, ]+)\)", sentence)
        assert cited, sentence
        assert all(1 <= int(number) <= rules for part in cited for number in part.split(",")), sentence


def test_requantisation_is_the_documents_formula() -> None:
    """The vectorised arithmetic against the formula in plain integers, at the edges of every range."""
    random = np.random.default_rng(8)
    for kind in (ELEMENT_TYPES[number] for number in (0, 1, 3, 4, 6, 7)):
        edges = [kind.low, kind.high, 0, 1, kind.high - 1]
        codes = np.array(
            edges + random.integers(kind.low, kind.high, 45, endpoint=True).tolist(), dtype=np.int64
        )
        words = codes.astype(f"<i{kind.width}" if kind.low else kind.dtype).view(kind.dtype)
        for shift in (0, 1, 10, 31, 62):
            for many in (False, True):
                zeros = 3 if many else 1
                shape = Requantise(
                    start=4,
                    inner=7,
                    shift=shift,
                    multipliers=(1, instructions.MAX_MULTIPLIER, 12345),
                    old_zero=(instructions.MAX_ZERO_POINT, -instructions.MAX_ZERO_POINT, 5)[:zeros],
                    new_zero=(-7, instructions.MAX_ZERO_POINT, 3)[:zeros],
                )
                expected = []
                for index, code in enumerate(codes.tolist()):
                    channel = (4 + index) // 7 % 3
                    old, new = shape.old_zero[channel % zeros], shape.new_zero[channel % zeros]
                    scaled = (code - old) * shape.multipliers[channel] + (1 << shift >> 1)
                    expected.append(min(max((scaled >> shift) + new, kind.low), kind.high))
                got = tensors.requantised(words, kind, shape, shape.start)
                signed = got.view(f"<i{kind.width}") if kind.low else got
                assert signed.tolist() == expected
