"""Crafted deltas that together use every part of the format, in groups of what they are about."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from edge_tests.conformance import crafted
from edge_tests.conformance.crafted import Case
from updater.delta.instructions import DENSE, DIFFERENCE, PLAIN, REQUANTISE, SPARSE
from updater.delta.program import affine, records
from updater.delta.program.affine import Affine
from updater.delta.program.records import Record

ROWS, COLUMNS = 64, 82
COUNT = ROWS * COLUMNS
TEXT = b"".join(b"node %d of a graph, weight %d; " % (number, number * 7 % 13) for number in range(90))
SPECIALS = [0x7FC00001, 0xFF800001, 0x7F800000, 0xFF800000, 0x80000000, 0, 0x00000001, 0x807FFFFF, 0x33D6BF94]
SPECIALS += [0x461C4001, 0x7F7FFFFF, 0x33000000, 0x33000001, 0x387FE000, 0x477FF000, 0x38800000, 0x3F801000]


def base_of() -> tuple[bytes, dict[str, int]]:
    """A base with arrays of every kind, and where they begin."""
    random = np.random.default_rng(11)
    weights = random.normal(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)
    special = weights[:2].copy()
    special.view(np.uint32).reshape(-1)[: len(SPECIALS)] = SPECIALS
    scales = (np.abs(weights).max(axis=1) / np.float32(127)).astype(np.float32)
    odd = scales.copy()
    odd.view(np.uint32)[:8] = [0, 0x80000000, 0x7FC00000, 0x7F800000, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF]
    parts = {
        "text": TEXT,
        "weights": weights.tobytes(),
        "special": special.tobytes(),
        "scales": scales.tobytes(),
        "columns": (np.abs(weights).max(axis=0) / np.float32(100)).astype(np.float32).tobytes(),
        "odd": odd.tobytes(),
        "halves": weights.astype(np.float16).tobytes(),
        "codes": random.integers(-100, 100, COUNT).astype(np.int8).tobytes(),
        "ints": random.integers(-(1 << 31), 1 << 31, COUNT).astype(np.int32).tobytes(),
    }
    out, places = b"", {}
    for name, part in parts.items():
        places[name] = len(out)
        out += part
    return out, places


BASE, AT = base_of()
F32, I8, U8, I32, I64, F16, BF16 = range(7)


def same(count: int, place: str, dtype: int = F32) -> Record:
    return Record(records.SAME, dtype, 0, count, base=AT[place])


def matrix(op: int, dtype: int, place: str, residual: int, **fields: object) -> Record:
    given = {"rows": ROWS, **fields}
    return Record(op, dtype, 0, COUNT, base=AT[place], residual=residual, **given)  # type: ignore[arg-type]


def gains(digits: int, size: int) -> dict[str, object]:
    values = (1 << digits) + np.arange(size) % 9 - 4
    values[0], values[-1] = -3, 1 << 15
    return {"gain_bits": digits, "gains": values.astype(np.int64), "by_rows": size == ROWS}


def affine_of(digits: int, size: int) -> Affine:
    values = np.random.default_rng(digits).normal(1, 0.5, (2, size))
    values[0, ::7], values[1, ::5] = 1, 0
    values[:, 3] = 2.0**-126, 3e38
    factors = affine.rounded(values[0], digits, affine.NEUTRAL_FACTOR)
    return Affine(digits, factors, affine.rounded(values[1] - 1, digits, affine.NEUTRAL_OFFSET))


def following() -> Iterator[Case]:
    words = [0x3C000000 + 7 * number for number in range(ROWS)]
    items = [
        Record(records.GIVEN, F32, 0, ROWS, base=AT["text"], words=words),
        same(ROWS, "scales"),
        same(ROWS, "odd"),
        same(1, "columns"),
        *(same(30, "codes", dtype) for dtype in (I8, U8, I32, I64, F16, BF16)),
        Record(records.REFER, F32, 0, ROWS, base=-1, one=2),
        Record(records.REFER, F32, 0, ROWS, base=AT["odd"], one=0),
    ]
    first = len(items)
    for op in (records.PRODUCT, records.PEAKED, records.RANGED):
        items.append(Record(op, F32, 0, ROWS, base=-1, one=2, two=1))
        items.append(Record(op, F32, 0, ROWS, base=-1, one=3, two=2))
    items.append(Record(records.PRODUCT, F32, 0, ROWS, base=AT["odd"], one=first, two=first + 1))
    for op in (records.PEAK, records.LOWEST, records.HIGHEST):
        for rows, place, count, two in ((True, "weights", ROWS, COLUMNS), (False, "weights", COLUMNS, ROWS),
                                        (True, "special", 1, 17), (True, "special", 17, 1)):  # fmt: skip
            items.append(Record(op, F32, 0, count, base=AT[place], two=two, by_rows=rows))
    items += [Record(records.SELF, I8, 0, 200, base=60), Record(records.SELF, I64, 0, 5, base=0)]
    for way in range(4):
        yield crafted.program_case(f"following {way}", BASE, items, TEXT[300:700], way, way)


def quantised() -> Iterator[Case]:
    for number, residual in enumerate((records.EXACT, records.EXCEPTIONS, records.POOL, records.SPARSE)):
        items = [same(ROWS, "scales"), same(1, "columns"), same(COLUMNS, "columns"), same(ROWS, "odd")]
        for dtype, one, rows, zero in (
            (I8, 0, True, 0), (U8, 1, True, 128), (I8, 2, False, 3), (I8, 3, True, -128), (U8, 3, True, 0),
        ):  # fmt: skip
            items.append(
                matrix(records.QUANTISED, dtype, "weights", residual, one=one, by_rows=rows, zero=zero)
            )
        specials = Record(records.QUANTISED, U8, 0, 2 * COLUMNS, base=AT["special"], one=1, zero=9)
        items.append(specials)
        yield crafted.program_case(f"quantised {residual}", BASE, items, b"", number, number)


def integers() -> Iterator[Case]:
    for number, residual in enumerate((records.EXACT, records.EXCEPTIONS, records.POOL)):
        items = [same(1, "columns"), same(ROWS, "odd"), same(1, "odd")]
        for one, count, place in ((0, 164, "special"), (1, ROWS, "special"), (2, ROWS, "weights")):
            items.append(Record(records.BIAS, I32, 0, count, base=AT[place], one=one, residual=residual))
        for one, count, old in ((0, COUNT, "scales"), (1, ROWS, "scales"), (1, ROWS, "special")):
            items.append(
                Record(
                    records.RESCALED, I32, 0, count, base=AT["ints"], one=one, two=AT[old], residual=residual
                )
            )
        yield crafted.program_case(f"integers {residual}", BASE, items, TEXT[7:900], 3 - number, number)


def floats() -> Iterator[Case]:
    pool = records.POOL
    items = [
        matrix(records.FLOAT, F32, "weights", pool),
        Record(records.FLOAT, F32, 0, 2 * COLUMNS, 2, base=AT["special"], residual=pool),
        matrix(records.FLOAT, F16, "halves", pool, rows=1),
        matrix(records.FLOAT, BF16, "halves", pool, rows=COUNT),
        matrix(records.FLOAT, F32, "weights", pool, rows=COLUMNS),
        Record(records.PLAIN, F32, 0, 900, 30, base=-1, residual=pool),
        Record(records.PLAIN, F32, 0, 41, 41, base=AT["weights"], residual=pool),
    ]
    items += [
        matrix(records.FLOAT, F32, "weights", pool, **gains(digits, size))
        for digits, size in ((7, ROWS), (9, COLUMNS), (11, ROWS), (14, COLUMNS))
    ]
    items += [
        matrix(records.FLOAT, F32, "weights", pool, by_rows=size == ROWS, affine=affine_of(digits, size))
        for digits, size in ((12, ROWS), (24, COLUMNS))
    ]
    special = gains(11, 2 * COLUMNS)
    items.append(
        Record(records.FLOAT, F32, 0, 2 * COLUMNS, 1, AT["special"], residual=pool, **special)  # type: ignore[arg-type]
    )
    for residual in (records.EXACT, records.EXCEPTIONS, pool):
        for zero in (0, 1):
            items.append(
                Record(records.CAST, F16, 0, 2 * COLUMNS, base=AT["special"], zero=zero, residual=residual)
            )
        items.append(Record(records.CAST, BF16, 0, 2 * COLUMNS, base=AT["special"], residual=residual))
    for residual, sign in ((records.EXACT, 0), (records.EXCEPTIONS, 1)):
        items.append(matrix(records.PRUNED, F32, "weights", residual, zero=0x3D000000, base_zero=sign))
    yield crafted.program_case("floats", BASE, items, TEXT[:500], 1, 1)


def codes() -> Iterator[Case]:
    for number, residual in enumerate((records.EXACT, records.EXCEPTIONS, records.POOL, records.SPARSE)):
        items = [
            matrix(records.CODES, I8, "codes", residual),
            matrix(records.CODES, U8, "codes", residual, zero=-20, base_zero=11),
            matrix(records.CODES, I8, "codes", residual, rows=1),
        ]
        for digits, size in ((7, COLUMNS), (9, ROWS), (11, COLUMNS), (14, ROWS)):
            zeros = {"zero": 4, "base_zero": -9}
            items.append(matrix(records.CODES, I8, "codes", residual, **zeros, **gains(digits, size)))
        if residual == records.SPARSE:
            items.append(matrix(records.CODES, I8, "codes", residual, used=np.ones(ROWS, dtype=bool)))
        yield crafted.program_case(f"codes {residual}", BASE, items, TEXT[::-1], number, number)


def layouts() -> Iterator[Case]:
    """Sources that are transposed, sliced, repeated or narrow."""
    pool, across = records.POOL, ((COLUMNS, 1), (ROWS, COLUMNS))
    sliced = ((16, 2 * COLUMNS), (1, 7), (2, 1), (20, 3))
    items = [
        same(COLUMNS, "columns"),
        matrix(records.SAME, F32, "weights", records.EXACT, axes=across),
        Record(records.SAME, I8, 0, 640, 16, base=AT["codes"], axes=sliced),
        Record(records.SAME, I64, 0, 90, 1, base=AT["text"], axes=((9, 0), (10, 2))),
        Record(records.SAME, F16, 0, 100, base=AT["halves"], axes=((100, 3),)),
        same(1, "columns"),
    ]
    for op in (records.PEAK, records.LOWEST, records.HIGHEST):
        for source, rows in ((F32, True), (F16, False), (BF16, True)):
            count, two = (COLUMNS, ROWS) if rows else (ROWS, COLUMNS)
            place = "weights" if source == F32 else "halves"
            given = {"two": two, "by_rows": rows, "source": source, "axes": across}
            items.append(Record(op, F32, 0, count, base=AT[place], **given))  # type: ignore[arg-type]
    for source in (F16, BF16):
        narrow = {"rows": COLUMNS, "source": source, "axes": across}
        plain = {"base": AT["special"], "source": source}
        items += [
            matrix(records.QUANTISED, I8, "halves", pool, one=0, **narrow),
            Record(records.BIAS, I32, 0, 300, one=5, residual=records.EXCEPTIONS, **plain)
            if source == BF16
            else Record(records.BIAS, I32, 0, COUNT, one=5, residual=pool, **plain),
            matrix(records.FLOAT, F32, "halves", pool, **narrow),
            matrix(records.FLOAT, F32, "halves", pool, **{**narrow, **gains(9, COLUMNS), "by_rows": True}),
            matrix(records.CAST, F32, "halves", records.EXCEPTIONS, **narrow),
            Record(records.CAST, F32, 0, 300, **plain),
            Record(records.CAST, F16, 0, 300, zero=1, residual=pool, **plain)
            if source == BF16
            else Record(records.CAST, BF16, 0, 300, axes=((30, 1), (10, 30)), **plain),
        ]
    items += [
        matrix(
            records.CODES,
            U8,
            "codes",
            pool,
            rows=COLUMNS,
            axes=across,
            **{**gains(7, COLUMNS), "by_rows": True},
        ),
        matrix(records.CODES, I8, "codes", records.SPARSE, rows=COLUMNS, axes=across),
        Record(
            records.RESCALED, I32, 0, COLUMNS, base=AT["ints"], one=0, two=AT["odd"], axes=((COLUMNS, 5),)
        ),
        matrix(records.FLOAT, F16, "halves", pool, rows=COLUMNS, axes=across),
    ]
    yield crafted.program_case("layouts", BASE, items, TEXT[:600], 1, 1)


def scaled() -> Iterator[Case]:
    """Scales and zero points worked out from weights, and channels of all kinds."""
    listed, across = records.EXCEPTIONS, ((COLUMNS, 1), (ROWS, COLUMNS))
    items = []
    for silent, residual in ((True, records.EXACT), (False, listed)):
        shared = {"base": AT["weights"], "silent": silent, "residual": residual}
        rows, columns = {"two": COLUMNS, **shared}, {"two": ROWS, "by_rows": False, **shared}
        first = len(items)
        items += [
            Record(records.SPANNED, F32, 0, ROWS, halves=510, **rows),  # type: ignore[arg-type]
            Record(records.SPANNED, F32, 0, COLUMNS, halves=255, **columns),  # type: ignore[arg-type]
            Record(records.PEAK, F32, 0, ROWS, halves=1, **rows),  # type: ignore[arg-type]
            Record(records.LOWEST, F32, 0, COLUMNS, axes=across, **{**rows, "two": ROWS}),  # type: ignore[arg-type]
            Record(records.HIGHEST, F32, 0, ROWS, **rows),  # type: ignore[arg-type]
            Record(records.ZEROS, I8, 0, ROWS, one=first, **rows),  # type: ignore[arg-type]
            Record(records.ZEROS, U8, 0, COLUMNS, one=first + 1, **columns),  # type: ignore[arg-type]
        ]
    special = {"base": AT["special"], "two": 1}
    items += [
        Record(records.SPANNED, F32, 0, 60, halves=1 << 17, **special),
        Record(records.PEAK, F32, 0, 60, halves=3, source=F16, **special),
        Record(records.ZEROS, U8, 0, ROWS, one=2, **special),
        Record(records.ZEROS, I8, 0, 60, one=len(items), source=BF16, **special),
        same(ROWS, "codes", I8),
        same(2 * COLUMNS, "scales"),
        same(COUNT + 9, "weights"),
    ]
    points, grouped, long = len(items) - 3, len(items) - 2, len(items) - 1
    for residual in (records.EXACT, listed, records.POOL, records.SPARSE):
        for one, zeros, fields in (
            (0, 5, {}),
            (0, points, {}),
            (1, 6, {"by_rows": False}),
            # Scales with exceptions move all codes, which a sparse residual would have to follow.
            (*((1, 6) if residual == records.SPARSE else (8, 13)), {"by_rows": False}),
            (0, None, {"rows": COUNT, "zero": 3}),
            (grouped, None, {"by_rows": False}),
            (long, None, {"rows": 1, "by_rows": False, "phase": 9}),
        ):
            given = {"one": one, **fields}
            if zeros is not None:
                given |= {"two": zeros, "zeros": True}
            items.append(
                matrix(records.QUANTISED, U8 if zeros in (6, 13) else I8, "weights", residual, **given)
            )
    yield crafted.program_case("scaled", BASE, items, TEXT[:50], 0, 1)


def partly() -> Iterator[Case]:
    """Pools that only some rows take from."""
    pool, used = records.POOL, {"used": np.ones(ROWS, dtype=bool)}
    items = [
        same(1, "columns"),
        matrix(records.FLOAT, F32, "weights", pool, **used),
        matrix(records.FLOAT, F16, "halves", pool, **used),
        matrix(records.FLOAT, F32, "weights", pool, **used, **gains(9, COLUMNS)),
        matrix(records.CODES, I8, "codes", pool, **used, **gains(7, ROWS)),
        matrix(records.CODES, U8, "codes", records.SPARSE, **used),
        matrix(records.QUANTISED, I8, "weights", pool, one=0, **used),
        matrix(records.CAST, BF16, "weights", pool, **used),
        matrix(records.BIAS, I32, "weights", pool, one=0, **used),
        Record(
            records.FLOAT, F32, 0, 3 * COLUMNS, 3, AT["weights"], residual=pool, used=np.ones(3, dtype=bool)
        ),
        Record(records.FLOAT, F32, 0, 9, 1, AT["weights"], residual=pool, used=np.ones(1, dtype=bool)),
    ]
    yield crafted.program_case("partly", BASE, items, TEXT[:99], 1, 1)


def zeroed() -> Iterator[Case]:
    """Pruned, thinned and masked arrays of all their types."""
    for number, residual in enumerate((records.EXACT, records.EXCEPTIONS)):
        items = []
        for dtype, place in ((F32, "weights"), (F16, "halves"), (BF16, "halves"), (I8, "codes")):
            sign = {"base_zero": number}
            limit = {F32: 0x3D000000, F16: 0x2A00, BF16: 0x2A00, I8: 40}[dtype]
            items.append(matrix(records.PRUNED, dtype, place, residual, zero=limit, **sign))
            for by_rows, group, keep in (
                (True, 2, 1),
                (False, 4, 2),
                (False, 64, 0),
                (True, 2, -1),
                (False, 8, 9),
            ):
                given = {"by_rows": by_rows, "group": group, "zero": keep, **sign}
                items.append(matrix(records.THINNED, dtype, place, residual, **given))
            for by_rows, size in ((True, ROWS), (False, COLUMNS)):
                given = {"by_rows": by_rows, "used": np.arange(size) % 7 == 3, **sign}
                items.append(matrix(records.MASKED, dtype, place, residual, **given))
        across = {"rows": COLUMNS, "axes": ((COLUMNS, 1), (ROWS, COLUMNS))}
        items.append(matrix(records.THINNED, F32, "weights", residual, group=32, zero=5, **across))
        items.append(Record(records.THINNED, F32, 0, 2 * COLUMNS, 2, AT["special"], group=2, zero=1))
        yield crafted.program_case(f"zeroed {residual}", BASE, items, TEXT[9:300], number, number)


def stepped() -> Iterator[Case]:
    """Steps for all rows or each, in rows that change, on numbers of every kind."""
    pool, used = records.POOL, {"used": np.ones(ROWS, dtype=bool)}
    rows = np.array([0.0 if row % 9 == 4 else (2048 + 31 * row) * 2.0**-22 for row in range(ROWS)])
    one, huge = np.array([3000 * 2.0**-20]), np.array([4095 * 2.0**110])
    items = []
    for dtype, place in ((F32, "weights"), (F16, "halves"), (BF16, "halves")):
        items += [
            matrix(records.STEPPED, dtype, place, pool, by_rows=False, steps=one),
            matrix(records.STEPPED, dtype, place, pool, steps=rows),
            matrix(records.STEPPED, dtype, place, pool, steps=rows, **used),
            matrix(records.STEPPED, dtype, place, pool, by_rows=False, steps=one, **used),
        ]
    special = {"base": AT["special"], "by_rows": False, "residual": pool}
    items += [
        Record(records.STEPPED, dtype, 0, 2 * COLUMNS, 2, steps=step, **special)  # type: ignore[arg-type]
        for dtype in (F32, F16, BF16)
        for step in (one, huge, np.array([2048 * 2.0**-160]), np.zeros(1))
    ]
    across = {"rows": COLUMNS, "axes": ((COLUMNS, 1), (ROWS, COLUMNS)), "by_rows": False}
    items.append(matrix(records.STEPPED, F32, "weights", pool, steps=one, **across))
    yield crafted.program_case("stepped", BASE, items, TEXT[:200], 1, 1)


def bytes_alone() -> Iterator[Case]:
    """Skeletons without records: text that moved, text that changed, and noise."""
    noise = np.random.default_rng(3).bytes(300)
    changed = bytearray(TEXT[:1200])
    changed[::37] = noise[: len(changed[::37])]
    numbers = np.arange(100, 160, dtype="<u4").tobytes()
    text = bytes(changed) + TEXT[1700:] + noise + TEXT[:400] + numbers + noise[:200]
    item = Record(records.SELF, I8, 0, 5, base=1)
    for way in range(5):
        yield crafted.program_case(f"bytes {way}", BASE, [item], text, way, way)
    yield crafted.program_case("bytes of a tiny base", bytes(52), [item], noise[:10], 3, 0)
    yield crafted.program_case("bytes along a tiny base", bytes(52), [item], noise[:10], 4, 0)


def tensors() -> Iterator[Case]:
    for number, predictor, coding in product(range(12), (PLAIN, DIFFERENCE, REQUANTISE), (DENSE, SPARSE)):
        if predictor != REQUANTISE or (number % 3 < 2 and number < 9):
            yield crafted.tensor_case(number, predictor, coding, number)
    yield crafted.stream_case()


GROUPS = (
    following,
    quantised,
    integers,
    floats,
    codes,
    layouts,
    scaled,
    partly,
    zeroed,
    stepped,
    bytes_alone,
    tensors,
)
