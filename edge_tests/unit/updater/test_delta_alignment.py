"""Bytes that the base has nearly, and streams of LZMA: what the encoder makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updater import delta, limits
from updater.delta import alignment, container, streams
from updater.delta.alignment import Stretch
from updater.delta.assembly import Coding
from updater.delta.base_windows import BaseWindows
from updater.delta.differences import Differences
from updater.delta.elements import BYTES
from updater.delta.plan import Piece
from updater.delta.stream_coder import Care, StreamCoder

RANDOM = random.Random(11)
BASE = RANDOM.randbytes(4000)


def changed(data: bytes, every: int) -> bytes:
    out = bytearray(data)
    for place in range(every // 2, len(out), every):
        out[place] ^= 0x55
    return bytes(out)


def sent(tmp: Path, base: bytes, target: bytes, effort: str = "default") -> int:
    """Bytes of the delta, which rebuilds the target."""
    for name, data in (("base", base), ("target", target)):
        (tmp / name).write_bytes(data)
    options = delta.EncodeOptions(effort=effort, threads=1)
    delta.create(tmp / "base", tmp / "target", tmp / "delta", options=options)
    delta.apply(tmp / "base", tmp / "delta", tmp / "out")
    assert (tmp / "out").read_bytes() == target
    return (tmp / "delta").stat().st_size


def test_what_moved_and_changed_is_one_stretch() -> None:
    data = RANDOM.randbytes(300) + changed(BASE[1000:3000], 40) + RANDOM.randbytes(300)
    (found,) = alignment.find(BASE, data)
    assert found.shift == 700
    assert abs(found.start - 300) < 40
    assert abs(found.end - 2300) < 40


def test_of_several_places_the_one_that_goes_on_is_taken() -> None:
    line = b'{"dtype": "float32", "quantization": {"scale": %d}}'
    base = b"".join(line % RANDOM.randrange(10**9) for _ in range(50))
    found = alignment.find(base, b"[" + base + b"]")
    assert found == [Stretch(1, len(base) + 1, -1)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stretches_are_in_order_and_inside_both(data: st.DataObject) -> None:
    parts = []
    for _ in range(data.draw(st.integers(0, 6))):
        start = data.draw(st.integers(0, len(BASE)))
        piece = BASE[start : start + data.draw(st.integers(0, 500))]
        parts.append(changed(piece, data.draw(st.integers(2, 60))))
        parts.append(data.draw(st.binary(max_size=20)) * data.draw(st.integers(1, 9)))
    target = b"".join(parts)
    end = 0
    for found in alignment.find(BASE, target):
        assert end <= found.start < found.end <= len(target)
        assert found.start + found.shift >= 0
        assert found.end + found.shift <= len(BASE)
        end = found.end


@pytest.mark.parametrize("thorough", [False, True])
def test_differences_keep_to_the_ranges_of_their_window(thorough: bool) -> None:
    base = np.frombuffer(BASE, dtype=np.uint8)
    ranges = ((2000, 1000), (100, 900))
    window = b"".join(BASE[start : start + length] for start, length in ranges)
    target = changed(window, 30)
    new = np.frombuffer(target, dtype=np.uint8)
    found = Differences(base, new, 0, target, window, ranges, thorough)
    whole = Coding(Piece(0, len(target), BYTES, None, False, False), None)
    for way in found.code([whole], len):
        place = 0
        for coding in way:
            assert coding.piece.offset == place
            place += coding.piece.length
            if coding.candidate is not None:
                origin, length = coding.candidate.item.base_offset, coding.candidate.item.length
                assert any(start <= origin and origin + length <= start + size for start, size in ranges)
        assert place == len(target)


def test_text_that_is_written_with_other_spaces_costs_little(tmp_path: Path) -> None:
    weights = [
        {
            "dtype": "float32",
            "shape": [RANDOM.randrange(999)],
            "scale": RANDOM.random(),
            "name": f"layer/{n}/w",
        }
        for n in range(150)
    ]
    base = json.dumps([{"paths": ["shard1", "shard2"], "weights": weights}], separators=(",", ":")).encode()
    target = base.replace(b'{"dtype"', b'\n          {"dtype"')
    assert sent(tmp_path, base, target) < 500


@pytest.mark.parametrize("thorough", [False, True])
def test_lzma_is_taken_where_it_is_smaller(thorough: bool) -> None:
    nodes = np.random.default_rng(3).integers(0, 60, 3000)
    tree = np.stack([np.arange(3000), np.arange(3000) // 3, nodes], axis=1).astype("<u4").tobytes()
    plain = streams.compress(tree, 19)
    packed = streams.smaller(plain, tree, thorough)
    assert packed.coder == streams.LZMA
    assert len(packed.coded) < 0.97 * len(plain.coded)
    assert streams.decode(packed, lambda offset, length: b"") == tree
    noise = RANDOM.randbytes(1 << 17)
    assert streams.smaller(streams.compress(noise, 19), noise, thorough).coder == streams.RAW


@pytest.mark.parametrize("thorough", [False, True])
def test_more_care_never_makes_a_stream_larger(thorough: bool) -> None:
    text = json.dumps([RANDOM.randrange(999) for _ in range(9000)]).encode()
    windows = BaseWindows(np.frombuffer(text[:20_000], dtype=np.uint8))
    for data in (text, text[10_000:30_000], BASE, b"", b"0"):
        coder = StreamCoder(windows, 19, thorough)
        for literal in (False, True):
            coded = [coder.code(data, care, literal) for care in Care]
            sizes = [len(stream.coded) + 4 * len(stream.window) for stream in coded]
            assert sizes[1:] == sorted(sizes[1:], reverse=True)
            for stream in coded:
                assert streams.decode(stream, lambda start, length: text[start : start + length]) == data


def test_a_stream_is_coded_once_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    coder = StreamCoder(BaseWindows(np.frombuffer(BASE, dtype=np.uint8)), 19, True)
    first = [coder.code(BASE[:3000], care, literal=True) for care in Care]
    monkeypatch.setattr(streams, "compress_patch", None)
    monkeypatch.setattr(streams, "compress", None)
    monkeypatch.setattr(streams, "smaller", None)
    assert [coder.code(BASE[:3000], care, literal=True) for care in Care] == first


def test_more_stretches_than_a_block_may_have_make_several_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [RANDOM.randbytes(40) for _ in range(400)]
    base = b"".join(records)
    target = b"".join(changed(record, 16) for record in reversed(records))
    monkeypatch.setattr(limits, "MAX_INSTRUCTIONS", 150)
    assert sent(tmp_path, base, target) < len(target) // 3
    data, bounds = (tmp_path / "delta").read_bytes(), delta.DecodeLimits()
    header = container.decode_header(
        data[: container.header_length(data[: container.PREFIX.size], bounds)], bounds
    )
    assert header.block_count > 1
