"""Valid vectors of codes of four bits, and of scales of blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import programs
from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES, noise
from edge_tests.conformance.vectors.valid_programs import level
from updater.delta.program import nibbles
from updater.delta.program import records as ops
from updater.delta.program.records import EXACT, EXCEPTIONS, POOL, SPARSE, Record

_KINDS = (("int4", ops.I4), ("uint4", ops.U4))


def stepped(name: str, about: str, records: Sequence[Record], steps: Sequence[int] = ()) -> Made:
    """A vector whose last record's codes are what it predicts, each with a step added, modulo 16."""
    last = records[-1]
    length = last.at + last.length + 5
    exact = replace(last, residual=EXACT, activity=None, used=np.empty(0, dtype=bool), changed=0)
    plain = last if last.residual == EXCEPTIONS else exact
    target = bytearray(programs.settle(NUMBERS, [*records[:-1], plain], noise(length, 9), length))
    place = slice(last.at, last.at + last.length)
    codes = nibbles.unpack(np.frombuffer(bytes(target[place]), dtype=np.uint8), last.count, 0, False)
    moved = codes.astype(np.int64) + np.array([*steps, *[0] * (last.count - len(steps))])
    target[place] = nibbles.pack(moved).tobytes()
    program = programs.encode(NUMBERS, bytes(target), records)
    delta = programs.delta(NUMBERS, bytes(target), program.encode())
    return Made(name, about, NUMBERS, delta, bytes(target))


def made() -> Iterator[Made]:
    """All of this module."""
    weights, codes, scales = PLACES["weights"].at, PLACES["bytes"].at, PLACES["scales"].at
    draw = random.Random(4)
    steps = [draw.choice((-1, 0, 0, 0, 1)) for _ in range(192)]
    coarse = Record(ops.GIVEN, ops.F32, 0, 1, words=[0x3C23D70A])  # 0.01
    for name, kind in _KINDS:
        one = Record(ops.QUANTISED, kind, 3, 191, 1, weights, one=0, zero=0 if kind == ops.I4 else 8)
        yield stepped(
            f"nibbles-quantised-{name}", f"Weights quantised to {name}, an odd number of them.", [coarse, one]
        )
        pooled = replace(one, count=192, rows=12, residual=POOL, activity=level([1]))
        yield stepped(
            f"nibbles-pool-{name}", f"Codes of type {name} with residuals.", [coarse, pooled], steps
        )
        listed = replace(one, residual=EXCEPTIONS, exceptions=[(0, 1), (7, -15), (190, 9)])
        yield stepped(f"nibbles-exceptions-{name}", "Codes that differ, modulo 16.", [coarse, listed])
        plain = Record(ops.CODES, kind, 1, 191, 1, codes, residual=POOL, activity=level([1]))
        yield stepped(
            f"nibbles-codes-{name}", f"Codes from codes of type {name}, two to a byte.", [plain], steps[:191]
        )
        gains = np.arange(480, 544, 4)
        gained = replace(
            plain, count=192, rows=12, zero=3, base_zero=2, gain_bits=9, gains=gains, by_rows=False
        )
        yield stepped(f"nibbles-codes-gain-{name}", "Codes of four bits times gains.", [gained], steps)
        few = [step if at % 9 == 0 else 0 for at, step in enumerate(steps[:189])]
        sparse = replace(
            plain, count=189, rows=21, residual=SPARSE, activity=None, changed=sum(step != 0 for step in few)
        )
        yield stepped(
            f"nibbles-sparse-{name}", "A sparse residual of codes in rows of nine, from either half on.",
            [sparse], few,
        )  # fmt: skip
        low = Record(ops.SPANNED, ops.F32, 0, 24, base=PLACES["clean"].at, two=8, halves=30)
        zeros = Record(ops.ZEROS, kind, 96, 24, base=PLACES["clean"].at, two=8, one=0)
        blocks = Record(ops.QUANTISED, kind, 110, 192, 24, PLACES["clean"].at, one=0, two=1, zeros=True)
        yield stepped(
            f"nibbles-zeros-{name}",
            "Blocks of eight with scales and packed zero points.",
            [low, zeros, blocks],
        )
        odd = replace(zeros, count=23, residual=EXCEPTIONS, exceptions=[(0, 3), (22, -2)])
        first = replace(low, count=23)
        rest = replace(blocks, count=184, rows=23)
        yield stepped(
            f"nibbles-zeros-exceptions-{name}", "An odd number of zero points, two of them others.",
            [first, odd, rest],
        )  # fmt: skip
    axes = ((4, 48), (12, 1), (4, 12))
    peaks = Record(ops.PEAK, ops.F32, 0, 48, base=PLACES["clean"].at, two=4, halves=14, axes=axes)
    for name, kind in (("int4", ops.I4), ("int8", ops.I8)):
        down = Record(ops.QUANTISED, kind, 192, 192, 16, PLACES["clean"].at, one=0, by_rows=False)
        yield stepped_or_whole(name, [peaks, down])
    silent = Record(ops.ZEROS, ops.I4, 24, 6, base=weights, two=8, one=0, silent=True)
    some = Record(ops.QUANTISED, ops.I4, 24, 48, 6, weights, one=0, two=1, zeros=True)
    six = Record(ops.SAME, ops.F32, 0, 6, base=scales)
    yield stepped(
        "nibbles-zeros-silent", "Zero points of four bits that are only worked out.", [six, silent, some]
    )


def stepped_or_whole(name: str, records: Sequence[Record]) -> Made:
    """Scales of blocks of rows that follow each other."""
    about = f"Codes of type {name} with scales of blocks down the columns."
    if records[-1].dtype == ops.I4:
        return stepped(f"blocks-down-{name}", about, records)
    length = records[-1].at + records[-1].length
    target = programs.settle(NUMBERS, records, noise(length, 9), length)
    program = programs.encode(NUMBERS, target, records)
    return Made(
        f"blocks-down-{name}", about, NUMBERS, programs.delta(NUMBERS, target, program.encode()), target
    )
