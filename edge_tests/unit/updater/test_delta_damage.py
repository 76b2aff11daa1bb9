"""A damaged, hostile or misdirected delta gives a DELTA error and never a wrong file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from updater import delta, limits
from updater.delta import assembly, container, instructions, streams, varint
from updater.delta.elements import ELEMENT_TYPES
from updater.delta.instructions import Copy, Literal, Requantise, Tensor
from updater.delta.streams import Stream
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.formats.span import Quantisation, TensorSpan

BASE = np.random.default_rng(0).integers(0, 60, 600, dtype=np.uint8).tobytes()


@dataclass(frozen=True)
class Sample:
    base: bytes | None
    target: bytes
    data: bytes


def make(
    tmp: Path,
    base: bytes | None,
    target: bytes,
    dtype: str = "",
    scales: tuple[float, float] = (0, 0),
    effort: str = "fast",
) -> Sample:
    (tmp / "t").write_bytes(target)
    if base is not None:
        (tmp / "b").write_bytes(base)
    spans = []
    for scale, content in zip(scales, (base or b"", target), strict=True):
        quantisation = Quantisation((scale,), (1,), None) if scale else None
        spans.append(
            [TensorSpan("w", dtype, (len(content),), 0, len(content), quantisation)] if dtype else []
        )
    delta.create(
        tmp / "b" if base is not None else None,
        tmp / "t",
        tmp / "d",
        options=delta.EncodeOptions(block_size=400 if effort == "fast" else 3000, effort=effort),
        base_spans=spans[0],
        target_spans=spans[1],
    )
    return Sample(base, target, (tmp / "d").read_bytes())


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Small deltas that together use every instruction, predictor and coder."""
    tmp = tmp_path_factory.mktemp("samples")
    codes = np.frombuffer(BASE, dtype=np.uint8).astype(np.int8)
    sparse = codes.copy()
    sparse[::90] += 3
    rescaled = np.clip(np.round((codes.astype(np.float64) - 1) * 1.5) + 1, -128, 127).astype(np.int8)
    halves = np.linspace(-2, 2, 300).astype(np.float16)
    moved = (halves * np.float16(1.01)).astype(np.float16)
    random = np.random.default_rng(7)
    numbers = random.normal(0, 0.1, 300).astype(np.float32)
    tuned = (numbers, (numbers * 1.001).astype(np.float32))
    many = random.integers(-90, 90, 1200).astype(np.int8)
    dense = (many, (many + random.integers(-2, 3, 1200)).astype(np.int8))
    text = (b"a name and its number 1234, " * 20, b"a name and its number 1235, " * 20 + b"and one more")
    nodes = [
        b"".join(b"\n%c%s.block.%d.weight" % (len(name) + 16, name, node) for node in range(20))
        for name in (b"model", b"main")
    ]
    cubes = b"".join(struct.pack("<2H", number, number**3 % 17) for number in range(60))
    found = [
        make(tmp, None, b"full copy " * 30),
        make(tmp, None, cubes, effort="default"),
        make(tmp, BASE, BASE[100:350] + b"between" + BASE[:300]),
        make(tmp, BASE, sparse.tobytes(), "int8"),
        make(tmp, BASE, rescaled.tobytes(), "int8", (0.3, 0.2)),
        make(tmp, halves.tobytes(), moved.tobytes(), "float16"),
        make(tmp, tuned[0].tobytes(), tuned[1].tobytes(), "float32", effort="default"),
        make(tmp, dense[0].tobytes(), dense[1].tobytes(), "int8", effort="default"),
        make(tmp, text[0], text[1], effort="default"),
        make(tmp, nodes[0], nodes[1], effort="default"),
    ]
    features = {name for sample in found for name in read(sample.data)[0].features}
    assert features == set(delta.FEATURES)
    return found


def read(data: bytes) -> tuple[container.Header, list[tuple[bytes, int]]]:
    """A sound delta taken apart: its header, and payload and target length of each block."""
    bounds = delta.DecodeLimits()
    at = container.header_length(data[: container.PREFIX.size], bounds)
    header = container.decode_header(data[:at], bounds)
    blocks = []
    for number in range(header.block_count):
        head, length = container.scan_block_head(data[at:], number, header.block_size)
        at += length
        blocks.append((data[at : at + head.payload_length], head.target_length))
        at += head.payload_length
    return header, blocks


def build(header: container.Header, blocks: list[tuple[bytes, int]]) -> bytes:
    """The inverse of `read`: with right checksums, whatever the blocks hold."""
    start = container.encode_header(header)
    seed = container.header_checksum(start)
    body = [
        container.encode_block(seed, number, length, payload)
        for number, (payload, length) in enumerate(blocks)
    ]
    return start + b"".join(body) + bytes([container.MARK_END])


def outcome(
    tmp: Path, data: bytes, base: bytes | None, bounds: delta.DecodeLimits | None = None
) -> str | bytes:
    """What applying `data` gives: the target, or the code of the error. Nothing else may be raised."""
    if base is not None:
        (tmp / "base").write_bytes(base)
    applier = delta.Applier(
        tmp / "base" if base is not None else None, tmp / "partial", limits=bounds or delta.DecodeLimits()
    )
    try:
        applier.feed(data)
        applier.finish()
        return (tmp / "partial").read_bytes()
    except SluiceError as error:
        assert error.message
        return error.code
    finally:
        applier.discard()


def refused(result: str | bytes) -> bool:
    return isinstance(result, str) and result.startswith("DELTA_")


def test_every_flipped_byte_is_noticed(tmp_path: Path, samples: list[Sample]) -> None:
    for sample in samples:
        for place in range(len(sample.data)):
            for bits in (0x01, 0xFF):
                data = bytearray(sample.data)
                data[place] ^= bits
                assert refused(outcome(tmp_path, bytes(data), sample.base)), (place, bits)


def test_every_truncation_is_noticed(tmp_path: Path, samples: list[Sample]) -> None:
    for sample in samples:
        for length in range(len(sample.data)):
            assert outcome(tmp_path, sample.data[:length], sample.base) == "DELTA_TRUNCATED", length


def test_trailing_bytes_are_refused(tmp_path: Path, samples: list[Sample]) -> None:
    for sample in samples:
        assert outcome(tmp_path, sample.data + b"\0", sample.base) == "DELTA_INVALID"


def test_any_cut_of_the_stream_gives_the_target(tmp_path: Path, samples: list[Sample]) -> None:
    for sample in samples:
        if sample.base is not None:
            (tmp_path / "base").write_bytes(sample.base)
        for step in (1, 3, 50):
            with delta.Applier(tmp_path / "base" if sample.base else None, tmp_path / "out") as applier:
                for start in range(0, len(sample.data), step):
                    assert applier.resume_offset == start
                    applier.feed(sample.data[start : start + step])
                assert applier.finish() == digest_bytes(sample.target)
            assert (tmp_path / "out").read_bytes() == sample.target


def test_damage_behind_right_checksums_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    """Each byte of each payload changed, the checksums made right: the decoder itself must hold."""
    for sample in samples:
        header, blocks = read(sample.data)
        for number, (payload, length) in enumerate(blocks):
            for place in range(len(payload)):
                for value in {0, 0x80, 0xFF, payload[place] ^ 1} - {payload[place]}:
                    changed = payload[:place] + bytes([value]) + payload[place + 1 :]
                    result = outcome(
                        tmp_path,
                        build(header, [*blocks[:number], (changed, length), *blocks[number + 1 :]]),
                        sample.base,
                    )
                    # A frame may spell the same bytes in another way; then the target is right.
                    assert refused(result) or result == sample.target


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_behind_right_checksums(
    tmp_path: Path, samples: list[Sample], data: st.DataObject
) -> None:
    sample = data.draw(st.sampled_from(samples))
    header, blocks = read(sample.data)
    number = data.draw(st.integers(0, len(blocks) - 1))
    payload = bytearray(blocks[number][0])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(payload)))
        payload[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    blocks[number] = (bytes(payload), blocks[number][1])
    result = outcome(tmp_path, build(header, blocks), sample.base)
    assert refused(result) or result == sample.target


def test_blocks_of_another_delta_or_order_are_refused(tmp_path: Path, samples: list[Sample]) -> None:
    sample = samples[2]
    at = len(sample.data) - 1
    header, blocks = read(sample.data)
    assert header.block_count == 2
    other = build(replace(header, base_size=header.base_size, features=delta.FEATURES), blocks)
    assert outcome(tmp_path, other[: len(other) - at] + sample.data[-at:], sample.base) != sample.target
    start = container.encode_header(header)
    seed = container.header_checksum(start)
    swapped = b"".join(
        container.encode_block(seed, 1 - number, length, payload)
        for number, (payload, length) in enumerate(blocks)
    )
    assert outcome(tmp_path, start + swapped + b"E", sample.base) == "DELTA_CORRUPT"


def header_for(target: bytes, base: bytes | None = BASE, **changes: object) -> container.Header:
    fields: dict[str, object] = {
        "base_digest": digest_bytes(base) if base is not None else None,
        "base_size": len(base or b""),
        "target_digest": digest_bytes(target),
        "target_size": len(target),
        "block_size": 1 << 20,
        "block_count": 1 if target else 0,
        "features": delta.FEATURES,
    }
    return container.Header(**(fields | changes))  # type: ignore[arg-type]


def block_of(items: list[instructions.Instruction], others: list[Stream]) -> bytes:
    listing = instructions.encode(items, 0)
    return streams.encode_table([Stream(streams.RAW, len(listing), listing), *others], 0)


def raw(data: bytes) -> Stream:
    return Stream(streams.RAW, len(data), data)


INT8, INT32, FLOAT32 = ELEMENT_TYPES[1], ELEMENT_TYPES[7], ELEMENT_TYPES[8]
SCALE = Requantise(0, 1, 10, (1 << 10,), (0,), (0,))


def bad_blocks() -> Iterator[tuple[str, bytes, str]]:
    """Blocks of 100 target bytes that no decoder may follow."""
    yield "copy outside the base", block_of([Copy(550, 100)], []), "DELTA_INVALID"
    yield "copy far outside", block_of([Copy(1 << 62, 100)], []), "DELTA_INVALID"
    yield "too little", block_of([Copy(0, 99)], []), "DELTA_INVALID"
    yield "too much", block_of([Copy(0, 60), Copy(0, 60)], []), "DELTA_INVALID"
    yield "nothing", block_of([], []), "DELTA_INVALID"
    yield "stream too short", block_of([Literal(1, 100)], [raw(bytes(50))]), "DELTA_INVALID"
    yield "stream not used up", block_of([Literal(1, 100)], [raw(bytes(101))]), "DELTA_INVALID"
    yield "stream unused", block_of([Copy(0, 100)], [raw(b"x")]), "DELTA_INVALID"
    yield "stream not there", block_of([Literal(2, 100)], [raw(bytes(100))]), "DELTA_INVALID"
    yield "the instructions as literal", block_of([Literal(0, 100)], []), "DELTA_INVALID"
    many = [item for _ in range(50) for item in (Copy(0, 1), Copy(9, 1))]
    yield "instructions over the limit", block_of(many, []), "DELTA_LIMIT_EXCEEDED"
    yield "unknown opcode", streams.encode_table([raw(b"\x09")], 0), "DELTA_UNSUPPORTED"
    yield "unknown coder", b"\x01\x07\x01\x00", "DELTA_UNSUPPORTED"
    yield "no streams", b"\x00", "DELTA_INVALID"
    yield "streams over the limit", varint.encode(limits.MAX_STREAMS + 1), "DELTA_LIMIT_EXCEEDED"
    yield "bytes after the streams", block_of([Copy(0, 100)], []) + b"x", "DELTA_INVALID"
    yield "overlong integer", b"\x81\x00", "DELTA_INVALID"
    yield "endless integer", b"\xff" * 20, "DELTA_INVALID"

    tensor = Tensor(instructions.DIFFERENCE, instructions.DENSE, INT8, 100, 0, 0, (1,))
    yield (
        "unknown predictor",
        block_of([replace(tensor, predictor=9)], [raw(bytes(100))]),
        "DELTA_UNSUPPORTED",
    )
    yield (
        "tensor outside the base",
        block_of([replace(tensor, base_offset=501)], [raw(bytes(100))]),
        "DELTA_INVALID",
    )
    yield "planes too short", block_of([tensor], [raw(bytes(99))]), "DELTA_INVALID"
    yield (
        "more elements than the block",
        block_of([replace(tensor, count=101)], [raw(bytes(101))]),
        "DELTA_INVALID",
    )
    huge = replace(tensor, count=1 << 33)
    yield "elements beyond all memory", block_of([huge], [raw(bytes(100))]), "DELTA_INVALID"

    sparse = replace(tensor, coding=instructions.SPARSE, gap_bytes=2, streams=(1, 2))
    yield "gap beyond the tensor", block_of([sparse], [raw(b"\x60\x60"), raw(b"\0\0")]), "DELTA_INVALID"
    yield "gap without an end", block_of([sparse], [raw(b"\x01\xff"), raw(b"\0")]), "DELTA_INVALID"

    requantise = Tensor(instructions.REQUANTISE, instructions.DENSE, INT8, 100, 0, 0, (1,), SCALE, 2)

    def scaled(shape: Requantise, item: Tensor = requantise) -> bytes:
        numbers = instructions.encode_parameters(shape)
        return block_of([replace(item, requantise=shape)], [raw(bytes(100)), raw(numbers)])

    yield "multiplier 0", scaled(replace(SCALE, multipliers=(0,))), "DELTA_INVALID"
    yield "multiplier too large", scaled(replace(SCALE, multipliers=((1 << 30) + 1,))), "DELTA_INVALID"
    yield "shift too large", scaled(replace(SCALE, shift=63, multipliers=(1 << 62,))), "DELTA_INVALID"
    yield "no channels", scaled(replace(SCALE, multipliers=())), "DELTA_INVALID"
    yield "inner 0", scaled(replace(SCALE, inner=0)), "DELTA_INVALID"
    yield "start too large", scaled(replace(SCALE, start=1 << 62)), "DELTA_INVALID"
    yield "zero point too large", scaled(replace(SCALE, old_zero=(1 << 40,))), "DELTA_INVALID"
    short = block_of([requantise], [raw(bytes(100)), raw(b"\0")])
    yield "parameters too short", short, "DELTA_INVALID"
    floats = replace(requantise, kind=FLOAT32, count=25, streams=(1, 1, 1, 1))
    yield "floats requantised", scaled(SCALE, floats), "DELTA_INVALID"

    bomb = zstandard.ZstdCompressionParameters.from_level(3, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    coded = zstandard.ZstdCompressor(compression_params=bomb).compress(bytes(50_000_000))
    yield (
        "a frame larger than its stream",
        block_of([Literal(1, 100)], [Stream(streams.ZSTD, 100, coded[:90])]),
        "DELTA_INVALID",
    )
    yield (
        "streams larger than the block allows",
        block_of([Literal(1, 100)], [Stream(streams.ZSTD, 50_000_000, coded[:90])]),
        "DELTA_LIMIT_EXCEEDED",
    )
    yield (
        "a frame that is none",
        block_of([Literal(1, 100)], [Stream(streams.ZSTD, 100, b"nothing")]),
        "DELTA_",
    )
    yield "an empty frame", block_of([Literal(1, 100)], [Stream(streams.ZSTD, 100, b"")]), "DELTA_CORRUPT"

    def patched(*window: tuple[int, int]) -> bytes:
        stream = streams.compress_patch(BASE[:100], BASE, window, 3)
        return block_of([Literal(1, 100)], [stream])

    yield "window outside the base", patched((0, 601)), "DELTA_INVALID"
    yield "window over the limit", patched((0, 1 << 24)), "DELTA_LIMIT_EXCEEDED"
    yield "window of nothing", patched((0, 0)), "DELTA_INVALID"
    yield "no window", patched(), "DELTA_INVALID"
    yield "another window", patched((300, 100)), "DELTA_"


@pytest.mark.parametrize(("payload", "code"), [pytest.param(p, c, id=name) for name, p, c in bad_blocks()])
def test_bad_blocks(tmp_path: Path, payload: bytes, code: str) -> None:
    target = BASE[:100]
    data = build(header_for(target), [(payload, 100)])
    bounds = delta.DecodeLimits(instructions=99)
    result = outcome(tmp_path, data, BASE, bounds)
    assert isinstance(result, str)
    assert result.startswith(code)


def test_features_must_be_named_by_the_header(tmp_path: Path, samples: list[Sample]) -> None:
    for sample in samples:
        header, blocks = read(sample.data)
        for feature in header.features:
            fewer = tuple(name for name in header.features if name != feature)
            result = outcome(tmp_path, build(replace(header, features=fewer), blocks), sample.base)
            assert result == "DELTA_INVALID", feature


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"features": ("rans", "tensor")}, "DELTA_UNSUPPORTED"),
        ({"features": ("tensor", "patch")}, "DELTA_INVALID"),
        ({"features": ("patch", "patch")}, "DELTA_INVALID"),
        ({"features": ("Not a name",)}, "DELTA_INVALID"),
        ({"features": ("x" * 33,)}, "DELTA_LIMIT_EXCEEDED"),
        ({"features": tuple(f"f{n:03}" for n in range(65))}, "DELTA_LIMIT_EXCEEDED"),
        ({"block_size": 0}, "DELTA_INVALID"),
        ({"block_size": limits.MAX_BLOCK_BYTES + 1}, "DELTA_LIMIT_EXCEEDED"),
        ({"block_count": 0}, "DELTA_INVALID"),
        ({"block_count": 101}, "DELTA_INVALID"),
        ({"target_size": limits.MAX_TARGET_BYTES + 1}, "DELTA_LIMIT_EXCEEDED"),
        ({"base_size": 599}, "DELTA_WRONG_BASE"),
        ({"base_digest": digest_bytes(b"another")}, "DELTA_WRONG_BASE"),
        ({"target_digest": digest_bytes(b"another")}, "DELTA_TARGET_MISMATCH"),
        ({"block_count": 2}, "DELTA_INVALID"),
    ],
)
def test_bad_headers(tmp_path: Path, changes: dict[str, object], code: str) -> None:
    target = BASE[:100]
    payload = assembly.raw_block(target, 0).payload
    assert outcome(tmp_path, build(header_for(target), [(payload, 100)]), BASE) == target
    assert outcome(tmp_path, build(header_for(target, **changes), [(payload, 100)]), BASE) == code


def test_a_delta_of_a_later_version_is_named_unsupported(tmp_path: Path) -> None:
    start = bytearray(container.encode_header(header_for(b"")))
    start[8] = 2
    assert outcome(tmp_path, bytes(start), BASE) == "DELTA_UNSUPPORTED"


def test_unknown_flags_are_refused(tmp_path: Path) -> None:
    start = bytearray(container.encode_header(header_for(b"", base=None)))
    start[container.PREFIX.size] = 2
    start[-4:] = struct.pack("<I", zlib.crc32(start[:-4]))
    assert outcome(tmp_path, bytes(start) + b"E", None) == "DELTA_INVALID"


@pytest.mark.parametrize("damage", [b"\r\n", b"\n\r"], ids=["lf-to-crlf", "swapped"])
def test_text_mode_transfers_are_noticed_at_once(
    tmp_path: Path, samples: list[Sample], damage: bytes
) -> None:
    data = samples[0].data.replace(b"\n", damage)
    assert outcome(tmp_path, data[:12], None) == "DELTA_INVALID"


def test_payload_longer_than_its_block_allows(tmp_path: Path) -> None:
    start = container.encode_header(header_for(BASE[:100]))
    payload = bytes(100 + limits.BLOCK_OVERHEAD_BYTES + 1)
    block = container.encode_block(container.header_checksum(start), 0, 100, payload)
    assert outcome(tmp_path, start + block[:20], BASE) == "DELTA_LIMIT_EXCEEDED"


def test_announced_target_is_compared_before_anything_is_written(
    tmp_path: Path, samples: list[Sample]
) -> None:
    sample = samples[0]
    for expected in ({"expected_target": digest_bytes(b"x")}, {"expected_size": len(sample.target) + 1}):
        with delta.Applier(None, tmp_path / "out", **expected) as applier:  # type: ignore[arg-type]
            with pytest.raises(SluiceError, match="announced") as caught:
                applier.feed(sample.data)
            assert caught.value.code == "DELTA_TARGET_MISMATCH"
        assert (tmp_path / "out").read_bytes() == b""


def test_wrong_target_removes_partial_and_journal(tmp_path: Path) -> None:
    payload = assembly.raw_block(BASE[:100], 0).payload
    data = build(header_for(BASE[1:101]), [(payload, 100)])
    with delta.Applier(tmp_path / "b", tmp_path / "out") as applier:
        (tmp_path / "b").write_bytes(BASE)
        applier.feed(data)
        with pytest.raises(SluiceError, match="instead of"):
            applier.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_apply_leaves_the_old_file_when_it_fails(tmp_path: Path, samples: list[Sample]) -> None:
    sample = samples[2]
    assert sample.base is not None
    (tmp_path / "b").write_bytes(sample.base[::-1])
    (tmp_path / "d").write_bytes(sample.data)
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(SluiceError) as caught:
        delta.apply(tmp_path / "b", tmp_path / "d", tmp_path / "out")
    assert caught.value.code == "DELTA_WRONG_BASE"
    with pytest.raises(SluiceError) as caught:
        delta.apply(None, tmp_path / "d", tmp_path / "out")
    assert caught.value.code == "DELTA_WRONG_BASE"
    with pytest.raises(SluiceError) as caught:
        delta.apply(tmp_path / "nowhere", tmp_path / "d", tmp_path / "out")
    assert caught.value.code == "IO_FAILED"
    assert (tmp_path / "out").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d", "out"]
    (tmp_path / "b").write_bytes(sample.base)
    delta.apply(tmp_path / "b", tmp_path / "d", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == sample.target


def test_describe_refuses_what_apply_refuses(tmp_path: Path, samples: list[Sample]) -> None:
    for sample in samples:
        if sample.base is not None:
            (tmp_path / "b").write_bytes(sample.base)
        for place in range(len(sample.data) - 1):
            data = bytearray(sample.data)
            data[place] ^= 0x10
            (tmp_path / "d").write_bytes(data)
            with pytest.raises(SluiceError, match="DELTA_"):
                delta.describe(tmp_path / "b" if sample.base else None, tmp_path / "d")
        for length in range(len(sample.data)):
            (tmp_path / "d").write_bytes(sample.data[:length])
            with pytest.raises(SluiceError, match="DELTA_TRUNCATED"):
                delta.describe(tmp_path / "b" if sample.base else None, tmp_path / "d")


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 23}, {"block_size": 1}, {"threads": -1}])
def test_options_out_of_range(tmp_path: Path, options: dict[str, int]) -> None:
    (tmp_path / "t").write_bytes(b"x")
    with pytest.raises(SluiceError, match="REQUEST_INVALID"):
        delta.create(None, tmp_path / "t", tmp_path / "d", options=delta.EncodeOptions(**options))
    assert not (tmp_path / "d").exists()
