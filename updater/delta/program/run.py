"""Runs a program out of a delta that may hold anything: the target's bytes, or a SluiceError."""

from __future__ import annotations

import numpy as np

from updater.delta import faults
from updater.delta.program import reader
from updater.delta.program.operands import LimitError, ReadBase


def run(
    read: ReadBase, data: bytes | memoryview, offset: int, length: int, tracks: bool = True
) -> memoryview:
    """The `length` bytes of the target at `offset`.

    Args:
        read: gives bytes of the base or raises SluiceError(DELTA_INVALID).
        data: the program.
        offset: where it writes; addresses of the base are counted from there.
        length: bytes that it must write.
        tracks: whether the header names the feature `tracking`.

    Raises SluiceError(DELTA_INVALID | DELTA_CORRUPT) and what `read` raises.
    """
    try:
        with np.errstate(all="ignore"):
            return reader.decode(read, data, offset, length, tracks)
    except LimitError as error:
        raise faults.over_limit(error.what, error.value, error.limit) from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # Streams that contradict each other show where arrays no longer fit.
        raise faults.invalid(f"a program at byte {offset} of the target does not run: {error}") from error
