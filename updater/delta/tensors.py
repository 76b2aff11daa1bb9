"""Predicted arrays and their residuals, both ways: what a tensor instruction means, element by element.

Decoding: (1) fill the output with the prediction, (2) add the residual. Prediction and addition work on a
bounded number of elements at a time. Rules: integers only, wrapping at the element's width; the encoder calls
the same functions as the decoder, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta import faults
from updater.delta.elements import ElementType, Unsigned, fold, from_ordered, to_ordered, unfold
from updater.delta.instructions import DENSE, PLAIN, Requantise, Tensor
from updater.limits import ARITHMETIC_ELEMENTS as STEP

GAP_ESCAPE = 255  # a gap byte that means "255 elements further, and the gap goes on"

Take = Callable[[int, int], bytes]  # (stream, length) -> its next bytes
Bytes = NDArray[np.uint8]


def requantised(codes: Unsigned, kind: ElementType, shape: Requantise, first: int) -> Unsigned:
    """Predicts new codes from old ones.

    For element i of the tensor, in channel c = (i // inner) mod channels, with old code q:
    p = floor(((q - old_zero[c]) * m[c] + 2^(shift-1)) / 2^shift) + new_zero[c] (the addend is 0 when shift is
    0), clamped to the range of the type. int64 holds every intermediate value.

    Args:
        codes: the old codes, as unsigned words.
        kind: their element type, which the new codes share.
        shape: the requantisation.
        first: where codes[0] lies in the tensor, counted in elements.
    """
    signed = codes.view(f"<i{kind.width}") if kind.reading == "signed" else codes
    values: NDArray[np.int64] = signed.astype(np.int64)
    channels = len(shape.multipliers)
    if channels == 1:
        multiplier, old_zero, new_zero = shape.multipliers[0], shape.old_zero[0], shape.new_zero[0]
        values = (values - old_zero) * multiplier
        values = _shifted(values, shape.shift) + new_zero
    else:
        channel = (np.arange(first, first + len(values), dtype=np.int64) // shape.inner) % channels
        old = np.asarray(shape.old_zero, dtype=np.int64)
        new = np.asarray(shape.new_zero, dtype=np.int64)
        many = len(shape.old_zero) > 1
        values = values - (old[channel] if many else old[0])
        values = values * np.asarray(shape.multipliers, dtype=np.int64)[channel]
        values = _shifted(values, shape.shift) + (new[channel] if many else new[0])
    return (
        np.clip(values, kind.low, kind.high)
        .astype(f"<i{kind.width}" if kind.low else kind.dtype)
        .view(kind.dtype)
    )


def _shifted(values: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    if shift == 0:
        return values
    return (values + np.int64(1 << (shift - 1))) >> np.int64(shift)


def predict(kind: ElementType, count: int, base: Bytes | None, shape: Requantise | None) -> Unsigned:
    """The prediction for `count` elements.

    Args:
        kind: the element type.
        count: elements.
        base: the bytes of as many elements of the base; None for the plain predictor (all bits zero).
        shape: the requantisation, if any.
    """
    if base is None:
        return np.zeros(count, dtype=kind.dtype)
    out: NDArray[Any] = base.view(kind.dtype).copy()
    if shape is not None:
        for start in range(0, count, STEP):
            piece = out[start : start + STEP]
            out[start : start + STEP] = requantised(piece, kind, shape, shape.start + start)
    return out


def residual(target: Unsigned, prediction: Unsigned, kind: ElementType) -> Unsigned:
    """Folded differences of the ordered integers, one unsigned word for each element."""
    out = np.empty_like(target)
    for start in range(0, len(target), STEP):
        piece = slice(start, start + STEP)
        out[piece] = fold(to_ordered(target[piece], kind) - to_ordered(prediction[piece], kind))
    return out


def planes(folded: Unsigned) -> list[bytes]:
    """The byte planes of unsigned words, the lowest byte's first."""
    width = folded.dtype.itemsize
    table = np.ascontiguousarray(folded).view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(table[:, index]).tobytes() for index in range(width)]


def join_planes(parts: list[bytes], kind: ElementType) -> Unsigned:
    """The inverse of `planes`."""
    table = np.empty((len(parts[0]), kind.width), dtype=np.uint8)
    for index, part in enumerate(parts):
        table[:, index] = np.frombuffer(part, dtype=np.uint8)
    joined: Unsigned = table.reshape(-1).view(kind.dtype)
    return joined


def sparse(folded: Unsigned) -> tuple[bytes, Unsigned]:
    """Gaps between the elements that are not zero, and those elements less one.

    A gap g (the zeros before an element) is written as g // 255 bytes 255 and one byte g mod 255.
    """
    positions = np.flatnonzero(folded)
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // GAP_ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, GAP_ESCAPE, dtype=np.uint8)
    coded[ends] = gaps % GAP_ESCAPE
    return coded.tobytes(), folded[positions] - folded.dtype.type(1)


def decode(item: Tensor, base: Bytes | None, take: Take) -> Bytes:
    """The bytes that a tensor instruction writes.

    Args:
        item: the instruction.
        base: the bytes of its elements in the base; None for PLAIN.
        take: gives the next bytes of a stream, or raises.

    Raises SluiceError(DELTA_INVALID).
    """
    out = predict(item.kind, item.count, None if item.predictor == PLAIN else base, item.requantise)
    if item.coding == DENSE:
        parts = [np.frombuffer(take(stream, item.count), dtype=np.uint8) for stream in item.streams]
        for start in range(0, item.count, STEP):
            piece = slice(start, min(start + STEP, item.count))
            _add(out, piece, join_planes([part[piece].tobytes() for part in parts], item.kind), item.kind)
    else:
        _add_sparse(out, item, take)
    return out.view(np.uint8)


def _add_sparse(out: Unsigned, item: Tensor, take: Take) -> None:
    gaps = np.frombuffer(take(item.streams[0], item.gap_bytes), dtype=np.uint8)
    if len(gaps) and gaps[-1] == GAP_ESCAPE:
        raise faults.invalid("a stream of gaps ends inside a gap")
    values = len(gaps) - int(np.count_nonzero(gaps == GAP_ESCAPE))
    parts = [np.frombuffer(take(stream, values), dtype=np.uint8) for stream in item.streams[1:]]
    passed = done = 0  # elements before the next gap; values used
    for start in range(0, len(gaps), STEP):
        piece = gaps[start : start + STEP]
        last = piece < GAP_ESCAPE
        ends = passed + np.cumsum(piece.astype(np.int64) + last)
        passed = int(ends[-1])
        if passed > item.count:
            raise faults.invalid(f"a gap leads beyond the {item.count} elements of its instruction")
        positions = ends[last] - 1
        chosen = [part[done : done + len(positions)].tobytes() for part in parts]
        done += len(positions)
        _add(out, positions, join_planes(chosen, item.kind) + item.kind.dtype.type(1), item.kind)


def _add(out: Unsigned, where: slice | NDArray[np.int64], folded: Unsigned, kind: ElementType) -> None:
    out[where] = from_ordered(to_ordered(out[where], kind) + unfold(folded), kind)
