"""Invalid vectors of records: factors and offsets, codes of four bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors.bad_programs import SIZE, bad, field_of, tampered
from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.programs import Parts
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES
from edge_tests.conformance.vectors.valid_affine import line
from edge_tests.conformance.vectors.valid_programs import level
from updater.delta.program import body
from updater.delta.program import records as ops
from updater.delta.program.arithmetic import Coder
from updater.delta.program.records import EXCEPTIONS, POOL, Record


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


def codes() -> Iterator[Made]:
    """Codes of four bits beyond what they may be."""
    record = Record(ops.CODES, ops.I4, 0, 2 * SIZE - 1, base=0)
    count = lambda value: value + 2  # noqa: E731
    yield bad(
        "nibble-count-over",
        "Codes of four bits that end one byte behind the target.",
        tampered([record], field_of("number", "count", count)),
    )
    beyond = replace(record, count=9, base=len(NUMBERS) - 4)
    plain = lambda _sent, _context, value: value  # noqa: E731
    yield bad(
        "nibble-base-beyond", "Codes of which the last lies behind the base.", tampered([beyond], plain)
    )
    listed = replace(record, count=20, residual=EXCEPTIONS, exceptions=[(3, 7)])
    over = field_of("plain", "value", lambda _: 32)  # 16, folded
    yield bad("nibble-exception-over", "An exception of more than four bits.", tampered([listed], over))
    scale = Record(ops.PEAK, ops.F32, 0, 6, base=PLACES["clean"].at, two=8)
    zeros = Record(ops.ZEROS, ops.U4, 24, 6, base=PLACES["clean"].at, two=8, one=0)
    refer = Record(ops.REFER, ops.U8, 40, 6, one=1)
    yield bad("nibble-reference", "A reference to zero points.", tampered([scale, zeros, refer], plain))
    signed = replace(zeros, dtype=ops.I8)
    refer = replace(refer, dtype=ops.I8)
    yield bad("nibble-reference-bytes", "A reference to zero points of its own type.",
              tampered([scale, signed, refer], plain))  # fmt: skip


def made() -> Iterator[Made]:
    """All of this module."""
    yield from gains()
    yield from codes()
