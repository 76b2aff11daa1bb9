"""What a control plane publishes, as a value: which submitted metadata may join it, and what it names.

`publish` takes the newest root, targets and delegated roles with what operators submit, checks the whole as a
device would, and returns the whole after it; `with_online` signs snapshot and timestamp over that. The caller
keeps bytes in a database and sends them; nothing here does I/O.

Rules: nothing is accepted that would leave a device with metadata it refuses, so a mistake is told to whoever
makes it; versions only grow; a delegated role that was taken back stays listed, because a snapshot must never
forget a role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.trust.documents import (
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    invalid,
    read_root,
    read_targets,
    require,
    root_signatures,
    signatures,
)
from updater.trust.online import Online, sign_online
from updater.trust.roles import delegated, find_target, key_for_online


@dataclass(frozen=True)
class Repository:
    """Everything that is published.

    Attributes:
        root: the newest root; None before trust is set up.
        targets: the top-level targets and each delegated role by name.
        online: snapshot and timestamp; None before they are signed.
    """

    root: bytes | None = None
    targets: Mapping[str, bytes] = field(default_factory=dict)
    online: Online | None = None

    def find(self, path: str) -> TargetFile | None:
        """What the published metadata names for a path."""
        if self.root is None:
            return None

        def get(role: str) -> Targets | None:
            return read_targets(role, self.targets[role]).signed if role in self.targets else None

        return find_target(get, path)


@dataclass(frozen=True)
class Publication:
    """What came of a submission.

    Attributes:
        repository: the whole after it.
        roots: new roots by version, ascending.
        roles: targets and delegated roles that are new or newer.
    """

    repository: Repository
    roots: Mapping[int, bytes]
    roles: Mapping[str, bytes]

    @property
    def changed(self) -> bool:
        return bool(self.roots or self.roles)


def publish(
    before: Repository,
    submitted: Sequence[tuple[str, bytes]],
    *,
    online_keyid: str,
    now: datetime,
    replace_root: bool = False,
) -> Publication:
    """Adds submitted metadata to what is published.

    Args:
        before: what is published.
        submitted: (role, bytes), roots by version.
        online_keyid: of the control plane's own key, which the root must name.
        now: the time to hold expiry against.
        replace_root: the first submitted root begins a new chain.

    Raises SluiceError(METADATA_INVALID | SIGNATURE_INVALID | METADATA_ROLLED_BACK | METADATA_EXPIRED |
    LIMIT_EXCEEDED).
    """
    for role, _ in submitted:
        if role in (SNAPSHOT, TIMESTAMP):
            raise invalid(role, "is signed by the control plane and cannot be published")
    newest = None if replace_root else before.root
    roots = _take_roots(newest, [data for role, data in submitted if role == ROOT])
    current = next(reversed(roots.values()), newest)
    if current is None:
        raise invalid(ROOT, "is missing", "set trust up first: `sluice trust init`")
    roles: dict[str, bytes] = {}
    targets = dict(before.targets)
    for role, data in submitted:
        if role != ROOT and targets.get(role) != data:
            roles[role] = targets[role] = data
    for role in roles:
        _check_newer(role, before.targets.get(role), targets[role])
    root = read_root(current).signed
    _check_root(root, online_keyid, now)
    _check_targets(root, targets, roles, now)
    after = replace(before, root=current, targets=targets)
    return Publication(after, roots, roles)


def with_online(repository: Repository, signer: Signer, now_ms: int, expires: datetime) -> Repository:
    """The same with a new snapshot and timestamp. Raises SluiceError(KEY_UNAVAILABLE | METADATA_INVALID)."""
    if repository.root is None:
        raise invalid(ROOT, "is missing", "set trust up first: `sluice trust init`")
    key_for_online(read_root(repository.root).signed, signer.public_key.keyid)
    return replace(
        repository, online=sign_online(repository.targets, repository.online, signer, now_ms, expires)
    )


def _take_roots(newest: bytes | None, submitted: Sequence[bytes]) -> dict[int, bytes]:
    before = read_root(newest).signed if newest is not None else None
    taken: dict[int, bytes] = {}
    for data in submitted:
        if data == newest:
            continue
        document = read_root(data)
        version = document.signed.version
        if before is not None and version <= before.version:
            raise _rolled_back(ROOT, version, before.version)
        if before is not None and version != before.version + 1:
            raise invalid(
                ROOT, f"{version} does not follow version {before.version}", "send those between too"
            )
        require(root_signatures(document, before), f"root version {version}")
        taken[version] = data
        before = document.signed
    return taken


def _check_newer(role: str, before: bytes | None, after: bytes) -> None:
    new = read_targets(role, after).signed.version
    old = read_targets(role, before).signed.version if before is not None else 0
    if new <= old:
        raise _rolled_back(role, new, old)


def _check_root(root: Root, online_keyid: str, now: datetime) -> None:
    if not root.consistent_snapshot:
        raise invalid(ROOT, "does not ask for consistent snapshots")
    if root.is_expired(now):
        raise _expired(ROOT, root)
    key_for_online(root, online_keyid)


def _check_targets(
    root: Root, targets: Mapping[str, bytes], fresh: Mapping[str, bytes], now: datetime
) -> None:
    """Every role from the top down: there, signed by who may, and what was just sent not expired."""
    if TARGETS not in targets:
        raise invalid(TARGETS, "is missing", "publish it together with the root")
    top = read_targets(TARGETS, targets[TARGETS])
    require([signatures(TARGETS, top, root)], TARGETS)
    known = {TARGETS: top}
    for name in delegated(top.signed):
        if name not in targets:
            raise invalid(name, "is delegated but missing", "publish it together with the targets")
        known[name] = read_targets(name, targets[name])
        require([signatures(name, known[name], top.signed)], name)
        if known[name].signed.delegations is not None:
            raise invalid(name, "delegates further, which sluice does not use")
    for role in fresh:
        if role not in known:
            raise invalid(role, "is not delegated by the targets")
        _check_fresh(role, known[role], now)


def _check_fresh(role: str, document: Metadata[Targets], now: datetime) -> None:
    if document.signed.is_expired(now):
        raise _expired(role, document.signed)


def _expired(role: str, signed: Root | Targets) -> SluiceError:
    return SluiceError(
        errors_pb2.METADATA_EXPIRED,
        f"the {role} metadata was good until {signed.expires:%Y-%m-%d}",
        hint="sign it anew: `sluice trust renew`",
        obj=role,
    )


def _rolled_back(role: str, version: int, published: int) -> SluiceError:
    return SluiceError(
        errors_pb2.METADATA_ROLLED_BACK,
        f"{role} version {version} comes after version {published}, which is published",
        hint="somebody published meanwhile: run the command again",
        obj=role,
    )
