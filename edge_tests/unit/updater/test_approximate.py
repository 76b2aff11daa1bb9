"""The mathematics of approximate updates, on arrays and on real files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_tests.harness.models import tiny_onnx
from sluice.api.v1 import errors_pb2
from updater import approximate as ap
from updater.approximate.layers import decode, encode
from updater.delta.elements import element_type, to_ordered
from updater.errors import SluiceError
from updater.formats import read_model
from updater.formats.span import Quantisation

FLOATS = ("float16", "bfloat16", "float32", "float64")
SETTINGS = settings(max_examples=40, deadline=None)


def layer(
    old: NDArray[Any], new: NDArray[Any], dtype: str = "float32", shape: tuple[int, ...] = ()
) -> ap.Layer:
    if dtype in FLOATS:
        old, new = encode(old.reshape(-1), dtype), encode(new.reshape(-1), dtype)
    return ap.Layer("w", dtype, shape or (len(old), 1), 0, old, new)


def tuned(
    seed: int, rows: int = 12, columns: int = 70, dtype: str = "float32", size: float = 0.02
) -> ap.Layer:
    """A layer whose weights all moved a little."""
    rng = np.random.default_rng(seed)
    old = rng.normal(0, 0.05, rows * columns)
    new = old + rng.normal(0, size * 0.05, rows * columns)
    return layer(old, new, dtype, (rows, columns))


def tally(method: ap.Method, amount: int, rounding: ap.Rounding = ap.EXACT) -> ap.Tally:
    layers = method.layers
    words = [ap.realise(found, method.update(i, amount), rounding) for i, found in enumerate(layers)]
    return ap.tally(layers, words)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_finite_word_of_16_bits_survives_decoding(dtype: str) -> None:
    words = np.arange(1 << 16, dtype="<u2")
    words = words[np.isfinite(decode(words, dtype))]
    assert len(words) > 1 << 15
    assert np.array_equal(encode(decode(words, dtype), dtype), words)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
@SETTINGS
def test_bfloat16_is_rounded_to_the_nearest(values: list[float]) -> None:
    found = decode(encode(np.array(values), "bfloat16"), "bfloat16")
    for wanted, got in zip(np.array(values), found, strict=True):
        if np.isfinite(got):
            near = encode(np.array([wanted]), "bfloat16").astype(int) + np.array([-1, 1])
            others = decode(np.clip(near, 0, 0xFFFF).astype("<u2"), "bfloat16")
            assert all(abs(got - wanted) <= abs(other - wanted) or np.isnan(other) for other in others)


@given(st.integers(0, 1 << 30), st.sampled_from(FLOATS), st.sampled_from(ap.ROUNDINGS))
@SETTINGS
def test_words_without_a_code_stay_the_bases(seed: int, dtype: str, rounding: ap.Rounding) -> None:
    found = tuned(seed, dtype=dtype)
    # -0.0 is the word that adding nothing would change.
    found.base[:5] = 1 << (8 * found.base.itemsize - 1)
    codes = np.random.default_rng(seed).integers(-3, 4, found.size)
    codes[:5] = 0
    words = ap.realise(found, ap.Update(codes, np.array([1e-3])), rounding)
    assert words.dtype == found.base.dtype
    assert np.array_equal(words[codes == 0], found.base[codes == 0])


@given(st.integers(0, 1 << 30), st.floats(1e-8, 10))
@SETTINGS
def test_unrounded_values_are_base_and_code_times_step_in_double_precision(seed: int, step: float) -> None:
    found = tuned(seed)
    codes = np.random.default_rng(seed).integers(-100, 101, found.size)
    words = ap.realise(found, ap.Update(codes, np.array([step])))
    wanted = (found.base.view("<f4").astype(np.float64) + codes * step).astype("<f4")
    assert np.array_equal(words[codes != 0], wanted.view("<u4")[codes != 0])


def test_a_value_that_would_overflow_stays_the_bases() -> None:
    found = layer(np.array([6e4, 1.0]), np.array([6.1e4, 2.0]), "float16", (2, 1))
    words = ap.realise(found, ap.Update(np.array([1, 1]), np.array([1e5])))
    assert decode(words, "float16").tolist() == [
        decode(found.base, "float16")[0],
        decode(found.base, "float16")[1],
    ]


@given(st.integers(0, 1 << 30), st.sampled_from(["float32", "float64"]), st.sampled_from(ap.ROUNDINGS[1:]))
@SETTINGS
def test_rounding_makes_differences_multiples_and_errs_by_half_a_unit(
    seed: int, dtype: str, rounding: ap.Rounding
) -> None:
    found = tuned(seed, dtype=dtype)
    assert rounding.bits is not None
    shift = {"float32": 23, "float64": 52}[dtype] - rounding.bits
    update = ap.Update(np.random.default_rng(seed).integers(-3, 4, found.size), np.array([7e-4]))
    kind = element_type(dtype)
    base, plain, rounded = (
        to_ordered(words, kind).astype(object)
        for words in (found.base, ap.realise(found, update), ap.realise(found, update, rounding))
    )
    difference = rounded - base
    for d, wanted in zip(difference, plain - base, strict=True):
        offset = rounding.up if d > 0 else rounding.down
        assert not d or (abs(d) - offset) % (1 << shift) == 0
        assert abs(d - wanted) <= (1 << (shift - 1)) + 1


@given(st.integers(0, 1 << 30))
@SETTINGS
def test_sign_keeps_what_its_scale_can_keep(seed: int) -> None:
    found = tuned(seed)
    method = ap.make_method("sign", [found])
    change = found.change().reshape(found.rows, -1)
    means = np.abs(change).mean(axis=1)
    # The least error of scale * sign(d) for a row is |d|^2 - n * mean^2.
    least = (change**2).sum() - (change.shape[1] * means**2).sum()
    figures = tally(method, method.most).layers[0]
    assert figures.error_energy == pytest.approx(least, rel=1e-3)
    assert set(np.unique(method.update(0, method.most).codes)) <= {-1, 0, 1}


@given(st.integers(0, 1 << 30), st.integers(1, 500), st.sampled_from(["topk", "threshold"]))
@SETTINGS
def test_the_largest_changes_of_the_model_are_kept(seed: int, amount: int, name: str) -> None:
    layers = [tuned(seed), tuned(seed + 1, size=0.2), tuned(seed + 2, dtype="float16")]
    method = ap.make_method(name, layers)
    sizes, kept = [], []
    for index, found in enumerate(layers):
        scale = np.sqrt((found.values(found.target) ** 2).mean()) if name == "threshold" else 1.0
        sizes.append((np.abs(found.change()) / scale).astype(np.float32))
        kept.append(method.update(index, amount).codes != 0)
    size, keep = np.concatenate(sizes), np.concatenate(kept)
    assert keep.sum() >= amount  # ties with the least are kept too
    assert size[keep].min() > size[~keep].max()
    assert keep.sum() == (size >= np.sort(size)[-amount]).sum()


@pytest.mark.parametrize("name", ap.METHODS)
def test_more_explains_more_and_all_explains_most(name: str) -> None:
    method = ap.make_method(name, [tuned(1), tuned(2, 30, 40)])
    shares = [
        tally(method, amount).explained for amount in range(0, method.most + 1, max(1, method.most // 12))
    ]
    assert shares[0] == 0
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(shares))
    assert tally(method, method.most).explained > {"sign": 0.55, "lowrank": 0.97}.get(name, 0.98)


@pytest.mark.parametrize("name", ap.METHODS)
def test_the_same_input_gives_the_same_words(name: str) -> None:
    one, other = (ap.make_method(name, [tuned(5)]) for _ in range(2))
    amount = max(1, one.most // 2)
    assert np.array_equal(
        ap.realise(one.layers[0], one.update(0, amount)), ap.realise(other.layers[0], other.update(0, amount))
    )


def test_one_direction_is_enough_for_a_change_of_rank_one() -> None:
    rng = np.random.default_rng(3)
    old = rng.normal(0, 0.05, (40, 50))
    new = old + 1e-3 * np.outer(rng.normal(size=40), rng.normal(size=50))
    method = ap.make_method("lowrank", [layer(old, new, "float32", (40, 50))])
    assert tally(method, 1).explained > 0.99
    assert len(method.update(0, 1).steps) == 1


def test_steps_have_few_significant_bits() -> None:
    for name in ap.METHODS:
        method = ap.make_method(name, [tuned(9)])
        for step in method.update(0, max(1, method.most // 2)).steps:
            fraction, _ = np.frexp(step)
            assert (fraction * 2**12).is_integer()


def test_the_base_explains_nothing_and_the_target_all() -> None:
    found = tuned(4)
    base, target = ap.explained(found, found.base), ap.explained(found, found.target)
    assert (base.explained, base.changed, base.cosine) == (0, 0, 0)
    assert (target.explained, target.relative_mse) == (1, 0)
    assert target.cosine == pytest.approx(1)
    wanted = found.values(found.target)
    assert base.relative_mse == pytest.approx((found.change() ** 2).mean() / (wanted**2).mean())


def test_an_error_in_a_layer_of_zeros_is_infinite() -> None:
    found = layer(np.ones(64), np.zeros(64), "float32", (8, 8))
    assert ap.explained(found, found.base).relative_mse == float("inf")
    assert ap.explained(found, found.target).relative_mse == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("name", ["topk", "threshold"])
def test_codes_are_kept_or_left_whole(dtype: str, name: str) -> None:
    rng = np.random.default_rng(8)
    low, high = (-128, 128) if dtype == "int8" else (0, 256)
    old = rng.integers(low, high, 600).astype(dtype)
    new = np.clip(old.astype(int) + rng.integers(-2, 3, 600), low, high - 1).astype(dtype)
    found = layer(old, new, dtype, (20, 30))
    method = ap.make_method(name, [found])
    whole = ap.realise(found, method.update(0, method.most))
    assert np.array_equal(whole, new)
    some = ap.realise(found, method.update(0, 1))  # only changes by 2, all of which tie
    assert np.array_equal(some != old, np.abs(new.astype(int) - old) == 2)
    assert not ap.make_method("sign", [found]).layers
    assert not ap.make_method("lowrank", [found]).layers


def test_codes_begin_from_the_bases_reals_on_the_new_scale() -> None:
    old = np.arange(-64, 64, dtype=np.int8)
    before, after = Quantisation((0.02,), (3,), None), Quantisation((0.01,), (-5,), None)
    found = ap.Layer("w", "int8", (16, 8), 0, old, old, before, after)
    wanted = np.clip((old.astype(int) - 3) * 2 - 5, -128, 127)
    assert np.array_equal(found.start, wanted)
    assert found.values(found.start)[40] == pytest.approx(0.01 * (wanted[40] + 5))


def test_the_file_is_the_targets_but_for_its_layers(tmp_path: Path) -> None:
    old = tiny_onnx(tmp_path / "old.onnx", hidden=64)
    new = tiny_onnx(tmp_path / "new.onnx", hidden=64, change=1e-2)
    layers = ap.find_layers(old, new)
    assert [found.name for found in layers] == ["weights0", "weights1"]
    out = tmp_path / "out.onnx"
    ap.write_file(new, layers, [found.base for found in layers], out)
    data, target, base = (np.fromfile(path, np.uint8) for path in (out, new, old))
    inside = np.zeros(len(data), bool)
    for found in layers:
        place = slice(found.offset, found.offset + found.base.nbytes)
        inside[place] = True
        span = next(span for span in read_model(old).spans if span.name == found.name)
        assert np.array_equal(data[place], base[span.offset : span.offset + span.length])
    assert np.array_equal(data[~inside], target[~inside])
    ap.write_file(new, layers, [found.target for found in layers], out)
    assert out.read_bytes() == new.read_bytes()


def test_a_layer_with_a_nan_stays_the_targets(tmp_path: Path) -> None:
    old = tiny_onnx(tmp_path / "old.onnx", hidden=64)
    new = tiny_onnx(tmp_path / "new.onnx", hidden=64, change=1e-2)
    (first, _) = ap.find_layers(old, new)
    data = bytearray(new.read_bytes())
    data[first.offset : first.offset + 4] = b"\x01\x00\xc0\x7f"
    new.write_bytes(data)
    assert [found.name for found in ap.find_layers(old, new)] == ["weights1"]


def test_files_without_a_weight_that_differs_are_refused(tmp_path: Path) -> None:
    old = tiny_onnx(tmp_path / "old.onnx", hidden=64)
    with pytest.raises(SluiceError) as error:
        ap.find_layers(old, old)
    assert error.value.reason == errors_pb2.MODEL_FILE_INVALID
    assert "share no weights that differ" in error.value.message
