"""Invalid vectors of programs: heads and records. `bad_pools` has the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import build, programs
from edge_tests.conformance.vectors.build import INVALID, LIMIT, Made
from edge_tests.conformance.vectors.programs import Parts, Tamper
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES
from edge_tests.conformance.vectors.valid_programs import level
from updater import limits
from updater.delta.program import body
from updater.delta.program import records as ops
from updater.delta.program.arithmetic import Coder
from updater.delta.program.records import EXACT, EXCEPTIONS, POOL, SPARSE, Record

REFUSED = (LIMIT,)
SIZE = 400


def bad(
    name: str,
    about: str,
    program: bytes,
    errors: Sequence[str] = (INVALID,),
    *,
    features: Sequence[str] = ("program",),
) -> Made:
    data = programs.delta(NUMBERS, NUMBERS[:SIZE], program, features)
    return Made(name, about, NUMBERS, data, None, tuple(errors))


def copying() -> Parts:
    """A sound program: two arrays of the base and the bytes between."""
    records = [Record(ops.SAME, ops.F32, 8, 10, base=8), Record(ops.SAME, ops.U8, 60, 300, base=60)]
    return programs.encode(NUMBERS, NUMBERS[:SIZE], records)


def pooled() -> tuple[Parts, bytes]:
    """A sound program with codes in a pool, and its target."""
    target = bytes(byte + at % 3 & 255 for at, byte in enumerate(NUMBERS[:SIZE]))
    record = Record(ops.CODES, ops.U8, 0, SIZE, 20, 0, residual=POOL, activity=level([2]))
    return programs.encode(NUMBERS, target, [record]), target


def heads() -> Iterator[Made]:
    """Heads, and what they cut the rest into."""
    good = copying()
    yield bad(
        "program-unnamed",
        "A program, though the header does not name the feature.",
        good.encode(),
        features=(),
    )
    whole = good.encode()
    yield bad("program-empty-body", "A program of one byte.", b"\0")
    yield bad("program-cut-head", "A program that ends inside its head.", whole[:2])
    yield bad(
        "program-cut-records", "A program that ends inside its records.", whole[: 6 + len(good.records) // 2]
    )
    yield bad(
        "program-records-beyond",
        "Records longer than the program.",
        replace(good, record_bytes=5000).encode(),
    )
    yield bad(
        "program-records-huge",
        "Records of 2^64 - 1 bytes.",
        replace(good, record_bytes=(1 << 64) - 1).encode(),
    )
    yield bad(
        "program-window-over-limit",
        "A window over its limit.",
        replace(good, window=(0, limits.MAX_WINDOW_BYTES + 1)).encode(),
        REFUSED,
    )
    frame = bytes([programs.ZSTD]) + build.frame(bytes(60), NUMBERS[:100])
    yield bad(
        "program-window-beyond",
        "A window beyond the base.",
        replace(good, window=(0, len(NUMBERS) + 1), frame=frame).encode(),
    )
    yield bad(
        "program-window-before",
        "A window before the base.",
        replace(good, window=(-1, 100), frame=frame).encode(),
    )
    spare, _ = pooled()
    yield bad(
        "program-pool-unused",
        "A pool that no record takes from.",
        replace(good, tables=spare.tables, raw_sizes=spare.raw_sizes, stream=spare.stream).encode(),
    )
    yield bad("program-pool-unknown", "Bit 7 of the mask of pools.", replace(good, mask=0x80).encode())
    twice = build.program(1, len(whole), SIZE) * 2
    data = build.payload(twice, build.zstd(whole * 2))
    yield Made(
        "program-twice",
        "Two programs in a block.",
        NUMBERS,
        build.one_block(NUMBERS, NUMBERS[:SIZE] * 2, data, ("program",)),
        None,
        (INVALID,),
    )
    short = build.payload(build.program(1, len(whole), SIZE), build.raw(whole[:-1]))
    yield Made(
        "program-beyond-stream",
        "A program longer than its stream.",
        NUMBERS,
        build.one_block(NUMBERS, NUMBERS[:SIZE], short, ("program",)),
        None,
        (INVALID,),
    )
    long = build.payload(build.program(1, len(whole), SIZE + 1), build.raw(whole))
    yield Made(
        "program-too-long",
        "A program that writes more than its block has left.",
        NUMBERS,
        build.one_block(NUMBERS, NUMBERS[:SIZE], long, ("program",)),
        None,
        (INVALID,),
    )


def field_of(kind: str, name: str, change: Callable[[int], int], which: int = 0) -> Tamper:
    """Changes the value that is sent in a context of this name, the `which`-th time."""
    seen = 0

    def tamper(sent: str, context: object, value: int) -> int:
        nonlocal seen
        found = (
            context[:2] == ("number", name)
            if isinstance(context, tuple) and kind == "number"
            else (context == name or (isinstance(context, tuple) and context[0] == name))
        )
        if not found or sent == "bit":
            return value
        seen += 1
        return change(value) if seen == which + 1 else value

    return tamper


def tampered(records: Sequence[Record], tamper: Tamper, **changes: object) -> bytes:
    coded = programs.code(records, SIZE, 0, tamper)
    left = SIZE - sum(record.length for record in records)
    parts = Parts(coded, frame=b"\0" + bytes(max(0, left)))
    return replace(parts, **changes).encode()  # type: ignore[arg-type]


def records() -> Iterator[Made]:
    """Records that say what they must not."""
    first = Record(ops.SAME, ops.U8, 3, 100, base=50)
    second = Record(ops.SAME, ops.U8, 150, 200, base=70)
    pair = [first, second]

    def of(
        name: str, about: str, field: str, change: Callable[[int], int], which: int = 0, kind: str = "number"
    ) -> Made:
        return bad(name, about, tampered(pair, field_of(kind, field, change, which)))

    yield of("record-count-0", "A record of no elements.", "count", lambda value: value - 100)
    yield of("record-count-huge", "A record of 2^40 elements.", "count", lambda value: value + (1 << 40))
    yield of(
        "record-beyond",
        "A record that ends one byte behind the target.",
        "count",
        lambda value: value + 51,
        1,
    )
    yield of(
        "record-gap-negative", "A record that overlaps the one before it.", "gap", lambda value: value - 48, 1
    )
    yield of(
        "record-gap-huge", "A record behind a gap of 2^40 bytes.", "gap", lambda value: value + (1 << 40)
    )
    yield of("record-base-before", "A record that reads before the base.", "base", lambda value: value - 51)
    yield of(
        "record-base-beyond",
        "A record that reads beyond the base.",
        "base",
        lambda value: value + len(NUMBERS),
    )
    yield of("record-base-huge", "A record that reads at 2^60.", "base", lambda value: value + (1 << 60))
    yield of("record-rows-odd", "Rows that do not divide the elements.", "rows", lambda value: value + 2)
    yield of("record-rows-negative", "Rows below one.", "rows", lambda value: value - 3)
    over = field_of("plain", "records", lambda _: limits.MAX_INSTRUCTIONS + 1)
    yield bad("records-over-limit", "More records than a program may have.", tampered(pair, over), (LIMIT,))
    over = field_of("number", "base", lambda value: value + limits.MAX_RECORD_NUMBER)
    yield bad("record-number-over-limit", "A place in the base over 2^62.", tampered(pair, over), (LIMIT,))
    yield of(
        "records-missing", "A record more than there are.", "records", lambda value: value + 1, kind="plain"
    )
    yield bad(
        "records-endless",
        "Records that do not end: an integer of more than 64 bits.",
        Parts((b"\0" * 40, b""), frame=b"\0" + bytes(SIZE)).encode(),
    )
    yield bad("record-operation-unknown", "An operation without a meaning.", _symbol(pair, "op", 0b11111))
    yield bad("record-type-unknown", "An element type without a meaning.", _symbol(pair, "dtype", 0b111))
    yield bad("record-type-wrong", "A product of codes.", _symbol(pair, "op", ops.PRODUCT))
    yield bad("step-of-codes", "Steps on codes.", _symbol(pair, "op", ops.STEPPED))
    yield from _references()
    yield from _residuals()
    yield from _steps()


def _symbol(pair: Sequence[Record], field: str, value: int) -> bytes:
    """Records whose first operation or element type is sent as another symbol."""

    class Coded(Coder):
        at = 0

        def bit(self, context: object, bit: int = 0) -> int:
            size = 5 if field == "op" else 3
            if (
                isinstance(context, tuple)
                and isinstance(context[0], tuple)
                and context[0][0] == field
                and self.at < size
            ):
                sent = value >> (size - 1 - self.at) & 1
                self.at += 1
                # The tree's models follow what is sent.
                prefix = 1 << (self.at - 1) | value >> (size - self.at + 1)
                super().bit((context[0], prefix), sent)
                return bit
            return super().bit(context, bit)

    coder = Coded(limit=body.RECORD_LIMIT)
    ops.code_records(coder, list(pair), SIZE, 0, ops.RowBits(), ops.Share(SIZE))
    return Parts((coder.finish(), b""), frame=b"\0" + bytes(SIZE)).encode()


def _references() -> Iterator[Made]:
    scales = Record(ops.SAME, ops.F32, 0, 8, base=PLACES["scales"].at)
    refer = Record(ops.REFER, ops.F32, 64, 8, one=0)
    either = (INVALID, LIMIT)  # a decoder may see the circle or count how far it leads

    def of(name: str, about: str, found: Sequence[Record], *errors: str) -> Made:
        return bad(name, about, tampered(found, lambda _sent, _context, value: value), errors or (INVALID,))

    yield of(
        "reference-forward", "A record that refers to one that is not there.", [scales, replace(refer, one=2)]
    )
    yield of("reference-before", "A record that refers before the first.", [scales, replace(refer, one=-1)])
    yield of("reference-itself", "A record that refers to itself.", [scales, replace(refer, one=1)], *either)
    circle = [replace(refer, one=1, at=0), replace(refer, one=0, at=64)]
    yield of("reference-circle", "Two records that refer to each other.", circle, *either)
    chain = [
        replace(scales, count=1),
        *(Record(ops.REFER, ops.F32, 4 * at, 1, one=at + 1) for at in range(1, 90)),
        Record(ops.GIVEN, ops.F32, 360, 1, words=[7]),
    ]
    yield of("reference-chain", "A chain of references longer than allowed.", chain, LIMIT)
    codes = Record(ops.SAME, ops.U8, 0, 8, base=0)
    yield of("reference-type", "A record that refers to one of another type.", [codes, refer])
    yield of(
        "reference-count", "A record that refers to one of another count.", [scales, replace(refer, count=7)]
    )
    late = Record(ops.CODES, ops.U8, 0, 8, base=0)
    yield of(
        "reference-late",
        "A record that refers to codes, which are not known by then.",
        [late, replace(refer, dtype=ops.U8)],
    )
    bytes_ = Record(ops.SAME, ops.U8, 0, 1, base=0)
    quantised = Record(ops.QUANTISED, ops.I8, 40, 192, 1, PLACES["weights"].at, one=0)
    yield of("scales-of-bytes", "Scales that are no floats.", [bytes_, quantised])
    yield of("scales-count", "Other scales than channels.", [scales, replace(quantised, rows=12)])
    bias = Record(ops.BIAS, ops.I32, 40, 16, 1, PLACES["clean"].at, one=0)
    yield of("scales-bias", "Other scales than biases.", [scales, bias])
    product = Record(ops.PRODUCT, ops.F32, 64, 12, one=0, two=0)
    yield of("product-count", "A product of another count than its operands.", [scales, product])
    itself = Record(ops.SELF, ops.U8, 100, 50, base=60)
    yield of("self-overlapping", "A copy of itself that overlaps what it writes.", [itself])
    yield of("self-forward", "A copy of what is not written yet.", [replace(itself, base=200)])
    yield of("self-before", "A copy of what lies before the range.", [replace(itself, base=-1)])
    reduced = Record(ops.PEAK, ops.F32, 0, 8, base=PLACES["clean"].at, two=12)
    yield of("reduce-beyond", "A row that ends behind the base.", [replace(reduced, two=100)])
    yield bad(
        "reduce-nothing",
        "A peak of no numbers.",
        tampered([reduced], field_of("number", "two", lambda value: value - 12)),
    )
    yield bad(
        "reduce-huge",
        "A peak of 2^40 numbers.",
        tampered([reduced], field_of("number", "two", lambda value: value + (1 << 40))),
    )
    words = [Record(ops.GIVEN, ops.F32, 0, SIZE, words=[0] * SIZE)] * 2
    yield of(
        "decisions-over-limit", "Records of more decisions than a range of 400 bytes allows.", words, LIMIT
    )
    many = [replace(reduced, at=4 * at, count=1, two=192) for at in range(99)]
    yield of(
        "operands-over-budget", "Records that read more of the base than their program may.", many, LIMIT
    )


def _residuals() -> Iterator[Made]:
    codes = Record(ops.CODES, ops.U8, 0, 192, 12, 0, residual=EXCEPTIONS, exceptions=[(5, 1), (190, 1)])
    plain = "plain"

    def of(name: str, about: str, record: Record, tamper: Tamper) -> Made:
        return bad(name, about, tampered([record], tamper))

    yield of(
        "exception-beyond",
        "An exception behind its record.",
        codes,
        field_of(plain, "place", lambda value: value + 2, 1),
    )
    yield of("exceptions-huge", "2^40 exceptions.", codes, field_of(plain, "exceptions", lambda _: 1 << 40))
    pruned = Record(ops.PRUNED, ops.F32, 0, 96, 1, 0, zero=5)
    over = lambda value: value + (1 << 31)  # noqa: E731
    yield of("threshold-over", "A threshold over 2^31.", pruned, field_of("number", "zero", over))
    shifted = replace(codes, residual=EXACT, exceptions=[], zero=3, base_zero=3)
    yield of(
        "code-zero-over",
        "A zero point of codes over its limit.",
        shifted,
        field_of("number", "zero", lambda value: value + 600),
    )
    gained = replace(shifted, gain_bits=9, gains=np.full(12, 500))
    yield of(
        "gain-over",
        "A gain over its limit.",
        gained,
        field_of(plain, "gain", lambda value: value + ops.MAX_GAIN + 1),
    )
    sparse = Record(ops.CODES, ops.U8, 0, 192, 12, 0, residual=SPARSE, changed=2, used=np.arange(12) < 3)
    yield of("changes-over", "More changes than elements.", sparse, field_of(plain, "changed", lambda _: 193))
    yield of("used-rows-over", "More used rows than rows.", sparse, field_of(plain, "used", lambda _: 13))
    yield of("used-rows-0", "No used row.", sparse, field_of(plain, "used", lambda _: 0))
    yield of(
        "used-rows-zeros", "Gaps longer than the rows.", sparse, field_of(plain, "row zeros", lambda _: 13)
    )
    yield of(
        "used-rows-width",
        "Gaps of 33 low bits.",
        replace(sparse, used=np.arange(12) > 10, changed=1),
        field_of("number", "row bits", lambda _: 33),
    )
    last = replace(sparse, used=np.arange(12) > 9, changed=2)
    coded, bits = programs.code([last], SIZE, 0)
    left = b"\0" + bytes(SIZE - 192)
    for name, about, rows in (
        ("cut", "Bits of rows that end early.", b""),
        ("left", "Bits of rows that nothing takes.", bits + b"\0"),
        ("fewer", "Bits of rows that name fewer than the record says.", bytes([bits[0] & 0xF7])),
    ):
        yield bad(f"used-rows-{name}", about, Parts((coded, rows), frame=left).encode())
    pooled = replace(codes, residual=POOL, exceptions=[], activity=level([4]))
    yield of(
        "pool-missing",
        "A record that takes from a pool that is not there.",
        pooled,
        lambda _sent, _context, value: value,
    )
    yield of(
        "activity-over",
        "An activity level out of its range.",
        pooled,
        field_of(plain, "level", lambda value: value + (1 << 12) + 1),
    )
    unbounded = replace(pooled, activity=level([0] * 12, [0] * 16))
    yield of(
        "activity-sum-over",
        "Levels that leave their range step by step.",
        unbounded,
        field_of(plain, "level", lambda _: -(1 << 20), 5),
    )


def _steps() -> Iterator[Made]:
    at, one = PLACES["clean"].at, np.array([3000 * 2.0**-20])
    record = Record(ops.STEPPED, ops.F32, 0, 96, 12, at, by_rows=False, steps=one, residual=POOL,
                    activity=level([4]))  # fmt: skip
    for name, exponent in (("over", 201), ("under", -201)):
        tamper = field_of("plain", "step", lambda value, to=exponent: to * 2048)  # type: ignore[misc]
        yield bad(f"step-{name}", f"A step of 2^{exponent} and more bits.", tampered([record], tamper))

    def exact(sent: str, context: object, value: int) -> int:
        return 0 if sent == "bit" and context == (("residual", ops.STEPPED), 1) else value

    yield bad("step-without-pool", "Steps without codes.", tampered([record], exact))
    stray = replace(record, exceptions=[(95, 1)])
    beyond = field_of("plain", "place", lambda value: value + 1)
    yield bad("step-exception-beyond", "An exception behind its record.", tampered([stray], beyond))


def made() -> Iterator[Made]:
    """All of this module."""
    yield from heads()
    yield from records()
