"""Which tensor of the base a tensor of the target comes from: by content, by name, by shape and likeness.

Used by the encoder only; nothing here is needed, or repeated, on the device.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from updater.delta.elements import element_type, fold, to_ordered
from updater.formats.span import TensorSpan

Bytes = NDArray[np.uint8]

_SAMPLE = 1024  # elements compared to judge how alike two tensors are
_CANDIDATES = 32  # tensors of the same shape that are judged


@dataclass(frozen=True)
class Match:
    """A tensor of the target and what it comes from.

    Attributes:
        span: the tensor in the target.
        base: the tensor of the base to predict it from, if there is one.
        copy_offset: where exactly its bytes lie in the base, if they do.
    """

    span: TensorSpan
    base: TensorSpan | None
    copy_offset: int | None


def match_tensors(
    base: Bytes, base_spans: Sequence[TensorSpan], target: Bytes, target_spans: Sequence[TensorSpan]
) -> list[Match]:
    """Finds each target tensor's origin: by name, then by shape and likeness; and equal content anywhere."""
    pairs = _by_name(base_spans, target_spans)
    taken = {id(span) for span in pairs.values()}
    _by_shape(base, [span for span in base_spans if id(span) not in taken], target, target_spans, pairs)
    contents: dict[tuple[int, bytes], int] = {}
    for span in base_spans:
        contents.setdefault((span.length, _digest(base, span)), span.offset)
    matches = []
    for index, span in enumerate(target_spans):
        origin = pairs.get(index)
        offset = None
        if origin is not None and _equal(base, origin, target, span):
            offset = origin.offset
        else:
            offset = contents.get((span.length, _digest(target, span)))
        matches.append(Match(span, origin, offset))
    return matches


def _by_name(base_spans: Sequence[TensorSpan], target_spans: Sequence[TensorSpan]) -> dict[int, TensorSpan]:
    names: dict[str, list[TensorSpan]] = defaultdict(list)
    for span in base_spans:
        if span.name:
            names[span.name].append(span)
    pairs = {}
    for index, span in enumerate(target_spans):
        found = names.get(span.name, [])
        if len(found) == 1 and _same_kind(found[0], span):
            pairs[index] = found[0]
    return pairs


def _by_shape(
    base: Bytes,
    free: Sequence[TensorSpan],
    target: Bytes,
    target_spans: Sequence[TensorSpan],
    pairs: dict[int, TensorSpan],
) -> None:
    groups: dict[tuple[str, tuple[int, ...], int], list[TensorSpan]] = defaultdict(list)
    for span in free:
        groups[span.dtype, span.shape, span.length].append(span)
    for index, span in enumerate(target_spans):
        group = groups.get((span.dtype, span.shape, span.length))
        if index in pairs or not group:
            continue
        # The first of equally good ones, so that the order of the files decides.
        best = min(group[:_CANDIDATES], key=lambda origin: _unlikeness(base, origin, target, span))
        group.remove(best)
        pairs[index] = best


def _same_kind(one: TensorSpan, other: TensorSpan) -> bool:
    return (one.dtype, one.shape, one.length) == (other.dtype, other.shape, other.length)


def _equal(base: Bytes, origin: TensorSpan, target: Bytes, span: TensorSpan) -> bool:
    ours = target[span.offset : span.offset + span.length]
    return bool(np.array_equal(base[origin.offset : origin.offset + origin.length], ours))


def _digest(data: Bytes, span: TensorSpan) -> bytes:
    return hashlib.blake2b(data[span.offset : span.offset + span.length].data, digest_size=16).digest()


def _unlikeness(base: Bytes, origin: TensorSpan, target: Bytes, span: TensorSpan) -> float:
    kind = element_type(span.dtype)
    count = min(_SAMPLE, span.length // kind.width) * kind.width
    old = base[origin.offset : origin.offset + count].view(kind.dtype)
    new = target[span.offset : span.offset + count].view(kind.dtype)
    folded = fold(to_ordered(new, kind) - to_ordered(old, kind)).astype(np.float64)
    return float(np.log2(folded + 1).sum())
