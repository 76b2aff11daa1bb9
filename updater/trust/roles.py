"""The offline half of a repository: root, targets and delegations, made and changed as values.

Every change takes a document and returns the next version of it without signatures; nothing here signs or
does I/O, so a change can be shown before it is made (`describe`). Names:

- "root" signs the root, that is which keys count for which role;
- "targets" signs which versions exist, and delegates models to further roles;
- "online" stands for snapshot and timestamp, which the control plane's key signs.

A version is the target `<model>/<version>`: the digest and length of its manifest. A delegated role has
models or patterns of them; it may sign `<model>/*` of these and nothing else, and the search ends with it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Role, Root, TargetFile, Targets

from sluice.api.v1 import errors_pb2
from updater.digests import PREFIX, check_digest
from updater.errors import SluiceError
from updater.limits import MAX_ROLE_KEYS
from updater.manifest import NAME_RULE, is_name
from updater.trust.decision import Named
from updater.trust.documents import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL, next_of

ONLINE = "online"
ALLOWED_FROM = "allowed_from"  # in a target's custom part, see `allow`


@dataclass(frozen=True)
class RoleKeys:
    """Who signs for a role: any `threshold` of the keys."""

    keys: tuple[Key, ...]
    threshold: int = 1


def target_path(model: str, version: int) -> str:
    """The TUF target that stands for a version."""
    return f"{model}/{version}"


def make_root(root: RoleKeys, targets: RoleKeys, online: Key, expires: datetime) -> Metadata[Root]:
    """The first root. Raises SluiceError(REQUEST_INVALID) for a threshold that the keys cannot reach."""
    made = Metadata(Root(version=1, expires=expires, consistent_snapshot=True))
    given = {ROOT: root, TARGETS: targets, SNAPSHOT: RoleKeys((online,)), TIMESTAMP: RoleKeys((online,))}
    for name, role in given.items():
        for key in role.keys:
            made.signed.add_key(key, name)
        made.signed.roles[name].threshold = role.threshold
        _check_role(name, made.signed.roles[name])
    return made


def make_targets(expires: datetime) -> Metadata[Targets]:
    """The first version of targets or of a delegated role: nothing is signed yet."""
    return Metadata(Targets(version=1, expires=expires))


def change_root(
    root: Metadata[Root],
    role: str,
    expires: datetime,
    *,
    add: Sequence[Key] = (),
    remove: Sequence[str] = (),
    threshold: int | None = None,
) -> Metadata[Root]:
    """The next root, with other keys or another threshold for a role.

    Args:
        root: the newest.
        role: "root", "targets" or "online".
        expires: of the next root.
        add: keys that may sign from now on.
        remove: ids of keys that may no longer.
        threshold: signatures needed from now on; None: as before.

    Raises SluiceError(REQUEST_INVALID).
    """
    after = next_of(root, expires)
    for name in (SNAPSHOT, TIMESTAMP) if role == ONLINE else (role,):
        if name not in TOP_LEVEL:
            raise _refused(f"the root has no role {role!r}", f"the roles are {ROOT}, {TARGETS} and {ONLINE}")
        for keyid in remove:
            if keyid not in after.signed.roles[name].keyids:
                raise _refused(
                    f"the key {keyid[:16]} does not sign for {name}", "`sluice trust verify` lists the keys"
                )
            after.signed.revoke_key(keyid, name)
        for key in add:
            after.signed.add_key(key, name)
        if threshold is not None:
            after.signed.roles[name].threshold = threshold
        _check_role(name, after.signed.roles[name])
    return after


def renew(document: Metadata[Any], expires: datetime) -> Metadata[Any]:
    """The next version with a later date and nothing else changed."""
    return next_of(document, expires)


def roles_of(root: Root, keyid: str) -> list[str]:
    """The top-level roles that a key signs for, snapshot and timestamp as "online"."""
    found = [name for name in TOP_LEVEL if keyid in root.roles[name].keyids]
    return list(dict.fromkeys(ONLINE if name in (SNAPSHOT, TIMESTAMP) else name for name in found))


def delegate(
    targets: Metadata[Targets],
    name: str,
    role: RoleKeys,
    models: Sequence[str],
    expires: datetime,
) -> Metadata[Targets]:
    """Gives models to a role of their own; an existing role of this name is replaced.

    Args:
        targets: the newest top-level targets.
        name: of the role: 1 to 64 of a-z 0-9 - _ . and none of the top-level roles.
        role: who signs for it.
        models: names of models, or patterns with `*`, such as "team-*".
        expires: of the next targets.

    Raises SluiceError(REQUEST_INVALID).
    """
    if not is_name(name) or name in (*TOP_LEVEL, ONLINE):
        raise _refused(f"not a name for a role: {name[:80]!r}", f"a role's name has {NAME_RULE}")
    for model in models:
        if not is_name(model.replace("*", "x")):
            raise _refused(f"not a model or pattern: {model[:80]!r}", f"a model's name has {NAME_RULE}")
    if not models:
        raise _refused(f"the role {name} gets no models", "name at least one with --model")
    after = next_of(targets, expires)
    made = DelegatedRole(
        name,
        [key.keyid for key in role.keys],
        role.threshold,
        terminating=True,
        paths=[f"{m}/*" for m in models],
    )
    _check_role(name, made)
    before = after.signed.delegations or Delegations({}, roles={})
    roles = dict(before.roles or {})
    roles[name] = made
    keys = {**before.keys, **{key.keyid: key for key in role.keys}}
    after.signed.delegations = _delegations(keys, roles)
    return after


def undelegate(targets: Metadata[Targets], name: str, expires: datetime) -> Metadata[Targets]:
    """Takes a role's models back: what it signed counts no more. Raises SluiceError(REQUEST_INVALID)."""
    after = next_of(targets, expires)
    before = after.signed.delegations
    if before is None or not before.roles or name not in before.roles:
        raise _refused(f"there is no delegated role {name[:80]!r}", "`sluice trust verify` lists them")
    roles = {other: role for other, role in before.roles.items() if other != name}
    after.signed.delegations = _delegations(before.keys, roles) if roles else None
    return after


def change_delegated(
    targets: Metadata[Targets],
    name: str,
    expires: datetime,
    *,
    add: Sequence[Key] = (),
    remove: Sequence[str] = (),
    threshold: int | None = None,
) -> Metadata[Targets]:
    """The next targets, with other keys or another threshold for a delegated role; arguments as
    `change_root`.

    Raises SluiceError(REQUEST_INVALID).
    """
    role = delegated(targets.signed).get(name)
    if role is None:
        raise _refused(f"there is no role {name[:80]!r}", "`sluice trust verify` lists them")
    absent = [keyid for keyid in remove if keyid not in role.keyids]
    if absent:
        raise _refused(
            f"the key {absent[0][:16]} does not sign for {name}", "`sluice trust verify` lists the keys"
        )
    known = targets.signed.delegations.keys if targets.signed.delegations is not None else {}
    keys = [known[keyid] for keyid in role.keyids if keyid not in remove]
    after = RoleKeys((*keys, *add), role.threshold if threshold is None else threshold)
    models = [path.removesuffix("/*") for path in role.paths or ()]
    return delegate(targets, name, after, models, expires)


def drop_delegated_key(targets: Metadata[Targets], keyid: str, expires: datetime) -> Metadata[Targets]:
    """Takes a key from every delegated role that has it. Raises SluiceError(REQUEST_INVALID)."""
    after = next_of(targets, expires)
    for name, role in delegated(after.signed).items():
        if keyid in role.keyids:
            after.signed.revoke_key(keyid, name)
            _check_role(name, role)
    return after


def delegated(targets: Targets) -> Mapping[str, DelegatedRole]:
    """The delegated roles, first the one that is asked first."""
    return (targets.delegations.roles or {}) if targets.delegations is not None else {}


def role_for(targets: Targets, model: str) -> str:
    """Which role signs a model's versions."""
    for name, role in delegated(targets).items():
        if any(fnmatch.fnmatchcase(f"{model}/1", path) for path in role.paths or ()):
            return name
    return TARGETS


def add_version(
    targets: Metadata[Targets], model: str, version: int, digest: str, length: int, expires: datetime
) -> Metadata[Targets]:
    """Names a version: from now on its manifest is the one with this digest and length (bytes)."""
    after = next_of(targets, expires)
    sha256 = check_digest(digest, "manifest digest")[len(PREFIX) :]
    path = target_path(model, version)
    after.signed.targets[path] = TargetFile(length, {"sha256": sha256}, path)
    return after


def drop_version(
    targets: Metadata[Targets], model: str, version: int, expires: datetime
) -> Metadata[Targets]:
    """Takes a version back: no device accepts it any more. Raises SluiceError(VERSION_NOT_SIGNED)."""
    after = next_of(targets, expires)
    _target(after.signed, model, version)
    del after.signed.targets[target_path(model, version)]
    return after


def allow(
    targets: Metadata[Targets], model: str, version: int, allowed_from: int, expires: datetime
) -> Metadata[Targets]:
    """Lets devices go down to a version below their floor: those that run at most version `allowed_from`.

    Raises SluiceError(VERSION_NOT_SIGNED | REQUEST_INVALID).
    """
    if allowed_from <= version:
        raise _refused(f"{allowed_from} is not above {version}", "name the version that devices run now")
    after = next_of(targets, expires)
    _target(after.signed, model, version).unrecognized_fields["custom"] = {ALLOWED_FROM: allowed_from}
    return after


def find_target(get: Callable[[str], Targets | None], path: str) -> TargetFile | None:
    """What metadata names for a path, the top-level targets first, then the role that may sign the path.

    Args:
        get: a role's targets, verified as far as its caller wants; None where there are none.
        path: of the target.
    """
    top = get(TARGETS)
    if top is None or path in top.targets:
        return top.targets[path] if top is not None else None
    for name, role in delegated(top).items():
        if role.is_delegated_path(path):
            targets = get(name)
            return targets.targets.get(path) if targets is not None else None
    return None


def key_for_online(root: Root, keyid: str) -> Key:
    """The online key as the root names it. Raises SluiceError(METADATA_INVALID) when it does not."""
    for name in (SNAPSHOT, TIMESTAMP):
        role = root.roles[name]
        if keyid not in role.keyids or role.threshold != 1:
            raise SluiceError(
                errors_pb2.METADATA_INVALID,
                f"root version {root.version} does not let the control plane's key {keyid[:16]}"
                f" sign {name} alone",
                hint="let it name this control plane's key: `sluice trust rotate online`",
                obj=name,
            )
    return root.keys[keyid]


def allowed_from(target: TargetFile) -> int:
    """The version from which devices may come down to this target, whatever their floor; 0: none."""
    custom = target.custom
    value = custom.get(ALLOWED_FROM) if isinstance(custom, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def named(target: TargetFile) -> Named:
    """What a target says of a version."""
    return Named(f"{PREFIX}{target.hashes.get('sha256')}", allowed_from(target))


def describe(before: Metadata[Any] | None, after: Metadata[Any]) -> list[str]:
    """What changes between two versions of a document, in plain words, a line each."""
    new = after.signed
    lines = []
    if isinstance(new, Root):
        old = before.signed.roles if before is not None else {}
        for name, role in new.roles.items():
            lines += _role_changes(name, old.get(name), role)
    elif isinstance(new, Targets):
        old_targets: Targets = before.signed if before is not None else Targets()
        old_roles, roles = delegated(old_targets), delegated(new)
        for name, role in roles.items():
            lines += _role_changes(name, old_roles.get(name), role)
            old_paths = set(old_roles[name].paths or ()) if name in old_roles else set()
            lines += [f"{name}: may sign {path}" for path in role.paths or () if path not in old_paths]
            lines += [
                f"{name}: may no longer sign {path}" for path in sorted(old_paths - set(role.paths or ()))
            ]
        lines += [f"{name}: is taken back with all that it signed" for name in old_roles if name not in roles]
        for path, target in new.targets.items():
            if old_targets.targets.get(path) != target:
                allowed = allowed_from(target)
                extra = f", and devices at version {allowed} or below may go down to it" if allowed else ""
                lines.append(f"{path}: manifest {PREFIX}{target.hashes.get('sha256', '?')[:16]}…{extra}")
        lines += [f"{path}: is taken back" for path in old_targets.targets if path not in new.targets]
    lines.append(f"version {new.version}, good until {new.expires:%Y-%m-%d}")
    return lines


def _role_changes(name: str, before: Role | None, after: Role) -> list[str]:
    old = before.keyids if before is not None else []
    lines = [f"{name}: key {keyid[:16]} may sign" for keyid in after.keyids if keyid not in old]
    lines += [f"{name}: key {keyid[:16]} may no longer sign" for keyid in old if keyid not in after.keyids]
    if before is None or before.threshold != after.threshold:
        lines.append(f"{name}: {after.threshold} of {len(after.keyids)} keys must sign")
    return lines


def _check_role(name: str, role: Role) -> None:
    if len(role.keyids) > MAX_ROLE_KEYS:
        raise _refused(f"{name} would have {len(role.keyids)} keys; at most {MAX_ROLE_KEYS} are allowed", "")
    if not 1 <= role.threshold <= len(role.keyids):
        raise _refused(
            f"{name} would need {role.threshold} signatures of {len(role.keyids)} keys",
            "add a key first, or lower the threshold: `sluice trust threshold`",
        )


def _delegations(keys: Mapping[str, Key], roles: Mapping[str, DelegatedRole]) -> Delegations:
    used = {keyid for role in roles.values() for keyid in role.keyids}
    return Delegations({keyid: key for keyid, key in keys.items() if keyid in used}, roles=dict(roles))


def _target(targets: Targets, model: str, version: int) -> TargetFile:
    found = targets.targets.get(target_path(model, version))
    if found is None:
        raise SluiceError(
            errors_pb2.VERSION_NOT_SIGNED,
            f"no signed metadata names {model}@{version}",
            hint="`sluice trust verify` lists what is signed",
            obj=f"{model}@{version}",
        )
    return found


def _refused(why: str, hint: str) -> SluiceError:
    return SluiceError(errors_pb2.REQUEST_INVALID, why, hint=hint, obj="trust")
