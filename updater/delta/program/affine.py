"""Factors and offsets of floats: base · factor + offset, both numbers of few or of all significant bits.

The part of FLOAT records that both sides run alike. A row or a column has its factor and its offset; most of
either may be neutral (1, and -0, which changes no number), and then take one modelled bit. Arithmetic: a
product, then a sum, each a single operation on float32, flushed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.arithmetic import Coder
from updater.delta.program.operands import ProgramError

Floats = NDArray[np.float32]
DIGITS = (12, 24)  # significant bits
NEUTRAL_FACTOR, NEUTRAL_OFFSET = 0x3F800000, 0x80000000  # words of 1 and -0
_FIRST_EXPONENT = 127
_NORMAL = (1, 254)  # exponents of normal numbers


@dataclass(frozen=True, eq=False)
class Affine:
    """What FLOAT multiplies by and adds.

    Attributes:
        digits: significant bits of each number, one of `DIGITS`.
        factors, offsets: float32, one of each for a row or a column.
    """

    digits: int
    factors: Floats
    offsets: Floats


def code(coder: Coder, digits: int, size: int, given: Affine | None) -> Affine:
    """Sends `size` factors and as many offsets, or reads them. Raises ProgramError."""
    factors = _code(coder, "factor", digits, size, NEUTRAL_FACTOR, given.factors if given else None)
    offsets = _code(coder, "offset", digits, size, NEUTRAL_OFFSET, given.offsets if given else None)
    return Affine(digits, factors, offsets)


def _code(coder: Coder, name: str, digits: int, size: int, neutral: int, given: Floats | None) -> Floats:
    out = np.empty(size, dtype="<u4")
    wanted = [neutral] * size if given is None else given.view("<u4").tolist()
    last, rest = _FIRST_EXPONENT, 24 - digits
    for place, word in enumerate(wanted):
        if coder.bit(("neutral", name), int(word == neutral)):
            out[place] = neutral
            continue
        sign = coder.bit(("negative", name), word >> 31)
        last += coder.signed(("exponent", name), (word >> 23 & 255) - last)
        if not _NORMAL[0] <= last <= _NORMAL[1]:
            raise ProgramError("a factor or an offset lies outside its range")
        out[place] = sign << 31 | last << 23 | coder.bits((word & 0x7FFFFF) >> rest, digits - 1) << rest
    return out.view("<f4")


def rounded(values: NDArray[Any], digits: int, neutral: int) -> Floats:
    """The nearest numbers that can be sent; the neutral one for what is none, or too small or too large."""
    fraction, exponent = np.frexp(values.astype(np.float64))
    near = np.ldexp(np.rint(np.ldexp(fraction, digits)), exponent - digits)
    size = np.abs(near)
    usable = (size >= float(np.finfo(np.float32).tiny)) & (size <= float(np.finfo(np.float32).max))
    plain = np.array([neutral], dtype="<u4").view("<f4")
    return np.where(usable, np.where(usable, near, 1.0).astype("<f4"), plain).astype("<f4")


def bits(line: Affine) -> float:
    """Bits that factors and offsets cost, about."""
    sent = (line.factors.view("<u4") != NEUTRAL_FACTOR).sum()
    sent += (line.offsets.view("<u4") != NEUTRAL_OFFSET).sum()
    return float(sent) * (line.digits + 3) + 0.3 * 2 * len(line.factors)
