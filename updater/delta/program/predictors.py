"""What a record's operation predicts, in arithmetic that every machine rounds alike (see records.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import nibbles
from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.records import (
    BF16,
    CODE_EDGE,
    DTYPES,
    F16,
    F32,
    HIGHEST,
    I4,
    I8,
    LOWEST,
    MASKED,
    NIBBLES,
    PEAK,
    POOL,
    PRUNED,
    RANGES,
    SPANNED,
    Record,
)

Array = NDArray[Any]
U32 = NDArray[np.uint32]
_TINY = 1 << 23  # words below are subnormal
F32T = np.dtype("<f4")
MAX_STEPS = CODE_EDGE + 256  # the largest code that the pool has


def flush(values: Array) -> Array:
    """float32 with subnormal numbers made zero and every NaN the same one, by their bits."""
    words = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    size = words & np.uint32(0x7FFFFFFF)
    # Subnormal numbers, zeros and NaNs are few: one comparison finds them all.
    odd = np.flatnonzero(size - np.uint32(_TINY) > np.uint32(0x7F800000 - _TINY))
    if not len(odd):
        return words.view("<f4")
    shape = words.shape
    words = words.reshape(-1).copy()
    found, size = words[odd], size.reshape(-1)[odd]
    words[odd] = np.where(size > 0x7F800000, 0x7FC00000, found & np.uint32(0x80000000))
    return words.reshape(shape).view("<f4")


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
    """Actual - predicted, unsigned integers modulo 2^bits, as the number nearest to zero; 8 to 32 bits."""
    out = actual.astype(np.uint32) - predicted.astype(np.uint32)
    out <<= np.uint32(32 - bits)
    return out.view(np.int32) >> np.int32(32 - bits)


def _channels(record: Record, values: Array, piece: Piece) -> Array:
    """Per-channel values as they broadcast over the piece.

    Along rows they may begin anew after some rows; along columns each group of rows may have its own.
    """
    many = len(values)
    if many == 1:
        return values.reshape(1, 1)
    if record.by_rows and record.rows % many == 0:
        if many == record.rows:
            return values[piece.rows, None]
        return values[np.arange(piece.first_row, piece.last_row) % many, None]
    if not record.by_rows and record.rows == 1 and record.phase + record.columns <= many:
        first = record.phase + piece.first_column
        return values[None, first : first + piece.shape[1]]
    grouped = not record.by_rows and record.rows > 1 and many % record.columns == 0
    if grouped and record.rows % (many // record.columns) == 0:
        if many == record.columns:
            return values[None, piece.columns]
        block = record.rows // (many // record.columns)
        group = np.arange(piece.first_row, piece.last_row) // block
        return values.reshape(-1, record.columns)[group, piece.columns]
    raise ProgramError("a record has another number of scales than of channels")


def _elements(record: Record, scales: Array, piece: Piece) -> Array:
    """One scale, or those of the piece's elements."""
    if len(scales) not in (1, record.count):
        raise ProgramError("a record has another number of scales than of elements")
    return scales if len(scales) == 1 else scales[piece.start : piece.start + piece.count]


def base_array(base: Operands, record: Record, dtype: np.dtype[Any] | str, piece: Piece) -> Array:
    """The base's elements that a piece of the record follows from, [rows, columns]."""
    kind = np.dtype(dtype)
    if record.axes:
        return base.laid(kind, record.base, record.axes, piece.start, piece.count).reshape(piece.shape)
    return base.array(kind, piece.count, record.base + piece.start * kind.itemsize).reshape(piece.shape)


def base_codes(base: Operands, record: Record, piece: Piece) -> Array:
    """Codes of the base of the record's own type, [rows, columns]."""
    if record.dtype not in NIBBLES:
        return base_array(base, record, DTYPES[record.dtype], piece)
    first, skip = divmod(piece.start, 2)
    raw = base.array("u1", (skip + piece.count + 1) // 2, record.base + first)
    return nibbles.unpack(raw, piece.count, skip, record.dtype == I4).reshape(piece.shape)


def base_floats(base: Operands, record: Record, piece: Piece) -> Array:
    """float32 of the base, [rows, columns]; 16-bit types are widened, which is exact."""
    if record.source == F32:
        return base_array(base, record, F32T, piece)
    return widened(base_array(base, record, "<u2", piece), record.source)


def widened(words: Array, source: int) -> Array:
    """float32 of the words of a 16-bit type; NaNs keep their bits, zeros behind them."""
    if source == BF16:
        return (words.astype("<u4") << np.uint32(16)).view("<f4")
    out: Array = words.view("<f2").astype("<f4")
    if not np.isnan(out).any():
        return out
    # What becomes of a NaN differs between machines: the payload's top bits stay.
    wide = words.astype("<u4")
    nan = (
        (wide & np.uint32(0x8000)) << np.uint32(16) | (wide & np.uint32(0x3FF)) << np.uint32(13) | 0x7F800000
    )
    return np.where(np.isnan(out), nan, out.view("<u4")).astype("<u4").view("<f4")


def reduce(base: Operands, record: Record) -> Array:
    """PEAK, LOWEST, HIGHEST, SPANNED: one value for each row or column of a float32 matrix of the base.

    `two` is the number of base elements for each result. PEAK is max|w| / divisor; SPANNED is the distance
    from the least to the greatest number, zero among them, / divisor.
    """
    divisor = np.float32(record.halves) / np.float32(2)
    if record.op == SPANNED:
        low, high = (_reduced(base, record, op) for op in (LOWEST, HIGHEST))
        span = flush(np.maximum(high, np.float32(0)) - np.minimum(low, np.float32(0)))
        return flush(span / divisor)
    if record.op == PEAK:
        return flush(_reduced(base, record, PEAK) / divisor)
    return _reduced(base, record, record.op)


def zero_points(base: Operands, record: Record, scales: Array) -> NDArray[np.int16]:
    """ZEROS: the codes of zero for numbers from the least one on, zero among them: in float64."""
    if len(scales) != record.count:
        raise ProgramError("a record has another number of scales than of zero points")
    least, most = RANGES[record.dtype]
    low = np.minimum(_reduced(base, record, LOWEST), np.float32(0)).astype(np.float64)
    scale = flush(scales).astype(np.float64)
    codes = np.rint(least - low / np.where(scale == 0, 1.0, scale))
    codes = np.where(np.isnan(codes), 0.0, np.clip(codes, least, most))
    return codes.astype(np.int16)


def _reduced(base: Operands, record: Record, op: int) -> Array:
    """max|w| (PEAK), min w or max w of each row or column, flushed."""
    pick = np.minimum if op == LOWEST else np.maximum
    shape = (record.count, record.two) if record.by_rows else (record.two, record.count)
    out: Array = np.empty(record.count, dtype=np.float32)
    for piece in pieces(*shape):
        part = base_floats(base, record, piece)
        if op == PEAK:
            part = np.abs(part)
        if record.by_rows:
            least = pick.reduce(part, axis=1)
            if piece.first_column:
                least = pick(out[piece.rows], least)
            out[piece.rows] = least
        else:
            least = pick.reduce(part, axis=0)
            out[piece.columns] = pick(out[piece.columns], least) if piece.first_row else least
    return flush(out) + np.float32(0)  # which zero is least depends on the machine


def quantise(
    base: Operands, record: Record, scales: Array, zeros: Array | None, piece: Piece
) -> NDArray[np.int16]:
    """Codes of float32 weights: rint(w / scale) + zero point, clamped to the type; int8 of zero 0 to
    +-127, unless the channels have zero points of their own.
    """
    least, most = RANGES[record.dtype]
    low = -127 if record.zero == 0 and least == -128 and zeros is None else least
    zero: Array = np.full((1, 1), record.zero, dtype=np.float32)
    if zeros is not None:
        if len(zeros) != len(scales):
            raise ProgramError("a record has another number of zero points than of scales")
        zero = _channels(record, zeros, piece).astype(np.float32)
    scale = flush(_channels(record, scales, piece))
    quotient = flush(base_floats(base, record, piece)) / np.where(scale == 0, np.float32(1), scale)
    codes = np.rint(quotient, out=quotient)
    codes += zero
    np.clip(codes, low, most, out=codes)
    codes[np.isnan(codes)] = 0
    return codes.astype(np.int16).reshape(-1)


def bias(base: Operands, record: Record, scales: Array, piece: Piece) -> NDArray[np.int32]:
    """int32 biases of float32 ones: rint(b / scale) in float64."""
    scale = flush(_elements(record, scales, piece)).astype(np.float64)
    value = flush(base_floats(base, record, piece)).reshape(-1).astype(np.float64)
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
    old = base_codes(base, record, piece)
    if not record.gain_bits and record.zero == record.base_zero:
        return (old.astype(np.int16) if record.residual == POOL else old).reshape(-1), None
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
    if record.affine is not None:
        factors, offsets = (
            _channels(record, each, piece) for each in (record.affine.factors, record.affine.offsets)
        )
        moved = flush(flush(base_floats(base, record, piece)) * factors)
        return flush(moved + offsets).reshape(-1).view("<u4")
    if not record.gain_bits:
        return base_floats(base, record, piece).reshape(-1).view("<u4")
    gain = np.ldexp(record.gains.astype(np.float32), -record.gain_bits).astype(np.float32)
    product = flush(base_floats(base, record, piece)) * _channels(record, gain, piece)
    return flush(product).reshape(-1).view("<u4")


def cast(base: Operands, record: Record, piece: Piece) -> Array:
    """CAST: float32 to 16-bit words, to nearest, ties to even, in integers for bfloat16; or widened; flat.

    With `zero` 1, numbers but zero below 1e-7 and above 1e4 are first clamped as ONNX's float16 converter
    does.
    """
    value = base_floats(base, record, piece).reshape(-1)
    if record.dtype == F32:
        return value.view("<u4")
    if record.dtype == F16:
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
    return _bfloat16(value.view("<u4"))


def _bfloat16(words: Array) -> Array:
    """bfloat16 words of float32 ones, to nearest, ties to even; of NaNs too."""
    wide = words.astype(np.uint64)
    even = np.uint64(0x7FFF) + (wide >> np.uint64(16) & np.uint64(1))
    out: Array = ((wide + even) >> np.uint64(16)).astype("<u2")
    return out


def stepped(record: Record, words: Array, codes: Array, piece: Piece) -> Array:
    """STEPPED: base + code * step for words of the base, in float64, then rounded to the type; flat.

    A word stays as it is where the code is 0, or where the sum, or what it is rounded to, is not finite.
    """
    changes = codes.reshape(piece.shape) * _channels(record, record.steps, piece)
    total = reals(words, record.dtype) + changes.reshape(-1)
    if record.dtype == F16:
        made, top = total.astype("<f2").view("<u2"), 0x7C00
    else:
        made, top = total.astype("<f4").view("<u4"), 0x7F800000
    if record.dtype == BF16:
        made, top = _bfloat16(made), 0x7F80
    finite = np.isfinite(total) & (made & made.dtype.type(top) != top)
    out: Array = np.where((codes != 0) & finite, made, words)
    return out


def step_codes(record: Record, old: Array, new: Array, piece: Piece) -> NDArray[np.int16]:
    """The codes by which STEPPED leads from old words to new ones; 0 where none does. Encoders only."""
    change = reals(new, record.dtype) - reals(old, record.dtype)
    codes = np.rint(change.reshape(piece.shape) / _channels(record, record.steps, piece)).reshape(-1)
    codes[(old == new) | (np.abs(codes) > MAX_STEPS) | np.isnan(codes)] = 0
    whole = codes.astype(np.int16)
    whole[stepped(record, old, whole, piece) != new] = 0
    return whole


def reals(words: Array, dtype: int) -> NDArray[np.float64]:
    """The numbers of float words."""
    return (words.view("<f4") if dtype == F32 else widened(words, dtype)).astype(np.float64)


def zeroed(base: Operands, record: Record, piece: Piece) -> Array:
    """PRUNED, THINNED, MASKED: words or int8 codes of the base, some of them zero; flat."""
    kind = DTYPES[record.dtype]
    bits = 8 * kind.itemsize
    words = base_array(base, record, f"<u{kind.itemsize}", piece)
    if record.op == MASKED:
        gone = record.used[piece.rows, None] if record.by_rows else record.used[None, piece.columns]
    elif record.op == PRUNED:
        gone = magnitudes(words, record.dtype).astype(np.int64) < record.zero
    else:
        gone = _thinned(base, record, piece)
    sign: Array = words & words.dtype.type(1 << (bits - 1) if record.base_zero and record.dtype != I8 else 0)
    out: Array = np.where(gone, sign, words).reshape(-1)
    return out


def magnitudes(words: Array, dtype: int) -> Array:
    """What grows with the size of a number, whatever its sign: its word without the sign, or |code|."""
    if dtype == I8:
        return np.abs(words.view(np.int8).astype(np.int16))
    out: Array = words & words.dtype.type((1 << (8 * words.itemsize - 1)) - 1)
    return out


def _thinned(base: Operands, record: Record, piece: Piece) -> Array:
    """Which elements of a piece are not among the largest of their group, [rows, columns]."""
    kind = f"<u{DTYPES[record.dtype].itemsize}"
    size, shape = record.group, piece.shape
    if record.by_rows:  # a piece begins and ends with a group: CHUNK and the columns are multiples of it
        words = base_array(base, record, kind, piece)
        marked: Array = smallest(magnitudes(words, record.dtype).reshape(-1, size), record.zero)
        return marked.reshape(shape)
    first, last = piece.first_row // size * size, -(-piece.last_row // size) * size
    ends = piece.first_column, piece.last_column
    if shape[1] == piece.width:
        words = base_array(base, record, kind, Piece(first, last, *ends, piece.width))
    else:  # one row: those of its group, each alone
        alone = [Piece(row, row + 1, *ends, piece.width) for row in range(first, last)]
        words = np.concatenate([base_array(base, record, kind, one) for one in alone])
    words = words.reshape(-1, size, shape[1])
    gone = smallest(magnitudes(words, record.dtype).transpose(0, 2, 1), record.zero).transpose(0, 2, 1)
    out: Array = gone.reshape(-1, shape[1])[piece.first_row - first : piece.last_row - first]
    return out


def smallest(sizes: Array, keep: int) -> Array:
    """Marks all but the `keep` largest of the last axis; of equal ones the first stay."""
    order = np.argsort(-sizes.astype(np.int64), axis=-1, kind="stable")
    gone = np.zeros(sizes.shape, dtype=bool)
    np.put_along_axis(gone, order[..., max(0, keep) :], True, axis=-1)
    return gone
