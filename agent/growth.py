"""How much memory a worker process may come to hold, and which one holds too much. Pure.

What counts is memory of the process's own: neither what it shares with the agent, where large requests lie,
nor the pages of files, which the kernel takes back by itself. Runtimes keep the memory of the largest batch
they ran, so a process may grow well beyond what it held when it was checked: the default leaves room for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.limits import (
    GROWTH_BOX_SHARE,
    GROWTH_BYTES,
    GROWTH_FACTOR,
    GROWTH_LEAST,
    RENEWAL_RESERVE_BYTES,
)


def limit(asked: int, base: int, box: int, processes: int) -> int:
    """The most that one process may hold, bytes.

    Args:
        asked: by the configuration or the variant, bytes; 0: nothing was.
        base: what a process held once it was checked, bytes.
        box: memory of the box at all, bytes.
        processes: of the version.
    """
    if asked:
        return asked
    share = int(GROWTH_BOX_SHARE * box) // processes
    return max(int((1 + GROWTH_LEAST) * base), min(GROWTH_FACTOR * base + GROWTH_BYTES, share))


def outgrown(sizes: Sequence[int], most: int) -> int | None:
    """Which process of a version is to be renewed: the largest, if it holds more than `most`; else None."""
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    return largest if most and sizes[largest] > most else None


def fits_beside(base: int, available: int) -> bool:
    """Whether a fresh process, which will hold about `base` bytes, has room while the old one is there."""
    return base + RENEWAL_RESERVE_BYTES <= available
