"""A version's files under their own names: `slots/<model>/<version>/`, hard links into the store.

The store knows files by digest; a model needs them by name beside each other (ONNX external data refers to
its neighbours). Links cost no space and share the store's read-only bytes. The directory is built under a
temporary name, fsynced and renamed, so that it is whole whenever it has its name. Two hidden files, the
manifest and `.version` (its digest, the variant, the runtime), say what it is, so that recovery.py can
rebuild a lost database.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from agent.slots import Installed
from sluice.api.v1 import errors_pb2
from updater.atomic import sync_directory, write_atomic
from updater.digests import digest_file
from updater.errors import SluiceError, os_errors
from updater.manifest import Variant
from updater.store import Store

MARKER = ".version"  # paths in manifests never start with a dot
MANIFEST = ".manifest"
_COPY_PREFIX = "add-"  # as Store.add_file names a copy in progress


def version_directory(root: Path, model: str, version: int) -> Path:
    """Where a version's files lie below the slots directory."""
    return root / model / str(version)


def materialise(store: Store, root: Path, model: str, installed: Installed, variant: Variant) -> Path:
    """Builds the directory, or finds it whole already; returns it.

    Args:
        store: holds the manifest and every file of the variant.
        root: the slots directory, on the store's file system.
        model: the model's name.
        installed: which version, for the marker.
        variant: whose files are linked.

    Raises SluiceError(FILE_UNKNOWN | DISK_FULL | IO_FAILED).
    """
    directory = version_directory(root, model, installed.version)
    links = {file.path: store.require(file.digest) for file in variant.files}
    links[MANIFEST] = store.require(installed.manifest_digest)
    marker = json.dumps(
        {"manifest": installed.manifest_digest, "variant": installed.variant, "runtime": installed.runtime},
        sort_keys=True,
    ).encode()
    if _is_whole(directory, links, marker):
        return directory
    parent = directory.parent
    with os_errors("linking the version's files in", directory):
        if not parent.is_dir():
            parent.mkdir(parents=True, exist_ok=True)
            sync_directory(root)
        building = parent / f".{installed.version}.{secrets.token_hex(6)}.tmp"
        building.mkdir(mode=0o755)
        try:
            for name, source in links.items():
                os.link(source, building / name)
            write_atomic(building / MARKER, marker)
            sync_directory(building)
            _swap_in(building, directory)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        sync_directory(parent)
    return directory


def installed_in(root: Path, model: str, version: int) -> Installed:
    """What a version's directory says it is. Raises SluiceError(STORE_CORRUPT)."""
    directory = version_directory(root, model, version)
    try:
        marker = json.loads((directory / MARKER).read_bytes())
        return Installed(version, str(marker["manifest"]), str(marker["variant"]), str(marker["runtime"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SluiceError(
            errors_pb2.STORE_CORRUPT,
            f"{directory} does not say what it holds: {error}",
            obj=str(directory),
        ) from error


def _swap_in(building: Path, directory: Path) -> None:
    """Gives the new directory its name; one of other content there makes way first."""
    if directory.exists():
        old = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.tmp")
        directory.rename(old)
        building.rename(directory)
        shutil.rmtree(old)
    else:
        building.rename(directory)


def _is_whole(directory: Path, links: dict[str, Path], marker: bytes) -> bool:
    try:
        if {entry.name for entry in directory.iterdir()} != {*links, MARKER}:
            return False
        if (directory / MARKER).read_bytes() != marker:
            return False
        return all((directory / name).samefile(source) for name, source in links.items())
    except OSError:
        return False


def verify(directory: Path, model: str, version: int, variant: Variant, store: Store) -> tuple[str, ...]:
    """Re-hashes every file that a worker is about to load; returns their digests in the manifest's order.

    Raises SluiceError(STORE_CORRUPT) naming the damaged or missing file; the store's copy is then set aside
    too, so that it is fetched again and never taken for a base.
    """
    for file in variant.files:
        path = directory / file.path
        try:
            actual = digest_file(path)
        except SluiceError as error:
            if path.exists():
                raise
            actual = f"nothing ({error.message})"
        if actual != file.digest:
            if store.has(file.digest):
                store.verify(file.digest)
            raise SluiceError(
                errors_pb2.STORE_CORRUPT,
                f"{file.path} of {model}@{version} should have digest {file.digest} but has {actual}",
                hint="it is fetched again; check the disk if this repeats",
                obj=str(path),
            )
    return tuple(file.digest for file in variant.files)


def remove(root: Path, model: str, version: int) -> None:
    """Deletes a version's directory; the files stay in the store while anything needs them."""
    directory = version_directory(root, model, version)
    with os_errors("removing", directory):
        if directory.exists():
            doomed = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.tmp")
            directory.rename(doomed)
            shutil.rmtree(doomed)


def sweep(root: Path, store: Store) -> None:
    """Deletes directories and copies that a kill left unfinished; partial downloads stay, they are resumed.

    Only for the start of the agent, when nothing is being built. Raises SluiceError(IO_FAILED).
    """
    with os_errors("sweeping", root):
        for leftover in root.glob("*/.*.tmp"):
            shutil.rmtree(leftover)
        for copy in store.staged():
            if copy.name.startswith(_COPY_PREFIX):
                copy.unlink()
