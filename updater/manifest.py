"""Manifests: what a version of a model is, immutable once published.

A version is one or more *variants*, each for a kind of board, each a set of *files* by digest and size. The
manifest's canonical bytes (canonical.py) are what is hashed, stored and later signed; docs/manifest.md
describes every field. Nothing here does I/O.

Rules kept by `Manifest.parse`, so that everything behind it may rely on them: names and paths are plain,
digests well-formed, sizes and counts under their limits, variant names and file paths unique, exactly one
file of role "model" a variant, 1 <= floor <= version, no unknown fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sluice.api.v1 import errors_pb2
from updater import canonical
from updater.digests import digest_bytes, is_digest
from updater.errors import SluiceError
from updater.limits import (
    MAX_ANNOTATIONS,
    MAX_FILE_BYTES,
    MAX_FILES_PER_VARIANT,
    MAX_MANIFEST_BYTES,
    MAX_TEXT_CHARACTERS,
    MAX_TOLERATED_OUTPUTS,
    MAX_VARIANTS,
)

SCHEMA = 2  # the newest; each manifest has the lowest that can say it
_OWN_BOUNDS = 2  # since when a tolerance has a relative error, and bounds for single outputs
NAME_RULE = "1 to 64 of a-z 0-9 - _ . starting with a letter or digit"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,12})?")

ROLES = ("model", "external", "labels", "tokenizer", "preprocessing", "postprocessing", "golden", "other")
FORMATS = ("onnx", "tflite")
ACCELERATORS = ("cpu", "cuda")


def is_name(text: str) -> bool:
    """Whether `text` may name a model, variant or alias."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class File:
    """One file of a variant.

    Attributes:
        path: its plain name in the variant's directory on the box; external data keeps the name that the
            model refers to it by.
        role: one of ROLES.
        digest: "sha256:…" of its bytes.
        size: bytes.
    """

    path: str
    role: str
    digest: str
    size: int


@dataclass(frozen=True)
class Bounds:
    """How far one output on the golden inputs may be from the golden output; all are decimal strings.

    A cosine says nothing about scale, so the default bounds the error too: 0.35 is what a cosine of 0.95
    allows at best (0.31), and a little for the scale.

    Attributes:
        cosine_min: least cosine similarity.
        max_relative_error: largest norm of the difference to that of the golden output; empty for no bound.
        max_abs_error: largest absolute difference; empty for no bound.
    """

    cosine_min: str = "0.95"
    max_relative_error: str = "0.35"
    max_abs_error: str = ""


@dataclass(frozen=True)
class Tolerance(Bounds):
    """The bounds of every output that has none of its own.

    Attributes:
        outputs: bounds of single outputs, by the model's names for them.
    """

    outputs: dict[str, Bounds] = field(default_factory=dict)

    def of(self, output: str) -> Bounds:
        """The bounds of one output."""
        return self.outputs.get(output, self)


@dataclass(frozen=True)
class Variant:
    """A version's files for one kind of board.

    Attributes:
        name: unique within the version.
        format: one of FORMATS.
        precision: of the weights, for people: "float32", "int8".
        runtime: the runtime it needs by name; empty for any that reads the format.
        accelerator: one of ACCELERATORS.
        boards: board or architecture names it is for; empty for any.
        min_memory_bytes: least physical memory of the box; 0 for no bound.
        options: runtime options, e.g. {"threads": "2"}.
        files: at least the model itself.
    """

    name: str
    format: str
    files: tuple[File, ...]
    precision: str = ""
    runtime: str = ""
    accelerator: str = "cpu"
    boards: tuple[str, ...] = ()
    min_memory_bytes: int = 0
    options: dict[str, str] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)

    @property
    def model_file(self) -> File:
        """The file that the runtime loads."""
        return next(file for file in self.files if file.role == "model")

    @property
    def golden_file(self) -> File | None:
        """Golden inputs and outputs, if the variant has them."""
        return next((file for file in self.files if file.role == "golden"), None)


@dataclass(frozen=True)
class Manifest:
    """A version of a model.

    Attributes:
        model: the model's name.
        version: from 1; grows by one.
        floor: the lowest version that a device running this one may be sent back to unattended.
        variants: in order of preference among equals.
        annotations: free text for people and tools, e.g. {"commit": "…"}.
    """

    model: str
    version: int
    variants: tuple[Variant, ...]
    floor: int = 1
    annotations: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The canonical bytes. Raises SluiceError(MANIFEST_INVALID) when the manifest breaks a rule."""
        data = canonical.encode(self._value())
        Manifest.parse(data)
        return data

    @property
    def digest(self) -> str:
        return digest_bytes(canonical.encode(self._value()))

    @property
    def schema(self) -> int:
        """The lowest that can say it: bytes that were signed once stay as they are."""
        return max(_schema(variant.tolerance) for variant in self.variants) if self.variants else 1

    @property
    def content_digest(self) -> str:
        """The digest without version and floor: equal for two pushes of the same content."""
        value = self._value()
        del value["version"], value["floor"]
        return digest_bytes(canonical.encode(value))

    def variant(self, name: str) -> Variant:
        """The variant of this name; raises SluiceError(NO_COMPATIBLE_VARIANT)."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        have = ", ".join(variant.name for variant in self.variants)
        raise SluiceError(
            errors_pb2.NO_COMPATIBLE_VARIANT,
            f"{self.model}@{self.version} has no variant {name!r}; it has {have}",
            obj=f"{self.model}@{self.version}",
        )

    def files(self) -> dict[str, File]:
        """Each distinct file of all variants by digest."""
        return {file.digest: file for variant in self.variants for file in variant.files}

    def _value(self) -> dict[str, Any]:
        return {
            "annotations": dict(self.annotations),
            "floor": self.floor,
            "model": self.model,
            "schema": self.schema,
            "variants": [_variant_value(variant, self.schema) for variant in self.variants],
            "version": self.version,
        }

    @staticmethod
    def parse(data: bytes) -> Manifest:
        """The manifest of canonical bytes. Raises SluiceError(MANIFEST_INVALID) that names the field."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise _invalid("$", f"has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
        top = _Object(canonical.decode(data, "manifest"), "$")
        schema = top.integer("schema", 1, canonical.MAX_INTEGER)
        if schema > SCHEMA:
            raise _invalid("$.schema", f"is {schema}; this release reads up to {SCHEMA}: update sluice")
        version = top.integer("version", 1, canonical.MAX_INTEGER)
        manifest = Manifest(
            model=top.matching("model", _NAME, NAME_RULE),
            version=version,
            floor=top.integer("floor", 1, version),
            variants=tuple(_parse_variant(item, schema) for item in top.objects("variants", 1, MAX_VARIANTS)),
            annotations=top.texts("annotations"),
        )
        top.finish()
        _unique("$.variants", "name", [variant.name for variant in manifest.variants])
        if manifest.schema != schema:
            raise _invalid("$.schema", f"is {schema}, and nothing here needs more than {manifest.schema}")
        return manifest


def _variant_value(variant: Variant, schema: int) -> dict[str, Any]:
    return {
        "accelerator": variant.accelerator,
        "boards": list(variant.boards),
        "files": [
            {"digest": file.digest, "path": file.path, "role": file.role, "size": file.size}
            for file in variant.files
        ],
        "format": variant.format,
        "min_memory_bytes": variant.min_memory_bytes,
        "name": variant.name,
        "options": dict(variant.options),
        "precision": variant.precision,
        "runtime": variant.runtime,
        "tolerance": _tolerance_value(variant.tolerance, schema),
    }


def _schema(tolerance: Tolerance) -> int:
    return _OWN_BOUNDS if tolerance.max_relative_error or tolerance.outputs else 1


def _tolerance_value(tolerance: Tolerance, schema: int) -> dict[str, Any]:
    if schema < _OWN_BOUNDS:
        return {"cosine_min": tolerance.cosine_min, "max_abs_error": tolerance.max_abs_error}
    outputs = {name: _bounds_value(bounds) for name, bounds in tolerance.outputs.items()}
    return {**_bounds_value(tolerance), "outputs": outputs}


def _bounds_value(bounds: Bounds) -> dict[str, str]:
    return {
        "cosine_min": bounds.cosine_min,
        "max_abs_error": bounds.max_abs_error,
        "max_relative_error": bounds.max_relative_error,
    }


def _parse_variant(item: _Object, schema: int) -> Variant:
    variant = Variant(
        name=item.matching("name", _NAME, NAME_RULE),
        format=item.choice("format", FORMATS),
        precision=item.text("precision"),
        runtime=item.text("runtime"),
        accelerator=item.choice("accelerator", ACCELERATORS),
        boards=item.text_list("boards"),
        min_memory_bytes=item.integer("min_memory_bytes", 0, canonical.MAX_INTEGER),
        options=item.texts("options"),
        tolerance=_parse_tolerance(item.object("tolerance"), schema),
        files=tuple(_parse_file(file) for file in item.objects("files", 1, MAX_FILES_PER_VARIANT)),
    )
    item.finish()
    _unique(f"{item.where}.files", "path", [file.path for file in variant.files])
    models = sum(file.role == "model" for file in variant.files)
    if models != 1:
        raise _invalid(f"{item.where}.files", f"has {models} files of role model; exactly one is needed")
    if sum(file.role == "golden" for file in variant.files) > 1:
        raise _invalid(f"{item.where}.files", "has more than one file of role golden")
    return variant


def _parse_tolerance(item: _Object, schema: int) -> Tolerance:
    common = _parse_bounds(item, schema)
    own = {}
    if schema >= _OWN_BOUNDS:
        for name, inner in item.named("outputs", MAX_TOLERATED_OUTPUTS).items():
            own[name] = _parse_bounds(inner, schema)
            inner.finish()
    item.finish()
    return Tolerance(common.cosine_min, common.max_relative_error, common.max_abs_error, own)


def _parse_bounds(item: _Object, schema: int) -> Bounds:
    return Bounds(
        item.matching("cosine_min", _DECIMAL, 'a decimal such as "0.95"'),
        item.decimal_or_empty("max_relative_error") if schema >= _OWN_BOUNDS else "",
        item.decimal_or_empty("max_abs_error"),
    )


def _parse_file(item: _Object) -> File:
    digest = item.text("digest")
    if not is_digest(digest):
        raise _invalid(f"{item.where}.digest", f"is not a digest: {digest[:80]!r}")
    file = File(
        path=item.matching("path", _PATH, "a plain file name of at most 128 letters, digits and . _ -"),
        role=item.choice("role", ROLES),
        digest=digest,
        size=item.integer("size", 0, MAX_FILE_BYTES),
    )
    item.finish()
    return file


class _Object:
    """Takes the fields of a JSON object one by one; every refusal names the field."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _invalid(where, "is not an object")
        self.where = where
        self._value = dict(value)

    def _take(self, key: str) -> Any:
        if key not in self._value:
            raise _invalid(f"{self.where}.{key}", "is missing")
        return self._value.pop(key)

    def finish(self) -> None:
        if self._value:
            raise _invalid(f"{self.where}.{min(self._value)}", "is not a field of this schema")

    def integer(self, key: str, least: int, most: int) -> int:
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _invalid(
                f"{self.where}.{key}", f"must be an integer from {least} to {most}, not {value!r:.80}"
            )
        return value

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARACTERS:
            raise _invalid(f"{self.where}.{key}", f"must be text of at most {MAX_TEXT_CHARACTERS} characters")
        return value

    def matching(self, key: str, pattern: re.Pattern[str], rule: str) -> str:
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise _invalid(f"{self.where}.{key}", f"must be {rule}, not {value[:80]!r}")
        return value

    def decimal_or_empty(self, key: str) -> str:
        value = self.text(key)
        if value and not _DECIMAL.fullmatch(value):
            raise _invalid(f"{self.where}.{key}", f"must be a decimal or empty, not {value[:80]!r}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in choices:
            raise _invalid(f"{self.where}.{key}", f"must be one of {', '.join(choices)}, not {value[:80]!r}")
        return value

    def object(self, key: str) -> _Object:
        return _Object(self._take(key), f"{self.where}.{key}")

    def named(self, key: str, most: int) -> dict[str, _Object]:
        """Objects by name."""
        value = self._take(key)
        if not isinstance(value, dict) or len(value) > most:
            raise _invalid(f"{self.where}.{key}", f"must be an object of at most {most} entries")
        return {str(name): _Object(item, f"{self.where}.{key}.{name:.80}") for name, item in value.items()}

    def objects(self, key: str, least: int, most: int) -> list[_Object]:
        value = self._take(key)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _invalid(f"{self.where}.{key}", f"must be a list of {least} to {most} objects")
        return [_Object(item, f"{self.where}.{key}[{index}]") for index, item in enumerate(value)]

    def texts(self, key: str) -> dict[str, str]:
        value = self._take(key)
        if not isinstance(value, dict) or len(value) > MAX_ANNOTATIONS:
            raise _invalid(f"{self.where}.{key}", f"must be an object of at most {MAX_ANNOTATIONS} texts")
        inner = _Object(value, f"{self.where}.{key}")
        return {name: inner.text(name) for name in value}

    def text_list(self, key: str) -> tuple[str, ...]:
        value = self._take(key)
        if not isinstance(value, list) or len(value) > MAX_ANNOTATIONS:
            raise _invalid(f"{self.where}.{key}", f"must be a list of at most {MAX_ANNOTATIONS} texts")
        inner = _Object({str(index): item for index, item in enumerate(value)}, f"{self.where}.{key}")
        return tuple(inner.text(str(index)) for index in range(len(value)))


def _unique(where: str, key: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise _invalid(where, f"has two entries with {key} {value!r}")


def _invalid(where: str, why: str) -> SluiceError:
    return SluiceError(errors_pb2.MANIFEST_INVALID, f"the manifest's {where} {why}", obj=where)
