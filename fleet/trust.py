"""The control plane's part in trust: keeps signed metadata, signs with the online key, checks publications.

The online key is made at the first start, lies in DATA/trust/online.json and never leaves. It signs snapshot
and timestamp at each publication and every RESIGN_DAYS, and the desired state of each device whenever one is
sent. Before a root is published everything works unsigned; from then on nothing that the operators did not
sign does.

Rules: a publication is checked and written in one transaction; an online key that the root does not name
(after a restore, or a theft) stops signing and nothing else: what is published stays readable, and the log
says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from securesystemslib.signer import Key, Signer
from sqlalchemy import Connection, delete, func, insert, select
from tuf.api.metadata import Metadata, Snapshot, Timestamp

from fleet import log, tables
from fleet.clock import now_us
from fleet.limits import (
    MAX_METADATA_PARTS,
    MAX_PUBLICATION_BYTES,
    MAX_ROLES,
    MAX_STORED_INTEGER,
    METADATA_KEPT,
    STATEMENT_LIFE_S,
)
from sluice.api.v1 import errors_pb2, sync_pb2, trust_pb2
from updater.errors import SluiceError, os_errors
from updater.manifest import Manifest
from updater.trust.director import sign_desired
from updater.trust.documents import ROOT, SNAPSHOT, TIMESTAMP, in_days, read, read_root, read_targets, write
from updater.trust.keys import KeyFile, key_dict, new_key, read_key_file
from updater.trust.online import ONLINE_DAYS, RESIGN_DAYS, Online
from updater.trust.repository import Publication, Repository, publish, with_online
from updater.trust.roles import key_for_online, named, target_path

DIRECTORY = "trust"  # below DATA
ONLINE_KEY = "online"


class Trust:
    """Signed metadata of one control plane. What takes a transaction blocks.

    Args:
        directory: for the online key; created when absent.

    Raises SluiceError(KEY_UNAVAILABLE | IO_FAILED | DISK_FULL).
    """

    def __init__(self, directory: Path) -> None:
        self._signer = _online_signer(directory)
        self._may_sign: bool | None = None  # None: not looked yet

    @property
    def online_key(self) -> Key:
        """The public half of the online key."""
        return self._signer.public_key

    def public_key_file(self) -> bytes:
        """The same as a key file without a private half."""
        return KeyFile(ONLINE_KEY, self.online_key, {}).to_bytes()

    def root_version(self, connection: Connection) -> int:
        """The newest root's version; 0 before trust is set up."""
        return _newest_version(connection, ROOT)

    def roles(self, connection: Connection) -> list[str]:
        """Every role but the four at the top."""
        return sorted(_repository(connection).targets.keys() - {"targets"})

    def state(self, connection: Connection) -> trust_pb2.GetTrustResponse:
        """How far trust is set up, and the online key."""
        return trust_pb2.GetTrustResponse(
            root_version=self.root_version(connection),
            online_key=json.dumps(key_dict(self.online_key), sort_keys=True),
            roles=self.roles(connection),
        )

    def get(self, connection: Connection, role: str, version: int) -> bytes:
        """One role's metadata, the newest for version 0; empty where there is none."""
        columns = tables.trust_metadata.c
        query = select(columns.data).where(columns.role == role).order_by(columns.version.desc()).limit(1)
        if version:
            query = query.where(columns.version == version)
        return connection.execute(query).scalar() or b""

    def publish(
        self, connection: Connection, submitted: Sequence[tuple[str, bytes]], *, replace_root: bool = False
    ) -> Publication:
        """Adds metadata and signs snapshot and timestamp over it. Raises as `repository.publish`."""
        size = sum(len(data) for _, data in submitted)
        if len(submitted) > MAX_METADATA_PARTS or size > MAX_PUBLICATION_BYTES:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{len(submitted)} documents of {size} bytes; at most {MAX_METADATA_PARTS} of"
                f" {MAX_PUBLICATION_BYTES} bytes are taken at once",
                hint="publish some of them first",
            )
        now = datetime.now(UTC)
        before = _repository(connection)
        published = publish(
            before,
            submitted,
            online_keyid=self.online_key.keyid,
            now=now,
            replace_root=replace_root,
        )
        if len(published.repository.targets) > MAX_ROLES:
            raise SluiceError(errors_pb2.LIMIT_EXCEEDED, f"more than {MAX_ROLES} roles were ever delegated")
        if not published.changed:
            return published
        _check_versions(connection, before.targets, published.roles)
        if replace_root:
            connection.execute(delete(tables.trust_metadata).where(tables.trust_metadata.c.role == ROOT))
        for version, data in published.roots.items():
            _keep(connection, ROOT, version, data)
        for role, data in published.roles.items():
            _keep(connection, role, read(role, data).signed.version, data)
        return Publication(self._sign(connection, published.repository), published.roots, published.roles)

    def publish_targets(self, connection: Connection, submitted: Sequence[tuple[str, bytes]]) -> None:
        """The same for what comes with a version: who counts is not changed that way. Raises as `publish`."""
        if any(role == ROOT for role, _ in submitted):
            raise SluiceError(
                errors_pb2.METADATA_INVALID,
                "a root cannot come with a version",
                hint="publish it first: `sluice trust publish`",
                obj=ROOT,
            )
        self.publish(connection, submitted)

    def resign(self, connection: Connection) -> int:
        """Signs snapshot and timestamp anew when they are older than RESIGN_DAYS; how many were signed.

        Raises SluiceError(METADATA_INVALID) when the root does not name the online key.
        """
        repository = _repository(connection)
        if repository.root is None:
            return 0
        online = repository.online
        due = datetime.now(UTC) + timedelta(days=ONLINE_DAYS - RESIGN_DAYS)
        if online is not None and min(online.snapshot.signed.expires, online.timestamp.signed.expires) > due:
            return 0
        self._sign(connection, repository)
        return 2

    def _sign(self, connection: Connection, repository: Repository) -> Repository:
        signed = with_online(repository, self._signer, now_us() // 1_000, in_days(ONLINE_DAYS))
        online = cast("Online", signed.online)
        _keep(connection, SNAPSHOT, online.snapshot.signed.version, write(online.snapshot))
        _keep(connection, TIMESTAMP, online.timestamp.signed.version, write(online.timestamp))
        return signed

    def require_signed(self, connection: Connection, manifest: Manifest, data: bytes) -> None:
        """Raises SluiceError(VERSION_NOT_SIGNED) where trust is set up and no metadata names this version."""
        repository = _repository(connection)
        if repository.root is None:
            return
        target = repository.find(target_path(manifest.model, manifest.version))
        name = f"{manifest.model}@{manifest.version}"
        if target is None or named(target).digest != manifest.digest or target.length != len(data):
            raise SluiceError(
                errors_pb2.VERSION_NOT_SIGNED,
                f"{name} is not published: no signed metadata names it with this content",
                hint="push it with `sluice model push` where the keys are",
                obj=name,
            )

    @property
    def is_stale(self) -> bool:
        """Whether `look` was never called."""
        return self._may_sign is None

    def look(self, connection: Connection) -> None:
        """Finds out whether the newest root names the online key, which `prove` goes by."""
        root = self.get(connection, ROOT, 0)
        may = bool(root)
        if root:
            try:
                key_for_online(read_root(root).signed, self.online_key.keyid)
            except SluiceError as error:
                log.warning("online_key_does_not_count", error)
                may = False
        self._may_sign = may

    def prove(self, device_id: str, desired: sync_pb2.DesiredState) -> sync_pb2.DesiredState:
        """A device's desired state with its proof, where trust is set up. Takes a tenth of a millisecond."""
        if not self._may_sign:
            return desired
        now = datetime.now(UTC)
        proven = sync_pb2.DesiredState()
        proven.CopyFrom(desired)
        proven.proof.CopyFrom(sign_desired(device_id, desired, self._signer, now, STATEMENT_LIFE_S))
        return proven


def _check_versions(
    connection: Connection, before: Mapping[str, bytes], changed: Mapping[str, bytes]
) -> None:
    """Raises SluiceError(VERSION_CONFLICT) when a published version would be named with other content.

    A version that devices run would else be refused by all others, and nobody could tell why.
    """
    columns = tables.versions.c
    for role, data in changed.items():
        old = read_targets(role, before[role]).signed.targets if role in before else {}
        for path, target in read_targets(role, data).signed.targets.items():
            model, _, number = path.partition("/")
            if old.get(path) == target or not number.isascii() or not number.isdigit():
                continue
            query = select(columns.manifest_digest).where(
                columns.model == model, columns.version == min(int(number), MAX_STORED_INTEGER)
            )
            published = connection.execute(query).scalar()
            if published is not None and published != named(target).digest:
                raise SluiceError(
                    errors_pb2.VERSION_CONFLICT,
                    f"{model}@{number} is published, and {role} names it with other content",
                    hint="publish this content as the next version",
                    obj=f"{model}@{number}",
                )


def _online_signer(directory: Path) -> Signer:
    path = directory / f"{ONLINE_KEY}.json"
    with os_errors("creating", directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        new_key(ONLINE_KEY, None).write(path)
    key = read_key_file(path)
    return KeyFile(key.name, key.public, key.signing).signer(_no_passphrase)


def _no_passphrase(name: str) -> str:
    raise SluiceError(
        errors_pb2.KEY_UNAVAILABLE,
        f"the key {name} of the control plane is sealed, and nobody is there to open it",
        hint="put an unsealed one in its place, or remove the file for a new one",
        obj=name,
    )


def _newest_version(connection: Connection, role: str) -> int:
    columns = tables.trust_metadata.c
    return connection.execute(select(func.max(columns.version)).where(columns.role == role)).scalar() or 0


def _repository(connection: Connection) -> Repository:
    """The newest of every role."""
    columns = tables.trust_metadata.c
    newest = (
        select(columns.role, func.max(columns.version).label("version")).group_by(columns.role).subquery()
    )
    query = select(columns.role, columns.data).join(
        newest, (columns.role == newest.c.role) & (columns.version == newest.c.version)
    )
    found: dict[str, bytes] = {row.role: row.data for row in connection.execute(query)}
    root, snapshot, timestamp = (found.pop(role, None) for role in (ROOT, SNAPSHOT, TIMESTAMP))
    online = None
    if snapshot is not None and timestamp is not None:
        online = Online(
            cast("Metadata[Snapshot]", read(SNAPSHOT, snapshot)),
            cast("Metadata[Timestamp]", read(TIMESTAMP, timestamp)),
        )
    return Repository(root, found, online)


def _keep(connection: Connection, role: str, version: int, data: bytes) -> None:
    columns = tables.trust_metadata.c
    connection.execute(
        insert(tables.trust_metadata).values(role=role, version=version, data=data, created_us=now_us())
    )
    if role == ROOT:
        return
    kept = (
        select(columns.version)
        .where(columns.role == role)
        .order_by(columns.version.desc())
        .limit(METADATA_KEPT)
        .scalar_subquery()
    )
    connection.execute(
        delete(tables.trust_metadata).where(columns.role == role, columns.version.not_in(kept))
    )
