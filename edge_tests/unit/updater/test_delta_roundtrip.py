"""Whatever the files, create and apply give the target back bit by bit."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from updater import delta
from updater.digests import digest_file
from updater.formats.span import Quantisation, TensorSpan

DTYPES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "bool": 1,
    "int4": 1,
}
SPECIAL_FLOATS = [
    0.0,
    -0.0,
    float("nan"),
    -float("nan"),
    float("inf"),
    -float("inf"),
    1e-45,
    -1e-45,
    3.4e38,
    1.0,
]


def there_and_back(
    directory: Path,
    old: bytes | None,
    new: bytes,
    *,
    old_spans: list[TensorSpan] | None = None,
    new_spans: list[TensorSpan] | None = None,
    options: delta.EncodeOptions | None = None,
) -> delta.DeltaSummary:
    base = directory / "old"
    target, made, out = directory / "new", directory / "made", directory / "out"
    if old is not None:
        base.write_bytes(old)
    target.write_bytes(new)
    summary = delta.create(
        base if old is not None else None,
        target,
        made,
        options=options,
        base_spans=old_spans,
        target_spans=new_spans,
    )
    assert delta.apply(base if old is not None else None, made, out) == digest_file(target)
    assert out.read_bytes() == new
    assert sorted(path.name for path in directory.iterdir() if path.name.startswith(".")) == []
    assert sum(region.target_length for region in summary.regions) == len(new)
    return summary


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"", b""),
        (b"", b"x"),
        (b"x", b""),
        (b"same" * 100, b"same" * 100),
        (bytes(range(256)) * 40, bytes(range(255, -1, -1)) * 40),
        (None, b""),
        (None, b"no base at all" * 50),
    ],
    ids=["empty", "from-empty", "to-empty", "same", "reversed", "full-empty", "full"],
)
def test_corners(tmp_path: Path, old: bytes | None, new: bytes) -> None:
    there_and_back(tmp_path, old, new)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    old=st.binary(max_size=3000),
    edits=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=40)), max_size=6),
    block_size=st.sampled_from([64, 100, 1 << 20]),
)
def test_opaque_files(tmp_path: Path, old: bytes, edits: list[tuple[int, bytes]], block_size: int) -> None:
    new = bytearray(old * 2)
    for place, piece in edits:
        new[place : place + len(piece) // 2] = piece
    there_and_back(tmp_path, old, bytes(new), options=delta.EncodeOptions(level=3, block_size=block_size))


@st.composite
def tensor_files(draw: st.DrawFn) -> tuple[bytes, bytes, list[TensorSpan], list[TensorSpan]]:
    """Two files of the same tensors in other places, each a random step away from its old value."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    old, new = bytearray(), bytearray()
    old_spans, new_spans = [], []
    for index in range(draw(st.integers(0, 5))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        width = DTYPES[dtype]
        channels, inner = draw(st.integers(1, 5)), draw(st.integers(0, 60))
        count = channels * inner
        before = random.integers(0, 256, count * width, dtype=np.uint8)
        if draw(st.booleans()):
            pool = np.array(SPECIAL_FLOATS, dtype=np.float32).view(np.uint8)
            before = np.resize(pool, count * width)
        after = before.copy()
        changed = random.random(len(after)) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
        after[changed] += random.integers(0, 8, int(changed.sum()), dtype=np.uint8)
        quantised = dtype in ("int8", "uint8", "int16", "int32") and draw(st.booleans())
        scales = [
            Quantisation(
                tuple(random.uniform(0.001, 1000, channels)),
                tuple(random.integers(-9, 9, channels).tolist()),
                0,
            )
            if quantised
            else None
            for _ in range(2)
        ]
        old += random.bytes(draw(st.integers(0, 40)))
        new += random.bytes(draw(st.integers(0, 40)))
        name = f"t{index}" if draw(st.booleans()) else ""
        shape = (channels, inner)
        old_spans.append(TensorSpan(name, dtype, shape, len(old), len(before), scales[0]))
        new_spans.append(TensorSpan(name, dtype, shape, len(new), len(after), scales[1]))
        old += before.tobytes()
        new += after.tobytes()
    return bytes(old), bytes(new), old_spans, new_spans


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=tensor_files(), block_size=st.sampled_from([64, 257, 1 << 20]))
def test_tensor_files(
    tmp_path: Path, files: tuple[bytes, bytes, list[TensorSpan], list[TensorSpan]], block_size: int
) -> None:
    old, new, old_spans, new_spans = files
    there_and_back(
        tmp_path,
        old,
        new,
        old_spans=old_spans,
        new_spans=new_spans,
        options=delta.EncodeOptions(level=3, block_size=block_size),
    )


def test_every_float16_against_every_shift(tmp_path: Path) -> None:
    """All 65,536 patterns, NaNs with payloads included, a small step and a large one away from others."""
    old = np.arange(1 << 16, dtype=np.uint16)
    for step in (1, 77, 1 << 15):
        new = old + np.uint16(step)
        span = [TensorSpan("t", "float16", (1 << 16,), 0, 1 << 17)]
        there_and_back(tmp_path, old.tobytes(), new.tobytes(), old_spans=span, new_spans=span)


def test_requantised_tensor_costs_little(tmp_path: Path) -> None:
    """Codes that only follow from new scales are predicted, per channel, across block borders."""
    random = np.random.default_rng(5)
    weights = random.normal(0, 1, (3, 64, 500)).astype(np.float32)
    sizes = {}
    for axis in (0, 1, None):
        channels = 1 if axis is None else weights.shape[axis]
        files, spans = [], []
        for _ in range(2):
            scale = random.uniform(0.02, 0.05, channels)
            zero = random.integers(-3, 4, channels)
            column = (slice(None),) + (None,) * (2 - axis) if axis is not None else (0,)
            codes = np.clip(np.round(weights / scale[column]) + zero[column], -128, 127).astype(np.int8)
            files.append(codes.tobytes())
            quantisation = Quantisation(tuple(scale.tolist()), tuple(zero.tolist()), axis)
            spans.append([TensorSpan("w", "int8", weights.shape, 0, codes.size, quantisation)])
        options = delta.EncodeOptions(block_size=30_001, effort="fast")
        summary = there_and_back(
            tmp_path, files[0], files[1], old_spans=spans[0], new_spans=spans[1], options=options
        )
        (region,) = summary.regions
        assert (region.instruction, region.predictor) == ("tensor", "requantise")
        sizes[axis] = summary.delta_size
        plain = there_and_back(tmp_path, files[0], files[1], old_spans=[], new_spans=[], options=options)
        assert summary.delta_size < 0.6 * plain.delta_size
    assert all(sizes.values())


def test_tensor_that_moved_and_was_renamed_is_copied(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weights = random.bytes(40_000)
    old = b"head" * 9 + weights
    new = b"a longer head, and another" * 99 + weights + b"tail"
    summary = there_and_back(
        tmp_path,
        old,
        new,
        old_spans=[TensorSpan("a", "float32", (100, 100), 36, 40_000)],
        new_spans=[TensorSpan("b", "float32", (10_000,), 26 * 99, 40_000)],
    )
    region = next(region for region in summary.regions if region.name == "b")
    assert (region.predictor, region.base_name) == ("same", "a")
    assert summary.delta_size < 400


def test_same_input_same_output_whatever_the_threads(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    old = random.integers(0, 50, 15_000, dtype=np.uint8)
    new = old.copy()
    new[::7] += 1
    (tmp_path / "old").write_bytes(old.tobytes())
    (tmp_path / "new").write_bytes(new.tobytes())
    digests = set()
    for threads in (1, 2, 5):
        options = delta.EncodeOptions(level=5, block_size=5000, threads=threads)
        summary = delta.create(tmp_path / "old", tmp_path / "new", tmp_path / "delta", options=options)
        digests.add(summary.delta_digest)
    assert len(digests) == 1


def test_base_larger_than_a_window_is_searched_by_content(tmp_path: Path) -> None:
    """Blocks of a shuffled file find their bytes anywhere in a base beyond the largest window."""
    random = np.random.default_rng(3)
    old = random.integers(0, 256, 10 << 20, dtype=np.uint8)
    parts = [old[start : start + (1 << 20)] for start in range(0, len(old), 1 << 20)]
    new = np.concatenate(
        [parts[index] for index in (8, 2, 9, 0)] + [random.integers(0, 256, 999, dtype=np.uint8)]
    )
    summary = there_and_back(tmp_path, old.tobytes(), new.tobytes(), options=delta.EncodeOptions(level=5))
    assert summary.delta_size < 10_000


def test_progress_ends_at_the_whole_and_never_falls(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(struct.pack("<1000I", *range(1000)))
    seen: list[tuple[int, int]] = []
    options = delta.EncodeOptions(block_size=1000)

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    delta.create(None, tmp_path / "new", tmp_path / "delta", options=options, progress=note)
    assert seen == sorted(seen)
    assert seen[-1] == (4000, 4000)
    seen.clear()
    delta.apply(None, tmp_path / "delta", tmp_path / "out", progress=note)
    assert seen[-1] == (4000, 4000)


def test_describe_without_the_target_names_the_bases_tensors(tmp_path: Path) -> None:
    old = np.arange(10_000, dtype=np.float32)
    new = old * np.float32(1.001)
    span = [TensorSpan("w", "float32", (10_000,), 0, 40_000)]
    summary = there_and_back(tmp_path, old.tobytes(), new.tobytes(), old_spans=span, new_spans=span)
    regions = delta.describe(tmp_path / "old", tmp_path / "made", base_spans=span)
    assert regions == summary.regions
    assert (regions[0].name, regions[0].predictor) == ("w", "float")
    assert regions[0].coded_bytes <= summary.delta_size
