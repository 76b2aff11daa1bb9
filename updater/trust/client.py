"""The device's side: keeps a verified copy of the signed metadata and says what it names.

python-tuf's ngclient does the verifying (root rotations, then timestamp, snapshot, targets, delegations);
this module gives it what it needs and keeps its promises on a box:

1. `TrustClient` begins at the root that was pinned at installation, and walks from there through the roots it
   has kept to the newest.
2. `refresh` brings everything up to date: signatures, versions, expiry. Whatever fails, the stored copy stays
   as good as it was, and only the question is left without an answer.
3. `target` says what fresh metadata names for a version. `stored_target` says what the last good refresh
   named, whatever the date: a box that was off for a year can still prove what it runs.

Rules: every size has a limit and every fetch a deadline; a stored file appears whole and on disk (fsync,
rename) or not at all; damaged or expired stored files are as good as absent and never stop a refresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, unquote

from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from updater.atomic import sync_directory, write_atomic
from updater.errors import SluiceError, os_errors
from updater.limits import (
    MAX_DELEGATIONS,
    MAX_ROOT_BYTES,
    MAX_ROOT_ROTATIONS,
    MAX_SNAPSHOT_BYTES,
    MAX_TARGETS_BYTES,
    MAX_TIMESTAMP_BYTES,
)
from updater.trust.decision import Named
from updater.trust.documents import TARGETS, invalid, read_root, read_targets, root_signatures, signatures
from updater.trust.problems import trust_errors
from updater.trust.roles import delegated, find_target, named, target_path

log = logging.getLogger(__name__)
NOT_FOUND = 404

# One role's metadata: its bytes, in pieces, for a role and a version (None: the newest), or None where there
# is none. Raises SluiceError; ends within a deadline of its own.
Fetch = Callable[[str, "int | None"], "Iterable[bytes] | None"]

_BASE = "unused:"  # of ngclient's URLs: `DurableUpdater` asks by role and version
_CONFIG = UpdaterConfig(
    max_root_rotations=MAX_ROOT_ROTATIONS,
    max_delegations=MAX_DELEGATIONS,
    root_max_length=MAX_ROOT_BYTES,
    timestamp_max_length=MAX_TIMESTAMP_BYTES,
    snapshot_max_length=MAX_SNAPSHOT_BYTES,
    targets_max_length=MAX_TARGETS_BYTES,
)


class FunctionFetcher(FetcherInterface):
    """Lets ngclient fetch through a function instead of a URL."""

    def __init__(self, fetch: Fetch) -> None:
        self._by_role = fetch

    def _fetch(self, url: str) -> Iterator[bytes]:
        version, _, role = url.partition("/")
        pieces = self._by_role(unquote(role), int(version) if version else None)
        if pieces is None:
            raise DownloadHTTPError(f"there is no {role} {version or 'at all'}", NOT_FOUND)
        return iter(pieces)


class DurableUpdater(Updater):
    """ngclient's updater, with files that survive a power cut whole, and fetches by role and version.

    ngclient renames its files into place but does not flush them, so that after a power cut a name may hold
    an empty file, and it replaces the link to the newest root in two steps. What is overridden is private to
    it: the conformance suite and a test of ours hold the names.
    """

    clock: Callable[[Root], datetime] | None = None

    def _load_root(self) -> None:
        super()._load_root()
        if self.clock is not None:
            self._trusted_set.reference_time = self.clock(self.root)

    def _download_metadata(self, rolename: str, length: int, version: int | None = None) -> bytes:
        number = "" if version is None else str(version)
        return self._fetcher.download_bytes(f"{number}/{quote(rolename, '')}", length)

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        if not path.is_file() or path.read_bytes() != data:  # the root it begins with is kept at each refresh
            write_atomic(path, data)

    def _update_root_symlink(self) -> None:
        directory = Path(self._dir)
        link, temporary = directory / "root.json", directory / ".root.json.tmp"
        current = f"root_history/{self._trusted_set.root.version}.root.json"
        if link.is_symlink() and str(link.readlink()) == current:
            return
        with os_errors("linking the newest root", link):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(current)
            temporary.replace(link)
            sync_directory(directory)

    @property
    def root(self) -> Root:
        """The newest root that is trusted."""
        return self._trusted_set.root


class TrustClient:
    """What one box, or one operator, trusts. One at a time works on a directory.

    Args:
        directory: for the verified copy; created when absent, owned by this client.
        pinned_root: bytes of the root to begin with; None: of the copy that is there, when its owner put it.
        fetch: brings metadata.
        clock: the time to hold expiry against, given the newest trusted root; None: this machine's.

    Raises SluiceError(METADATA_INVALID | SIGNATURE_INVALID | LIMIT_EXCEEDED) for a root that is none,
    SluiceError(IO_FAILED | DISK_FULL).
    """

    def __init__(
        self,
        directory: Path,
        pinned_root: bytes | None,
        fetch: Fetch,
        clock: Callable[[Root], datetime] | None = None,
    ) -> None:
        self._directory = directory
        self._pinned_root = pinned_root
        self._fetcher = FunctionFetcher(fetch)
        self._clock = clock
        with os_errors("creating the directory of signed metadata", directory):
            directory.mkdir(parents=True, exist_ok=True)
        if pinned_root is not None:
            read_root(pinned_root)  # its size too
        self._updater = self._begin()
        self.root = self._known_root()

    def refresh(self) -> None:
        """Brings the verified copy up to date; everything after this call answers from it.

        Raises SluiceError: CONTROL_UNREACHABLE and what else fetching raises, METADATA_EXPIRED,
        METADATA_ROLLED_BACK, METADATA_INVALID, SIGNATURE_INVALID, LIMIT_EXCEEDED, IO_FAILED, DISK_FULL.
        """
        updater = self._begin()
        with trust_errors("refreshing the signed metadata"):
            try:
                updater.refresh()
            finally:
                self.root = updater.root
        self._updater = updater

    def target(self, path: str) -> TargetFile | None:
        """What metadata names for a path, delegations followed; call `refresh` first. Raises as `refresh`."""
        with trust_errors(f"looking for {path} in the signed metadata", path):
            return self._updater.get_targetinfo(path)

    def version(self, model: str, number: int) -> Named | None:
        """What metadata says of a version of a model. Raises as `target`."""
        found = self.target(target_path(model, number))
        return named(found) if found is not None else None

    def load_delegated(self) -> list[str]:
        """Brings every delegated role's metadata, which `target` only does for the role that it needs.

        Returns the roles' names. Call `refresh` first. Raises as `target`.
        """
        data = self.stored(TARGETS)
        roles = delegated(read_targets(TARGETS, data).signed) if data is not None else {}
        for role in roles.values():
            for pattern in (role.paths or ())[:1]:  # a path that the role may sign leads to it
                self.target(pattern.replace("*", "x"))
        return list(roles)

    def stored_target(self, path: str) -> TargetFile | None:
        """What the stored copy names for a path; no network, and no date is looked at.

        Signatures are checked, from the newest root known down. Raises SluiceError(METADATA_INVALID |
        SIGNATURE_INVALID).
        """
        top: Targets | None = None

        def get(role: str) -> Targets | None:
            nonlocal top
            data = self.stored(role)
            if data is None:
                return None
            document = read_targets(role, data)
            if not signatures(role, document, top if top is not None else self.root).complete:
                raise invalid(role, "that is stored is not signed by the keys that count now")
            top = top if top is not None else document.signed
            return document.signed

        return find_target(get, path)

    def stored(self, role: str) -> bytes | None:
        """The stored bytes of a role, as last verified; None when there are none."""
        path = self._directory / f"{quote(role, '')}.json"
        if not path.is_file():
            return None
        with os_errors("reading signed metadata", path):
            return path.read_bytes()

    def roots(self) -> list[bytes]:
        """Every root that is kept, the oldest first."""
        found = []
        number = 1 if self._pinned_root is None else read_root(self._pinned_root).signed.version
        while (path := self._directory / "root_history" / f"{number}.root.json").is_file():
            with os_errors("reading a root", path):
                found.append(path.read_bytes())
            number += 1
        return found

    def _begin(self) -> DurableUpdater:
        """An updater at the trusted root. ngclient's may refresh once."""
        with trust_errors("reading the pinned root"):
            updater = DurableUpdater(
                str(self._directory),
                _BASE,
                fetcher=self._fetcher,
                config=_CONFIG,
                bootstrap=self._pinned_root,
            )
        updater.clock = self._clock
        return updater

    def _known_root(self) -> Root:
        """The newest root among those kept, without the network: the pinned one, and what follows it."""
        root = self._updater.root
        while True:
            path = self._directory / "root_history" / f"{root.version + 1}.root.json"
            if not path.is_file():
                return root
            try:
                following = read_root(path.read_bytes())
            except (SluiceError, OSError) as error:
                log.warning("a stored root is unreadable and is fetched again: %s", error)
                return root
            sound = all(item.complete for item in root_signatures(following, root))
            if following.signed.version != root.version + 1 or not sound:
                return root
            root = following.signed
