"""What stays on disk: what the slots need, a few versions more as bases, and nothing else.

Version directories are the reference counts: a stored file that no directory links to is garbage, unless the
desired version is made of it; so are partial files on the way to anything else. Rules: nothing that an
active, previous or staged slot needs is ever removed; removal belongs to the reconciler's thread, as
installation does, so the two never meet.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from agent.installer import PARTIAL_PREFIX
from agent.slots import Slots
from agent.version_directory import remove
from updater.digests import PREFIX
from updater.errors import SluiceError, os_errors
from updater.manifest import Manifest
from updater.store import Store

_DIGEST_HEX_DIGITS = 64
log = logging.getLogger(__name__)


def surplus(
    models: Mapping[str, Slots],
    on_disk: Mapping[str, Iterable[int]],
    keep_versions: int,
    pinned: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> list[tuple[str, int]]:
    """Which version directories may go. Pure.

    All may that no slot holds and that are not `pinned`, but for the newest `keep_versions`.
    """
    doomed = []
    for model, versions in on_disk.items():
        held = {item.version for item in models.get(model, Slots(model)).held} | set(pinned.get(model, ()))
        spare = sorted((version for version in versions if version not in held), reverse=True)
        doomed += [(model, version) for version in spare[keep_versions:]]
    return sorted(doomed)


def versions_on_disk(slots_dir: Path) -> dict[str, list[int]]:
    """The version directories of each model."""
    with os_errors("listing", slots_dir):
        return {
            model.name: [int(entry.name) for entry in model.iterdir() if entry.name.isdigit()]
            for model in slots_dir.iterdir()
            if model.is_dir()
        }


def collect(
    store: Store,
    slots_dir: Path,
    models: Mapping[str, Slots],
    desired: Iterable[str],
    keep_versions: int,
    pinned: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> int:
    """Removes what nothing needs; returns the bytes freed in the store.

    Args:
        store: of this box.
        slots_dir: version directories.
        models: the slots of every model.
        desired: manifest digests of the desired versions, whose files are kept too.
        keep_versions: versions beside the slots to keep, a model.
        pinned: versions to keep besides, a model.

    Raises SluiceError(IO_FAILED).
    """
    for model, version in surplus(models, versions_on_disk(slots_dir), keep_versions, pinned):
        log.info("removing %s@%d: no slot needs it", model, version)
        remove(slots_dir, model, version)
    wanted = _wanted(store, models, desired)
    freed = 0
    for digest in list(store.digests()):
        path = store.path(digest)
        with os_errors("examining", path):
            status = path.stat()
        if status.st_nlink == 1 and digest not in wanted:
            store.remove(digest)
            freed += status.st_size
    for partial in store.staged():
        target = PREFIX + partial.name.removeprefix(PARTIAL_PREFIX)[:_DIGEST_HEX_DIGITS]
        if partial.name.startswith(PARTIAL_PREFIX) and target not in wanted:
            with os_errors("removing", partial):
                freed += partial.stat().st_size
                partial.unlink()
    for damaged in store.root.glob("objects/*/*.damaged"):
        with os_errors("removing", damaged):
            damaged.unlink(missing_ok=True)
    return freed


def _wanted(store: Store, models: Mapping[str, Slots], desired: Iterable[str]) -> set[str]:
    """Manifests of the slots and of the desired versions, and the files of the latter and of staged ones."""
    wanted = {item.manifest_digest for slots in models.values() for item in slots.held}
    building = {slots.staged.manifest_digest for slots in models.values() if slots.staged is not None}
    for digest in building | set(desired):
        wanted.add(digest)
        if not store.has(digest):
            continue
        try:
            wanted.update(Manifest.parse(store.path(digest).read_bytes()).files())
        except SluiceError as error:
            log.warning("retention: the stored manifest %s is damaged: %s", digest, error)
    return wanted
