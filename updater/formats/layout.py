"""Shapes and spans, checked: what every reader does with what it found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from updater.formats import limits
from updater.formats.source import Source
from updater.formats.span import ELEMENT_BITS, Quantisation, TensorSpan


def elements(source: Source, shape: Sequence[int], what: str, at: int) -> int:
    """The number of elements of a shape; raises MODEL_FILE_INVALID for an impossible one."""
    if len(shape) > limits.MAX_RANK:
        raise source.invalid(
            f"{what} at byte {at} has {len(shape)} dimensions, more than the {limits.MAX_RANK} allowed"
        )
    count = 1
    for dimension in shape:
        if dimension < 0:
            raise source.invalid(f"{what} at byte {at} has a negative dimension in its shape {list(shape)}")
        count *= dimension
        if count > limits.MAX_ELEMENTS:
            raise source.invalid(
                f"{what} at byte {at} has the shape {list(shape)}: "
                f"more elements than the {limits.MAX_ELEMENTS} allowed"
            )
    return count


def byte_length(dtype: str, count: int) -> int:
    """Bytes of `count` elements, those smaller than a byte packed."""
    return (count * ELEMENT_BITS[dtype] + 7) // 8


def quantisation(
    scales: Sequence[float], zero_points: Sequence[int], shape: Sequence[int], axis: int, block: int = 0
) -> Quantisation | None:
    """Parameters if they make sense for the shape, else None: they help a delta, they are never needed.

    One scale stands for the whole tensor; as many as shape[axis] run along that axis, or one for each `block`
    elements along it. No zero points mean zeros; one serves all scales.
    """
    if not scales or not all(0 <= scale < float("inf") for scale in scales):
        return None
    if len(zero_points) == 0:
        zero_points = [0] * len(scales)
    elif len(zero_points) == 1:
        zero_points = [zero_points[0]] * len(scales)
    if len(zero_points) != len(scales):
        return None
    if len(scales) == 1:
        return Quantisation(tuple(scales), tuple(zero_points), None)
    if axis < 0:
        axis += len(shape)
    if not 0 <= axis < len(shape):
        return None
    if block:
        blocked = Quantisation(tuple(scales), tuple(zero_points), axis, block)
        return blocked if blocked.groups(tuple(shape)) == len(scales) else None
    if shape[axis] != len(scales):
        return None
    return Quantisation(tuple(scales), tuple(zero_points), axis)


def arrange(spans: Iterable[TensorSpan]) -> tuple[TensorSpan, ...]:
    """Spans by offset, without empty ones, duplicates and overlaps.

    Tensors may share bytes (TFLite deduplicates buffers, ONNX external data may). The same bytes give one
    span, named after the first tensor and quantised as the first that says so. Of spans that overlap in
    part, which no exporter writes, the first stays and the others are dropped: spans only help a delta to be
    small, and bytes outside all of them travel too.
    """
    kept: list[TensorSpan] = []
    for span in sorted(spans, key=lambda span: (span.offset, -span.length)):  # stable: first come, first kept
        if span.length == 0:
            continue
        last = kept[-1] if kept else None
        if last is None or span.offset >= last.offset + last.length:
            kept.append(span)
        elif (span.offset, span.length, span.dtype, span.shape) == (
            last.offset,
            last.length,
            last.dtype,
            last.shape,
        ) and last.quantisation is None:
            kept[-1] = replace(last, quantisation=span.quantisation)
    return tuple(kept)
