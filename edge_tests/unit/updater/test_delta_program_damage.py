"""Damaged programs of the wider operations end with an error or the right length, in bounded time."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest

from edge_tests.unit.updater.program_pairs import Arrays, weights
from updater.delta import faults
from updater.delta.program import body, records, run, writer
from updater.delta.program.encoder import ProgramEncoder
from updater.delta.program.operands import ProgramError
from updater.errors import SluiceError
from updater.formats.span import Quantisation

_MOST_S = 10.0  # that a damaged program of this size may take, on a busy machine


def made() -> tuple[bytes, bytes, bytes]:
    """A base, a target and the program that leads to it, with most operations."""
    one, two, three = weights((40, 30)), weights((36, 20), 2), weights((32, 24), 3)
    low, high = np.minimum(two.min(axis=0), 0), np.maximum(two.max(axis=0), 0)
    scale = ((high - low) / np.float32(255)).astype(np.float32)
    zero = np.rint(-low.astype(np.float64) / scale.astype(np.float64)).astype(np.uint8)
    codes = np.clip(np.rint(two / scale) + zero, 0, 255).astype(np.uint8)
    thin = three.copy()
    for row in thin.reshape(-1, 4):
        row[np.argsort(-np.abs(row), kind="stable")[2:]] = 0
    masked = one.copy()
    masked[::3] = 0
    base = Arrays().add("a", one).add("b", two.astype(np.float32)).add("c", three)
    base.add("d", weights((20, 40), 4).astype(np.float16)).add("e", one + 1)
    target = Arrays().add("a.t", one.T.copy())
    target.add("b_q", codes, meaning=Quantisation(tuple(scale.tolist()), tuple(zero.tolist()), 1))
    target.add("b_s", scale).add("b_z", zero).add("c", thin)
    target.add("d.t", weights((20, 40), 4).astype(np.float16).astype(np.float32).T.copy())
    target.add("e", masked + (masked != 0).astype(np.float32))
    old, new = bytes(base.data), bytes(target.data)
    encoder = ProgramEncoder(
        np.frombuffer(old, dtype=np.uint8),
        base.spans,
        np.frombuffer(new, dtype=np.uint8),
        target.spans,
        19,
        False,
    )
    found = encoder.encode(0, len(new))
    assert found is not None
    return old, new, found.data


def test_damage_to_wider_operations() -> None:
    base, target, program = made()

    def read(offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(base):
            raise faults.invalid("outside")
        return base[offset : offset + length]

    assert bytes(run(read, program, 0, len(target))) == target
    ops = {records.NAMES[record.op] for record in body.open_body(program, 0, len(target)).records}
    assert ops >= {"same", "quantised", "spanned", "zeros", "thinned", "cast"}
    random = np.random.default_rng(8)
    head = len(program) // 2
    for _ in range(300):
        damaged = bytearray(program)
        damaged[int(random.integers(0, random.choice([12, head, len(program)])))] ^= int(
            random.integers(1, 256)
        )
        start = time.monotonic()
        with contextlib.suppress(SluiceError):
            assert len(run(read, bytes(damaged), 0, len(target))) == len(target)
        assert time.monotonic() - start < _MOST_S


@pytest.mark.parametrize(
    "record",
    [
        records.Record(records.PEAK, records.F32, 0, 2500, two=4, base=0, silent=True),
        records.Record(records.ZEROS, records.U8, 0, 10_000, two=8, base=0, one=0),
        records.Record(records.SPANNED, records.F32, 0, 2500, two=80_000, base=0),
        records.Record(records.PEAK, records.F32, 0, 2500, two=80_000, base=0, axes=((2500, 0), (80_000, 0))),
    ],
)
def test_reductions_stay_within_their_block(record: records.Record) -> None:
    """Silent values count against the block; what is read many times counts as often."""
    values = [record] * 2 if record.silent else [record]
    length = 10_000
    place = body.Place(0, length, 0, 0)
    with pytest.raises((ProgramError, SluiceError)):
        made = writer.encode(lambda _, size: bytes(size), bytes(length), [place], values, 3, False)
        run(lambda _, size: bytes(size), made[0], 0, length)
