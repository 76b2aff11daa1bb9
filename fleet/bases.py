"""Which stored files to try as the base of a delta. Pure: takes values, returns values.

A good base is an older version of the same file. The order: same model and same variant; same model, another
variant; another model. Within each, the same role before another, the same path, then the newest version
before the target (then after it: a device may go back), and what the device listed first. Only files that
the control plane itself holds can be bases, and files of another role only compete as model weights
(model, external), because a label list says nothing about weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fleet.catalog import Held
from fleet.limits import CANDIDATES_PER_FILE, MIN_DELTA_TARGET_BYTES

_WEIGHTS = frozenset({"model", "external"})


@dataclass(frozen=True)
class Target:
    """A file that a device needs, and where it belongs."""

    digest: str
    size: int
    model: str
    version: int
    variant: str
    path: str
    role: str


def choose_bases(target: Target, held: Iterable[Held], preference: Sequence[str]) -> tuple[str, ...]:
    """Digests to try as bases of `target`, best first, at most CANDIDATES_PER_FILE.

    Args:
        target: the file wanted.
        held: what the control plane knows about the files the device holds.
        preference: the device's own order of digests; ties keep it.
    """
    if target.size < MIN_DELTA_TARGET_BYTES:
        return ()
    place = {digest: index for index, digest in enumerate(preference)}
    best: dict[str, tuple[object, ...]] = {}
    for file in held:
        if file.digest == target.digest or file.size == 0 or not _related(target, file):
            continue
        rank = (*_rank(target, file), place.get(file.digest, len(place)))
        if file.digest not in best or rank < best[file.digest]:
            best[file.digest] = rank
    return tuple(sorted(best, key=lambda digest: best[digest])[:CANDIDATES_PER_FILE])


def _related(target: Target, file: Held) -> bool:
    return file.role == target.role or (file.role in _WEIGHTS and target.role in _WEIGHTS)


def _rank(target: Target, file: Held) -> tuple[int, ...]:
    kinship = 2
    if file.model == target.model:
        kinship = 0 if file.variant == target.variant else 1
    older = file.version < target.version
    return (
        kinship,
        0 if file.role == target.role else 1,
        0 if file.path == target.path else 1,
        0 if older else 1,
        abs(target.version - file.version) if kinship < 2 else 0,
    )
