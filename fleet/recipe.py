"""Recipes: what an operator writes to publish a version, as model.yaml or as one file on the command line.

A recipe names local files and says which boards they are for; publish.py turns it into a manifest. Paths are
relative to the recipe. Nothing is guessed from what is misspelt: an unknown key is refused with the keys that
exist, a key given twice is refused, and text must be text (YAML reads `0123` and `1.0e+3` as numbers, so a
commit hash could change silently).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors
from updater.limits import (
    MAX_ANNOTATIONS,
    MAX_FILES_PER_VARIANT,
    MAX_TEXT_CHARACTERS,
    MAX_TOLERATED_OUTPUTS,
    MAX_VARIANTS,
)
from updater.manifest import ACCELERATORS, NAME_RULE, ROLES, Bounds, Tolerance, is_name

MAX_RECIPE_BYTES = 256 << 10
_MAX_INTEGER = (1 << 53) - 1
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,12})?")
_EXTRA_ROLES = tuple(role for role in ROLES if role not in ("model", "external", "golden"))


@dataclass(frozen=True)
class ExtraFile:
    """A file beside the model: labels, tokenizer, pre- or post-processing."""

    role: str
    path: Path


@dataclass(frozen=True)
class VariantRecipe:
    """One variant to publish.

    Attributes:
        file: the model file.
        name: of the variant; empty to derive it from format and precision.
        golden: an .npz with golden inputs and outputs, or None.
        precision: of the weights; empty to derive it from the file.
        files: what else a box needs; external data of an ONNX model is found by itself.
        runtime, accelerator, boards, min_memory_bytes, options, tolerance: as in updater.manifest.Variant.
    """

    file: Path
    name: str = ""
    golden: Path | None = None
    precision: str = ""
    files: tuple[ExtraFile, ...] = ()
    runtime: str = ""
    accelerator: str = "cpu"
    boards: tuple[str, ...] = ()
    min_memory_bytes: int = 0
    options: dict[str, str] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)


@dataclass(frozen=True)
class Recipe:
    """A version to publish; its number comes from the control plane."""

    model: str
    variants: tuple[VariantRecipe, ...]
    floor: int = 1
    annotations: dict[str, str] = field(default_factory=dict)


def load_recipe(path: Path) -> Recipe:
    """Reads a model.yaml.

    Raises SluiceError(CONFIG_INVALID) that names the field and what is allowed, or IO_FAILED.
    """
    with os_errors("reading", path), path.open("rb") as file:
        data = file.read(MAX_RECIPE_BYTES + 1)
    if len(data) > MAX_RECIPE_BYTES:
        raise _invalid(path, "", f"is larger than {MAX_RECIPE_BYTES >> 10} KiB; is it a model.yaml?")
    try:
        value = yaml.load(data, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _invalid(path, "", f"is not YAML: {' '.join(str(error).split())}") from error
    top = _Mapping(path, "", value, ("model", "floor", "annotations", "variants"))
    model = top.text("model", required=True)
    if not is_name(model):
        raise top.refuse("model", f"must be {NAME_RULE}, not {model[:80]!r}")
    entries = top.items("variants", MAX_VARIANTS)
    if not entries:
        raise top.refuse("variants", "needs at least one entry with a file")
    return Recipe(
        model=model,
        floor=top.integer("floor", 1, 1),
        annotations=top.texts("annotations"),
        variants=tuple(_variant(path, f"variants[{index}]", entry) for index, entry in enumerate(entries)),
    )


_VARIANT_KEYS = (
    "name",
    "file",
    "golden",
    "runtime",
    "accelerator",
    "boards",
    "min_memory_bytes",
    "precision",
    "options",
    "tolerance",
    "files",
)


_BOUNDS = ("cosine_min", "max_relative_error", "max_abs_error")


def _variant(path: Path, where: str, value: Any) -> VariantRecipe:
    entry = _Mapping(path, where, value, _VARIANT_KEYS)
    golden = entry.text("golden")
    return VariantRecipe(
        file=entry.local_file("file", entry.text("file", required=True)),
        name=entry.text("name"),
        golden=entry.local_file("golden", golden) if golden else None,
        precision=entry.text("precision"),
        files=tuple(
            _extra(path, f"{where}.files[{index}]", item)
            for index, item in enumerate(entry.items("files", MAX_FILES_PER_VARIANT))
        ),
        runtime=entry.text("runtime"),
        accelerator=entry.choice("accelerator", ACCELERATORS, "cpu"),
        boards=entry.text_list("boards"),
        min_memory_bytes=entry.integer("min_memory_bytes", 0, 0),
        options=entry.texts("options"),
        tolerance=_tolerance(path, f"{where}.tolerance", entry.get("tolerance", {})),
    )


def _tolerance(path: Path, where: str, value: Any) -> Tolerance:
    entry = _Mapping(path, where, value, (*_BOUNDS, "outputs"))
    common = _bounds(entry, Bounds())
    outputs = entry.mapping("outputs", MAX_TOLERATED_OUTPUTS)
    own = {
        name: _bounds(_Mapping(path, f"{where}.outputs.{name}", item, _BOUNDS), common)
        for name, item in outputs.items()
    }
    return Tolerance(common.cosine_min, common.max_relative_error, common.max_abs_error, own)


def _bounds(entry: _Mapping, standard: Bounds) -> Bounds:
    return Bounds(
        entry.decimal("cosine_min", standard.cosine_min),
        entry.decimal("max_relative_error", standard.max_relative_error, optional=True),
        entry.decimal("max_abs_error", standard.max_abs_error, optional=True),
    )


def _extra(path: Path, where: str, value: Any) -> ExtraFile:
    entry = _Mapping(path, where, value, ("role", "path"))
    role = entry.choice("role", _EXTRA_ROLES, None)
    return ExtraFile(role, entry.local_file("path", entry.text("path", required=True)))


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep=deep)


class _Mapping:
    """A mapping of the recipe whose fields are taken with their rules; every refusal names the field."""

    def __init__(self, path: Path, where: str, value: Any, allowed: tuple[str, ...]) -> None:
        self._path = path
        self._where = where
        if not isinstance(value, dict):
            raise _invalid(path, where, f"must hold keys and values ({', '.join(allowed)})")
        self._value: Mapping[Any, Any] = value
        for key in value:
            if key not in allowed:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                guess = f"; did you mean {near[0]!r}?" if near else ""
                known = ", ".join(allowed)
                raise self.refuse(str(key)[:80], f"is not a known key{guess} Known here: {known}")

    def refuse(self, key: str, why: str) -> SluiceError:
        return _invalid(self._path, f"{self._where}.{key}" if self._where else key, why)

    def get(self, key: str, default: Any) -> Any:
        value = self._value.get(key, default)
        return default if value is None else value

    def _check_text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse(key, f'must be text, not {value!r:.60}; put it in quotes: "{value!s:.60}"')
        if len(value) > MAX_TEXT_CHARACTERS:
            raise self.refuse(key, f"has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are allowed")
        return value

    def text(self, key: str, *, required: bool = False) -> str:
        if required and self._value.get(key) in (None, ""):
            raise self.refuse(key, "is missing")
        return self._check_text(key, self.get(key, ""))

    def integer(self, key: str, default: int, least: int) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MAX_INTEGER:
            raise self.refuse(key, f"must be a whole number from {least}, not {value!r:.60}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None) -> str:
        value = self.get(key, default)
        if value not in choices:
            raise self.refuse(key, f"must be one of {', '.join(choices)}, not {value!r:.60}")
        return str(value)

    def decimal(self, key: str, default: str, *, optional: bool = False) -> str:
        value = self._check_text(key, self.get(key, default))
        if not _DECIMAL.fullmatch(value) and not (optional and not value):
            raise self.refuse(key, f'must be a decimal such as "0.95", not {value[:60]!r}')
        return value

    def items(self, key: str, most: int) -> list[Any]:
        value = self.get(key, [])
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(key, f"must be a list of at most {most} entries")
        return value

    def text_list(self, key: str) -> tuple[str, ...]:
        values = self.items(key, MAX_ANNOTATIONS)
        return tuple(self._check_text(f"{key}[{index}]", value) for index, value in enumerate(values))

    def mapping(self, key: str, most: int) -> dict[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, dict) or len(value) > most:
            raise self.refuse(key, f"must hold at most {most} keys")
        return {self._check_text(f"{key} (a key)", name): item for name, item in value.items()}

    def texts(self, key: str) -> dict[str, str]:
        value = self.get(key, {})
        if not isinstance(value, dict) or len(value) > MAX_ANNOTATIONS:
            raise self.refuse(key, f"must hold at most {MAX_ANNOTATIONS} keys, each with a text")
        return {
            self._check_text(f"{key} (a key)", name): self._check_text(f"{key}.{name}", text)
            for name, text in value.items()
        }

    def local_file(self, key: str, name: str) -> Path:
        """The file of this name beside the recipe."""
        path = self._path.parent / name
        if not path.is_file():
            raise self.refuse(key, f"names {name!r}, but there is no file {path}")
        return path


def _invalid(path: Path, where: str, why: str) -> SluiceError:
    place = f"{path}: {where}" if where else str(path)
    return SluiceError(
        errors_pb2.CONFIG_INVALID,
        f"{place} {why}",
        hint="docs/cli.md shows a complete model.yaml",
        obj=place,
    )
