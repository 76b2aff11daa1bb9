"""Decodes what a fuzzer made and holds the decoder to its word.

Whatever a delta holds: it ends with the announced bytes or with a SluiceError of a DELTA code; nothing stays
behind an error; time and memory stay within bounds that follow from the target's size.
"""

from __future__ import annotations

import os
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edge_tests.fuzz.deltas import Case, put_together, take_apart
from updater import delta
from updater.delta.block import Block, decode_block
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.limits import DecodeLimits

# What decoding may take: the machine that runs the tests is slow and shared, hence the seconds at the start.
SECONDS = 2.0
SECONDS_A_KIBIBYTE = 0.25  # of target
MEMORY_BYTES = 96 << 20  # as Python and NumPy allocate it
MEMORY_EXPANSION = 64  # times the target's size, beyond that


SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory for the files of a decoder, in memory where there is such a place."""
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="delta-fuzz-", dir=parent) as directory:
        yield Path(directory)


class BrokenWordError(AssertionError):
    """The decoder did what it must not."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "right", or the error's code; what it took."""

    code: str
    seconds: float
    peak_bytes: int


def examine(case: Case, directory: Path, memory: bool = False) -> Outcome:
    """Decodes a case. Raises BrokenWordError; anything else that comes out is a fault too.

    Args:
        case: the delta and its base.
        directory: an empty one, which is empty again afterwards.
        memory: whether to measure memory, which takes its time.
    """
    path = directory / "base"
    if case.base is not None:
        path.write_bytes(case.base)
    try:
        outcome = _timed(case, directory, memory)
        if outcome.code == "DELTA_TARGET_MISMATCH":
            _decode_again(case, directory)
        _describe(case, directory)
        return outcome
    finally:
        for name in ("base", "delta"):
            (directory / name).unlink(missing_ok=True)
        if left := [found.name for found in directory.iterdir()]:
            raise BrokenWordError(f"left behind: {left}")


def _timed(case: Case, directory: Path, memory: bool) -> Outcome:
    if memory:
        tracemalloc.start()
    start = time.perf_counter()
    try:
        code, size = _apply(case, directory)
    finally:
        seconds = time.perf_counter() - start
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        tracemalloc.stop()
    if seconds > SECONDS + SECONDS_A_KIBIBYTE * size / 1024:
        raise BrokenWordError(f"{seconds:.1f} s for a target of {size} bytes")
    if peak > MEMORY_BYTES + MEMORY_EXPANSION * size:
        raise BrokenWordError(f"{peak >> 20} MiB for a target of {size} bytes")
    return Outcome(code, seconds, peak)


def _apply(case: Case, directory: Path) -> tuple[str, int]:
    """The outcome, and the target's size as far as the header was accepted."""
    out = directory / "out"
    applier = delta.Applier(directory / "base" if case.base is not None else None, out)
    size = 0
    try:
        applier.feed(case.delta)
        header = applier.header
        size = header.target_size if header is not None else 0
        digest = applier.finish()
        data = out.read_bytes()
        if header is None or digest_bytes(data) != digest != header.target_digest or len(data) != size:
            raise BrokenWordError("another target than the header says")
        return "right", size
    except SluiceError as error:
        if not error.code.startswith("DELTA_"):
            raise
        return error.code, min(size, len(case.delta) << 10)
    finally:
        applier.discard()


def _decode_again(case: Case, directory: Path) -> None:
    """Blocks that decode, to another target than the header says: with the right digest all is well."""
    sample, base = take_apart(case.base, case.delta), case.base or b""
    out = bytearray()

    def read(offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(base):
            raise BrokenWordError("a read beyond the base in a delta that decodes")
        return base[offset : offset + length]

    for payload, length in sample.blocks:
        start = len(out)
        block = Block(payload, start, length)
        decode_block(block, sample.header.features, read, out.extend, DecodeLimits())
        if len(out) - start != length:
            raise BrokenWordError(f"a block of {length} bytes wrote {len(out) - start}")
    header = replace(sample.header, target_digest=digest_bytes(out))
    code, _ = _apply(Case(case.base, put_together(header, list(sample.blocks))), directory)
    if code != "right":
        raise BrokenWordError(f"{code} at the second time")


def _describe(case: Case, directory: Path) -> None:
    path = directory / "delta"
    path.write_bytes(case.delta)
    try:
        delta.describe(directory / "base" if case.base is not None else None, path)
    except SluiceError as error:
        if not error.code.startswith("DELTA_"):
            raise
