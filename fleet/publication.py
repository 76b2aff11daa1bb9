"""Publishing a version: every check, then one transaction that makes it visible.

In order: the manifest parses; its number is the next one, or its content is already there; every file is in
the store with the stated size; every model file reads as the format its variant states, and external data it
refers to is among the variant's files. The number is looked at again inside the transaction, because another
publication may have come first.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, select

from fleet import catalog, tables
from fleet.limits import MAX_NAMED_IN_ERROR
from sluice.api.v1 import errors_pb2
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.formats import read_model
from updater.manifest import Manifest, Variant
from updater.store import Store


def find_published(connection: Connection, manifest: Manifest, data: bytes) -> Row[Any] | None:
    """The version that already has this content, or None when the manifest's number is the next one.

    Raises SluiceError(VERSION_CONFLICT | VERSION_NOT_NEXT).
    """
    columns = tables.versions.c
    latest = catalog.latest_number(connection, manifest.model)
    name = f"{manifest.model}@{manifest.version}"
    if latest:
        row = catalog.version_row(connection, manifest.model, latest)
        if row.content_digest == manifest.content_digest:
            return row
    same_number = connection.execute(
        select(tables.versions).where(columns.model == manifest.model, columns.version == manifest.version)
    ).one_or_none()
    if same_number is not None:
        if same_number.manifest_digest == digest_bytes(data):
            return same_number
        raise SluiceError(
            errors_pb2.VERSION_CONFLICT,
            f"{name} is published already, with other content",
            hint=f"publish this content as version {latest + 1}",
            obj=name,
        )
    if manifest.version != latest + 1:
        raise SluiceError(
            errors_pb2.VERSION_NOT_NEXT,
            f"{name} is not the next version: the latest of {manifest.model} is {latest}",
            hint=f"publish it as version {latest + 1}",
            obj=name,
        )
    return None


def insert_unless_published(connection: Connection, manifest: Manifest, data: bytes) -> tuple[Row[Any], bool]:
    """The version's row and whether it was made now. Raises as `find_published`."""
    row = find_published(connection, manifest, data)
    if row is not None:
        return row, False
    return catalog.insert_version(connection, manifest, data), True


def check_files(store: Store, manifest: Manifest) -> None:
    """Reads what the manifest names. Blocks: seconds for large models.

    Raises SluiceError(FILE_UNKNOWN | MANIFEST_INVALID | MODEL_FILE_INVALID | MODEL_FILE_TRUNCATED).
    """
    files = manifest.files().values()
    missing = [file for file in files if not store.has(file.digest)]
    if missing:
        named = ", ".join(f"{file.path} ({file.digest})" for file in missing[:MAX_NAMED_IN_ERROR])
        more = f" and {len(missing) - MAX_NAMED_IN_ERROR} more" if len(missing) > MAX_NAMED_IN_ERROR else ""
        raise SluiceError(
            errors_pb2.FILE_UNKNOWN,
            f"the store lacks {len(missing)} of the version's files: {named}{more}",
            hint="upload them with UploadFile, then publish again",
            obj=missing[0].digest,
        )
    for variant in manifest.variants:
        for file in variant.files:
            held = store.path(file.digest).stat().st_size
            if held != file.size:
                raise SluiceError(
                    errors_pb2.MANIFEST_INVALID,
                    f"the manifest says that {file.path} has {file.size} bytes; the store's has {held}",
                    obj=file.digest,
                )
        _check_model_file(store, variant)


def _check_model_file(store: Store, variant: Variant) -> None:
    file = variant.model_file
    try:
        found = read_model(store.require(file.digest))
    except SluiceError as error:
        raise SluiceError(
            error.reason,
            f"{file.path} of variant {variant.name}: {error.message}",
            hint=error.hint,
            obj=file.digest,
        ) from error
    if found.format != variant.format:
        looks = "no model format that sluice knows" if found.format == "opaque" else found.format
        raise SluiceError(
            errors_pb2.MODEL_FILE_INVALID,
            f"variant {variant.name} is stated to be {variant.format}, but {file.path} looks like {looks}",
            hint="name the right file, or the variant's right format",
            obj=file.digest,
        )
    have = {other.path for other in variant.files}
    absent = [name for name in found.external if name not in have]
    if absent:
        named = ", ".join(absent[:MAX_NAMED_IN_ERROR])
        raise SluiceError(
            errors_pb2.MODEL_FILE_INVALID,
            f"{file.path} of variant {variant.name} keeps weights in {named}, which the variant lacks",
            hint="push the external data files with the model",
            obj=file.digest,
        )
