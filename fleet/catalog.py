"""The catalog: models, versions, aliases and the files of versions, as rows.

Every function takes a connection inside a transaction of fleet.database and blocks. What a version must
fulfil before it gets here is checked in publication.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, insert, select, update

from fleet import tables
from fleet.clock import now_us, to_timestamp
from fleet.limits import MAX_ALIASES, MAX_STORED_INTEGER
from sluice.api.v1 import errors_pb2, registry_pb2
from updater.errors import SluiceError
from updater.manifest import NAME_RULE, Manifest, is_name

_IN_CLAUSE = 500  # values in one IN (…), well below SQLite's limit on variables


@dataclass(frozen=True)
class Held:
    """What a stored file is: one file of one variant of one version.

    Attributes:
        format: the variant's model format, "onnx" or "tflite".
    """

    digest: str
    size: int
    model: str
    version: int
    variant: str
    path: str
    role: str
    format: str


def model(connection: Connection, name: str) -> registry_pb2.Model:
    """One model. Raises SluiceError(MODEL_UNKNOWN)."""
    row = connection.execute(select(tables.models).where(tables.models.c.name == name)).one_or_none()
    if row is None:
        raise unknown_model(name)
    return _model(connection, row)


def models(connection: Connection, after: str, limit: int) -> list[registry_pb2.Model]:
    """Models by name, behind `after`."""
    query = (
        select(tables.models).where(tables.models.c.name > after).order_by(tables.models.c.name).limit(limit)
    )
    return [_model(connection, row) for row in connection.execute(query).all()]


def latest_number(connection: Connection, name: str) -> int:
    """The newest version's number; 0 when there is none."""
    query = select(func.max(tables.versions.c.version)).where(tables.versions.c.model == name)
    return connection.execute(query).scalar() or 0


def version_row(connection: Connection, name: str, number: int) -> Row[Any]:
    """A version's row; number 0 means the latest. Raises SluiceError(MODEL_UNKNOWN | VERSION_UNKNOWN)."""
    wanted = number or latest_number(connection, name)
    columns = tables.versions.c
    query = select(tables.versions).where(columns.model == name, columns.version == wanted)
    row = connection.execute(query).one_or_none() if wanted <= MAX_STORED_INTEGER else None
    if row is None:
        latest = model(connection, name).latest_version
        raise SluiceError(
            errors_pb2.VERSION_UNKNOWN,
            f"{name} has no version {number}; its latest is {latest}",
            hint=f"`sluice model list {name}` shows its versions",
            obj=f"{name}@{number}",
        )
    return row


def alias_number(connection: Connection, name: str, alias: str) -> int:
    """The version an alias points at. Raises SluiceError(MODEL_UNKNOWN | ALIAS_UNKNOWN)."""
    known = dict(model(connection, name).aliases)
    if alias not in known:
        raise SluiceError(
            errors_pb2.ALIAS_UNKNOWN,
            f"{name} has no alias {alias[:80]!r}; it has {', '.join(sorted(known)) or 'none'}",
            obj=f"{name}:{alias[:80]}",
        )
    return known[alias]


def version_message(row: Row[Any], *, with_manifest: bool = True) -> registry_pb2.Version:
    """The wire form of a version's row."""
    return registry_pb2.Version(
        model=row.model,
        version=row.version,
        manifest=row.manifest if with_manifest else b"",
        manifest_digest=row.manifest_digest,
        retired=row.retired,
        size_bytes=row.size_bytes,
        create_time=to_timestamp(row.created_us),
        variants=[variant.name for variant in Manifest.parse(row.manifest).variants],
    )


def version_rows(connection: Connection, name: str, before: int | None, limit: int) -> Sequence[Row[Any]]:
    """A model's versions, newest first, below `before`. Raises SluiceError(MODEL_UNKNOWN)."""
    model(connection, name)
    columns = tables.versions.c
    query = select(tables.versions).where(columns.model == name).order_by(columns.version.desc())
    if before is not None:
        query = query.where(columns.version < before)
    return connection.execute(query.limit(limit)).all()


def insert_version(connection: Connection, manifest: Manifest, data: bytes) -> Row[Any]:
    """Adds a version, and its model when it is the first."""
    now = now_us()
    if (
        connection.execute(
            select(tables.models.c.name).where(tables.models.c.name == manifest.model)
        ).one_or_none()
        is None
    ):
        connection.execute(insert(tables.models).values(name=manifest.model, created_us=now))
    connection.execute(
        insert(tables.versions).values(
            model=manifest.model,
            version=manifest.version,
            manifest=data,
            manifest_digest=manifest.digest,
            content_digest=manifest.content_digest,
            size_bytes=sum(file.size for file in manifest.files().values()),
            retired=False,
            created_us=now,
        )
    )
    connection.execute(
        insert(tables.version_files),
        [
            {
                "model": manifest.model,
                "version": manifest.version,
                "variant": variant.name,
                "path": file.path,
                "role": file.role,
                "format": variant.format,
                "digest": file.digest,
                "size": file.size,
            }
            for variant in manifest.variants
            for file in variant.files
        ],
    )
    return version_row(connection, manifest.model, manifest.version)


def set_alias(connection: Connection, name: str, alias: str, number: int) -> registry_pb2.Model:
    """Points an alias at a version, or removes it when `number` is 0.

    Raises SluiceError(MODEL_UNKNOWN | VERSION_UNKNOWN | REQUEST_INVALID | LIMIT_EXCEEDED).
    """
    if not is_name(alias):
        raise SluiceError(
            errors_pb2.REQUEST_INVALID, f"not an alias: {alias[:80]!r}; it must be {NAME_RULE}", obj="alias"
        )
    known = dict(model(connection, name).aliases)
    columns = tables.aliases.c
    connection.execute(delete(tables.aliases).where(columns.model == name, columns.alias == alias))
    if number:
        version_row(connection, name, number)
        if alias not in known and len(known) >= MAX_ALIASES:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{name} has {len(known)} aliases; at most {MAX_ALIASES} are allowed",
                hint="remove one by setting it to version 0",
                obj=name,
            )
        connection.execute(insert(tables.aliases).values(model=name, alias=alias, version=number))
    return model(connection, name)


def retire(connection: Connection, name: str, number: int) -> Row[Any]:
    """Bars a version from new rollouts.

    Raises SluiceError(MODEL_UNKNOWN | VERSION_UNKNOWN | REQUEST_INVALID).
    """
    if number == 0:
        raise SluiceError(errors_pb2.REQUEST_INVALID, "the version to retire is missing", obj="version")
    version_row(connection, name, number)
    columns = tables.versions.c
    connection.execute(
        update(tables.versions).where(columns.model == name, columns.version == number).values(retired=True)
    )
    return version_row(connection, name, number)


def held_files(connection: Connection, digests: Sequence[str]) -> list[Held]:
    """What is known about the files with these digests; a file of several versions comes several times."""
    columns = tables.version_files.c
    found: list[Held] = []
    for part in _parts(digests):
        found += map(
            _held, connection.execute(select(tables.version_files).where(columns.digest.in_(part))).all()
        )
    return found


def external_data_of(connection: Connection, digest: str) -> tuple[str, str] | None:
    """Which model describes an external data file: the model file's digest and the name it knows the file by.

    None when no version has the digest as external data.
    """
    data, model = tables.version_files.alias(), tables.version_files.alias()
    same = [data.c[name] == model.c[name] for name in ("model", "version", "variant")]
    query = (
        select(model.c.digest, data.c.path)
        .join(data, and_(*same))
        .where(data.c.digest == digest, data.c.role == "external", model.c.role == "model")
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else (row.digest, row.path)


def files_of(connection: Connection, name: str, numbers: Sequence[int]) -> list[Held]:
    """Every file of some versions of one model."""
    columns = tables.version_files.c
    query = select(tables.version_files).where(columns.model == name, columns.version.in_(numbers))
    return [_held(row) for row in connection.execute(query).all()]


def latest_numbers(connection: Connection) -> dict[str, int]:
    """The newest version of each model."""
    columns = tables.versions.c
    query = select(columns.model, func.max(columns.version)).group_by(columns.model)
    return {row.model: row[1] for row in connection.execute(query).all()}


def unknown_model(name: str) -> SluiceError:
    """The error for a model that is not there."""
    return SluiceError(
        errors_pb2.MODEL_UNKNOWN,
        f"there is no model {name[:80]!r}",
        hint="`sluice model list` shows the models",
        obj=name[:80],
    )


def _model(connection: Connection, row: Row[Any]) -> registry_pb2.Model:
    columns = tables.aliases.c
    aliases = connection.execute(
        select(columns.alias, columns.version).where(columns.model == row.name)
    ).all()
    return registry_pb2.Model(
        name=row.name,
        latest_version=latest_number(connection, row.name),
        aliases={entry.alias: entry.version for entry in aliases},
        create_time=to_timestamp(row.created_us),
    )


def _held(row: Row[Any]) -> Held:
    return Held(row.digest, row.size, row.model, row.version, row.variant, row.path, row.role, row.format)


def _parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _IN_CLAUSE):
        yield values[start : start + _IN_CLAUSE]
