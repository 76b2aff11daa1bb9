"""Steps of stepped records as they are sent: numbers of 12 significant bits, mantissa * 2^exponent.

A step is coded by its place among all such numbers, so that rows of nearly the same step differ by little.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from updater.delta.program.arithmetic import Coder
from updater.delta.program.operands import ProgramError

Reals = NDArray[np.float64]
BITS = 12  # significant bits of a step
OCTAVE = 1 << (BITS - 1)  # steps of one exponent; also the least mantissa
MAX_EXPONENT = 200  # of two, either way: beyond the widest type, far inside binary64


def code(coder: Coder, count: int, used: NDArray[np.bool_], given: Reals | None) -> Reals:
    """Sends [count] steps, or reads them when `given` is None; those of rows that are not `used` are 0.

    Raises ProgramError for a step outside its range.
    """
    out = np.zeros(count)
    last = 0
    for place in np.flatnonzero(used).tolist() if len(used) == count else range(count):
        step = 0.0 if given is None else float(given[place])
        if coder.bit("still", int(step == 0)):
            continue
        last += coder.signed("step", _place(step) - last)
        if not -MAX_EXPONENT <= last // OCTAVE <= MAX_EXPONENT:
            raise ProgramError("a step lies outside its range")
        out[place] = math.ldexp(OCTAVE + last % OCTAVE, last // OCTAVE)
    return out


def _place(step: float) -> int:
    """The place of a step among all, 0 for OCTAVE * 2^0."""
    if not step:
        return 0
    fraction, exponent = math.frexp(step)
    return (exponent - BITS) * OCTAVE + int(math.ldexp(fraction, BITS)) - OCTAVE


def shortened(value: float) -> float:
    """The step nearest to a positive number."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, BITS)), exponent - BITS)
