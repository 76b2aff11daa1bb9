"""Programs out of choices: invented records, or a sound program whose parts are changed one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import build, programs
from edge_tests.conformance.vectors.programs import Parts
from edge_tests.fuzz.choices import Choices
from edge_tests.fuzz.coders import DrawingCoder
from updater.delta.program import body, records, tables
from updater.delta.program.operands import ProgramError
from updater.delta.program.records import KINDS, Record
from updater.errors import SluiceError

TABLE_LIMIT = 60  # visits after which a model of tables keeps its rate
_POOL_CONTEXTS = 2  # groups that invented tables cover at most


def spoil(data: bytes, choices: Choices) -> bytes:
    """Bytes with a few changes: other values, pieces left out, repeated or put in."""
    out = bytearray(data)
    for _ in range(1 + choices.below(3)):
        at = choices.below(len(out) + 1)
        kind = choices.below(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << choices.below(8)
        elif kind == 1 and at < len(out):
            out[at] = choices.small()
        elif kind == 2:
            del out[at : at + 1 + choices.below(8)]
        elif kind == 3:
            out[at:at] = out[at : at + 1 + choices.below(16)]
        else:
            out[at:at] = choices.bytes(1 + choices.below(8))
    return bytes(out)


def invent(base: bytes, length: int, offset: int, choices: Choices) -> bytes:
    """A program of drawn records that writes `length` bytes; the encoder adds what fits them, where it can."""
    coder = DrawingCoder(choices, body.RECORD_LIMIT)
    found: list[Record] = []
    try:
        found = records.code_records(coder, None, length, offset)
    except ProgramError:  # readers will find the same fault
        return Parts(coder.finish(), frame=b"\0" + choices.bytes(8)).encode()
    parts = Parts(coder.finish(), frame=_frame(base, length, found, choices))
    target = (choices.bytes(16) * (length // 16 + 1))[:length]
    try:
        parts = programs.encode(base, target, found, offset)
    except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError, SluiceError):
        kinds = [name for name in KINDS if choices.below(4) == 0]
        parts = replace(parts, pools={name: _pool(name, choices) for name in kinds})
    return change(parts, length, offset, choices) if choices.below(2) else parts.encode()


def _frame(base: bytes, length: int, found: list[Record], choices: Choices) -> bytes:
    size = max(0, length - sum(record.length for record in found))
    way = choices.below(5)
    if way in (programs.ZSTD, programs.ZSTD_WHOLE):
        return bytes([way]) + build.frame(choices.bytes(size), base)
    return bytes([way]) + choices.bytes(size)


def _pool(name: str, choices: Choices) -> list[bytes]:
    sent = _tables(name, choices, None)
    lanes = choices.below(16)
    return [sent, bytes([lanes]) + choices.bytes(choices.below(64)), choices.bytes(choices.below(32))]


def _tables(name: str, choices: Choices, source: bytes | None) -> bytes:
    kind = KINDS[name]
    contexts = kind.contexts * (1 + choices.below(_POOL_CONTEXTS))
    coder = DrawingCoder(choices, TABLE_LIMIT, source)
    try:
        tables._code_model(coder, np.zeros(contexts, dtype=np.uint8), contexts, kind.alphabet, 1, 0, None)
    except (ArithmeticError, LookupError, ProgramError, ValueError):
        pass  # readers will find the same fault
    return coder.finish()


def change(parts: Parts, length: int, offset: int, choices: Choices) -> bytes:
    """The program with one or two parts changed."""
    for _ in range(1 + choices.below(2)):
        kind = choices.below(9)
        pools = dict(parts.pools or {})
        if kind == 0:
            coder = DrawingCoder(choices, body.RECORD_LIMIT, parts.records)
            try:
                records.code_records(coder, None, length, offset)
            except ProgramError:
                pass
            parts = replace(parts, records=coder.finish())
        elif kind == 1:
            parts = replace(parts, records=spoil(parts.records, choices))
        elif kind == 2:
            parts = replace(parts, frame=spoil(parts.frame, choices))
        elif kind == 3:
            parts = replace(parts, frame=bytes([choices.below(5)]) + parts.frame[1:])
        elif kind == 4:
            parts = replace(parts, window=(choices.signed(), choices.number()))
        elif kind == 5 and pools:
            name = choices.one(sorted(pools))
            pools[name] = [_tables(name, choices, pools[name][0]), *pools[name][1:]]
        elif kind == 6 and pools:
            name, which = choices.one(sorted(pools)), choices.below(3)
            pools[name] = [spoil(part, choices) if at == which else part for at, part in enumerate(pools[name])]
        elif kind == 7:
            name = choices.one(sorted(KINDS))
            if pools.pop(name, None) is None:
                pools[name] = _pool(name, choices)
        else:
            return replace(parts, mask=choices.small()).encode()
        parts = replace(parts, pools=pools)
    return parts.encode()
