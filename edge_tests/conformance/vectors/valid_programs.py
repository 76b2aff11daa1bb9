"""Valid vectors of programs: each operation, residual and pool. `valid_skeletons` has the rest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from edge_tests.conformance.vectors import programs
from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES, noise
from updater.delta.program import records as ops
from updater.delta.program.activity import Activity
from updater.delta.program.records import EXACT, EXCEPTIONS, POOL, SPARSE, Record

_TYPES = {
    "weights": ops.F32,
    "clean": ops.F32,
    "scales": ops.F32,
    "codes": ops.I8,
    "bytes": ops.U8,
    "biases": ops.I32,
    "longs": ops.I64,
    "halves": ops.F16,
    "brains": ops.BF16,
}


def level(rows: Sequence[int], columns: Sequence[int] = (0,)) -> Activity:
    """An activity."""
    return Activity(np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64))


def same(name: str, at: int = 0) -> Record:
    """An array of the base as it is."""
    place = PLACES[name]
    return Record(ops.SAME, _TYPES[name], at, place.count, base=place.at)


def case(
    name: str,
    about: str,
    records: Sequence[Record],
    *,
    length: int = 0,
    base: bytes = NUMBERS,
    change: Mapping[int, Sequence[int]] | None = None,
) -> Made:
    """A vector whose target is what the records predict, with words of record n changed by `change[n]`.

    Changes are added to the elements as integers of their width; records of pools take them up.
    """
    length = length or max(record.at + record.length for record in records)
    exact = [_exact(record) for record in records]
    target = bytearray(programs.settle(base, exact, noise(length, 9), length))
    for number, steps in (change or {}).items():
        record = records[number]
        width = ops.DTYPES[record.dtype].itemsize
        for index, step in enumerate(steps):
            at = record.at + index * width
            word = int.from_bytes(target[at : at + width], "little") + step
            target[at : at + width] = (word % (1 << 8 * width)).to_bytes(width, "little")
    program = programs.encode(base, bytes(target), records)
    return Made(name, about, base, programs.delta(base, bytes(target), program.encode()), bytes(target))


def _exact(record: Record) -> Record:
    """The record without a residual: floats, which always have one, as they are in the base."""
    if record.op in (ops.PLAIN, ops.FLOAT):
        place = PLACES["weights"].at if record.op == ops.PLAIN else record.base
        return Record(ops.SAME, record.dtype, record.at, record.count, base=place)
    if record.residual in (POOL, SPARSE):
        return replace(record, residual=EXACT, activity=None, used=np.empty(0, dtype=bool), changed=0)
    return record


def steps_of(count: int, seed: int, spread: int = 3, share: float = 1.0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(-spread, spread + 1) if draw.random() < share else 0 for _ in range(count)]


def predicted() -> Iterator[Made]:
    """Operations whose arrays follow exactly."""
    for name, dtype in _TYPES.items():
        if name != "clean":
            yield case(
                f"program-same-{name}", f"The operation same on an array of type {dtype}.", [same(name)]
            )
    weights, clean, scales = PLACES["weights"].at, PLACES["clean"].at, PLACES["scales"].at
    one = same("scales")
    refer = Record(ops.REFER, ops.F32, 64, 16, one=0)
    yield case("program-refer", "A record that refers to another.", [one, refer])
    product = Record(ops.PRODUCT, ops.F32, 128, 16, one=0, two=1)
    yield case("program-product", "A product of two records.", [one, refer, product])
    scalar = Record(ops.SAME, ops.F32, 64, 1, base=scales)
    product = Record(ops.PRODUCT, ops.F32, 68, 16, one=0, two=1)
    yield case("program-product-scalar", "A product of an array and one number.", [one, scalar, product])
    tiny = Record(ops.GIVEN, ops.F32, 0, 4, words=[0x00800000, 0x80800000, 0x7F800001, 0x00000001])
    small = Record(ops.GIVEN, ops.F32, 0, 4, words=[0x3F000000, 0x3F000000, 0x3F800000, 0x7F000000])
    product = Record(ops.PRODUCT, ops.F32, 0, 4, one=0, two=1)
    yield case("program-product-flushed", "Products that are subnormal or NaN.", [tiny, small, product])
    for by_rows in (True, False):
        side = "rows" if by_rows else "columns"
        yield case(
            f"program-reduce-{side}",
            f"Peak, lowest and highest number of {side}.",
            [
                Record(op, ops.F32, 64 * place, 16, base=clean, two=12, by_rows=by_rows)
                for place, op in enumerate((ops.PEAK, ops.LOWEST, ops.HIGHEST))
            ],
        )
    specials = [
        Record(op, ops.F32, 4 * place, 1, base=weights + 720, two=4)
        for place, op in enumerate((ops.LOWEST, ops.HIGHEST))
    ]
    yield case(
        "program-reduce-specials", "Lowest and highest among zeros of both signs and infinities.", specials
    )
    nans = [
        Record(op, ops.F32, 4 * place, 1, base=weights + 720, two=10)
        for place, op in enumerate((ops.PEAK, ops.LOWEST, ops.HIGHEST))
    ]
    yield case("program-reduce-nan", "A NaN among the numbers: all three become 7fc00000.", nans)
    low = Record(ops.LOWEST, ops.F32, 0, 16, base=clean, two=12)
    high = Record(ops.HIGHEST, ops.F32, 64, 16, base=clean, two=12)
    yield case(
        "program-peaked-ranged",
        "Scales from lowest and highest, symmetric and not.",
        [
            low,
            high,
            Record(ops.PEAKED, ops.F32, 128, 16, one=0, two=1),
            Record(ops.RANGED, ops.F32, 192, 16, one=0, two=1),
        ],
    )
    yield case(
        "program-self",
        "A copy of what the program wrote, also of the skeleton.",
        [
            same("scales", 10),
            Record(ops.SELF, ops.U8, 80, 60, base=3),
            Record(ops.SELF, ops.I32, 150, 4, base=90),
        ],
    )


def quantised() -> Iterator[Made]:
    """Operations that need scales."""
    weights, biases = PLACES["weights"].at, PLACES["biases"].at
    given = Record(ops.GIVEN, ops.F32, 0, 1, words=[0x3A83126F])  # 0.001
    shapes = (
        (
            "int8",
            Record(ops.QUANTISED, ops.I8, 0, 192, 1, weights, one=0),
            "int8, zero point 0: clamped to ±127",
        ),
        (
            "int8-zero",
            Record(ops.QUANTISED, ops.I8, 0, 192, 1, weights, one=0, zero=-3),
            "int8 with a zero point: down to -128",
        ),
        ("uint8", Record(ops.QUANTISED, ops.U8, 0, 192, 1, weights, one=0, zero=128), "uint8"),
    )
    for name, record, about in shapes:
        yield case(
            f"program-quantised-{name}", f"Weights quantised to {about}; NaNs become 0.", [given, record]
        )
    scales = same("scales")
    for by_rows in (True, False):
        rows = 16 if by_rows else 12
        record = Record(ops.QUANTISED, ops.I8, 64, 192, rows, weights, one=0, by_rows=by_rows)
        side = "rows" if by_rows else "columns"
        yield case(
            f"program-quantised-{side}",
            f"Weights quantised with a scale for each of the {side}.",
            [scales, record],
        )
    zero = Record(ops.GIVEN, ops.F32, 0, 1, words=[0])
    record = Record(ops.QUANTISED, ops.I8, 0, 192, 1, weights, one=0)
    yield case("program-quantised-scale-0", "A scale of zero divides by one.", [zero, record])
    record = Record(ops.BIAS, ops.I32, 64, 16, 1, PLACES["clean"].at, one=0)
    yield case("program-bias", "int32 biases of float32 ones, a scale each.", [scales, record])
    tiny = Record(ops.GIVEN, ops.F32, 0, 1, words=[0x2B8CBCCC])  # 1e-12
    record = Record(ops.BIAS, ops.I32, 0, 192, 1, weights, one=0)
    yield case(
        "program-bias-clamped", "One scale for biases beyond 32 bits, infinities and NaNs.", [tiny, record]
    )
    moved = Record(ops.PRODUCT, ops.F32, 64, 16, one=0, two=0)
    record = Record(ops.RESCALED, ops.I32, 128, 16, 1, biases, one=1, two=PLACES["scales"].at)
    yield case("program-rescaled", "int32 biases at new scales.", [scales, moved, record])
    record = Record(
        ops.QUANTISED,
        ops.I8,
        64,
        192,
        16,
        weights,
        one=0,
        residual=EXCEPTIONS,
        exceptions=[(0, 1), (7, -3), (191, 200)],
    )
    yield case("program-exceptions", "Three codes that differ, one modulo 256.", [scales, record])
    record = Record(
        ops.BIAS, ops.I32, 64, 16, 1, PLACES["clean"].at, one=0, residual=EXCEPTIONS, exceptions=[(2, -70000)]
    )
    yield case("program-bias-exception", "A bias that differs.", [scales, record])
    record = replace(record, residual=POOL, activity=level([5], range(-2, 14)), exceptions=[], rows=1)
    yield case(
        "program-bias-pool",
        "Biases with residuals in the pool wide.",
        [scales, record],
        change={1: steps_of(16, 3, 90)},
    )


def coded() -> Iterator[Made]:
    """8-bit codes with gains, sparse and pooled residuals."""
    for name, dtype in (("codes", ops.I8), ("bytes", ops.U8)):
        at = PLACES[name].at
        plain = Record(ops.CODES, dtype, 0, 192, 12, at, residual=POOL, activity=level([2]))
        steps = steps_of(192, 5)
        yield case(
            f"program-codes-{name}",
            f"Codes of type {dtype}, residuals in a pool.",
            [plain],
            change={0: steps},
        )
        shifted = replace(plain, zero=7, base_zero=-2)
        yield case(
            f"program-codes-zero-{name}", "Codes with other zero points.", [shifted], change={0: steps}
        )
        for bits in ops.GAIN_BITS[1:]:
            gains = np.array([(1 << bits) + step * (1 << bits) // 40 for step in range(-6, 6)])
            gained = replace(shifted, gain_bits=bits, gains=gains, activity=level(range(12), range(-8, 8)))
            yield case(
                f"program-codes-gain-{bits}-{name}",
                f"Gains of {bits} binary digits by rows, levels by rows and columns.",
                [gained],
                change={0: steps},
            )
    at = PLACES["codes"].at
    by_columns = Record(
        ops.CODES,
        ops.I8,
        0,
        192,
        12,
        at,
        by_rows=False,
        gain_bits=9,
        gains=np.arange(480, 544, 4),
        residual=POOL,
        activity=level([1], range(16)),
    )
    yield case(
        "program-codes-columns", "Gains and levels by columns.", [by_columns], change={0: steps_of(192, 6)}
    )
    negative = replace(by_columns, gains=-np.arange(480, 544, 4))
    yield case("program-codes-negative-gain", "Gains below zero.", [negative], change={0: steps_of(192, 6)})
    far = [200 if at % 50 == 7 else -150 if at % 50 == 20 else 0 for at in range(192)]
    wide = Record(ops.CODES, ops.U8, 0, 192, 12, PLACES["bytes"].at, residual=POOL, activity=level([9]))
    yield case(
        "program-codes-escape", "Residuals beyond ±100 escape in both directions.", [wide], change={0: far}
    )
    few = steps_of(192, 8, share=0.06)
    sparse = Record(
        ops.CODES, ops.I8, 0, 192, 12, at, residual=SPARSE, changed=sum(step != 0 for step in few)
    )
    yield case("program-sparse", "A sparse residual.", [sparse], change={0: few})
    used = np.zeros(12, dtype=bool)
    used[[1, 2, 10]] = True
    inside = [1 if used[place // 16] and place % 5 == 0 else 0 for place in range(192)]
    rows = replace(sparse, used=used, changed=sum(inside))
    yield case("program-sparse-rows", "A sparse residual in three of the rows.", [rows], change={0: inside})
    large = [200 * (place == 3) - 120 * (place == 100) for place in range(192)]
    base_large = replace(sparse, dtype=ops.U8, base=PLACES["bytes"].at, changed=2)
    yield case("program-sparse-escape", "Sizes beyond 63 escape.", [base_large], change={0: large})
    for name, record in (
        ("codes", Record(ops.CODES, ops.I8, 0, 192, 12, at, used=used, activity=level([1] * 12))),
        (
            "float",
            Record(ops.FLOAT, ops.F32, 0, 192, 12, PLACES["clean"].at, used=used, activity=level([-14])),
        ),
        ("cast", Record(ops.CAST, ops.F16, 0, 192, 12, PLACES["clean"].at, used=used, activity=level([1]))),
    ):
        pooled = replace(record, residual=POOL)
        if len(record.activity.rows) > 1:  # type: ignore[union-attr]
            pooled = replace(pooled, activity=level([3 * int(one) for one in used]))
        yield case(
            f"program-{name}-rows", "Residuals of a pool in three of the rows.", [pooled], change={0: inside}
        )
    base = bytes(6000)
    lone = Record(ops.CODES, ops.I8, 0, 6000, 1, 0, residual=SPARSE, changed=41)
    steps = [int(place < 40 or place == 5999) for place in range(6000)]
    yield case(
        "program-sparse-far",
        "A gap that escapes, with low bits left raw.",
        [lone],
        change={0: steps},
        base=base,
    )


def floats() -> Iterator[Made]:
    """Floats in order, casts, pruning, numbers without a prediction."""
    for name, dtype in (("clean", "float32"), ("halves", "float16"), ("brains", "bfloat16")):
        place = PLACES[name]
        record = Record(
            ops.FLOAT, _TYPES[name], 0, 192, 12, place.at, residual=POOL, activity=level([-14], range(16))
        )
        yield case(
            f"program-float-{dtype}",
            f"Differences of {dtype} in order.",
            [record],
            change={0: steps_of(192, 2, 500)},
        )
    weights = PLACES["weights"].at
    record = Record(ops.FLOAT, ops.F32, 0, 192, 12, weights, residual=POOL, activity=level([-10]))
    yield case(
        "program-float-specials",
        "NaNs, zeros of both signs, infinities and subnormals.",
        [record],
        change={0: steps_of(192, 4, 2)},
    )
    for bits in ops.GAIN_BITS[1:]:
        gains = np.array([(1 << bits) + step for step in range(-6, 6)])
        for by_rows in (True, False):
            if not by_rows and bits != 11:
                continue
            count = 12 if by_rows else 16
            gained = replace(record, gain_bits=bits, by_rows=by_rows, gains=np.resize(gains, count))
            yield case(
                f"program-float-gain-{bits}{'' if by_rows else '-columns'}",
                f"Floats times gains of {bits} binary digits by {'rows' if by_rows else 'columns'}.",
                [gained],
                change={0: steps_of(192, 4, 2)},
            )
    plain = Record(ops.PLAIN, ops.F32, 0, 192, 12, -1, residual=POOL, activity=level(range(-12, 0)))
    yield case("program-plain", "Floats without a prediction: fine octaves, coarse ones, escapes.", [plain])
    for kind, name in ((ops.F16, "float16"), (ops.BF16, "bfloat16")):
        cast = Record(ops.CAST, kind, 0, 192, 12, weights)
        yield case(
            f"program-cast-{name}", f"Casts to {name}, ties to even, NaNs, infinities and subnormals.", [cast]
        )
        yield case(
            f"program-cast-{name}-exceptions",
            f"Casts to {name} with exceptions, which are steps in order.",
            [replace(cast, residual=EXCEPTIONS, exceptions=[(0, 1), (180, -1), (191, 5)])],
        )
        pooled = replace(cast, residual=POOL, activity=level([1]))
        yield case(
            f"program-cast-{name}-pool",
            f"Casts to {name} with residuals.",
            [pooled],
            change={0: steps_of(192, 7, 1)},
        )
    edges = np.array(
        [1e-7, 9.99e-8, -1e-8, 1e4, 10001, -1e9, 0.0, -0.0, np.inf, np.nan, 65504, 1e-45], dtype="<f4"
    ).tobytes()
    clamped = Record(ops.CAST, ops.F16, 0, 12, 1, 0, zero=1)
    yield case("program-cast-clamped", "The cast of ONNX's converter at its edges.", [clamped], base=edges)
    ties = np.array(
        [0x3F801000, 0x3F803000, 0x3F802FFF, 0x33000000, 0x33000001, 0x477FEFFF, 0x477FF000], dtype="<u4"
    ).tobytes()
    yield case(
        "program-cast-ties",
        "Ties, the least float16, and the step to infinity.",
        [Record(ops.CAST, ops.F16, 0, 7, 1, 0)],
        base=ties,
    )
    nans = np.array(
        [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF801234, 0x7F7FFFFF, 0x3F808000, 0x3F818000], dtype="<u4"
    ).tobytes()
    yield case(
        "program-cast-bfloat16-edges",
        "What rounding in integers does to NaNs and ties.",
        [Record(ops.CAST, ops.BF16, 0, 7, 1, 0)],
        base=nans,
    )
    threshold = int(np.float32(0.04).view(np.uint32))
    for keep in (0, 1):
        pruned = Record(ops.PRUNED, ops.F32, 0, 192, 1, weights, zero=threshold, base_zero=keep)
        yield case(
            f"program-pruned{'-signs' if keep else ''}",
            f"Small numbers become zeros{' of their sign' if keep else ''}.",
            [pruned],
        )


def pools() -> Iterator[Made]:
    """Sizes that take long ways through pools: groups, lanes, many tables."""
    codes = bytes(random.Random(1).choices(range(60), k=4096 * 2 + 50))
    level_of = [level([0]), level([8]), level([3])]
    places = ((0, 4096), (4096, 4096), (8192, 50))
    grouped = [
        Record(ops.CODES, ops.U8, at, count, 1, at, residual=POOL, activity=one)
        for (at, count), one in zip(places, level_of, strict=True)
    ]
    change = {0: steps_of(4096, 1, 1, 0.3), 1: steps_of(4096, 2, 9), 2: steps_of(50, 3, 2)}
    yield case(
        "program-groups",
        "Large records have contexts of their own; small ones share theirs.",
        grouped,
        base=codes,
        change=change,
    )
    count = 2500
    base = np.array([1.0] * count, dtype="<f4").tobytes()
    lanes = Record(ops.FLOAT, ops.F32, 0, count, 1, 0, residual=POOL, activity=level([-20]))
    yield case(
        "program-lanes",
        "Several lanes, which carry a part of the raw bits.",
        [lanes],
        base=base,
        change={0: steps_of(count, 5, 40)},
    )
    steps = [sign * (1 << bit) + step for bit in range(31) for sign in (1, -1) for step in (-1, 0, 1)]
    every = Record(ops.FLOAT, ops.F32, 0, len(steps), 1, 0, residual=POOL, activity=level([-20]))
    yield case(
        "program-tokens",
        "Differences of every length, at both ends of each.",
        [every],
        change={0: steps},
        base=np.array([1.0] * len(steps), dtype="<f4").tobytes(),
    )
    alike = Record(ops.CODES, ops.I8, 0, 192, 12, PLACES["codes"].at, residual=POOL, activity=level([2]))
    yield case(
        "program-one-symbol",
        "A table of one symbol: the rANS stream has no words.",
        [alike],
        change={0: [1] * 192},
    )


def made() -> Iterator[Made]:
    """All of this module."""
    yield from predicted()
    yield from quantised()
    yield from coded()
    yield from floats()
    yield from pools()
