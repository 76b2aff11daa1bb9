"""Long runs of the target that occur in the base or earlier in the target, wherever they lie.

Order: hash every window of 32 bytes of the base, and of the target's parts in question; of more than a
million windows keep those whose hash ends in zeros; look up each fourth place of those parts, or those kept;
check, extend to both sides, keep the longest from left to right. NumPy does the hashing and the look-up; only
matches are visited one by one. Memory is some 25 bytes for each byte hashed, of which there are MAX_BYTES.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

WINDOW = 32
_STEP = 4
MIN_LENGTH = 48
MAX_BYTES = 16 << 20  # hashed
_WINDOWS = 1 << 20  # looked at, about


@dataclass(frozen=True)
class Repeat:
    """`length` bytes at `at` of the target that equal those at `source` of the base, or of the target."""

    at: int
    length: int
    source: int
    own: bool


def _hashes(data: U8) -> U64:
    """A hash of each window of 32 bytes."""
    value = data.astype(np.uint64) + np.uint64(1)
    multiplier = 0x9E3779B97F4A7C15
    width = 1
    while width < WINDOW:
        value = value[:-width] * np.uint64(multiplier) + value[width:]
        value ^= value >> np.uint64(29)
        multiplier = (multiplier * multiplier) & 0xFFFFFFFFFFFFFFFF
        width *= 2
    return value


def _common(one: U8, other: U8) -> int:
    """Bytes that two arrays have in common at their beginning."""
    at, size, end = 0, 64, min(len(one), len(other))
    while at < end:
        differ = np.flatnonzero(one[at : at + size][: end - at] != other[at : at + size][: end - at])
        if len(differ):
            return at + int(differ[0])
        at, size = at + size, min(size * 4, 1 << 20)
    return end


def find(base: U8, target: bytes, parts: Sequence[tuple[int, int]], least: Sequence[int]) -> list[Repeat]:
    """Repeats inside parts (offset, length) of the target, in order, never overlapping.

    `least` gives for each part how long a repeat must be.

    Own repeats have their source before `at`, inside one of the parts, and do not overlap themselves.
    """
    wanted = [(part, size) for part, size in zip(parts, least) if part[1] >= WINDOW]
    parts, least = [part for part, _ in wanted], [size for _, size in wanted]
    if not parts or len(base) + sum(length for _, length in parts) > MAX_BYTES:
        return []
    old, new = base, np.frombuffer(target, dtype=np.uint8)
    base_hash = _hashes(old) if len(old) >= WINDOW else np.empty(0, dtype=np.uint64)
    part_hash = [_hashes(new[at : at + length]) for at, length in parts]
    # Of many windows those are kept whose hash says so, in base and target alike.
    total = len(base_hash) + sum(map(len, part_hash))
    mask = np.uint64((1 << (total // _WINDOWS).bit_length()) - 1)
    known = np.flatnonzero(base_hash & mask == 0)
    kept = [np.flatnonzero(values & mask == 0) for values in part_hash]
    joined = np.concatenate([base_hash[known], *(values[chosen] for values, chosen in zip(part_hash, kept))])
    places = np.concatenate([known, *(at + len(old) + chosen for (at, _), chosen in zip(parts, kept))])
    order = np.argsort(joined, kind="stable")
    joined, places = joined[order], places[order]
    out: list[Repeat] = []
    for (at, length), values, chosen, shortest in zip(parts, part_hash, kept, least):
        starts = chosen if mask else chosen[::_STEP]
        queries = values[starts]
        first = np.searchsorted(joined, queries)
        source = places[first]  # the earliest place with that hash: in the base if anywhere
        hits = np.flatnonzero(source < at + len(old) + starts)
        end = at
        for index in hits.tolist():
            here = at + int(starts[index])
            if here < end:
                continue
            out_end = at + length
            begin = int(first[index])
            best: Repeat | None = None
            for candidate in range(begin, min(begin + 8, len(places))):
                if joined[candidate] != queries[index]:
                    break
                place = int(places[candidate])
                own = place >= len(old)
                text, place = (new, place - len(old)) if own else (old, place)
                limit = out_end - here
                if own:
                    if place >= here:
                        break
                    limit = min(limit, here - place)
                size = _common(text[place : place + limit], new[here : here + limit])
                back_limit = min(here - end, place)
                back = _common(text[place - back_limit : place][::-1], new[here - back_limit : here][::-1])
                if own:
                    back = min(back, max(0, here - place - size))
                found = Repeat(here - back, size + back, place - back, own)
                if size >= WINDOW and (best is None or found.length > best.length):
                    best = found
            if best is not None and best.length >= shortest:
                out.append(best)
                end = best.at + best.length
    return out
