"""Finds installed versions again when the state database was lost.

Every version directory says which manifest, variant and runtime it is. The newest version whose directory is
sound becomes active, the next one previous; which of them was active before is unknown, and the control
plane's desired state puts it right. A box that is offline serves meanwhile.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from agent.retention import versions_on_disk
from agent.slots import Installed, Slots
from agent.version_directory import MANIFEST, MARKER, verify, version_directory
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.manifest import Manifest
from updater.store import Store

log = logging.getLogger(__name__)


def recover(store: Store, slots_dir: Path) -> list[Slots]:
    """The slots of every model of which a sound version is on the disk.

    Raises SluiceError(IO_FAILED) when the slots directory cannot be listed; unsound versions are logged.
    """
    found = []
    for model, versions in versions_on_disk(slots_dir).items():
        sound = []
        for version in sorted(versions, reverse=True):
            installed = _read(store, slots_dir, model, version)
            if installed is not None:
                sound.append(installed)
        if sound:
            previous = sound[1] if len(sound) > 1 else None
            found.append(Slots(model, active=sound[0], previous=previous))
            log.warning("recovered %s@%d from its directory", model, sound[0].version)
    return found


def _read(store: Store, slots_dir: Path, model: str, version: int) -> Installed | None:
    directory = version_directory(slots_dir, model, version)
    try:
        marker = json.loads((directory / MARKER).read_bytes())
        data = (directory / MANIFEST).read_bytes()
        installed = Installed(
            version, str(marker["manifest"]), str(marker["variant"]), str(marker["runtime"])
        )
        manifest = Manifest.parse(data)
        if digest_bytes(data) != installed.manifest_digest or (manifest.model, manifest.version) != (
            model,
            version,
        ):
            raise ValueError("its manifest is of another version")
        verify(directory, model, version, manifest.variant(installed.variant), store)
        store.add_bytes(data)
    except (OSError, ValueError, KeyError, TypeError, SluiceError) as error:
        log.warning("cannot recover %s: %s", directory, error)
        return None
    return installed
