"""Scales and zero points that follow from the base's weights, along any axis and in any block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_tests.unit.updater.program_pairs import Arrays, predictors, send, weights
from updater.formats.span import Quantisation

HEAD = 400  # bytes that a delta has beside its blocks, about
Codes = tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.int64]]


def quantised(values: NDArray[np.float32], axis: int, dtype: type, symmetric: bool) -> Codes:
    """Codes, scales and zero points for each slice along an axis, as ONNX Runtime's quantiser makes them."""
    info = np.iinfo(dtype)
    moved = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    low, high = np.minimum(moved.min(axis=1), 0), np.maximum(moved.max(axis=1), 0)
    if symmetric:
        scale = (np.maximum(-low, high) / np.float32(127)).astype(np.float32)
        zero = np.zeros(len(scale), dtype=np.int64)
    else:
        scale = ((high - low) / np.float32(255)).astype(np.float32)
        zero = np.rint(info.min - low.astype(np.float64) / scale.astype(np.float64)).astype(np.int64)
    shape = [1] * values.ndim
    shape[axis] = -1
    codes = np.rint(values / scale.reshape(shape)) + zero.reshape(shape)
    return np.clip(codes, -127 if symmetric else info.min, info.max).astype(dtype), scale, zero


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "symmetric"), [(np.int8, True), (np.int8, False), (np.uint8, False)])
@pytest.mark.parametrize("turned", [False, True])
def test_channels_along_any_axis(
    tmp_path: Path, axis: int, dtype: type, symmetric: bool, turned: bool
) -> None:
    values = weights((24, 20, 16))
    values *= np.random.default_rng(3).uniform(0.5, 2, (24, 20, 16)).astype(np.float32)
    codes, scale, zero = quantised(values, axis, dtype, symmetric)
    meaning = Quantisation(tuple(scale.tolist()), tuple(zero.tolist()), axis)
    base = np.ascontiguousarray(values.transpose(2, 0, 1)) if turned else values
    new = Arrays().add("w_quantized", codes, meaning=meaning).add("w_scale", scale)
    new.add("w_zero_point", zero.astype(dtype))
    summary = send(tmp_path, Arrays().add("w", base), new)
    assert "quantised" in predictors(summary)
    assert summary.delta_size < HEAD


@pytest.mark.parametrize("block_size", [6000, 40_000])
@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_weights_that_blocks_cut(tmp_path: Path, block_size: int, axis: int) -> None:
    values = weights((300, 200))
    codes, scale, zero = quantised(values, axis, np.int8, True)
    meaning = Quantisation(tuple(scale.tolist()), tuple(zero.tolist()), axis)
    new = Arrays().add("s", scale).add("q", codes, meaning=meaning)
    summary = send(tmp_path, Arrays().add("w", values), new, block_size)
    # A small block may not read all weights for the scales of columns: it says them.
    said = scale.nbytes if axis == 1 and block_size < values.nbytes // 24 else 0
    assert summary.delta_size < HEAD + (codes.nbytes // block_size) * (120 + said) + scale.nbytes * (said > 0)


@pytest.mark.parametrize("divisor", [127.0, 127.5, 128.0, 63.0])
def test_scales_by_other_numbers_of_codes(tmp_path: Path, divisor: float) -> None:
    values = weights((100, 64))
    scale = (np.abs(values).max(axis=1) / np.float32(divisor)).astype(np.float32)
    codes = np.clip(np.rint(values / scale[:, None]), -127, 127).astype(np.int8)
    meaning = Quantisation(tuple(scale.tolist()), (0,) * 100, 0)
    new = Arrays().add("s", scale).add("q", codes, meaning=meaning)
    assert send(tmp_path, Arrays().add("w", values), new).delta_size < HEAD


def test_scales_that_do_not_follow_are_sent(tmp_path: Path) -> None:
    values = weights((100, 64))
    scale = (np.abs(values).max(axis=1) / np.float32(127)).astype(np.float32)
    scale[::2] *= np.float32(0.9)  # clipped
    scale[7] = 1.0
    codes = np.clip(np.rint(values / scale[:, None]), -127, 127).astype(np.int8)
    meaning = Quantisation(tuple(scale.tolist()), (0,) * 100, 0)
    new = Arrays().add("s", scale).add("q", codes, meaning=meaning)
    summary = send(tmp_path, Arrays().add("w", values), new)
    assert "quantised" in predictors(summary)
    assert summary.delta_size < HEAD + scale.nbytes


def test_constant_and_empty_channels(tmp_path: Path) -> None:
    """Channels of zeros, of one number, with NaN and infinity: scales that no formula gives."""
    values = weights((20, 32))
    values[3], values[4], values[5, 0], values[6, 1] = 0, 0.25, np.nan, np.inf
    with np.errstate(all="ignore"):
        scale = (np.abs(values).max(axis=1) / np.float32(127)).astype(np.float32)
        scale[3] = 1
        codes = np.clip(np.nan_to_num(values / scale[:, None]), -127, 127).astype(np.int8)
    meaning = Quantisation(tuple(scale.tolist()), (0,) * 20, 0)
    send(tmp_path, Arrays().add("w", values), Arrays().add("s", scale).add("q", codes, meaning=meaning))
