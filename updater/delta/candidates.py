"""Ways to code one piece of the target, and what each costs: the encoder tries them and keeps the cheapest.

A candidate is an instruction without stream numbers and the bytes that it puts into streams. Costs are
estimates (each stream of the candidate compressed alone and fast); the block's real size decides at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import zstandard
from numpy.typing import NDArray

from updater.delta import tensors
from updater.delta.elements import ELEMENT_TYPES, ElementType, Unsigned
from updater.delta.instructions import (
    DENSE,
    DIFFERENCE,
    MAX_MULTIPLIER,
    MAX_ZERO_POINT,
    PLAIN,
    REQUANTISE,
    SPARSE,
    Requantise,
    Tensor,
    encode_parameters,
)
from updater.delta.plan import Piece, Rescale

Bytes = NDArray[np.uint8]

# Digits behind the point that are tried: few cost little to send, many predict better.
_SHIFTS = (10, 14, 20)
_ESTIMATE_LEVEL = 3
_FRAME_COST = 12  # bytes of an instruction and its frames that no estimate sees
_SPARSE_SHARE = 0.5  # above this share of elements that differ, gaps are not worth a try
_FLOAT32 = ELEMENT_TYPES[8]


@dataclass(frozen=True)
class Candidate:
    """One way to code a piece as a tensor instruction.

    Attributes:
        item: the instruction; its stream numbers are filled in when the block is put together.
        parts: what goes into its streams, in the instruction's order.
        parameters: what goes into the parameter stream.
    """

    item: Tensor
    parts: tuple[bytes, ...]
    parameters: bytes = b""


class Estimator:
    """Compresses quickly, with a window of the base or without, to compare candidates.

    Args:
        window: bytes of the base that every literal may refer to; may be empty.
    """

    def __init__(self, window: bytes) -> None:
        self._plain = zstandard.ZstdCompressionParameters.from_level(_ESTIMATE_LEVEL, write_checksum=False)
        self._window = None
        if window:
            self._window = zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            self._window.precompute_compress(level=_ESTIMATE_LEVEL)

    def plain(self, data: bytes) -> int:
        """Bytes of a stream of its own."""
        coded = zstandard.ZstdCompressor(compression_params=self._plain).compress(data)
        return min(len(data), len(coded))

    def literal(self, data: bytes) -> int:
        """Bytes of a literal that may refer to the window."""
        if self._window is None:
            return self.plain(data)
        coded = zstandard.ZstdCompressor(level=_ESTIMATE_LEVEL, dict_data=self._window).compress(data)
        return min(len(data), len(coded))

    def cost(self, candidate: Candidate) -> int:
        """Bytes of a candidate."""
        parts = (*candidate.parts, candidate.parameters)
        return _FRAME_COST + sum(self.plain(part) for part in parts if part)


def choose(piece: Piece, base: Bytes, target: Bytes, estimator: Estimator) -> Candidate | None:
    """The cheapest way to code a piece that is no copy; None stands for a literal."""
    data = target[piece.offset : piece.offset + piece.length]
    best, least = None, estimator.literal(data.tobytes())
    for candidate in _candidates(piece, base, data):
        cost = estimator.cost(candidate)
        if cost < least:
            best, least = candidate, cost
    return best


def _candidates(piece: Piece, base: Bytes, data: Bytes) -> Iterator[Candidate]:
    kinds = [piece.kind]
    if not piece.tensor:
        # What no reader explains may still be an array of numbers, such as scales, on its own alignment.
        kinds = [piece.kind, _FLOAT32] if piece.length % 4 == 0 else [piece.kind]
    for kind in kinds:
        words = data.view(kind.dtype)
        if piece.tensor:
            yield from _coded(piece, kind, words, None, None)
        if piece.base_offset is None:
            continue
        old = base[piece.base_offset : piece.base_offset + piece.length]
        yield from _coded(piece, kind, words, old, None)
        for shape in _requantisations(piece.rescale, len(words)):
            yield from _coded(piece, kind, words, old, shape)


def _coded(
    piece: Piece, kind: ElementType, words: Unsigned, old: Bytes | None, shape: Requantise | None
) -> Iterator[Candidate]:
    folded = tensors.residual(words, tensors.predict(kind, len(words), old, shape), kind)
    predictor = PLAIN if old is None else DIFFERENCE if shape is None else REQUANTISE
    parameters = encode_parameters(shape) if shape is not None else b""
    dense = Tensor(predictor, DENSE, kind, len(words), piece.base_offset or 0, 0, (), shape)
    if predictor == PLAIN:
        dense = replace(dense, base_offset=0)
    yield Candidate(dense, tuple(tensors.planes(folded)), parameters)
    if np.count_nonzero(folded) <= _SPARSE_SHARE * len(words):
        gaps, values = tensors.sparse(folded)
        item = replace(dense, coding=SPARSE, gap_bytes=len(gaps))
        yield Candidate(item, (gaps, *tensors.planes(values)), parameters)


def _requantisations(rescale: Rescale | None, count: int) -> Iterator[Requantise]:
    if rescale is None:
        return
    old, new = rescale.old, rescale.new
    channels, start = len(new.scales), rescale.start
    chosen: Sequence[int] = range(channels)
    if channels > 1:
        first, last = start // rescale.inner, (start + count - 1) // rescale.inner
        if last < channels:  # the channels run along the outermost axis: send those of this piece only
            chosen = range(first, last + 1)
            start -= first * rescale.inner
        else:
            start %= rescale.inner * channels
    else:
        start = 0
    ratios = [_ratio(old.scales[c], new.scales[c]) for c in chosen]
    old_zero, new_zero = _zeros(old.zero_points, chosen), _zeros(new.zero_points, chosen)
    if len(old_zero) != len(new_zero):
        old_zero = tuple(old.zero_points[c] for c in chosen)
        new_zero = tuple(new.zero_points[c] for c in chosen)
    if all(ratio == 1 for ratio in ratios) and old_zero == new_zero:
        return
    if max(map(abs, (*old_zero, *new_zero))) > MAX_ZERO_POINT:
        return
    for shift in _SHIFTS:
        multipliers = tuple(round(ratio * (1 << shift)) for ratio in ratios)
        if min(multipliers) >= 1 and max(multipliers) <= MAX_MULTIPLIER:
            yield Requantise(start, rescale.inner, shift, multipliers, old_zero, new_zero)


def _ratio(old: float, new: float) -> float:
    """Old scale / new scale; 0, which no multiplier can have, where there is none."""
    if not (np.isfinite(old) and np.isfinite(new)) or new == 0:
        return 0.0
    return min(float(old) / float(new), 1e12)


def _zeros(points: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    zeros = tuple(points[c] for c in chosen)
    return zeros[:1] if len(set(zeros)) == 1 else zeros
