"""Pairs of small files for tests of the delta's programs: arrays with the spans that a reader would find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from updater import delta
from updater.formats.span import Quantisation, TensorSpan


@dataclass
class Arrays:
    """A file that is nothing but arrays, one behind the other."""

    data: bytearray = field(default_factory=bytearray)
    spans: list[TensorSpan] = field(default_factory=list)

    def add(
        self,
        name: str,
        values: NDArray[np.generic],
        dtype: str | None = None,
        meaning: Quantisation | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Arrays:
        """Puts an array behind the others."""
        raw = np.ascontiguousarray(values).tobytes()
        span = TensorSpan(
            name, dtype or str(values.dtype), shape or values.shape, len(self.data), len(raw), meaning
        )
        self.spans.append(span)
        self.data += raw
        return self


def weights(shape: Sequence[int], seed: int = 1) -> NDArray[np.float32]:
    """Normal numbers, as weights are."""
    return np.random.default_rng(seed).normal(0, 0.05, tuple(shape)).astype(np.float32)


def send(folder: Path, old: Arrays, new: Arrays, block_size: int = 1 << 20) -> delta.DeltaSummary:
    """Makes and applies the delta between two files, and compares."""
    (folder / "old").write_bytes(bytes(old.data))
    (folder / "new").write_bytes(bytes(new.data))
    summary = delta.create(
        folder / "old",
        folder / "new",
        folder / "d",
        options=delta.EncodeOptions(block_size=block_size),
        base_spans=old.spans,
        target_spans=new.spans,
    )
    delta.apply(folder / "old", folder / "d", folder / "out")
    assert (folder / "out").read_bytes() == bytes(new.data)
    return summary


def predictors(summary: delta.DeltaSummary) -> set[str]:
    """What predicts the named arrays."""
    return {region.predictor for region in summary.regions if region.name}
