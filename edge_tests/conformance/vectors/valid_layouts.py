"""Valid vectors of programs that read the base in other layouts and precisions, or make parts of it zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.samples import PLACES
from edge_tests.conformance.vectors.valid_programs import case, level, same, steps_of
from updater.delta.program import records as ops
from updater.delta.program.records import EXCEPTIONS, POOL, Record

_CLEAN, _WEIGHTS = PLACES["clean"].at, PLACES["weights"].at
_HALVES, _BRAINS, _CODES = PLACES["halves"].at, PLACES["brains"].at, PLACES["codes"].at
_NARROW = (("float16", ops.F16, _HALVES), ("bfloat16", ops.BF16, _BRAINS))


def sources() -> Iterator[Made]:
    """Floats of the base in 16 bits."""
    scales = same("scales")
    for name, kind, at in _NARROW:
        wide = Record(ops.CAST, ops.F32, 0, 192, 12, at, source=kind)
        yield case(f"source-{name}-widened", f"{name} widened, NaNs and subnormals among it.", [wide])
        yield case(
            f"source-{name}-exceptions",
            f"{name} widened, with exceptions.",
            [replace(wide, residual=EXCEPTIONS, exceptions=[(3, 1), (182, -2)])],
        )
        moved = Record(ops.FLOAT, ops.F32, 0, 192, 12, at, source=kind, residual=POOL, activity=level([-14]))
        yield case(
            f"source-{name}-float",
            f"Floats predicted from {name}.",
            [moved],
            change={0: steps_of(192, 2, 500)},
        )
        quantised = Record(ops.QUANTISED, ops.I8, 64, 192, 16, at, one=0, source=kind)
        yield case(f"source-{name}-quantised", f"Codes of weights in {name}.", [scales, quantised])
        bias = Record(ops.BIAS, ops.I32, 64, 16, 1, at, one=0, source=kind)
        yield case(f"source-{name}-bias", f"int32 biases of biases in {name}.", [scales, bias])
        reduced = [
            Record(op, ops.F32, 48 * place, 12, base=at, two=8, source=kind)
            for place, op in enumerate((ops.PEAK, ops.LOWEST, ops.HIGHEST, ops.SPANNED))
        ]
        yield case(f"source-{name}-reduced", f"Scales and limits of weights in {name}.", reduced)
    other = Record(ops.CAST, ops.F16, 0, 192, 12, _BRAINS, source=ops.BF16)
    yield case("source-bfloat16-to-float16", "bfloat16 cast to float16.", [other])
    other = Record(ops.CAST, ops.BF16, 0, 192, 12, _HALVES, source=ops.F16)
    yield case("source-float16-to-bfloat16", "float16 cast to bfloat16.", [other])


def layouts() -> Iterator[Made]:
    """Operands that do not lie one behind the other."""
    transposed = ((12, 1), (16, 12))
    leading = ((10, 16), (8, 1))
    for name, at, kind in (
        ("weights", _WEIGHTS, ops.F32),
        ("codes", _CODES, ops.I8),
        ("halves", _HALVES, ops.F16),
    ):
        moved = Record(ops.SAME, kind, 0, 192, 12, at, axes=transposed)
        yield case(f"layout-transposed-{name}", "A transposed matrix.", [moved])
        part = Record(ops.SAME, kind, 0, 80, 10, at, axes=leading)
        yield case(f"layout-columns-{name}", "The leading columns of a matrix.", [part])
    swapped = Record(ops.SAME, ops.U8, 0, 120, 6, 3, axes=((2, 60), (3, 4), (5, 12), (4, 1)))
    yield case("layout-four-axes", "Four axes, two of them exchanged, from an odd place.", [swapped])
    single = Record(ops.SAME, ops.F32, 0, 40, 1, _CLEAN, axes=((40, 3),))
    yield case("layout-stride", "Every third element.", [single])
    along = Record(ops.SAME, ops.F32, 0, 60, 5, _CLEAN, axes=((1, 7), (60, 1)))
    yield case("layout-one-step", "An axis of one element before one that lies in order.", [along])
    repeated = Record(ops.SAME, ops.F32, 0, 60, 5, _CLEAN, axes=((5, 0), (12, 1)))
    yield case("layout-repeated", "A row that is read again and again: a stride of 0.", [repeated])
    codes = Record(
        ops.CODES,
        ops.I8,
        0,
        192,
        12,
        _CODES,
        axes=transposed,
        zero=1,
        gain_bits=7,
        gains=np.arange(122, 134),
        residual=POOL,
        activity=level([2]),
    )
    yield case(
        "layout-codes", "Codes of a transposed matrix, with gains.", [codes], change={0: steps_of(192, 3)}
    )
    floats = Record(ops.FLOAT, ops.F32, 0, 80, 10, _CLEAN, axes=leading, residual=POOL, activity=level([-14]))
    yield case("layout-float", "Floats of leading columns.", [floats], change={0: steps_of(80, 3, 99)})
    cast = Record(ops.CAST, ops.BF16, 0, 192, 12, _WEIGHTS, axes=transposed)
    yield case("layout-cast", "A cast of a transposed matrix.", [cast])
    narrow = replace(cast, dtype=ops.F32, base=_HALVES, source=ops.F16)
    yield case("layout-widened", "float16 widened from a transposed matrix.", [narrow])
    scales = same("scales")
    quantised = Record(ops.QUANTISED, ops.I8, 64, 192, 16, _CLEAN, one=0, axes=((16, 1), (12, 16)))
    yield case("layout-quantised", "Codes of a transposed matrix.", [scales, quantised])
    for by_rows in (True, False):
        peak = Record(
            ops.PEAK,
            ops.F32,
            0,
            12,
            base=_CLEAN,
            two=16,
            by_rows=by_rows,
            axes=((12, 1), (16, 12)) if by_rows else ((16, 1), (12, 16)),
        )
        side = "rows" if by_rows else "columns"
        yield case(f"layout-peak-{side}", f"Peaks of a transposed matrix's {side}.", [peak])


def zeroing() -> Iterator[Made]:
    """Numbers that become zero."""
    kinds = (
        ("float32", ops.F32, _WEIGHTS),
        ("float16", ops.F16, _HALVES),
        ("bfloat16", ops.BF16, _BRAINS),
        ("int8", ops.I8, _CODES),
    )
    marked = np.zeros(12, dtype=bool)
    marked[[0, 5, 6, 11]] = True
    thresholds = {ops.F32: 0x3D000000, ops.F16: 0x2800, ops.BF16: 0x3D00, ops.I8: 40}
    for name, kind, at in kinds:
        record = Record(ops.MASKED, kind, 0, 192, 12, at, used=marked)
        yield case(f"zeroed-rows-{name}", f"Whole rows of {name} are zero.", [record])
        columns = np.arange(16) % 5 == 2
        record = replace(record, by_rows=False, used=columns, base_zero=1)
        yield case(f"zeroed-columns-{name}", f"Whole columns of {name} are zeros of their signs.", [record])
        for group, left in ((4, 2), (8, 1)):
            thinned = Record(ops.THINNED, kind, 0, 192, 12, at, group=group, zero=left)
            yield case(f"thinned-{left}-of-{group}-{name}", f"Of {group} in a row {left} stay.", [thinned])
        thinned = Record(ops.THINNED, kind, 0, 192, 12, at, by_rows=False, group=4, zero=2, base_zero=1)
        yield case(
            f"thinned-columns-{name}", "Of four in a column two stay; zeros keep their signs.", [thinned]
        )
        if kind != ops.F32:
            pruned = Record(ops.PRUNED, kind, 0, 192, 1, at, zero=thresholds[kind])
            yield case(f"pruned-{name}", f"Small numbers of {name} become zero.", [pruned])
    exceptions = Record(
        ops.PRUNED,
        ops.F32,
        0,
        192,
        1,
        _WEIGHTS,
        zero=thresholds[ops.F32],
        residual=EXCEPTIONS,
        exceptions=[(1, 5), (100, -7)],
    )
    yield case("pruned-exceptions", "Small numbers become zero, with exceptions.", [exceptions])
    ties = bytes([5, 251, 5, 251] * 4 + [128, 127, 128, 1] * 2)
    record = Record(ops.THINNED, ops.I8, 0, 24, 1, 0, group=4, zero=2)
    yield case("thinned-ties", "Of equal sizes the first stay; -128 is larger than 127.", [record], base=ties)
    keep = Record(ops.THINNED, ops.F32, 0, 192, 12, _CLEAN, group=4, zero=0)
    yield case("thinned-none", "No element stays.", [keep])


def following() -> Iterator[Made]:
    """Scales and zero points that follow from weights."""
    span = Record(ops.SPANNED, ops.F32, 0, 16, base=_CLEAN, two=12, halves=510)
    zeros = Record(ops.ZEROS, ops.U8, 64, 16, base=_CLEAN, two=12, one=0)
    quantised = Record(ops.QUANTISED, ops.U8, 80, 192, 16, _CLEAN, one=0, two=1, zeros=True)
    yield case("zero-points", "Scales, zero points and codes of asymmetric rows.", [span, zeros, quantised])
    signed = [span, replace(zeros, dtype=ops.I8), replace(quantised, dtype=ops.I8)]
    yield case("zero-points-int8", "The same with int8.", signed)
    wrong = replace(zeros, residual=EXCEPTIONS, exceptions=[(2, 1), (15, -1)])
    yield case("zero-points-exceptions", "Zero points of which two differ.", [span, wrong, quantised])
    silent = [replace(span, silent=True), replace(zeros, at=0, silent=True), replace(quantised, at=0)]
    yield case("silent", "Scales and zero points that are not written.", silent)
    peak = Record(ops.PEAK, ops.F32, 0, 16, base=_CLEAN, two=12, halves=255)
    yield case("peak-halves", "Peaks divided by 127.5.", [peak])
    inexact = replace(peak, residual=EXCEPTIONS, exceptions=[(0, -1), (9, 3)])
    yield case("peak-exceptions", "Peaks that are steps away.", [inexact])
    unsigned = np.array([-3, -2, -1, -0.5, 0.5, 1, 2, 3, -1, 0, 1, 2], dtype="<f4").tobytes()
    one_sided = Record(ops.SPANNED, ops.F32, 0, 3, base=0, two=4, halves=510)
    points = Record(ops.ZEROS, ops.U8, 12, 3, base=0, two=4, one=0)
    yield case(
        "span-one-sided", "Rows of one sign: zero is among the numbers.", [one_sided, points], base=unsigned
    )
    flat = Record(ops.SPANNED, ops.F32, 0, 2, base=0, two=4, halves=510)
    nothing = Record(ops.ZEROS, ops.I8, 8, 2, base=0, two=4, one=0)
    nan = np.array([0, 0, 0, 0, 1, np.nan, 2, 3], dtype="<f4").tobytes()
    yield case("span-nothing", "A row of zeros, and one with a NaN.", [flat, nothing], base=nan)
    scales = Record(ops.SAME, ops.F32, 0, 4, base=PLACES["scales"].at)
    again = Record(ops.QUANTISED, ops.I8, 16, 192, 12, _CLEAN, one=0)
    yield case("scales-again", "Scales that begin anew after four rows.", [scales, again])
    many = same("scales")
    grouped = Record(ops.QUANTISED, ops.I8, 64, 192, 48, _CLEAN, one=0, by_rows=False)
    yield case("scales-of-groups", "Scales by columns, others for each group of rows.", [many, grouped])
    phase = Record(ops.QUANTISED, ops.I8, 64, 10, 1, _CLEAN, one=0, by_rows=False, phase=5)
    yield case("scales-phase", "A row that begins with the sixth channel.", [many, phase])


def made() -> Iterator[Made]:
    """All of this module."""
    yield from sources()
    yield from layouts()
    yield from zeroing()
    yield from following()
