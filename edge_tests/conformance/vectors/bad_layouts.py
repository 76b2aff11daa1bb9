"""Invalid vectors of records that read the base in other layouts and precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors.bad_programs import bad, field_of, tampered
from edge_tests.conformance.vectors.build import INVALID, LIMIT, Made
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES
from updater import limits
from updater.delta.program import layout
from updater.delta.program import records as ops
from updater.delta.program.records import Record

_CLEAN = PLACES["clean"].at


def _sound(_sent: str, _context: object, value: int) -> int:
    return value


def made() -> Iterator[Made]:
    """All of this module."""

    def of(name: str, about: str, found: Sequence[Record], *errors: str) -> Made:
        return bad(name, about, tampered(found, _sound), errors or (INVALID,))

    def other(
        name: str,
        about: str,
        found: Sequence[Record],
        field: str,
        change: Callable[[int], int],
        which: int = 0,
    ) -> Made:
        return bad(name, about, tampered(found, field_of("number", field, change, which)))

    laid = Record(ops.SAME, ops.F32, 0, 60, 6, _CLEAN, axes=((6, 12), (10, 1)))
    yield other("axes-odd", "Axes that do not divide the elements.", [laid], "size", lambda value: value - 3)
    yield other("axes-0", "An axis of no elements.", [laid], "size", lambda value: value - 10)
    yield other("stride-negative", "A stride below zero.", [laid], "stride", lambda value: value - 13)
    over = layout.MAX_STRIDE + 1
    yield other("stride-over", "A stride over 2^40.", [laid], "stride", lambda value: value + over)
    beyond = (len(NUMBERS) - _CLEAN) // 4
    yield of("axes-beyond", "Axes that end behind the base.", [replace(laid, axes=((6, beyond), (10, 1)))])
    count, most = 100, limits.MAX_OPERAND_RUNS
    whole = Record(ops.PEAK, ops.F32, 0, count, base=0, two=-(-most // count) + 1, axes=((1, 1),))
    whole = replace(whole, axes=((count * whole.two, 1),))
    apart = field_of("number", "stride", lambda value: value + 1)
    yield bad("operand-runs-over-limit", "An operand in too many runs.", tampered([whole], apart), (LIMIT,))
    thin = Record(ops.THINNED, ops.F32, 0, 64, 4, _CLEAN, group=4, zero=2)
    odd = replace(thin, count=80, rows=4)
    yield bad("group-odd", "Groups that do not divide the rows.", tampered([odd], _sent_group(8)))
    yield bad("group-1", "Groups of one element.", tampered([thin], _sent_group(1)))
    mask = Record(ops.MASKED, ops.F32, 0, 64, 4, _CLEAN, used=np.arange(4) == 1)
    yield bad("mask-of-nothing", "No row is marked.", tampered([mask], _unmarked))
    peak = Record(ops.PEAK, ops.F32, 0, 4, base=_CLEAN, two=12, halves=255)
    yield other("halves-0", "A division by nothing.", [peak], "halves", lambda value: value - 255)
    yield other("halves-over", "A division by 2^20.", [peak], "halves", lambda value: value + (1 << 21))
    scales = Record(ops.SAME, ops.F32, 0, 16, base=PLACES["scales"].at)
    phase = Record(ops.QUANTISED, ops.I8, 64, 10, 1, _CLEAN, one=0, by_rows=False, phase=5)
    yield other(
        "phase-negative", "A first channel below zero.", [scales, phase], "phase", lambda value: value - 6
    )
    yield of("phase-beyond", "Channels behind the last scale.", [scales, replace(phase, phase=7)])
    silent = [replace(peak, count=90, two=1, silent=True)]
    about = "More values that are not written than a quarter of the target."
    yield other("silent-over", about, silent, "count", lambda value: value + 11)
    points = Record(ops.ZEROS, ops.U8, 64, 12, base=_CLEAN, two=16, one=0)
    yield of("zero-points-count", "Other zero points than scales.", [scales, points])
    codes = Record(ops.SAME, ops.U8, 64, 8, base=0)
    coded = Record(ops.QUANTISED, ops.U8, 80, 192, 16, _CLEAN, one=0, two=1, zeros=True)
    yield of("zero-points-other", "Codes with other zero points than scales.", [scales, codes, coded])
    floats = replace(codes, dtype=ops.F32, count=4, base=_CLEAN)
    yield of("zero-points-of-floats", "Zero points that are no codes.", [scales, floats, coded])
    cast = Record(ops.CAST, ops.F32, 0, 40, 1, _CLEAN, source=ops.F16)
    yield bad("cast-of-nothing", "A cast of float32 to float32.", tampered([cast], _wide))


def _sent_group(size: int) -> Callable[[str, object, int], int]:
    """Sends another group: three bits in a tree, whose models follow what is sent."""
    wanted, at = size.bit_length() - 1, 0

    def tamper(sent: str, context: object, value: int) -> int:
        nonlocal at
        if sent == "bit" and isinstance(context, tuple) and context[0] == "group":
            at += 1
            return wanted >> 3 - at & 1
        return value

    return tamper


def _unmarked(sent: str, context: object, value: int) -> int:
    return 0 if sent == "bit" and isinstance(context, tuple) and context[0] == "rows used" else value


def _wide(sent: str, context: object, value: int) -> int:
    return 0 if sent == "bit" and context == "narrow" else value
