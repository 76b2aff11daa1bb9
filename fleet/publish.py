"""Publishing: local files and a recipe become a version of a model in the control plane.

In order: `prepare` reads every file, finds its format, external data and precision, checks golden files and
takes the digests; `publish` asks which version is the latest, ends there when it has this content already,
uploads what the store lacks, lets the operator's keys sign and commits the manifest. Only the commit makes
anything visible; a push that was cut off goes on where it stopped when it is run again.

Two pushers may meet: the one that comes second is told so, and tries again with the number after, unless the
operator asked for a certain one.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet.client import ControlClient
from fleet.golden import check_golden
from fleet.recipe import Recipe, VariantRecipe
from sluice.api.v1 import errors_pb2
from updater.digests import digest_file
from updater.errors import SluiceError, os_errors
from updater.formats import ModelFile, TensorSpan, detect_format, external_spans, read_model
from updater.limits import MAX_FILE_BYTES
from updater.manifest import FORMATS, File, Manifest, Variant, is_name

_TRIES = 6
_PAUSE_S = 0.5  # at most, before another try
# What a push is told when another was faster, with its number or with its signature.
_BEATEN_ALWAYS = (errors_pb2.METADATA_ROLLED_BACK,)
_BEATEN = (errors_pb2.VERSION_NOT_NEXT, errors_pb2.VERSION_CONFLICT, *_BEATEN_ALWAYS)
# A type is a variant's precision when it holds at least this share of the weights' bytes.
PRECISION_SHARE = 0.75
# Types that weights have. Others (indices, shapes, 32-bit biases) say nothing about precision.
_PRECISION_OF = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int16": "int16",
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

# Metadata that names a version, signed and not published yet: (role, bytes); none where it is published.
Sign = Callable[[Manifest], Sequence[tuple[str, bytes]]]
Step = Callable[[str, int, int], None]  # (what: a file's name, bytes done, bytes in all)


@dataclass(frozen=True)
class Draft:
    """A version ready to publish, but for its number.

    Attributes:
        manifest: with `version` equal to its floor until publishing sets it.
        sources: where each file of the manifest lies, by digest.
    """

    manifest: Manifest
    sources: dict[str, Path]


@dataclass(frozen=True)
class Published:
    """What a push did.

    Attributes:
        manifest: as published.
        digest: the manifest's.
        created: False when the latest version has this content already.
        uploaded_files: files that the store lacked.
        uploaded_bytes: bytes that this push brought.
    """

    manifest: Manifest
    digest: str
    created: bool
    uploaded_files: int = 0
    uploaded_bytes: int = 0


def prepare(recipe: Recipe) -> Draft:
    """Reads and checks everything a version is made of.

    Raises SluiceError(MODEL_FILE_INVALID | MODEL_FILE_TRUNCATED | MANIFEST_INVALID | IO_FAILED).
    """
    sources: dict[str, Path] = {}
    known: dict[Path, File] = {}  # one digest a path, however many variants share it
    variants: list[Variant] = []
    for entry in recipe.variants:
        variant = _variant(entry, sources, known)
        if not entry.name:
            variant = replace(variant, name=_free_name(variant.name, [other.name for other in variants]))
        variants.append(variant)
    manifest = Manifest(
        model=recipe.model,
        version=recipe.floor,
        floor=recipe.floor,
        variants=tuple(variants),
        annotations=dict(recipe.annotations),
    )
    manifest.to_bytes()
    return Draft(manifest, sources)


def publish(
    client: ControlClient,
    draft: Draft,
    *,
    version: int | None = None,
    progress: Step | None = None,
    sign: Sign | None = None,
) -> Published:
    """Publishes a draft as the next version.

    Args:
        client: the control plane.
        draft: from `prepare`.
        version: the number it must have; None for the next one, whatever it is.
        progress: told of uploads.
        sign: names the version in signed metadata, once its files are uploaded; None where nobody signs.

    Raises SluiceError: VERSION_NOT_NEXT, and what `sign` raises, and whatever uploading and publishing raise
    (see ControlClient).
    """
    for last in (False,) * (_TRIES - 1) + (True,):
        try:
            return _publish_once(client, draft, version, progress, sign)
        except SluiceError as error:
            beaten = error.reason in _BEATEN and (version is None or error.reason in _BEATEN_ALWAYS)
            if last or not beaten:
                raise
        time.sleep(random.uniform(0, _PAUSE_S))  # noqa: S311 - two pushers, not in step
    raise AssertionError("unreachable: the last try returns or raises")


def _publish_once(
    client: ControlClient, draft: Draft, version: int | None, progress: Step | None, sign: Sign | None
) -> Published:
    model = draft.manifest.model
    latest = _latest(client, model)
    if latest is not None and latest.content_digest == draft.manifest.content_digest:
        # Published before anybody signed here: now it is. The content leaves the floor out: it is compared.
        if sign is not None and latest.floor == draft.manifest.floor and (documents := sign(latest)):
            client.publish_metadata(documents)
        return Published(latest, latest.digest, created=False)
    following = latest.version + 1 if latest is not None else 1
    if version is not None and version != following:
        now = f"the latest is {latest.version}" if latest is not None else "there is none yet"
        raise SluiceError(
            errors_pb2.VERSION_NOT_NEXT,
            f"cannot publish {model}@{version}: versions grow by one and {now}",
            hint=f"leave --version out, or give --version {following}",
            obj=f"{model}@{version}",
        )
    manifest = replace(draft.manifest, version=following)
    data = manifest.to_bytes()
    files, brought = _upload(client, draft, progress)
    response = client.publish_version(data, sign(manifest) if sign is not None else ())
    published = Manifest.parse(response.version.manifest) if response.version.manifest else manifest
    return Published(published, response.version.manifest_digest, response.created, files, brought)


def _latest(client: ControlClient, model: str) -> Manifest | None:
    """The manifest of the model's latest version, or None before the first."""
    try:
        number = client.get_model(model).latest_version
    except SluiceError as error:
        if error.reason != errors_pb2.MODEL_UNKNOWN:
            raise
        return None
    return Manifest.parse(client.get_version(model, number).manifest) if number else None


def _upload(client: ControlClient, draft: Draft, progress: Step | None) -> tuple[int, int]:
    """Brings every file that the store lacks; returns how many they were and their bytes."""
    files, brought = 0, 0
    for digest, file in draft.manifest.files().items():
        path = draft.sources[digest]
        size = file.size

        def report(done: int, total: int, name: str = path.name) -> None:
            if progress is not None:
                progress(name, done, total)

        sent = client.upload_file(path, digest, size, report)
        files += sent > 0
        brought += sent
    return files, brought


def _variant(entry: VariantRecipe, sources: dict[str, Path], known: dict[Path, File]) -> Variant:
    model, spans = _read(entry.file)
    directory = entry.file.parent
    wanted = [(f"model.{model.format}", "model", entry.file)]
    wanted += [(_external_name(entry.file, name), "external", directory / name) for name in model.external]
    if entry.golden is not None:
        check_golden(entry.golden)
        wanted.append(("golden.npz", "golden", entry.golden))
    for extra in entry.files:
        if not _PLAIN.fullmatch(extra.path.name):
            raise SluiceError(
                errors_pb2.MANIFEST_INVALID,
                f"the file name {extra.path.name!r} is not plain: a box takes letters, digits and . _ -",
                hint="rename the file",
                obj=str(extra.path),
            )
        wanted.append((extra.path.name, extra.role, extra.path))
    files = tuple(_file(name, role, path, sources, known) for name, role, path in wanted)
    precision = entry.precision or guess_precision(spans)
    return Variant(
        name=entry.name or (f"{model.format}-{precision}" if precision else model.format),
        format=model.format,
        files=files,
        precision=precision,
        runtime=entry.runtime,
        accelerator=entry.accelerator,
        boards=entry.boards,
        min_memory_bytes=entry.min_memory_bytes,
        options=dict(entry.options),
        tolerance=entry.tolerance,
    )


def _read(path: Path) -> tuple[ModelFile, list[TensorSpan]]:
    """The model file, and its spans together with those in external files, which must be there."""
    form = detect_format(path)
    if form not in FORMATS:
        model = read_model(path)  # a broken file of a known name is told so first
        what = "is in no model format that sluice knows" if model.format == "opaque" else f"is {model.format}"
        raise SluiceError(
            errors_pb2.MODEL_FILE_INVALID,
            f"{path} {what}; boxes run {' and '.join(FORMATS)}",
            hint="export the model as ONNX or TFLite and push that file",
            obj=str(path),
        )
    model = read_model(path)
    for name in model.external:
        if not (path.parent / name).is_file():
            raise SluiceError(
                errors_pb2.MODEL_FILE_INVALID,
                f"{path} keeps weights in {name!r}, and there is no file {path.parent / name}",
                hint="put the external data file beside the model, under the name that the model refers to",
                obj=str(path),
            )
    spans = list(model.spans)
    for found in external_spans(path).values() if model.external else ():
        spans.extend(found)
    return model, spans


def _external_name(model: Path, name: str) -> str:
    if _PLAIN.fullmatch(name):
        return name
    raise SluiceError(
        errors_pb2.MODEL_FILE_INVALID,
        f"{model} keeps weights in {name!r}; a box takes a plain file name of letters, digits and . _ -",
        hint="save the model again with its external data in one file beside it",
        obj=str(model),
    )


def _file(name: str, role: str, path: Path, sources: dict[str, Path], known: dict[Path, File]) -> File:
    with os_errors("reading", path):
        resolved = path.resolve(strict=True)
        size = resolved.stat().st_size
    if size > MAX_FILE_BYTES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"{path} has {size} bytes; a file of a version may have {MAX_FILE_BYTES}",
            obj=str(path),
        )
    seen = known.get(resolved)
    digest = seen.digest if seen is not None else digest_file(path)
    file = File(name, role, digest, size)
    known[resolved] = file
    sources.setdefault(digest, path)
    return file


def guess_precision(spans: Iterable[TensorSpan]) -> str:
    """What most bytes of the weights are: "int8", "float16", "float32", …, "mixed", or "" without weights."""
    counted: Counter[str] = Counter()
    for span in spans:
        if span.dtype in _PRECISION_OF:
            counted[_PRECISION_OF[span.dtype]] += span.length
    total = sum(counted.values())
    if not total:
        return ""
    precision, most = counted.most_common(1)[0]
    return precision if most >= PRECISION_SHARE * total else "mixed"


def _free_name(name: str, taken: list[str]) -> str:
    """`name`, or with the first number that no earlier variant has."""
    numbered = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in numbered if candidate not in taken and is_name(candidate))
