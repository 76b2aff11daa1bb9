"""The signed metadata of a control plane on this machine, while it does not run: for `sluice control init`.

What an operator publishes over the network is published here by the same rules, straight into its database.
The caller holds the lock on the data directory: a running control plane would not see what changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fleet.database import Database
from fleet.initialise import DATABASE
from fleet.trust import DIRECTORY, Trust
from sluice.api.v1 import trust_pb2
from updater.atomic import write_atomic

PUBLIC_KEY = "online.pub"


class LocalTrust:
    """A `fleet.signing.MetadataStore` over a data directory.

    Args:
        database: of the control plane.
        trust: its online key and rules.
    """

    def __init__(self, database: Database, trust: Trust) -> None:
        self._engine = database.engine
        self._trust = trust

    def get_trust(self) -> trust_pb2.GetTrustResponse:
        with self._engine.connect() as connection:
            return self._trust.state(connection)

    def get_metadata(self, role: str, version: int | None = None) -> bytes:
        with self._engine.connect() as connection:
            return self._trust.get(connection, role, version or 0)

    def publish_metadata(self, metadata: Sequence[tuple[str, bytes]], *, replace_root: bool = False) -> None:
        """Raises as `Trust.publish`; all of it is on disk or nothing."""
        with self._engine.begin() as connection:
            self._trust.publish(connection, metadata, replace_root=replace_root)


@contextmanager
def local_trust(data: Path) -> Iterator[LocalTrust]:
    """The metadata below a data directory; its online key is made when there is none.

    Raises SluiceError(KEY_UNAVAILABLE | STORE_CORRUPT | IO_FAILED | DISK_FULL).
    """
    trust = Trust(data / DIRECTORY)
    database = Database(data / DATABASE)
    try:
        yield LocalTrust(database, trust)
    finally:
        database.close()


def write_online_key(data: Path) -> Path:
    """Writes the public half of the online key, for signers elsewhere to name in their root."""
    path = data / DIRECTORY / PUBLIC_KEY
    write_atomic(path, Trust(data / DIRECTORY).public_key_file())
    return path
