"""Valid vectors of the instruction tensor: each predictor, coding and element type, in plain integers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from edge_tests.conformance.vectors import build
from edge_tests.conformance.vectors.build import Made, Tensor, copy, one_block, payload, raw
from edge_tests.conformance.vectors.samples import NUMBERS

NAMES = ("u8", "i8", "f8", "u16", "i16", "f16", "u32", "i32", "f32", "u64", "i64", "f64")
FLOATS = frozenset((2, 5, 8, 11))
PLAIN, DIFFERENCE, REQUANTISE = 0, 1, 2
DENSE, SPARSE = 0, 1
_FEATURES = ("tensor",)


def width(kind: int) -> int:
    """Bytes of an element."""
    return 1 << kind // 3


def words(data: bytes, kind: int) -> list[int]:
    """The elements' bit patterns."""
    size = width(kind)
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def unwords(values: Sequence[int], kind: int) -> bytes:
    """The inverse of `words`."""
    return b"".join(value.to_bytes(width(kind), "little") for value in values)


def order(word: int, kind: int) -> int:
    """A bit pattern's place among all of its type."""
    bits = 8 * width(kind)
    if kind not in FLOATS:
        return word
    return word ^ (1 << bits) - 1 if word >> bits - 1 else word + (1 << bits - 1)


def folded(target: Sequence[int], prediction: Sequence[int], kind: int) -> list[int]:
    """The folded residuals."""
    bits = 8 * width(kind)
    out = []
    for one, other in zip(target, prediction, strict=True):
        step = (order(one, kind) - order(other, kind)) % (1 << bits)
        step -= 1 << bits if step >> bits - 1 else 0
        out.append(2 * step if step >= 0 else -2 * step - 1)
    return out


def planes(values: Sequence[int], kind: int) -> list[bytes]:
    """The byte planes of residuals."""
    return [bytes(value >> 8 * plane & 255 for value in values) for plane in range(width(kind))]


def gaps(values: Sequence[int]) -> tuple[bytes, list[int]]:
    """Gap bytes, and what is not zero less one."""
    out, run, kept = bytearray(), 0, []
    for value in values:
        if value == 0:
            run += 1
            continue
        out += b"\xff" * (run // 255) + bytes([run % 255])
        kept.append(value - 1)
        run = 0
    return bytes(out), kept


def tensor_block(
    target: bytes, prediction: bytes, kind: int, coding: int, predictor: int, distance: int = 0
) -> bytes:
    """The payload of a block that is one tensor."""
    values = folded(words(target, kind), words(prediction, kind), kind)
    gap, kept = gaps(values) if coding == SPARSE else (b"", values)
    parts = ([gap] if coding == SPARSE else []) + planes(kept, kind)
    item = Tensor(predictor, coding, kind, len(values), range(1, len(parts) + 1), distance, len(gap))
    return payload(item.encode(), *map(raw, parts))


def every_type() -> Iterator[Made]:
    """Each element type, dense and sparse."""
    for kind, name in enumerate(NAMES):
        draw = random.Random(kind)
        size = width(kind)
        base = draw.randbytes(30 * size)
        prediction = words(base, kind)
        # Steps of every length, over zero and over the ends of the range.
        target = [
            (word + draw.choice((-1, 1)) * draw.randrange(1 << draw.randrange(1, 8 * size + 1)))
            % (1 << 8 * size)
            for word in prediction
        ]
        edge = (0, (1 << 8 * size) - 1, 1 << 8 * size - 1)
        target[:3] = edge
        data = unwords(target, kind)
        yield Made(
            f"plain-{name}",
            f"The predictor plain on elements of type {kind}.",
            None,
            one_block(None, data, tensor_block(data, bytes(len(data)), kind, DENSE, PLAIN), _FEATURES),
            data,
        )
        yield Made(
            f"difference-{name}",
            f"The predictor difference, dense, on elements of type {kind}.",
            base,
            one_block(base, data, tensor_block(data, base, kind, DENSE, DIFFERENCE), _FEATURES),
            data,
        )
        few = [
            new if at % 7 == 3 else old for at, (old, new) in enumerate(zip(prediction, target, strict=True))
        ]
        data = unwords(few, kind)
        yield Made(
            f"sparse-{name}",
            f"The predictor difference, sparse, on elements of type {kind}.",
            base,
            one_block(base, data, tensor_block(data, base, kind, SPARSE, DIFFERENCE), _FEATURES),
            data,
        )


def specials() -> Iterator[Made]:
    """Numbers and shapes that are easily missed."""
    cases: list[tuple[str, str, int, list[int], list[int]]] = [
        (
            "negative-zero",
            "-0 is one step below +0, in both directions.",
            8,
            [0, 0x80000000, 0, 0x80000000],
            [0x80000000, 0, 0, 0x80000000],
        ),
        (
            "nan-payloads",
            "NaNs keep sign and payload, quiet or signalling.",
            8,
            [0x7FC00000, 0xFFC00001, 0x7F800001, 0xFF8ABCDE],
            [0x7FC12345, 0xFF800001, 0xFFC00000, 0x7F800001],
        ),
        (
            "nan-payloads-f64",
            "NaNs of 8 bytes keep sign and payload.",
            11,
            [0x7FF8000000000000, 0x7FF0000000000001],
            [0xFFF8000000000001, 0x7FF0000000000002],
        ),
        (
            "nan-payloads-f16",
            "NaNs of 2 bytes keep sign and payload.",
            5,
            [0x7E00, 0xFC01, 0x7C01],
            [0x7E01, 0x7DFF, 0xFFFF],
        ),
        (
            "denormals",
            "Subnormal numbers are no zeros.",
            8,
            [1, 0x80000001, 0x007FFFFF, 2],
            [2, 1, 0x00800000, 0x80000002],
        ),
        (
            "infinities",
            "Infinities, and the step over them.",
            8,
            [0x7F7FFFFF, 0x7F800000, 0xFF800000],
            [0x7F800000, 0x7F800001, 0xFF7FFFFF],
        ),
        (
            "wrapping",
            "Differences go around the ends of the range.",
            7,
            [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0],
            [0x80000000, 0x7FFFFFFF, 0, 0xFFFFFFFF],
        ),
    ]
    for name, about, kind, old, new in cases:
        base, data = unwords(old, kind), unwords(new, kind)
        yield Made(
            name,
            about,
            base,
            one_block(base, data, tensor_block(data, base, kind, DENSE, DIFFERENCE), _FEATURES),
            data,
        )
    for count, name in ((254, "gap-254"), (255, "gap-255"), (765, "gap-765")):
        base = bytes(count + 4)
        data = bytes(count) + b"\1" + bytes(2) + b"\2"
        yield Made(
            name,
            f"A gap of {count} elements, then one of two.",
            base,
            one_block(base, data, tensor_block(data, base, 0, SPARSE, DIFFERENCE), _FEATURES),
            data,
        )
    base = NUMBERS[:40]
    yield Made(
        "sparse-nothing",
        "A sparse tensor without a change: no gap bytes, no values.",
        base,
        one_block(base, base, tensor_block(base, base, 6, SPARSE, DIFFERENCE), _FEATURES),
        base,
    )
    data = bytes(40)
    yield Made(
        "sparse-plain",
        "The predictor plain, sparse.",
        None,
        one_block(None, b"\0\7" + data, tensor_block(b"\0\7" + data, bytes(42), 3, SPARSE, PLAIN), _FEATURES),
        b"\0\7" + data,
    )
    yield from _streams()


def _streams() -> Iterator[Made]:
    base = NUMBERS[:64]
    data = (
        bytes(value + 1 & 255 for value in base[:20])
        + base[20:24]
        + bytes(value - 1 & 255 for value in base[24:44])
    )
    item = Tensor(DIFFERENCE, DENSE, 0, 20, (1,))
    body = payload(item.encode() + copy(0, 4) + item.encode(), raw(bytes([2]) * 20 + bytes([1]) * 20))
    yield Made(
        "tensors-share-a-stream",
        "Two tensors take from one stream in turn; the cursor goes on behind the first.",
        base,
        one_block(base, data, body, _FEATURES),
        data,
    )
    kind, old = 6, words(NUMBERS[:40], 6)
    new = [(word + 5) % (1 << 32) for word in old]
    values = folded(new, old, kind)
    body = payload(
        Tensor(DIFFERENCE, DENSE, kind, 10, (1, 1, 1, 1)).encode(), build.zstd(b"".join(planes(values, kind)))
    )
    data = unwords(new, kind)
    yield Made(
        "planes-share-a-stream",
        "One stream for all planes: it is taken in the order of the planes.",
        NUMBERS[:40],
        one_block(NUMBERS[:40], data, body, _FEATURES),
        data,
    )
    moved = NUMBERS[17:57]
    body = tensor_block(
        unwords([word ^ 1 for word in words(moved, 3)], 3), moved, 3, DENSE, DIFFERENCE, distance=17
    )
    data = unwords([word ^ 1 for word in words(moved, 3)], 3)
    yield Made(
        "unaligned-tensor",
        "A tensor whose base begins at an odd place.",
        NUMBERS[:64],
        one_block(NUMBERS[:64], data, body, _FEATURES),
        data,
    )


def requantised(
    codes: Sequence[int], kind: int, shape: Sequence[int], numbers: Sequence[Sequence[int]]
) -> list[int]:
    """The document's formula; `shape` is start, inner, shift, `numbers` multipliers, old and new zeros."""
    start, inner, shift = shape
    multipliers, old, new = numbers
    low = -(1 << 8 * width(kind) - 1) if kind % 3 == 1 else 0
    high = low + (1 << 8 * width(kind)) - 1
    out = []
    for place, code in enumerate(codes):
        channel = (start + place) // inner % len(multipliers)
        zero = channel if len(old) > 1 else 0
        scaled = (code - old[zero]) * multipliers[channel]
        scaled = scaled if shift == 0 else scaled + (1 << shift - 1) >> shift
        out.append(min(max(scaled + new[zero], low), high))
    return out


def requantise_case(
    name: str, about: str, kind: int, shape: Sequence[int], numbers: Sequence[Sequence[int]], count: int = 40
) -> Made:
    """A requantisation with a small dense residual."""
    draw = random.Random(name)
    size, is_signed = width(kind), kind % 3 == 1
    codes = [int.from_bytes(draw.randbytes(size), "little", signed=is_signed) for _ in range(count)]
    mask = (1 << 8 * size) - 1
    prediction = [value & mask for value in requantised(codes, kind, shape, numbers)]
    target = [(value + draw.randrange(-2, 3)) & mask for value in prediction]
    base, data = unwords([code & mask for code in codes], kind), unwords(target, kind)
    start, inner, shift = shape
    multipliers, old, new = numbers
    parameters = b"".join(build.signed(value - (1 << shift)) for value in multipliers)
    parameters += b"".join(map(build.signed, (*old, *new)))
    item = Tensor(
        REQUANTISE,
        DENSE,
        kind,
        count,
        (1,) * size,
        requantise=(2, start, inner, len(multipliers), shift, int(len(old) > 1)),
    )
    coded = build.zstd(b"".join(planes(folded(target, prediction, kind), kind)))
    body = payload(item.encode(), coded, raw(parameters))
    return Made(name, about, base, one_block(base, data, body, ("requantise", "tensor")), data)


def requantisations() -> Iterator[Made]:
    """The predictor requantise."""
    for kind in (0, 1, 3, 4, 6, 7):
        numbers = ((1234567, 1 << 20, 700001), (3, -5, 7), (-1, 2, 0))
        yield requantise_case(
            f"requantise-{NAMES[kind]}",
            f"Requantisation of elements of type {kind}, by channel.",
            kind,
            (0, 4, 20),
            numbers,
        )
    yield requantise_case(
        "requantise-one-scale", "One channel for all.", 1, (0, 1, 16), ((90000,), (0,), (0,))
    )
    yield requantise_case(
        "requantise-shared-zero",
        "Channels that share their zero points.",
        0,
        (0, 3, 10),
        ((900, 1300, 1024), (128,), (120,)),
    )
    yield requantise_case(
        "requantise-cut",
        "A tensor cut over blocks: the first element lies in the second channel.",
        1,
        (13, 5, 10),
        ((900, 1300, 1024), (0,), (0,)),
    )
    yield requantise_case(
        "requantise-shift-0", "No binary digits: nothing is rounded.", 4, (0, 2, 0), ((3, 1), (1, 2), (0, 9))
    )
    largest = (1 << 31, -(1 << 31))
    yield requantise_case(
        "requantise-extremes",
        "The largest shift, multiplier and zero points: intermediate values need all 64 bits.",
        6,
        (0, 1, 62),
        ((1 << 30, 1), largest, largest[::-1]),
    )
    yield requantise_case(
        "requantise-floor", "Halves are rounded up, also below zero.", 1, (0, 1, 1), ((1,), (0,), (0,))
    )


def made() -> Iterator[Made]:
    """All of this module."""
    yield from every_type()
    yield from specials()
    yield from requantisations()
