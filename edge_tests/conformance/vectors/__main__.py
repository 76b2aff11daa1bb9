"""`make vectors`: writes docs/delta-format/vectors anew, and says which vectors no rule cites.

With --check nothing is written: the exit status says whether the files are what the code makes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import zstandard

from edge_tests.conformance import index
from edge_tests.conformance.index import VECTORS, Vector
from edge_tests.conformance.vectors import (
    bad_blocks,
    bad_container,
    bad_layouts,
    bad_numbers,
    bad_pools,
    bad_programs,
    samples,
    valid_affine,
    valid_blocks,
    valid_layouts,
    valid_nibbles,
    valid_programs,
    valid_skeletons,
    valid_steps,
    valid_tensors,
)
from edge_tests.conformance.vectors.build import Made
from updater.delta import container
from updater.errors import SluiceError
from updater.limits import DecodeLimits

MODULES = (
    valid_blocks,
    valid_tensors,
    valid_programs,
    valid_affine,
    valid_nibbles,
    valid_layouts,
    valid_steps,
    valid_skeletons,
    bad_container,
    bad_blocks,
    bad_programs,
    bad_numbers,
    bad_layouts,
    bad_pools,
)
_KEPT_BYTES = 4096  # of a target; of larger ones only the digest is kept
_FOLDERS = ("bases", "deltas", "targets")


def made() -> list[Made]:
    """All vectors, the valid ones first."""
    vectors = [vector for module in MODULES for vector in module.made()]
    names = [vector.name for vector in vectors]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return vectors


def _features(data: bytes) -> tuple[str, ...]:
    """The features that a delta names; none where its header cannot be read."""
    try:
        length = container.header_length(
            data[: container.PREFIX.size].ljust(container.PREFIX.size), DecodeLimits()
        )
        return container.decode_header(
            data[:length].ljust(container.PREFIX.size + 4), DecodeLimits()
        ).features
    except SluiceError:
        return ()


def _name(known: dict[bytes, str], data: bytes, folder: str, name: str) -> str:
    return known.setdefault(data, f"{folder}/{name}.bin")


def files() -> dict[str, bytes]:
    """Every file of the vectors' directory but the README, by its path there."""
    citations = index.cited()
    bases = {samples.NUMBERS: "bases/numbers.bin", samples.BASE: "bases/noise.bin"}
    targets: dict[bytes, str] = {}
    out: dict[str, bytes] = {}
    vectors = []
    for vector in made():
        base = target = None
        if vector.base is not None:
            base = _name(bases, vector.base, "bases", vector.name)
            out[base] = vector.base
        if vector.target is not None and len(vector.target) <= _KEPT_BYTES:
            target = _name(targets, vector.target, "targets", vector.name)
            out[target] = vector.target
        delta = f"deltas/{vector.name}.sldelta"
        out[delta] = vector.delta
        right = vector.target or b""
        told = vector.announced
        vectors.append(
            Vector(
                vector.name,
                vector.about,
                base,
                delta,
                target,
                len(right),
                index.digest(right),
                vector.errors,
                (index.digest(told), len(told)) if told is not None else None,
                _features(vector.delta),
                index.rules_of(vector.name, citations),
            )
        )
    version = ".".join(map(str, zstandard.ZSTD_VERSION))
    out[index.INDEX] = index.dump(vectors, version).encode()
    return out


def on_disk() -> Iterator[Path]:
    """The files that `files` makes, as they lie in the repository."""
    yield VECTORS / index.INDEX
    for folder in _FOLDERS:
        yield from sorted((VECTORS / folder).glob("*"))


def main() -> int:
    """Runs the command; gives its exit status."""
    parser = argparse.ArgumentParser(prog="make vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    wanted = files()
    if arguments.check:
        found = {str(path.relative_to(VECTORS)): path.read_bytes() for path in on_disk()}
        changed = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        print("\n".join(changed) or f"{len(wanted)} files are as the code makes them")
        return bool(changed)
    for folder in _FOLDERS:
        shutil.rmtree(VECTORS / folder, ignore_errors=True)
        (VECTORS / folder).mkdir(parents=True)
    for name, content in wanted.items():
        (VECTORS / name).write_bytes(content)
    vectors = index.load()
    print(f"{len(vectors)} vectors, {sum(map(len, wanted.values())):,} bytes in {len(wanted)} files")
    loose, gone = index.uncited([vector.name for vector in vectors], index.cited())
    if loose:
        print(f"no rule of docs/delta-format.md cites: {', '.join(loose)}")
    if gone:
        print(f"rules cite what is not there: {', '.join(gone)}")
    return bool(loose or gone)


if __name__ == "__main__":
    sys.exit(main())
