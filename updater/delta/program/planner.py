"""Decides how each array of a target is made: the encoder's half, which alone understands model files.

Order: list the arrays of both files (tensors, and TFLite's quantisation arrays); pair them by name, then by
shape
and likeness; try for each array what could predict it exactly, then what could predict it closely, compare by
estimated bits; keep as records what is coded or referred to, and leave the rest to the skeleton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program import activity, affine_fit, nibbles, predictors, residuals
from updater.delta.program.layout import Axes
from updater.delta.program.operands import Operands, ProgramError
from updater.delta.program.piece import Piece, pieces
from updater.delta.program.records import (
    BF16,
    CODES,
    DTYPES,
    EXACT,
    EXCEPTIONS,
    F16,
    F32,
    FLOAT,
    GAIN_BITS,
    I4,
    I8,
    I32,
    I64,
    NIBBLES,
    PLAIN,
    POOL,
    SOURCES,
    SPARSE,
    U4,
    U8,
    Record,
    bytes_of,
)  # fmt: skip
from updater.errors import SluiceError
from updater.formats import tflite_metadata
from updater.formats.source import Source
from updater.formats.span import Quantisation, TensorSpan

Array = NDArray[Any]
_KINDS = {
    "float32": F32,
    "int8": I8,
    "uint8": U8,
    "int32": I32,
    "int64": I64,
    "float16": F16,
    "bfloat16": BF16,
    "int4": I4,
    "uint4": U4,
}
LEFT = 64  # equal arrays below this many bytes stay in the skeleton
_EXCEPTIONS = 0.02  # share of elements
_NEAR = 0.1  # share of a change below which a base surely helps
SAMPLE = 1 << 15  # elements on which ways are compared, of a tensor that has more than ...
WHOLE = 1 << 17  # ... so many
LEAST_ROW = 16  # elements of a row that may be named, in a tensor of several
UNTOUCHED = 0.06  # share of rows without a change from which they are named
_MAX_METADATA_BYTES = 256 << 20  # of a TFLite file that is read again for its quantisation arrays


@dataclass(eq=False)
class Item:
    """An array of a file."""

    role: str  # "data", "scale", "min", "max"
    name: str
    dtype: int
    shape: tuple[int, ...]
    at: int
    value: Array
    quantisation: Quantisation | None = None
    owner: int = -1  # TFLite tensor
    base: Item | None = None
    record: Record | None = None
    operands: list[Item] = field(default_factory=list)
    whole: Item | None = None  # what this is cut from
    weights: Item | None = None  # whose scales or zero points these are
    phase: int = -1  # of a part of one row whose channels run along it: the first one's
    number: int = -1  # of the whole array in its file
    grain: int = 0  # elements at whose multiples a block should cut it, beside whole rows
    axes: Axes = ()  # of a base whose elements, as `value` has them, do not lie one behind the other

    @property
    def length(self) -> int:
        """Bytes in the file."""
        return bytes_of(self.dtype, len(self.value))

    @property
    def content(self) -> bytes:
        return self.value.tobytes()

    def operand(self) -> dict[str, Any]:
        """The fields of a record that reads this array of the base."""
        return {"base": self.at, "axes": self.axes, "source": self.dtype if self.dtype in SOURCES else F32}


def items_of(
    data: NDArray[np.uint8], spans: Sequence[TensorSpan]
) -> tuple[list[Item], dict[int, tuple[int, int]]]:
    """The arrays of a file by place, and for biases (by TFLite tensor) the tensors whose scales they
    follow.
    """
    items = []
    for span in spans:
        if span.dtype in _KINDS:
            kind = _KINDS[span.dtype]
            value = _elements(data, span, kind)
            if len(value):
                items.append(Item("data", span.name, kind, span.shape, span.offset, value, span.quantisation))
    follows = _metadata(data, items)
    items.sort(key=lambda item: item.at)
    kept: list[Item] = []
    for item in items:  # flatbuffers may share arrays
        if not kept or item.at >= kept[-1].at + kept[-1].length:
            kept.append(item)
    return kept, follows


def _elements(data: NDArray[np.uint8], span: TensorSpan, kind: int) -> Array:
    """The elements of a span; none of those of four bits if what lies behind an odd last one is no zero."""
    if kind not in NIBBLES:
        return np.frombuffer(
            data, DTYPES[kind], count=span.length // DTYPES[kind].itemsize, offset=span.offset
        )
    raw, count = data[span.offset : span.offset + span.length], math.prod(span.shape)
    padded = count % 2 == 1 and span.length > 0 and raw[-1] >> 4
    if bytes_of(kind, count) != span.length or padded:
        return np.empty(0, dtype=DTYPES[kind])
    return nibbles.unpack(raw, count, 0, kind == I4)


def _metadata(data: NDArray[np.uint8], items: list[Item]) -> dict[int, tuple[int, int]]:
    """Adds the quantisation arrays of a TFLite file; gives what biases follow."""
    if data[4:8].tobytes() != b"TFL3" or len(data) > _MAX_METADATA_BYTES or not items:
        return {}
    try:
        tensors, operators = tflite_metadata.read(Source(data.tobytes(), Path("model")))
    except SluiceError:  # the arrays only help
        return {}
    owners = {}
    for tensor in tensors:
        if tensor.data.count:
            owners[tensor.data.offset] = tensor.index
    for item in items:
        item.owner = owners.get(item.at, -1)
    for tensor in tensors:
        for role in ("scale", "min", "max"):
            if role in tensor.arrays:
                array = tensor.arrays[role]
                value = np.frombuffer(data, "<f4", count=array.count, offset=array.offset)
                items.append(
                    Item(role, tensor.name, F32, (array.count,), array.offset, value, owner=tensor.index)
                )
    follows: dict[int, tuple[int, int]] = {}
    for operator in operators:
        if len(operator.inputs) >= 3 and min(operator.inputs[:3]) >= 0:
            follows.setdefault(operator.inputs[2], (operator.inputs[0], operator.inputs[1]))
    return follows


def splits(shape: tuple[int, ...], count: int) -> list[int]:
    """Numbers of rows that a tensor can sensibly be cut into."""
    rows, product = {1}, 1
    for size in shape[:-1]:
        product *= size
        rows.add(product)
    if len(shape) == 2:
        rows = {1, shape[0]}
    return sorted(row for row in rows if 0 < row <= count and count % row == 0) or [1]


def _gains(old: Array, new: Array, bits: int, spread: float) -> Array:
    """Least-squares gains of rows, in units of 2^-bits; 1 where a gain of its own does not pay."""
    energy = (old * old).sum(axis=1)
    gain = np.divide((old * new).sum(axis=1), energy, out=np.ones(len(old)), where=energy > 0)
    units = np.nan_to_num(np.clip(np.rint(gain * (1 << bits)), -(1 << 20), 1 << 20), nan=1 << bits)
    gain = units / np.float32(1 << bits)
    before = np.abs(new - old).mean(axis=1) + spread
    after = np.abs(new - old * gain[:, None]).mean(axis=1) + spread
    pays = old.shape[1] * np.log2(before / after) > 8
    return np.where(pays, units, 1 << bits).astype(np.int64)


@dataclass(frozen=True)
class _Way:
    """One way to predict a matrix from the base's: gains of least squares, given gains, or none."""

    rows: int
    digits: int = 0
    by_rows: bool = True
    given: Array | None = None

    def gains(self, old: Array, new: Array, spread: float, step: int = 1) -> Array:
        """Gains in units of 2^-digits for matrices of which every `step`th row was taken."""
        if self.given is not None:
            return self.given[::step] if self.by_rows and len(self.given) > 1 else self.given
        if self.by_rows:
            return _gains(old, new, self.digits, spread)
        return _gains(old.T, new.T, self.digits, spread)

    def change(self, old: Array, new: Array, gains: Array) -> Array:
        """What the prediction misses."""
        if not self.digits:
            return new - old
        scale = (gains / float(1 << self.digits)).astype(np.float32)
        return new - old * (scale[:, None] if self.by_rows else scale[None, :])


def _ways(shape: tuple[int, ...], count: int, ratio: Array | None) -> list[_Way]:
    """What may be tried: `ratio` is old scales / new scales, if known."""
    ways = []
    for rows in splits(shape, count):
        ways.append(_Way(rows))
        if rows == 1 and len(shape) > 1:
            if ratio is not None and len(ratio) == 1:
                ways.append(
                    _Way(1, 14, True, np.clip(np.rint(ratio * (1 << 14)), 0, 1 << 20).astype(np.int64))
                )
            continue
        for by_rows in (True, False):
            size = rows if by_rows else count // rows
            if size > max(1, count // 8) or count < 32:
                continue
            for digits in GAIN_BITS[1:]:
                ways.append(_Way(rows, digits, by_rows))
                if ratio is not None and len(ratio) in (1, size) and digits >= 9:
                    units = np.clip(np.rint(ratio * (1 << digits)), 0, 1 << 20).astype(np.int64)
                    ways.append(_Way(rows, digits, by_rows, np.broadcast_to(units, (size,)).copy()))
    return ways


def _step(count: int, rows: int) -> int:
    """Of how many rows one is looked at when ways are compared."""
    return 1 if count <= WHOLE else max(1, min(count // SAMPLE, rows // 64))


def _best_way(ways: list[_Way], old: Array, new: Array, floor: float) -> tuple[float, _Way]:
    """The way with the fewest estimated bits, tried on a sample of the rows; bits for the whole."""
    count = len(old)
    best: tuple[float, _Way] | None = None
    for way in ways:
        step = _step(count, way.rows)
        one, two = (values.reshape(way.rows, -1)[::step] for values in (old, new))
        if step == 1 and count > WHOLE:  # few long rows
            one, two = one[:, : SAMPLE // way.rows + 1], two[:, : SAMPLE // way.rows + 1]
        share = one.size / count
        spread = float(np.abs(two - one).mean()) * 0.01 + floor + 1e-30
        if way.given is not None and not way.by_rows and len(way.given) not in (1, one.shape[1]):
            continue
        gains = way.gains(one, two, spread, step)
        if way.digits and (gains == 1 << way.digits).all():
            continue
        change = way.change(one, two, gains)
        least = floor or max(1e-30, float(np.abs(change).mean()) * 0.05)
        bits = activity.bits(change, activity.fit(change, least), least) / share
        if way.digits:
            bits += _gain_bits(gains, way.digits) * (step if way.by_rows else 1)
        if best is None or bits < best[0]:
            best = (bits, way)
    assert best is not None
    return best


def finite(values: Array) -> Array:
    """Numbers to estimate by: float32, 0 for what is not finite."""
    out: Array = values.astype(np.float32)
    out[~np.isfinite(out)] = 0
    return out


def plan_float(item: Item, operands: Operands) -> None:
    """FLOAT with the best gains, or PLAIN (32-bit only)."""
    count, base = len(item.value), item.base
    if base is not None and base.dtype not in (SOURCES if item.dtype == F32 else (item.dtype,)):
        base = None
    if item.dtype != F32 and base is None:
        return
    new = finite(numbers(item))
    old = new
    if base is not None:
        old = finite(numbers(base))
    near = base is not None and np.abs(new - old).mean() < _NEAR * np.abs(new).mean()
    best = _plain(item, new) if item.dtype == F32 and not near else None
    if base is not None:
        ways = _ways(item.shape, count, None)
        if item.dtype != F32:
            ways = [way for way in ways if not way.digits]
        bits, way = _best_way(ways, old, new, 0.0)
        finest = float((25.0 - np.frexp(np.maximum(np.abs(old), 1e-38))[1]).sum()) + count
        lines = None
        if item.dtype == F32:
            lines = affine_fit.best(splits(item.shape, count), old, new, bits)
            bits = lines[0] if lines is not None else bits
        if best is None or bits + finest < best[0]:
            found = way if lines is None else lines[1]
            one, two = old.reshape(found.rows, -1), new.reshape(found.rows, -1)
            record = Record(
                FLOAT, item.dtype, item.at, count, found.rows, by_rows=found.by_rows, residual=POOL,
                **base.operand(),
            )  # fmt: skip
            if isinstance(found, _Way):
                gains = found.gains(one, two, float(np.abs(two - one).mean()) * 0.01 + 1e-30)
                change = found.change(one, two, gains)
                record.gain_bits = found.digits
                if found.digits:
                    record.gains = gains
            else:
                record.affine = found.fit(one, two)
                change = found.change(one, two, record.affine)
            _name_touched(item, record, operands)
            fit_changes(record, change.reshape(record.rows, -1))
            best = (bits + finest, record)
    item.record = best[1] if best else None


def _name_touched(item: Item, record: Record, operands: Operands) -> None:
    """Names the rows that a FLOAT record does not predict exactly, if many rows are."""
    rows = record.rows
    if not record.gain_bits and record.affine is None:
        # Rows only serve contexts: the tensor's own show best what was left alone.
        wide = [row for row in splits(item.shape, record.count) if record.count // row >= LEAST_ROW]
        rows = max(wide, default=1)
    words = item.value.view(f"<u{item.value.itemsize}")
    touched = np.zeros(rows, dtype=bool)
    whole = replace(record, rows=rows)
    for piece in pieces(rows, record.count // rows):
        differ = predictors.floats(operands, whole, piece) != words[piece.start : piece.start + piece.count]
        touched[piece.rows] |= differ.reshape(piece.shape).any(axis=1)
    if touched.any() and touched.sum() < (1 - UNTOUCHED) * rows:
        record.rows, record.used = rows, touched


def fit_changes(record: Record, change: Array) -> None:
    """Fits the activity of a record to what it misses in the rows that it changes."""
    part = change[record.used] if len(record.used) else change
    fitted = activity.fit(part, max(1e-30, float(np.abs(part).mean()) * 0.05))
    if len(record.used) and len(fitted.rows) > 1:
        rows = np.zeros(record.rows, dtype=np.int64)
        rows[record.used] = fitted.rows
        fitted = activity.Activity(rows, fitted.columns)
    record.activity = fitted


def _plain(item: Item, value: Array) -> tuple[float, Record]:
    """The best PLAIN record and its bits."""
    count = len(value)
    best: tuple[float, Record, int] | None = None
    place = -1 if item.base is None or item.base.dtype != F32 or item.base.axes else item.base.at
    words = item.value.view("<u4")
    for rows in splits(item.shape, count):
        step = _step(count, rows)
        matrix = value.reshape(rows, -1)[::step]
        part = words.reshape(rows, -1)[::step]
        record = Record(PLAIN, F32, item.at, count, rows, place, residual=POOL)
        sampled = Record(PLAIN, F32, item.at, part.size, len(part), place, residual=POOL)
        for number, fitted in enumerate(_plain_fits(matrix)):
            sampled.activity = fitted
            bits = (residuals.plain_bits(sampled, part.reshape(-1)) + activity.sent_bits(fitted)) * step
            if best is None or bits < best[0]:
                best = (bits, record, number)
    assert best is not None
    bits, record, number = best
    record.activity = _plain_fits(value.reshape(record.rows, -1))[number]
    return bits, record


def _plain_fits(matrix: Array) -> list[activity.Activity]:
    by_mean = activity.fit(matrix, float(np.abs(matrix).mean()) * 0.05 + 1e-30)
    return [by_mean, *activity.fits_of_logarithms(matrix)]


def _gain_bits(gains: Array, digits: int) -> float:
    """Bits that gains cost, about."""
    away = np.abs(gains - (1 << digits))
    return float((2 * np.log2(away + 1) + 1).clip(0, np.log2(away.mean() + 1) + 3).sum())


def numbers(item: Item) -> Array:
    """What the elements stand for, codes as they are."""
    return predictors.widened(item.value, item.dtype) if item.dtype in (F16, BF16) else item.value


def settle(record: Record, residual: Array, rows_options: list[int]) -> float:
    """Chooses how an integer residual is coded; gives its estimated bits."""
    places = np.flatnonzero(residual)
    if not len(places):
        record.residual = EXACT
        return 1.0
    if len(places) <= max(3, _EXCEPTIONS * len(residual)) and len(places) < 200:
        record.residual = EXCEPTIONS
        record.exceptions = [(int(place), int(residual[place])) for place in places]
        return 12.0 * len(places)
    best = None
    for rows in rows_options:
        change = residual.reshape(rows, -1)
        fitted = activity.fit(change, 0.05)
        bits = activity.bits(change, fitted, 0.05)
        if best is None or bits < best[0]:
            best = (bits, rows, fitted)
    assert best is not None
    record.residual, record.rows, record.activity = POOL, best[1], best[2]
    return best[0] + 2.0 * len(residual)


def _entropy(count: float, total: float) -> float:
    share = count / max(total, 1)
    if share <= 0 or share >= 1:
        return 0.0
    return float(-total * (share * np.log2(share) + (1 - share) * np.log2(1 - share)))


def sparse(record: Record, residual: Array, rows: int) -> None:
    """Makes a codes record sparse."""
    record.residual, record.rows = SPARSE, rows
    record.changed = int(np.count_nonzero(residual))
    used = residual.reshape(rows, -1).any(axis=1)
    columns = len(residual) // rows
    apart = _entropy(used.sum(), rows) + _entropy(record.changed, used.sum() * columns)
    if apart + 100 < _entropy(record.changed, len(residual)):
        record.used = np.asarray(used, dtype=bool)


def plan_codes(item: Item) -> None:
    """CODES: 8-bit codes from codes, with gains or rescaled; or without a base, by gains of 0."""
    base, count = item.base, len(item.value)
    zero = item.quantisation.zero_points[0] if item.quantisation else 0
    new = item.value.astype(np.float32) - np.float32(zero)
    best: tuple[float, Record] | None = None
    if base is not None and base.dtype == item.dtype:
        ratio, base_zero = None, zero
        if base.quantisation and item.quantisation:
            base_zero = base.quantisation.zero_points[0]
            if len(base.quantisation.scales) == len(item.quantisation.scales):
                ratio = np.array(base.quantisation.scales) / np.maximum(
                    np.array(item.quantisation.scales), 1e-38
                )
        old = base.value.astype(np.float32) - np.float32(base_zero)
        bits, way = _best_way(_ways(item.shape, count, ratio), old, new, 0.2)
        record = Record(
            CODES, item.dtype, item.at, count, way.rows, by_rows=way.by_rows, gain_bits=way.digits,
            zero=zero, base_zero=base_zero, **base.operand(),
        )  # fmt: skip
        if way.digits:
            record.gains = way.gains(old.reshape(way.rows, -1), new.reshape(way.rows, -1), 0.3)
        best = (bits, record)
    plain = [_Way(rows) for rows in splits(item.shape, count)]
    bits, way = _best_way(plain, np.zeros(count, dtype=np.float32), new, 0.2)
    if best is None or bits < best[0]:
        zeros = np.zeros(way.rows, dtype=np.int64)
        best = (
            bits,
            Record(CODES, item.dtype, item.at, count, way.rows, 0, gain_bits=7, gains=zeros, zero=zero),
        )
    item.record = best[1]


def finish_codes(item: Item, data: Operands) -> None:
    """Settles the residual of a CODES record by its exact prediction."""
    record = item.record
    assert record is not None
    try:
        guess, _ = predictors.codes(data, record, Piece.whole(record.rows, record.columns))
    except ProgramError:  # codes without a counterpart still name a place in the base, which has none so long
        item.record = None
        return
    residual = item.value.astype(np.int16) - guess
    changed = np.count_nonzero(residual)
    if 200 <= changed < 0.15 * len(residual):
        rows = record.rows if record.rows > 1 else max(splits(item.shape, len(residual)))
        if record.gain_bits and record.by_rows and len(record.gains) not in (1, rows):
            rows = record.rows
        sparse(record, residual, rows)
        return
    settle(record, residual, [record.rows] if record.gain_bits else splits(item.shape, len(residual)))
