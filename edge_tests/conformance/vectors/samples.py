"""What several vectors are made of: a base with arrays of every kind, a delta with every structure."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_tests.conformance.vectors import build

TEXT = b"".join(b"layer %d: weights and biases; " % index for index in range(8))[:192]


@dataclass(frozen=True)
class Place:
    """An array in `NUMBERS`: where it lies, its elements and their NumPy type."""

    at: int
    count: int
    dtype: str


def _numbers() -> tuple[bytes, dict[str, Place]]:
    """Text, then arrays: weights with special values, codes, biases, scales."""
    draw = random.Random(3)
    weights = [draw.gauss(0, 0.05) for _ in range(192)]
    words = np.array(weights, dtype="<f4").view("<u4")
    specials = (
        0x80000000,
        0,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0xFFC12345,
        0x7F800001,
        1,
        0x80000001,
        0x007FFFFF,
    )
    words[180 : 180 + len(specials)] = specials
    halves = np.array(weights, dtype="<f2").view("<u2")
    halves[180:186] = (0x8000, 0x7C00, 0xFE01, 0x7C01, 1, 0x83FF)
    brains = (words >> 16).astype("<u2")
    parts: list[tuple[str, bytes, str]] = [
        ("weights", words.tobytes(), "<f4"),
        ("codes", bytes(draw.randrange(256) for _ in range(192)), "i1"),
        ("bytes", bytes(draw.randrange(256) for _ in range(192)), "u1"),
        ("biases", struct.pack("<16i", *(draw.randrange(-9000, 9000) for _ in range(16))), "<i4"),
        ("longs", struct.pack("<8q", *(draw.randrange(-(1 << 62), 1 << 62) for _ in range(8))), "<i8"),
        ("halves", halves.tobytes(), "<u2"),
        ("brains", brains.tobytes(), "<u2"),
        ("scales", np.array([draw.uniform(0.0005, 0.002) for _ in range(16)], dtype="<f4").tobytes(), "<f4"),
        ("clean", np.array([draw.gauss(0, 0.05) for _ in range(192)], dtype="<f4").tobytes(), "<f4"),
    ]
    data, places = bytearray(TEXT), {}
    for name, content, dtype in parts:
        places[name] = Place(len(data), len(content) // np.dtype(dtype).itemsize, dtype)
        data += content
    return bytes(data), places


NUMBERS, PLACES = _numbers()


def array(name: str) -> NDArray[np.generic]:
    """An array of the base."""
    place = PLACES[name]
    return np.frombuffer(NUMBERS, dtype=place.dtype, count=place.count, offset=place.at)


def noise(count: int, seed: int) -> bytes:
    """Bytes that nothing makes smaller."""
    return random.Random(seed).randbytes(count)


BASE = noise(600, 1)
TARGET = BASE[100:350] + b"between the copies" + BASE[:132]


def sample_blocks() -> list[build.Block]:
    """Two blocks that use copies, a literal and a tensor, 200 bytes each."""
    tensor = build.Tensor(1, 0, 0, 100, (1,))
    sum_of = bytes(TARGET[200 + at] - BASE[200 + at] & 255 for at in range(100))
    folded = bytes((d << 1 if d < 128 else (256 - d << 1) - 1) for d in sum_of)
    first = build.payload(build.copy(100, 200))
    second = build.payload(
        tensor.encode() + build.literal(2, 68) + build.copy(-268, 32),
        build.raw(folded),
        build.zstd(TARGET[300:368]),
    )
    return [build.Block(first, 200), build.Block(second, 200)]


def sample_header(**changes: object) -> build.Header:
    """The header of the sample."""
    fields: dict[str, object] = {"base": BASE, "target": TARGET, "block_count": 2, "block_size": 200}
    return build.Header(**(fields | {"features": ("tensor",)} | changes))  # type: ignore[arg-type]
