"""A context-mixing model for bytes that no predictor explains: literals, and bytes that differ from an
aligned copy.

Eight binary decisions a byte, each predicted by several adaptive models whose contexts see the bytes
before, the
byte that the base has at the aligned place, and the place within four bytes; a small network, trained as it
goes,
mixes the predictions in the logistic domain (after M. Mahoney's lpaq). All integers. Plain Python: some ten
microseconds a bit, so a delta's share of such bytes is limited.
"""

from __future__ import annotations

from collections.abc import Sequence

from updater.delta.program.arithmetic import RATES, Coder
from updater.delta.program.operands import within


def _squash(value: int) -> int:
    """4096 / (1 + e^(-value / 256)), by interpolation."""
    value = max(-2047, min(2047, value))
    weight, index = value & 127, (value >> 7) + 16
    return (_CURVE[index] * (128 - weight) + _CURVE[index + 1] * weight + 64) >> 7


_CURVE = (
    *(1, 2, 3, 6, 10, 16, 27, 45, 73, 120, 194, 310, 488, 747, 1101, 1546, 2047),
    *(2549, 2994, 3348, 3607, 3785, 3901, 3975, 4024, 4050, 4068, 4079, 4085, 4089, 4092, 4093, 4094, 4095),
)
_SQUASH = tuple(_squash(value) for value in range(-2048, 2048))


def _stretches() -> tuple[int, ...]:
    out, at = [0] * 4096, 0
    for value in range(-2047, 2048):
        for probability in range(at, _squash(value) + 1):
            out[probability] = value
        at = _squash(value) + 1
    for probability in range(at, 4096):
        out[probability] = 2047
    return tuple(out)


_STRETCH = _stretches()
_LIMIT = 250
_WEIGHT_ONE = 1 << 16
_RATE = 14


class ByteModel:
    """Codes bytes one after the other through a `Coder`, in either direction."""

    def __init__(self, coder: Coder, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._coder = coder
        self._tables: list[dict[int, list[int]]] = []
        self._weights: dict[int, list[int]] = {}
        self._final: dict[int, list[int]] = {}

    def code(self, contexts: Sequence[int], selector: int, expected: int, byte: int = 0) -> int:
        """One byte.

        Args:
            contexts: one integer for each model, the same number at each call.
            selector: which weights mix, a small integer.
            expected: the byte thought likely, or -1; deciding bits after it failed are mixed apart.
            byte: the byte to write.
        """
        self._bytes += 1
        within("bytes through all of its models", self._bytes, self._budget)
        tables = self._tables
        while len(tables) < len(contexts):
            tables.append({})
        coder, partial = self._coder, 1
        for shift in range(7, -1, -1):
            hit = 2 if expected < 0 else int((expected | 256) >> (shift + 1) == partial)
            entries, inputs = [], []
            for table, context in zip(tables, contexts):
                key = context << 8 | partial
                entry = table.get(key)
                if entry is None:
                    entry = table[key] = [32768, 0]
                entries.append(entry)
                stretched = _STRETCH[entry[0] >> 4]
                seen = entry[1]
                inputs.append(stretched if seen > 2 else stretched * seen // 3)
                # A model that was never wrong speaks louder.
                inputs.append((stretched >> 1) if seen > 2 and (entry[0] < 2048 or entry[0] > 63488) else 0)
            chosen = (selector * 3 + hit) * 8 + (7 - shift if hit == 1 else 0)
            weights = self._weights.get(chosen)
            if weights is None:
                weights = self._weights[chosen] = [_WEIGHT_ONE * 3 // 10] * len(inputs)
            total = sum(map(int.__mul__, weights, inputs)) >> 16
            mixed = _SQUASH[max(-2047, min(2047, total)) + 2048]
            probability = min(65535 - 24, max(24, mixed << 4 | 8))
            bit = coder.raw_bit(byte >> shift & 1, probability)
            error = ((bit << 12) - mixed) * _RATE
            for index, value in enumerate(inputs):
                if value:
                    weights[index] += value * error + 0x2000 >> 14
            goal = 65535 if bit else 0
            for entry in entries:
                seen = entry[1]
                entry[0] += (goal - entry[0]) * RATES[seen] >> 16
                if seen < _LIMIT:
                    entry[1] = seen + 1
            partial = partial << 1 | bit
        return partial & 255
