"""The first root of a fleet, from whatever an earlier run left, for `sluice control init`.

In order: keys (each written whole, one that is there is taken), root and targets signed and kept pending, the
root pinned in the operator's directory, both published. Killed anywhere, the next run goes on from there.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from fleet.cli.passphrase import Passphrases
from fleet.cli.trust_options import obtain_key
from fleet.signing import MetadataStore, Signing
from fleet.trust_directory import TrustDirectory
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.trust.documents import ROOT, SNAPSHOT, TIMESTAMP, read_root
from updater.trust.keys import parse_public_key
from updater.trust.roles import RoleKeys

ROOT_KEY, TARGETS_KEY = "root", "targets"  # names of the keys unless others are given


class Standing(enum.Enum):
    """How far a directory and a control plane are."""

    NEW = "new"  # neither has a root
    SIGNED = "signed"  # the directory has, and could not publish it yet
    DONE = "done"  # both have
    ELSEWHERE = "elsewhere"  # the control plane has one that other operators signed


def standing(place: TrustDirectory, store: MetadataStore) -> Standing:
    """Raises SluiceError(STATE_LOCKED) for a directory that signs for another control plane."""
    found = store.get_trust()
    if found.root_version:
        known = {read_root(data).signed.version: data for data in place.roots()}
        shared = any(store.get_metadata(ROOT, version) == data for version, data in known.items())
        return Standing.DONE if shared else Standing.ELSEWHERE
    if not place.is_set_up():
        return Standing.NEW
    online = parse_public_key(found.online_key).keyid
    root = place.current_root()
    if online in root.roles[SNAPSHOT].keyids and online in root.roles[TIMESTAMP].keyids:
        return Standing.SIGNED
    raise SluiceError(
        errors_pb2.STATE_LOCKED,
        f"{place.path} signs for another control plane than this one",
        hint="for a second fleet name another directory with --trust; for a control plane that is made anew "
        "say --keys-elsewhere, and `sluice trust rotate online` once it runs",
        obj=str(place.path),
    )


def ask(place: TrustDirectory, phrases: Passphrases, names: Sequence[str] = (ROOT_KEY, TARGETS_KEY)) -> None:
    """Asks for what `set_up` will need, before anything is made. Raises SluiceError(KEY_UNAVAILABLE)."""
    for name in names:
        if place.has_key(name):
            phrases(name)
        else:
            phrases.new(name)


def finish(place: TrustDirectory, store: MetadataStore, phrases: Passphrases, found: Standing) -> None:
    """From NEW or SIGNED: one root and one targets key, the root pinned here, both published.

    Raises as `Signing.set_up` and `Signing.publish`.
    """
    signing = Signing(place, store, phrases)
    if found is Standing.SIGNED:
        signing.publish()
        return
    online = parse_public_key(store.get_trust().online_key)
    root, targets = (RoleKeys((obtain_key(place, name, phrases).public,)) for name in (ROOT_KEY, TARGETS_KEY))
    signing.set_up(root, targets, online)
