"""Valid vectors of the operation stepped: steps, codes, and the numbers that they do not move."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import programs
from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES
from edge_tests.conformance.vectors.valid_programs import level
from updater.delta.program import predictors, run
from updater.delta.program import records as ops
from updater.delta.program.operands import Operands
from updater.delta.program.piece import Piece
from updater.delta.program.records import POOL, Record

_TYPES = (("float32", ops.F32, "clean"), ("float16", ops.F16, "halves"), ("bfloat16", ops.BF16, "brains"))
_STEP = np.array([3001 * 2.0**-21])
_ROWS = np.array([0.0 if row == 5 else (2048 + 170 * row) * 2.0 ** (-23 + row % 3) for row in range(12)])


def _record(dtype: int, at: int, steps: np.ndarray = _STEP) -> Record:
    activity = level([3])
    return Record(ops.STEPPED, dtype, 0, 192, 12, at, by_rows=len(steps) > 1, steps=steps, residual=POOL,
                  activity=activity)  # fmt: skip


def _codes(seed: int, spread: int = 3) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(-spread, spread + 1) for _ in range(192)]


def _target(
    record: Record, codes: Sequence[int], base: bytes, strays: Mapping[int, int] | None = None
) -> bytes:
    """What codes make of a base; float32 words that lie some steps behind it at a few places."""
    whole = Piece.whole(record.rows, record.columns)
    words = predictors.floats(Operands(programs.reader_of(base)), record, whole)
    with np.errstate(all="ignore"):
        made = predictors.stepped(record, words, np.array(codes, dtype=np.int16), whole).astype(words.dtype)
    for place, step in (strays or {}).items():
        made[place] = predictors.unordered(predictors.ordered(words[[place]], 32) + np.uint32(step), 32)[0]
    return made.tobytes()


def case(
    name: str,
    about: str,
    record: Record,
    codes: Sequence[int],
    *,
    strays: Mapping[int, int] | None = None,
    made_for: bytes = NUMBERS,
) -> Made:
    """A vector of one record. Its program is made for another base if `made_for` says so.

    So codes are sent for numbers that no code moves, which an encoder would not do.
    """
    record = replace(record, exceptions=sorted((strays or {}).items()))
    program = programs.encode(made_for, _target(record, codes, made_for, strays), [record]).encode()
    target = bytes(run(programs.reader_of(NUMBERS), program, 0, record.length))
    return Made(name, about, NUMBERS, programs.delta(NUMBERS, target, program), target)


def made() -> Iterator[Made]:
    """All of this module."""
    for name, dtype, place in _TYPES:
        at = PLACES[place].at
        yield case(f"stepped-{name}", f"One step for all rows of {name}.", _record(dtype, at), _codes(1))
        yield case(
            f"stepped-rows-{name}",
            f"A step for each row of {name}, one of them 0.",
            _record(dtype, at, _ROWS),
            [0 if place // 16 == 5 else code for place, code in enumerate(_codes(2))],
        )
    clean, weights = PLACES["clean"].at, PLACES["weights"].at
    used = np.arange(12) % 4 == 1
    for name, steps in (("one", _STEP), ("each", np.where(used, _ROWS, 0.0))):
        record = replace(_record(ops.F32, clean, steps), used=used & (np.arange(12) != 5))
        inside = [code if record.used[place // 16] else 0 for place, code in enumerate(_codes(3))]
        yield case(f"stepped-used-{name}", f"Steps ({name}) in two of the rows.", record, inside)
    yield case(
        "stepped-escape",
        "Codes beyond ±100 escape.",
        _record(ops.F32, clean),
        [*_codes(4, 356)[:190], 356, -356],
    )
    yield case(
        "stepped-exceptions",
        "Three words that are a few words behind the base's in order, where the code is 0.",
        _record(ops.F32, clean),
        _codes(5),
        strays={0: 77, 100: 5, 191: 1},
    )
    yield case(
        "stepped-zeros",
        "Code 0 leaves every word as it is: NaNs, zeros of both signs, infinities, subnormals.",
        _record(ops.F32, weights),
        [code if place < 180 else 0 for place, code in enumerate(_codes(6))],
    )
    for name, dtype, place in (("float32", ops.F32, "weights"), *_TYPES[1:]):
        at, wide = PLACES[place].at, ops.DTYPES[dtype].itemsize
        calm = bytearray(NUMBERS)
        for index in range(180, 190):
            calm[at + index * wide : at + (index + 1) * wide] = NUMBERS[at : at + wide]
        yield case(
            f"stepped-specials-{name}",
            f"Codes on {name} NaNs and infinities leave them; zeros and subnormals move.",
            _record(dtype, at),
            [place % 7 - 3 if place % 7 != 3 else 5 for place in range(192)],
            made_for=bytes(calm),
        )
    yield from _edges()


def _edges() -> Iterator[Made]:
    """Large and small steps: codes that a step in the middle of its range was made for."""
    middle = np.array([2048 * 2.0**-24])
    codes = [place % 61 - 30 for place in range(192)]
    for name, dtype, place, exponent, about in (
        ("least", ops.F32, "clean", -200, "A step so small that every sum is rounded to the base's word."),
        ("over-float32", ops.F32, "clean", 112, "Sums beyond float32 leave the base's word."),
        ("over-float16", ops.F16, "halves", 1, "Sums beyond float16 leave the base's word."),
        ("over-bfloat16", ops.BF16, "brains", 112, "Sums beyond bfloat16 leave the base's word."),
        ("most", ops.F32, "clean", 200, "The largest step: only code 0 gives a finite number."),
    ):
        record = _record(dtype, PLACES[place].at, middle)
        parts = programs.encode(NUMBERS, _target(record, codes, NUMBERS), [record])
        other = replace(record, steps=np.array([4095 * 2.0**exponent]))
        program = replace(parts, records=programs.code([other], record.length, 0)).encode()
        target = bytes(run(programs.reader_of(NUMBERS), program, 0, record.length))
        delta = programs.delta(NUMBERS, target, program)
        yield Made(f"stepped-{name}", about, NUMBERS, delta, target)
