"""The online half of a repository: snapshot and timestamp over what operators signed. Pure, but for signing.

Version numbers are the time in milliseconds, or one more than the last where the clock went back: a control
plane that was restored from an old backup goes on above what devices have seen. Both name what they refer to
by version, length and SHA-256, so that nothing of one state goes with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from updater.trust.documents import read_targets, sign, write

ONLINE_DAYS = 7.0  # that a snapshot or timestamp counts; a device that is cut off longer waits for a new one
RESIGN_DAYS = 1.0  # the control plane signs anew this long after it last did


@dataclass(frozen=True)
class Online:
    """What the online key signed last."""

    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


def sign_online(
    targets: Mapping[str, bytes], before: Online | None, signer: Signer, now_ms: int, expires: datetime
) -> Online:
    """Snapshot and timestamp for these targets.

    Args:
        targets: bytes of the top-level targets and of every delegated role, by name; checked by the caller.
        before: what was signed last, if anything.
        signer: the online key.
        now_ms: milliseconds since 1970.
        expires: of both.
    """
    version = max(now_ms, before.snapshot.signed.version + 1 if before is not None else 1)
    meta = {
        f"{name}.json": MetaFile.from_data(read_targets(name, data).signed.version, data, ["sha256"])
        for name, data in targets.items()
    }
    snapshot = Metadata(Snapshot(version=version, expires=expires, meta=meta))
    sign(snapshot, [signer])
    last = before.timestamp.signed.version + 1 if before is not None else 1
    described = MetaFile.from_data(version, write(snapshot), ["sha256"])
    timestamp = Metadata(Timestamp(version=max(now_ms, last), expires=expires, snapshot_meta=described))
    sign(timestamp, [signer])
    return Online(snapshot, timestamp)
