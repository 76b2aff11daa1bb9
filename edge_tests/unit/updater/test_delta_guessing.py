"""Arrays in files that no reader knows: found by their bytes, paired, and coded smaller than as bytes."""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from updater import delta
from updater.delta import encoder, guessing
from updater.formats.span import TensorSpan

RANDOM = np.random.default_rng(7)
TEXT = (b"layer.%d.weight has its own place in this container; " * 200)[:9001]


def weights(count: int) -> NDArray[np.float32]:
    return (np.random.default_rng(count).standard_normal(count) * 0.05).astype("<f4")


def guesses(
    data: bytes,
    spans: tuple[TensorSpan, ...] = (),
    other: bytes = b"",
    other_spans: tuple[TensorSpan, ...] = (),
) -> tuple[TensorSpan, ...]:
    return guessing.with_guesses(
        np.frombuffer(data, np.uint8), spans, np.frombuffer(other, np.uint8), other_spans
    )


def bfloat16(values: NDArray[np.float32]) -> bytes:
    return (values.view("<u4") >> np.uint32(16)).astype("<u2").tobytes()


def as_type(dtype: str, count: int) -> bytes:
    values = weights(count)
    if dtype == "float64":
        return np.random.default_rng(count).standard_normal(count).tobytes()
    return bfloat16(values) if dtype == "bfloat16" else values.astype(np.dtype(dtype)).tobytes()


def delta_size(tmp_path: Path, old: bytes | None, new: bytes, effort: str = "default") -> int:
    for name, content in (("old", old), ("new", new)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    base = tmp_path / "old" if old is not None else None
    options = delta.EncodeOptions(effort=effort, threads=1)
    summary = delta.create(base, tmp_path / "new", tmp_path / "made", options=options)
    delta.apply(base, tmp_path / "made", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == new
    return summary.delta_size


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_an_array_between_text_is_found_with_its_type_and_phase(dtype: str, shift: int) -> None:
    array = as_type(dtype, 20_000)
    data = TEXT + b"x" * shift + array + TEXT
    found = guesses(data)
    begin = len(TEXT) + shift
    found = tuple(span for span in found if span.dtype == dtype)
    width = len(array) // 20_000
    covered = 0
    for span in found:
        inside = max(0, min(span.offset + span.length, begin + len(array)) - max(span.offset, begin))
        covered += inside
        assert (span.offset - begin) % width == 0
        assert span.length - inside < 4096
    assert covered > 0.75 * len(array)
    assert len(found) == 1


@pytest.mark.parametrize(
    "data",
    [
        TEXT * 8,
        bytes(100_000),
        RANDOM.bytes(100_000),
        lzma.compress(weights(50_000).tobytes()),
        RANDOM.integers(-3000, 3000, 50_000).astype("<i2").tobytes(),
        RANDOM.integers(0, 30_000, 30_000).astype("<i4").tobytes(),
        RANDOM.integers(0, 30_000, 20_000).astype("<i8").tobytes(),
        RANDOM.normal(0, 20, 100_000).astype("<i1").tobytes(),
    ],
    ids=["text", "zeros", "noise", "packed", "int16", "int32", "int64", "int8"],
)
def test_what_is_no_array_of_floats_is_left_alone(data: bytes) -> None:
    assert guesses(data) == ()


def test_what_a_reader_found_is_all_there_is() -> None:
    array = weights(10_000).tobytes()
    known = (TensorSpan("a", "float32", (10_000,), 0, 40_000),)
    assert guesses(array + array, known) == known
    assert guesses(array + array) != ()


def test_guesses_never_overlap_and_lie_inside_the_file() -> None:
    parts = [TEXT[:777], weights(5000).tobytes(), as_type("float16", 9000), RANDOM.bytes(5001)] * 3
    data = b"".join(parts)
    end = 0
    for span in guesses(data):
        assert span.offset >= end
        end = span.offset + span.length
    assert 0 < end <= len(data)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_of_the_bases_array_is_found_exactly(dtype: str) -> None:
    array = weights(6000)
    cast = array.astype("<f2").tobytes()
    if dtype == "bfloat16":
        rounded = (array.view("<u4") + np.uint32(0x7FFF) + ((array.view("<u4") >> 16) & 1)) >> np.uint32(16)
        cast = rounded.astype("<u2").tobytes()
    known = (TensorSpan("w", "float32", (60, 100), 0, array.nbytes),)
    found = guesses(TEXT * 2 + cast + TEXT, (), array.tobytes(), known)
    assert TensorSpan("w", dtype, (60, 100), 2 * len(TEXT), len(cast)) in found


def test_a_container_of_floats_is_smaller_than_its_bytes_packed(tmp_path: Path) -> None:
    data = b"".join(TEXT[: 100 + number] + weights(9000 + number).tobytes() for number in range(4))
    assert delta_size(tmp_path, None, data) < 0.96 * len(lzma.compress(data))


def unread(values: NDArray[np.float32], names: int) -> bytes:
    """A model with floats where no reader looks: in an attribute, beside a table that looks like some."""
    table = np.array([[index, 0, index * 24, 0x3F800000 + index % 9 * 4096] for index in range(names)], "<u4")
    nodes = [
        onnx.helper.make_node("Unknown", ["x"], ["y"], table=values.tobytes()),
        onnx.helper.make_node("Other", ["y"], ["z"], table=table.tobytes()),
    ]
    known = onnx.numpy_helper.from_array(weights(500), "w")
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [known])).SerializeToString()


def test_guesses_between_tensors_compete_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = weights(30_000)
    nudged = (values * np.float32(1 + 2e-4)).astype("<f4")
    floats = unread(values[:9000], 10), unread(nudged[9000:18000], 19)
    tables = unread(values[:9], 1100), unread(nudged[:9], 1200)
    sizes = [delta_size(tmp_path, *pair) for pair in (floats, tables)]
    monkeypatch.setattr(encoder, "_GUESSED", 0)
    without = [delta_size(tmp_path, *pair) for pair in (floats, tables)]
    assert sizes[0] < 0.95 * without[0]
    assert sizes[1] <= without[1]


def npz(arrays: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


@pytest.mark.parametrize("effort", ["fast", "default", "max"])
def test_arrays_of_a_zip_pair_by_their_names(tmp_path: Path, effort: str) -> None:
    one, two = weights(8000), weights(9000)
    nudged = [(array * np.float32(1 + 2e-5)).astype("<f4") for array in (one, two)]
    old = npz({"one": one, "two": two})
    new = npz({"two": nudged[1], "more": weights(300), "one": nudged[0]})
    assert delta_size(tmp_path, old, new, effort) < 0.5 * len(lzma.compress(new))


def test_a_zip_that_lies_about_its_entries_is_coded_all_the_same(tmp_path: Path) -> None:
    data = bytearray(npz({"one": weights(8000)}))
    place = data.index(b"PK\x01\x02") + 42
    data[place : place + 4] = b"\xff\xff\xff\x7f"
    delta_size(tmp_path, bytes(data), bytes(data[:-9]))
