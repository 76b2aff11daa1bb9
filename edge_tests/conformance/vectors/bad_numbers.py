"""Invalid vectors of records: factors and offsets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors.bad_programs import SIZE, bad, field_of, tampered
from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.programs import Parts
from edge_tests.conformance.vectors.samples import PLACES
from edge_tests.conformance.vectors.valid_affine import line
from edge_tests.conformance.vectors.valid_programs import level
from updater.delta.program import body
from updater.delta.program import records as ops
from updater.delta.program.arithmetic import Coder
from updater.delta.program.records import POOL, Record


def gains() -> Iterator[Made]:
    """Factors and offsets out of their range, and precisions that are not known."""
    base = PLACES["clean"].at
    record = Record(ops.FLOAT, ops.F32, 0, 96, 12, base, residual=POOL, activity=level([-12]))
    affine = replace(record, affine=line(12, [1.5] * 12, [0.25] * 12))
    for name, about, step, which in (
        ("subnormal", "A factor with the exponent of subnormal numbers.", -200, 0),
        ("infinite", "A factor with the exponent of infinities.", 128, 3),
        ("offset-infinite", "An offset with the exponent of infinities.", 130, 12),
    ):
        exponent = field_of("plain", "exponent", lambda value, step=step: value + step, which)
        yield bad(f"factor-{name}", about, tampered([affine], exponent))
    codes = Record(ops.CODES, ops.U8, 0, 96, 12, 0, gain_bits=9, gains=np.full(12, 500))
    yield bad("factor-of-codes", "Codes with factors.", precision(codes, 5))
    yield bad("factor-unknown", "Gains of a precision that is not known.", precision(record, 7))


def precision(record: Record, index: int) -> bytes:
    """A record whose gains are said to be of another precision."""

    class Coded(Coder):
        at = 0

        def bit(self, context: object, bit: int = 0) -> int:
            if isinstance(context, tuple) and isinstance(context[0], tuple) and context[0][0] == "gain bits":
                sent = index >> (2 - self.at) & 1
                prefix = 1 << self.at | index >> (3 - self.at)
                self.at += 1
                super().bit((context[0], prefix), sent)
                return bit
            return super().bit(context, bit)

    coder = Coded(limit=body.RECORD_LIMIT)
    ops.code_records(coder, [record], SIZE, 0, ops.RowBits(), ops.Share(SIZE))
    return Parts((coder.finish(), b""), frame=b"\0" + bytes(SIZE - record.length)).encode()


def made() -> Iterator[Made]:
    """All of this module."""
    yield from gains()
