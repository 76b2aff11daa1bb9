"""Programs: rANS, the arithmetic coder and every operation give back what went in; bad ones are refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_tests.harness import models
from updater import delta
from updater.delta import faults, varint
from updater.delta.program import bits, rans, records, row_bits, run, tables, tokens
from updater.delta.program.arithmetic import Coder, CoderError
from updater.delta.program.encoder import ProgramEncoder
from updater.delta.program.operands import LimitError
from updater.digests import digest_file
from updater.errors import SluiceError
from updater.formats.span import Quantisation, TensorSpan

SPECIALS = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-42, -1e-40], dtype=np.float32)


def weights(rows: int = 64, columns: int = 48, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)


def there_and_back(
    directory: Path,
    old: NDArray[np.generic],
    new: NDArray[np.generic],
    dtypes: tuple[str, str],
    quantisation: Quantisation | None = None,
    block_size: int = 1 << 20,
) -> delta.DeltaSummary:
    spans = []
    for name, values, dtype in zip(("old", "new"), (old, new), dtypes, strict=True):
        (directory / name).write_bytes(values.tobytes())
        meaning = quantisation if name == "new" else None
        spans.append([TensorSpan("w", dtype, values.shape, 0, values.nbytes, meaning)])
    options = delta.EncodeOptions(block_size=block_size)
    summary = delta.create(
        directory / "old",
        directory / "new",
        directory / "d",
        options=options,
        base_spans=spans[0],
        target_spans=spans[1],
    )
    delta.apply(directory / "old", directory / "d", directory / "out")
    assert (directory / "out").read_bytes() == new.tobytes()
    return summary


def predictor(summary: delta.DeltaSummary) -> str:
    return next(region.predictor for region in summary.regions if region.name == "w")


@pytest.mark.parametrize("block_size", [1 << 20, 5000])
def test_quantised_weights_cost_next_to_nothing(tmp_path: Path, block_size: int) -> None:
    old = weights()
    scales = np.abs(old).max(axis=1) / np.float32(127)
    new = np.clip(np.rint(old / scales[:, None]), -127, 127).astype(np.int8)
    meaning = Quantisation(tuple(scales.tolist()), (0,) * 64, 0)
    summary = there_and_back(tmp_path, old, new, ("float32", "int8"), meaning, block_size)
    assert predictor(summary) == "quantised"
    assert summary.delta_size < 64 * 4 + 250


def test_asymmetric_uint8_of_one_scale(tmp_path: Path) -> None:
    old = weights()
    scale = np.float32(old.max() - old.min()) / np.float32(255)
    zero = round(float(-old.min() / scale))
    new = np.clip(np.rint(old / scale) + zero, 0, 255).astype(np.uint8)
    meaning = Quantisation((float(scale),), (zero,), None)
    summary = there_and_back(tmp_path, old, new, ("float32", "uint8"), meaning)
    assert predictor(summary) == "quantised"
    assert summary.delta_size < 300


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_cost_next_to_nothing(tmp_path: Path, dtype: str) -> None:
    old = weights()
    if dtype == "float16":
        new: NDArray[np.generic] = old.astype(np.float16)
    else:
        words = old.view(np.uint32)
        new = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
    summary = there_and_back(tmp_path, old, new, ("float32", dtype))
    assert predictor(summary) == "cast"
    assert summary.delta_size < 200


def test_pruned_weights_cost_next_to_nothing(tmp_path: Path) -> None:
    old = weights()
    new = np.where(np.abs(old) < np.median(np.abs(old)), np.float32(0), old)
    summary = there_and_back(tmp_path, old, new, ("float32", "float32"))
    assert predictor(summary) == "pruned"
    assert summary.delta_size < 200


def test_scaled_rows_are_found(tmp_path: Path) -> None:
    old = weights(columns=256)
    gains = np.random.default_rng(2).uniform(0.5, 2, (64, 1)).astype(np.float32)
    scaled = there_and_back(tmp_path, old, old * gains, ("float32", "float32"))
    other = there_and_back(tmp_path, old, weights(columns=256, seed=9), ("float32", "float32"))
    assert scaled.delta_size < 0.75 * other.delta_size


def test_special_floats_survive_every_operation(tmp_path: Path) -> None:
    old = weights()
    old.reshape(-1)[: len(SPECIALS)] = SPECIALS
    new = (old * np.float32(1.001)).astype(np.float32)
    new.reshape(-1)[9 : 9 + len(SPECIALS)] = SPECIALS
    there_and_back(tmp_path, old, new, ("float32", "float32"))
    with np.errstate(all="ignore"):
        there_and_back(tmp_path, old, old.astype(np.float16), ("float32", "float16"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    dtypes=st.sampled_from(
        [
            ("float32", "float32"),
            ("float32", "int8"),
            ("float32", "float16"),
            ("float32", "bfloat16"),
            ("int8", "int8"),
            ("uint8", "uint8"),
            ("int32", "int32"),
            ("float16", "float16"),
            ("bfloat16", "bfloat16"),
        ]
    ),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 60)),
    block_size=st.sampled_from([1000, 1 << 20]),
)
def test_any_bits_of_any_type(
    tmp_path: Path, seed: int, dtypes: tuple[str, str], shape: tuple[int, int], block_size: int
) -> None:
    random = np.random.default_rng(seed)
    kinds = {"float32": 4, "int8": 1, "uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2}
    old, new = (
        random.integers(0, 256, shape[0] * shape[1] * kinds[dtype], dtype=np.uint8)
        .view(f"u{kinds[dtype]}")
        .reshape(shape)
        for dtype in dtypes
    )
    if dtypes[0] == dtypes[1] and random.random() < 0.7:
        new = old + (random.random(shape) < random.choice([0.01, 0.3, 1])).astype(old.dtype)
    there_and_back(tmp_path, old, new, dtypes, block_size=block_size)


@pytest.mark.parametrize(("count", "carried"), [(1, 0), (700, 3), (50_000, 100), (50_000, 0)])
def test_rans_gives_back_symbols_and_payload(count: int, carried: int) -> None:
    random = np.random.default_rng(count)
    contexts = random.integers(0, 3, count)
    symbols = np.minimum(random.geometric(0.3 + 0.2 * contexts) - 1, 19)
    model, sent = tables.build(symbols, contexts, 3, 20)
    again = tables.read(sent, 3, 20)
    assert (again.classes == model.classes).all()
    assert (again.frequencies == model.frequencies).all()
    coded = rans.join([model.frequencies])
    lanes = rans.lanes_for(int(coded.cost(symbols, model.classes[contexts])), carried, count)
    payload = random.bytes(min(carried, rans.payload_capacity(lanes)))
    data = rans.encode(symbols, model.classes[contexts], coded, lanes, payload)
    out, found = rans.decode(data, count, again.classes[contexts], coded, lanes)
    assert (out == symbols).all()
    assert found[: len(payload)] == payload
    with pytest.raises(rans.RansError):
        rans.decode(data[:-1], count, again.classes[contexts], coded, lanes)


def test_tokens_give_back_every_size() -> None:
    edges = [(1 << bit) + step for bit in range(31) for step in (-1, 0, 1)]
    values = np.array([sign * edge for edge in edges for sign in (1, -1)] + [-(1 << 31)], dtype=np.int32)
    symbols, fields, widths = tokens.encode(values)
    assert int(symbols.max()) < tokens.ALPHABET
    reader = bits.BitReader(bits.pack([(fields, widths)]))
    assert (tokens.decode(symbols, reader).view(np.int32) == values).all()
    reader.end()


@given(st.lists(st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, 32)), max_size=200))
def test_raw_bits_are_those_of_one_long_number(pairs: list[tuple[int, int]]) -> None:
    fields = [(value & ((1 << width) - 1), width) for value, width in pairs]
    number, at = 0, 0
    for value, width in fields:
        number |= value << at
        at += width
    values = np.array([value for value, _ in fields], dtype=np.uint32)
    widths = np.array([width for _, width in fields], dtype=np.uint8)
    packed = bits.pack([(values, widths)])
    assert packed == number.to_bytes((at + 7) // 8, "little")
    reader = bits.BitReader(packed)
    half = len(values) // 2
    assert (np.concatenate([reader.take(widths[:half]), reader.take(widths[half:])]) == values).all()
    reader.end()
    with pytest.raises(bits.BitsError, match="end before"):
        reader.same(8, 1)


@pytest.mark.parametrize("data", [b"\x01\x00", b"\x03"])
def test_raw_bits_that_no_record_takes_are_refused(data: bytes) -> None:
    reader = bits.BitReader(data)
    reader.same(1, 1)
    with pytest.raises(bits.BitsError, match="go on"):
        reader.end()


def test_the_arithmetic_coder_is_its_own_inverse_and_knows_its_end() -> None:
    values = [0, 1, -1, 5, 1 << 40, -(1 << 40), 7, 7, 7]
    writer = Coder()
    for value in values:
        writer.signed("a", value)
    data = writer.finish()
    reader = Coder(data)
    assert [reader.signed("a") for _ in values] == values
    reader.end()
    longer = Coder(data + b"\0")
    assert [longer.signed("a") for _ in values] == values
    with pytest.raises(CoderError, match="does not end"):
        longer.end()
    with pytest.raises(CoderError):
        for _ in range(10_000):
            reader.bits(0, 8)
    with pytest.raises(LimitError):
        Coder(data, budget=0).signed("a")


def made() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A base, and programs with their targets that together use floats, codes, gaps and the byte model."""
    old = weights()
    codes = np.random.default_rng(3).integers(-60, 60, (64, 48)).astype(np.int8)
    text = b"".join(b"layer %d of this model; " % index for index in range(40))
    base = text + old.tobytes() + codes.tobytes()
    out = []
    for step in (0.002, 0.2):
        random = np.random.default_rng(4)
        moved = (
            codes + random.integers(-2, 3, codes.shape) * (random.random(codes.shape) < step * 5)
        ).astype(np.int8)
        scale = np.float32(np.abs(old).max()) / np.float32(127)
        new = old + random.normal(0, step, old.shape).astype(np.float32)
        target = text.replace(b"1 of", b"11 of") + new.tobytes() + moved.tobytes()
        target += np.rint(old / scale).astype(np.int8).tobytes()
        at = len(text.replace(b"1 of", b"11 of"))
        spans = [
            TensorSpan("f", "float32", old.shape, at, old.nbytes),
            TensorSpan("c", "int8", codes.shape, at + old.nbytes, codes.nbytes),
            TensorSpan(
                "q",
                "int8",
                old.shape,
                at + old.nbytes + codes.nbytes,
                old.size,
                Quantisation((float(scale),), (0,), None),
            ),
        ]
        before = [
            TensorSpan("f", "float32", old.shape, len(text), old.nbytes),
            TensorSpan("c", "int8", codes.shape, len(text) + old.nbytes, codes.nbytes),
        ]
        encoder = ProgramEncoder(
            np.frombuffer(base, dtype=np.uint8),
            before,
            np.frombuffer(target, dtype=np.uint8),
            spans,
            19,
            False,
        )
        program = encoder.encode(0, len(target))
        assert program is not None
        out.append((program.data, target))
    return base, out


def test_damaged_programs_end_with_an_error_or_other_bytes_of_the_right_length() -> None:
    base, programs = made()

    def read(offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(base):
            raise faults.invalid("outside")
        return base[offset : offset + length]

    random = np.random.default_rng(8)
    for program, target in programs:
        assert run(read, program, 0, len(target)) == target
        for _ in range(50):
            damaged = bytearray(program)
            where = int(random.integers(0, min(len(program), random.choice([12, 200, 1 << 20]))))
            damaged[where] ^= int(random.integers(1, 256))
            with contextlib.suppress(SluiceError):
                assert len(run(read, bytes(damaged), 0, len(target))) == len(target)
        for cut in random.integers(0, len(program), 12):
            with contextlib.suppress(SluiceError):
                assert len(run(read, program[:cut], 0, len(target))) == len(target)


def test_fast_effort_does_without_programs(tmp_path: Path) -> None:
    old = weights()
    (tmp_path / "old").write_bytes(old.tobytes())
    (tmp_path / "new").write_bytes((old * np.float32(1.01)).tobytes())
    with pytest.raises(SluiceError, match="effort"):
        delta.create(
            tmp_path / "old", tmp_path / "new", tmp_path / "d", options=delta.EncodeOptions(effort="more")
        )
    spans = [TensorSpan("w", "float32", old.shape, 0, old.nbytes)]
    sizes = {}
    for effort in ("fast", "default", "max"):
        summary = delta.create(
            tmp_path / "old",
            tmp_path / "new",
            tmp_path / "d",
            options=delta.EncodeOptions(effort=effort),
            base_spans=spans,
            target_spans=spans,
        )
        assert effort != "fast" or all(region.instruction != "program" for region in summary.regions)
        sizes[effort] = summary.delta_size
    assert sizes["max"] <= sizes["default"] <= sizes["fast"]


def test_programs_resume_at_every_block(tmp_path: Path) -> None:
    """A new Applier for each piece of the delta gives the same file; work is never begun anew."""
    old = weights(200)
    new = old + weights(200, seed=6) * np.float32(0.1)
    summary = there_and_back(tmp_path, old, new, ("float32", "float32"), block_size=6000)
    assert {region.instruction for region in summary.regions} == {"program"}
    data, offsets = (tmp_path / "d").read_bytes(), set()
    while True:
        with delta.Applier(tmp_path / "old", tmp_path / "partial", sync_bytes=1) as applier:
            start = applier.resume_offset
            offsets.add(start)
            applier.feed(data[start : start + 9000])
            if start + 9000 >= len(data):
                applier.finish()
                break
    assert len(offsets) > 2
    assert (tmp_path / "partial").read_bytes() == new.tobytes()


@pytest.mark.parametrize("op", [records.QUANTISED, records.BIAS, records.RESCALED])
def test_scales_that_do_not_fit_their_record_are_refused_before_memory_is_taken(op: int) -> None:
    """One row against many scales would broadcast to their product."""
    scales = records.Record(records.SAME, records.F32, 0, 50_000, base=0)
    kind = records.I8 if op == records.QUANTISED else records.I32
    many = records.Record(op, kind, 200_000, 50_000, rows=1, base=0, one=0, residual=records.EXACT)
    coder = Coder(limit=30)
    records.code_records(coder, [scales, many], 400_000, 0, row_bits.RowBits(), records.Share(400_000))
    coded = coder.finish()
    program = varint.encode(len(coded)) + bytes([0, 0, 0, 0]) + coded + bytes([0]) + bytes(400_000)
    assert many.columns == 50_000
    if op != records.QUANTISED:
        few = replace(many, count=3, base=0)
        coder = Coder(limit=30)
        records.code_records(coder, [scales, few], 400_000, 0, row_bits.RowBits(), records.Share(400_000))
        coded = coder.finish()
        program = varint.encode(len(coded)) + bytes([0, 0, 0, 0]) + coded + bytes([0]) + bytes(400_000)
    with pytest.raises(SluiceError, match="another number of scales"):
        run(lambda offset, length: bytes(length), program, 0, 400_000)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float32", "float16", "int32"])
@pytest.mark.parametrize("base_bytes", [None, 100])
def test_arrays_without_a_base_or_with_one_too_small(
    tmp_path: Path, dtype: str, base_bytes: int | None
) -> None:
    base = None
    if base_bytes is not None:
        base = tmp_path / "base"
        base.write_bytes(bytes(base_bytes))
    new = np.random.default_rng(5).normal(0, 20, (64, 48)).astype(dtype)
    (tmp_path / "new").write_bytes(new.tobytes())
    spans = [TensorSpan("w", dtype, new.shape, 0, new.nbytes, Quantisation((0.1,), (0,), None))]
    delta.create(base, tmp_path / "new", tmp_path / "d", target_spans=spans)
    delta.apply(base, tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == new.tobytes()


def test_full_copies_of_models_need_no_base(tmp_path: Path) -> None:
    """A full copy has no base that a program could read."""
    for name, make in (("m.tflite", models.tiny_tflite), ("m.onnx", models.tiny_onnx)):
        target = make(tmp_path / name)
        delta.create(None, target, tmp_path / "full")
        assert delta.apply(None, tmp_path / "full", tmp_path / "out") == digest_file(target)
