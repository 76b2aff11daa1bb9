"""Valid vectors of floats times factors plus offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.samples import PLACES
from edge_tests.conformance.vectors.valid_programs import case, level, steps_of
from updater.delta.program import records as ops
from updater.delta.program.affine import DIGITS, NEUTRAL_FACTOR, NEUTRAL_OFFSET, Affine, rounded
from updater.delta.program.records import POOL, Record


def line(digits: int, factors: Sequence[float], offsets: Sequence[float]) -> Affine:
    """Factors and offsets as they can be sent; an offset of 0 is neutral."""
    return Affine(
        digits,
        rounded(np.array(factors), digits, NEUTRAL_FACTOR),
        rounded(np.array(offsets), digits, NEUTRAL_OFFSET),
    )


def made() -> Iterator[Made]:
    """All of this module."""
    weights, clean = PLACES["weights"].at, PLACES["clean"].at
    record = Record(ops.FLOAT, ops.F32, 0, 96, 12, clean, residual=POOL, activity=level([-12]))
    steps = steps_of(96, 4, 2)
    for digits in DIGITS:
        for by_rows in (True, False):
            count = 12 if by_rows else 8
            factors = [1.0 if at % 3 == 0 else 1 + 0.123456789 * (at - 5) for at in range(count)]
            offsets = [0.0 if at % 4 == 1 else 0.0314159265 * (5 - at) for at in range(count)]
            yield case(
                f"program-float-affine-{digits}-{'rows' if by_rows else 'columns'}",
                f"Floats times factors plus offsets of {digits} bits, some of them neutral.",
                [replace(record, by_rows=by_rows, affine=line(digits, factors, offsets))],
                change={0: steps},
            )
    one = replace(record, rows=1, affine=line(24, [-0.9993], [0.0]))
    yield case("program-float-affine-one", "One factor below zero for all.", [one], change={0: steps})
    edges = line(
        12,
        [2.0**-125, 2.0**127, 1, 1, -1, 1e30, 1e-30, 1, 1, 1, 1, 1],
        [0, 0, 2.0**-126, 3e38, -3e38, 0, 1e-38, 0, 0, 0, 0, 1],
    )
    yield case(
        "program-float-affine-specials",
        "Products and sums that are subnormal, infinite or NaN; zeros of both signs plus nothing.",
        [replace(record, count=192, base=weights, affine=edges)],
        change={0: steps_of(192, 4, 2)},
    )
