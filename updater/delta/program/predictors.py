"""What a record's operation predicts, in arithmetic that every machine rounds alike (see records.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.records import (
    BF16,
    DTYPES,
    F16,
    LOWEST,
    PEAK,
    RANGES,
    Record,
)

Array = NDArray[Any]
U32 = NDArray[np.uint32]
_TINY = 1 << 23  # words below are subnormal
F32T = np.dtype("<f4")


def flush(values: Array) -> Array:
    """float32 with subnormal numbers made zero and every NaN the same one, by their bits."""
    words = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    size = words & 0x7FFFFFFF
    words = np.where(size < _TINY, words & 0x80000000, words)
    out: Array = np.where(size > 0x7F800000, 0x7FC00000, words).astype("<u4").view("<f4")
    return out


def ordered(words: Array, bits: int) -> U32:
    """IEEE words of 16 or 32 bits as integers in the order of the numbers."""
    value = words.astype(np.uint32)
    sign = value >> np.uint32(bits - 1)
    np.negative(sign, out=sign)
    sign |= np.uint32(1 << (bits - 1))
    sign &= np.uint32((1 << bits) - 1)
    value ^= sign
    return value


def unordered(value: U32, bits: int) -> U32:
    """The inverse of `ordered`; bits above are cut off."""
    sign = value >> np.uint32(bits - 1)
    sign &= np.uint32(1)
    sign -= np.uint32(1)  # all ones where the number is negative
    sign |= np.uint32(1 << (bits - 1))
    sign ^= value
    sign &= np.uint32((1 << bits) - 1)
    return sign


def difference(actual: Array, predicted: Array, bits: int) -> NDArray[np.int32]:
    """Actual - predicted, unsigned integers modulo 2^bits, as the number nearest to zero; 16 or 32 bits."""
    out = actual.astype(np.uint32) - predicted.astype(np.uint32)
    out <<= np.uint32(32 - bits)
    return out.view(np.int32) >> np.int32(32 - bits)


def _channels(record: Record, values: Array, piece: Piece) -> Array:
    """Per-channel values as they broadcast over the piece."""
    if len(values) == 1:
        return values.reshape(1, 1)
    if len(values) != (record.rows if record.by_rows else record.columns):
        raise ProgramError("a record has another number of scales than of channels")
    return values[piece.rows, None] if record.by_rows else values[None, piece.columns]


def _elements(record: Record, scales: Array, piece: Piece) -> Array:
    """One scale, or those of the piece's elements."""
    if len(scales) not in (1, record.count):
        raise ProgramError("a record has another number of scales than of elements")
    return scales if len(scales) == 1 else scales[piece.start : piece.start + piece.count]


def base_array(base: Operands, record: Record, dtype: np.dtype[Any] | str, piece: Piece) -> Array:
    """The base's elements that a piece of the record follows from, [rows, columns]."""
    kind = np.dtype(dtype)
    return base.array(kind, piece.count, record.base + piece.start * kind.itemsize).reshape(piece.shape)


def reduce(base: Operands, record: Record) -> Array:
    """PEAK, LOWEST, HIGHEST: one value for each row or column of a float32 matrix of the base.

    `two` is the number of base elements for each result; PEAK is max|w| / 127.
    """
    pick = np.minimum if record.op == LOWEST else np.maximum
    shape = (record.count, record.two) if record.by_rows else (record.two, record.count)
    out: Array = np.empty(record.count, dtype=np.float32)
    for piece in pieces(*shape):
        part = base_array(base, record, F32T, piece)
        if record.op == PEAK:
            part = np.abs(part)
        if record.by_rows:
            least = pick.reduce(part, axis=1)
            if piece.first_column:
                least = pick(out[piece.rows], least)
            out[piece.rows] = least
        else:
            least = pick.reduce(part, axis=0)
            out[piece.columns] = pick(out[piece.columns], least) if piece.first_row else least
    if record.op == PEAK:
        return flush(flush(out) / np.float32(127))
    return flush(out) + np.float32(0)  # which zero is least depends on the machine


def quantise(base: Operands, record: Record, scales: Array, piece: Piece) -> NDArray[np.int16]:
    """Codes of float32 weights: rint(w / scale) + zero point, clamped to the type; int8 of zero 0 to
    +-127.
    """
    least, most = RANGES[record.dtype]
    low = -127 if record.zero == 0 and least == -128 else least
    scale = flush(_channels(record, scales, piece))
    quotient = flush(base_array(base, record, F32T, piece)) / np.where(scale == 0, np.float32(1), scale)
    codes = np.rint(quotient, out=quotient)
    codes += np.float32(record.zero)
    np.clip(codes, low, most, out=codes)
    codes[np.isnan(codes)] = 0
    return codes.astype(np.int16).reshape(-1)


def bias(base: Operands, record: Record, scales: Array, piece: Piece) -> NDArray[np.int32]:
    """int32 biases of float32 ones: rint(b / scale) in float64."""
    scale = flush(_elements(record, scales, piece)).astype(np.float64)
    value = flush(base_array(base, record, F32T, piece)).reshape(-1).astype(np.float64)
    return _int32(np.rint(value / np.where(scale == 0, 1.0, scale)))


def rescale(base: Operands, record: Record, scales: Array, piece: Piece) -> NDArray[np.int32]:
    """int32 codes at new scales: rint(code * old / new), each step in float64."""
    old_scales = flush(base.array(F32T, len(scales), record.two))
    old = _elements(record, old_scales, piece).astype(np.float64)
    new = flush(_elements(record, scales, piece)).astype(np.float64)
    codes = base_array(base, record, "<i4", piece).reshape(-1).astype(np.float64)
    return _int32(np.rint(codes * old / np.where(new == 0, 1.0, new)))


def _int32(value: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.nan_to_num(np.clip(value, -(2.0**31), 2.0**31 - 1)).astype(np.int64).astype(np.int32)


def codes(base: Operands, record: Record, piece: Piece) -> tuple[NDArray[np.int16], Array | None]:
    """CODES: prediction and lost fraction (of 32; None for one half everywhere) of 8-bit codes, flat.

    All numbers fit 32 bits: codes and zero points have 11, gains 21.
    """
    least, most = RANGES[record.dtype]
    old = base_array(base, record, DTYPES[record.dtype], piece)
    if not record.gain_bits and record.zero == record.base_zero:
        return old.astype(np.int16).reshape(-1), None
    moved = old.astype(np.int32)
    moved -= np.int32(record.base_zero)
    fraction = None
    if record.gain_bits:
        shift = record.gain_bits
        moved *= _channels(record, record.gains, piece).astype(np.int32)
        moved += np.int32(1 << (shift - 1))
        fraction = ((moved & np.int32((1 << shift) - 1)) << np.int32(5) >> np.int32(shift)).astype(np.uint8)
        moved >>= np.int32(shift)
    moved += np.int32(record.zero)
    np.clip(moved, least, most, out=moved)
    return moved.astype(np.int16).reshape(-1), None if fraction is None else fraction.reshape(-1)


def floats(base: Operands, record: Record, piece: Piece) -> Array:
    """FLOAT: the words predicted, float32 as u4, 16-bit types as u2, flat."""
    if record.dtype in (F16, BF16):
        return base_array(base, record, "<u2", piece).reshape(-1)
    if not record.gain_bits:
        return base_array(base, record, "<u4", piece).reshape(-1)
    gain = np.ldexp(record.gains.astype(np.float32), -record.gain_bits).astype(np.float32)
    product = flush(base_array(base, record, F32T, piece)) * _channels(record, gain, piece)
    return flush(product).reshape(-1).view("<u4")


def cast(base: Operands, record: Record, piece: Piece) -> Array:
    """CAST: float32 to 16-bit words, to nearest, ties to even, in integers for bfloat16; flat.

    With `zero` 1, numbers but zero below 1e-7 and above 1e4 are first clamped as ONNX's float16 converter
    does.
    """
    if record.dtype == F16:
        value = base_array(base, record, F32T, piece).reshape(-1)
        if record.zero:
            tiny, huge = np.float32(1e-7), np.float32(1e4)
            sign = np.where(value < 0, np.float32(-1), np.float32(1))
            value = np.where((value != 0) & (np.abs(value) < tiny), sign * tiny, value)
            value = np.where(np.abs(value) > huge, sign * huge, value)
        words = value.view("<u4")
        # What becomes of a NaN differs between machines: quiet, with the top bits of its payload.
        nan = words >> np.uint32(16) & np.uint32(0x8000) | words >> np.uint32(13) & np.uint32(0x3FF) | 0x7E00
        halves = np.asarray(value.astype("<f2")).view("<u2")
        return np.where(words & np.uint32(0x7FFFFFFF) > 0x7F800000, nan, halves).astype("<u2")
    words = base_array(base, record, "<u4", piece).reshape(-1).astype(np.uint64)
    out: Array = (
        (words + np.uint64(0x7FFF) + (words >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    ).astype("<u2")
    return out


def pruned(base: Operands, record: Record, piece: Piece) -> U32:
    """PRUNED: float32 words of the base, zero where the magnitude word is below `zero`; flat."""
    words = base_array(base, record, "<u4", piece).reshape(-1)
    small = (words & np.uint32(0x7FFFFFFF)).astype(np.int64) < record.zero
    keep = np.uint32(0x80000000 if record.base_zero else 0)
    return np.where(small, words & keep, words).astype(np.uint32)
