"""The delta format's test vectors as docs/delta-format/vectors/README.md describes them.

Reads and writes index.json; needs nothing beyond the standard library, so that any decoder's test can use it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "delta-format.md"
VECTORS = ROOT / "docs" / "delta-format" / "vectors"
INDEX = "index.json"
SCHEMA = 1


@dataclass(frozen=True)
class Vector:
    """One vector: what a decoder is given and what must come out.

    Attributes:
        name: unique; lower case, digits and dashes.
        about: one sentence.
        base: the base's file, relative to the vectors' directory; None where no base is given.
        delta: the delta's file.
        target: the expected target's file; None where only its digest is kept, or an error is expected.
        size: bytes of the expected target.
        digest: its SHA-256 in hex; "" where an error is expected.
        errors: the error codes of which one is expected; empty where the target is.
        announced: digest and size of the target that a decoder is told beforehand, if any.
        features: those that the delta's header names, if it can be read.
        rules: numbers of the document's rules that cite the vector.
    """

    name: str
    about: str
    base: str | None
    delta: str
    target: str | None
    size: int
    digest: str
    errors: tuple[str, ...]
    announced: tuple[str, int] | None
    features: tuple[str, ...]
    rules: tuple[int, ...]


def load(directory: Path = VECTORS) -> list[Vector]:
    """The vectors of a directory, in the order of its index. Raises ValueError for another schema."""
    content = json.loads((directory / INDEX).read_text())
    if content["schema"] != SCHEMA:
        raise ValueError(f"{directory / INDEX} has schema {content['schema']}; this reads {SCHEMA}")
    return [_vector(item) for item in content["vectors"]]


def _vector(item: dict[str, Any]) -> Vector:
    target, announced = item.get("target") or {}, item.get("announced")
    return Vector(
        item["name"],
        item["about"],
        item["base"],
        item["delta"],
        target.get("file"),
        target.get("size", 0),
        target.get("sha256", ""),
        tuple(item.get("errors", ())),
        (announced["sha256"], announced["size"]) if announced else None,
        tuple(item["features"]),
        tuple(item["rules"]),
    )


def dump(vectors: list[Vector], zstd: str) -> str:
    """The text of index.json."""
    items = []
    for vector in vectors:
        item: dict[str, Any] = {
            "name": vector.name,
            "about": vector.about,
            "base": vector.base,
            "delta": vector.delta,
        }
        if vector.errors:
            item["errors"] = list(vector.errors)
        else:
            item["target"] = {"file": vector.target, "size": vector.size, "sha256": vector.digest}
        if vector.announced:
            item["announced"] = {"sha256": vector.announced[0], "size": vector.announced[1]}
        item["features"] = list(vector.features)
        item["rules"] = list(vector.rules)
        items.append(json.dumps(item, ensure_ascii=False))
    lines = ",\n  ".join(items)
    return f'{{\n "schema": {SCHEMA},\n "zstd": "{zstd}",\n "vectors": [\n  {lines}\n ]\n}}\n'


def cited() -> dict[int, list[str]]:
    """What each rule cites behind the word "Vectors:", by the rule's number: names, or patterns with *."""
    section = DOCUMENT.read_text().split("## Rules")[1].split("\n## ")[0]
    found = {}
    for rule in re.findall(r"^\d+\. .*?(?=^\d+\. |^#|\Z)", section, re.MULTILINE | re.DOTALL):
        number = int(rule.split(".", 1)[0])
        found[number] = re.findall(r"`([a-z0-9*-]+)`", rule.partition("Vectors:")[2])
    return found


def rules_of(name: str, citations: dict[int, list[str]]) -> tuple[int, ...]:
    """The numbers of the rules that cite a vector."""
    return tuple(
        number
        for number, patterns in citations.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def uncited(names: Sequence[str], citations: dict[int, list[str]]) -> tuple[list[str], list[str]]:
    """The vectors that no rule cites, and the citations that name no vector."""
    patterns = [pattern for found in citations.values() for pattern in found]
    return (
        [name for name in names if not rules_of(name, citations)],
        [pattern for pattern in patterns if not fnmatch.filter(names, pattern)],
    )


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
