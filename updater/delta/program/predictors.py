"""What a record's operation predicts, in arithmetic that every machine rounds alike (see records.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.records import (
    BF16,
    DTYPES,
    F16,
    HIGHEST,
    LOWEST,
    RANGES,
    Record,
)

Array = NDArray[Any]
Ints = NDArray[np.int64]
_TINY = 1 << 23  # words below are subnormal
F32T = np.dtype("<f4")


def flush(values: Array) -> Array:
    """float32 with subnormal numbers made zero and every NaN the same one, by their bits."""
    words = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    size = words & 0x7FFFFFFF
    words = np.where(size < _TINY, words & 0x80000000, words)
    out: Array = np.where(size > 0x7F800000, 0x7FC00000, words).astype("<u4").view("<f4")
    return out


def ordered(words: Array, bits: int) -> Ints:
    """IEEE words as integers in the order of the numbers."""
    value = words.astype(np.int64)
    half = 1 << (bits - 1)
    out: Ints = np.where(value & half, half - 1 - (value & (half - 1)), value + half)
    return out


def unordered(value: Ints, bits: int) -> Ints:
    """The inverse of `ordered`."""
    half = 1 << (bits - 1)
    out: Ints = np.where(value >= half, value - half, half | (half - 1 - value))
    return out


def _channels(record: Record, values: Array) -> Array:
    """Per-channel values as they broadcast over the matrix."""
    if len(values) == 1:
        return values.reshape(1, 1)
    if len(values) != (record.rows if record.by_rows else record.columns):
        raise ProgramError("a record has another number of scales than of channels")
    return values[:, None] if record.by_rows else values[None, :]


def _check_scales(record: Record, scales: Array) -> None:
    if len(scales) not in (1, record.count):
        raise ProgramError("a record has another number of scales than of elements")


def base_floats(base: Operands, record: Record, count: int) -> Array:
    """float32 of the base at the record's place."""
    return base.array(F32T, count, record.base)


def reduce(base: Operands, record: Record) -> Array:
    """PEAK, LOWEST, HIGHEST: one value for each row or column of a float32 matrix of the base.

    `two` is the number of base elements for each result; PEAK is max|w| / 127.
    """
    weights = base_floats(base, record, record.count * record.two)
    matrix = (
        weights.reshape(record.count, record.two) if record.by_rows else weights.reshape(record.two, -1).T
    )
    if record.op == LOWEST:
        return flush(matrix.min(axis=1) + np.float32(0))  # which zero is least depends on the machine
    if record.op == HIGHEST:
        return flush(matrix.max(axis=1) + np.float32(0))
    return flush(flush(np.abs(matrix).max(axis=1)) / np.float32(127))


def quantise(base: Operands, record: Record, scales: Array) -> Ints:
    """Codes of float32 weights: rint(w / scale) + zero point, clamped to the type; int8 of zero 0 to
    +-127.
    """
    least, most = RANGES[record.dtype]
    low = -127 if record.zero == 0 and least == -128 else least
    weights = base_floats(base, record, record.count).reshape(record.rows, -1)
    scale = flush(_channels(record, scales))
    with np.errstate(all="ignore"):
        codes = np.rint(flush(weights) / np.where(scale == 0, np.float32(1), scale)) + np.float32(record.zero)
    return np.nan_to_num(np.clip(codes, low, most)).astype(np.int64).reshape(-1)


def bias(base: Operands, record: Record, scales: Array) -> Ints:
    """int32 biases of float32 ones: rint(b / scale) in float64."""
    _check_scales(record, scales)
    value = base_floats(base, record, record.count).astype(np.float64)
    scale = scales.astype(np.float64)
    with np.errstate(all="ignore"):
        out = np.rint(value / np.where(scale == 0, 1.0, scale))
    codes: Ints = np.nan_to_num(np.clip(out, -(2.0**31), 2.0**31 - 1)).astype(np.int64)
    return codes


def rescale(base: Operands, record: Record, scales: Array) -> Ints:
    """int32 codes at new scales: rint(code * old / new), each step in float64."""
    _check_scales(record, scales)
    old_codes = base.array("<i4", record.count, record.base).astype(np.float64)
    old = base.array(F32T, len(scales), record.two).astype(np.float64)
    new = scales.astype(np.float64)
    with np.errstate(all="ignore"):
        out = np.rint(old_codes * old / np.where(new == 0, 1.0, new))
    codes: Ints = np.nan_to_num(np.clip(out, -(2.0**31), 2.0**31 - 1)).astype(np.int64)
    return codes


def codes(base: Operands, record: Record) -> tuple[Array, Array | None]:
    """CODES: prediction (int16) and lost fraction (of 32; None for one half everywhere) of 8-bit codes.

    Both are [rows, columns]. All numbers fit 32 bits: codes and zero points have 11, gains 21.
    """
    least, most = RANGES[record.dtype]
    old = base.array(DTYPES[record.dtype], record.count, record.base).reshape(record.rows, -1)
    if not record.gain_bits and record.zero == record.base_zero:
        return old.astype(np.int16), None
    moved = old.astype(np.int32) - np.int32(record.base_zero)
    if not record.gain_bits:
        return np.clip(moved + record.zero, least, most).astype(np.int16), None
    shift = record.gain_bits
    moved *= _channels(record, record.gains).astype(np.int32)
    moved += np.int32(1 << (shift - 1))
    fraction = ((moved & ((1 << shift) - 1)) << 5 >> shift).astype(np.uint8)
    moved >>= shift
    return np.clip(moved + record.zero, least, most).astype(np.int16), fraction


def floats(base: Operands, record: Record) -> Array:
    """FLOAT: the words predicted, float32 as u4, 16-bit types as u2."""
    if record.dtype in (F16, BF16):
        return base.array("<u2", record.count, record.base)
    value = base_floats(base, record, record.count)
    if not record.gain_bits:
        return value.view("<u4")
    gain = np.ldexp(record.gains.astype(np.float32), -record.gain_bits).astype(np.float32)
    product = flush(value).reshape(record.rows, -1) * _channels(record, gain)
    return flush(product).reshape(-1).view("<u4")


def cast(base: Operands, record: Record) -> Array:
    """CAST: float32 to 16-bit words, to nearest, ties to even, in integers for bfloat16.

    With `zero` 1, numbers but zero below 1e-7 and above 1e4 are first clamped as ONNX's float16 converter
    does.
    """
    if record.dtype == F16:
        value = base_floats(base, record, record.count)
        if record.zero:
            tiny, huge = np.float32(1e-7), np.float32(1e4)
            sign = np.where(value < 0, np.float32(-1), np.float32(1))
            value = np.where((value != 0) & (np.abs(value) < tiny), sign * tiny, value)
            value = np.where(np.abs(value) > huge, sign * huge, value)
        with np.errstate(all="ignore"):
            return np.asarray(value.astype("<f2")).view("<u2")
    words = base.array("<u4", record.count, record.base).astype(np.uint64)
    out: Array = (
        (words + np.uint64(0x7FFF) + (words >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    ).astype("<u2")
    return out


def pruned(base: Operands, record: Record) -> Array:
    """PRUNED: float32 words of the base, zero where the magnitude word is below `zero`."""
    words = base.array("<u4", record.count, record.base)
    small = (words & 0x7FFFFFFF).astype(np.int64) < record.zero
    out: Array = np.where(small, words & (0x80000000 if record.base_zero else 0), words).astype("<u4")
    return out
