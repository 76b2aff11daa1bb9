"""The gate: which desired states a box believes, and which versions it may install.

With a root pinned (trust.root), in order: `admit` takes a desired state only out of a statement that the
online key signed for this device; `check`, before a version is installed, refreshes the signed metadata and
lets `director.decide` say yes or no. What was accepted once on fresh metadata is written down, so that an
attempt that goes on after a power cut, or without a network, needs no second answer. Without a root
nothing is installed.

Rules: nothing here is asked when the box boots or serves; a failure leaves the box with what it runs. The
clock that expiry is held against is this box's, or the time at which the last admitted statement was made if
that is later: a box without a battery starts in 1970.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from agent import update_limits as limits
from agent.config import AgentConfig
from agent.control import Channels, Control
from agent.state import DesiredModel, State
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError, os_errors
from updater.limits import MAX_ROOT_BYTES
from updater.trust.decision import Held, decide

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # heavy, and only needed where a root is pinned
    from tuf.api.metadata import Root

    from updater.trust.client import TrustClient


class Gate:
    """What one box believes. Its methods may be called from any thread; one at a time refreshes.

    Nothing is read before the first question, so that neither a damaged root nor a full disk keeps a box from
    serving.

    Args:
        config: with or without a pinned root.
        state: where accepted versions are written down.
        identity: gives connections to the control plane.
    """

    def __init__(self, config: AgentConfig, state: State, identity: Channels) -> None:
        self._device_id = config.device_id
        self._state = state
        self._root_path = config.trust_root
        self._directory = config.state_dir / "trust"
        self._control = Control(config.control_address, identity)
        self._source = Source(self._control)
        self._lock = threading.RLock()
        self._issued = datetime.fromtimestamp(0, timezone.utc)
        self._opened: TrustClient | None = None

    def close(self) -> None:
        self._control.close()

    def _client(self, root_path: Path) -> TrustClient:
        if self._opened is None:
            self._opened = open_client(root_path, self._directory, self._source, clock=self._now)
        return self._opened

    def admit(self, message: sync_pb2.DesiredState) -> sync_pb2.DesiredState:
        """The desired state that a message proves; the message itself where no root is pinned: nothing of it
        is installed then.

        An online key that is not known may be a new one: the metadata is refreshed once and the message
        looked at again. Raises SluiceError(SIGNATURE_INVALID | METADATA_EXPIRED | METADATA_INVALID |
        LIMIT_EXCEEDED), and as `open_client`.
        """
        if self._root_path is None:
            return message
        from updater.trust.director import read_desired

        with self._lock:
            client = self._client(self._root_path)
            now = datetime.now(timezone.utc)
            try:
                statement = read_desired(message.proof, client.root, self._device_id, now)
            except SluiceError as error:
                if error.reason != errors_pb2.SIGNATURE_INVALID:
                    raise
                self._refresh_for_new_key(client, error)
                statement = read_desired(message.proof, client.root, self._device_id, now)
            self._issued = statement.issue_time.ToDatetime(timezone.utc)
            return statement.desired

    def _refresh_for_new_key(self, client: TrustClient, refused: SluiceError) -> None:
        before = client.root.version
        self._source.begin()
        try:
            client.refresh()
        except SluiceError as error:
            # What hangs on the root may be broken; a new root alone is enough to look again.
            if client.root.version == before:
                raise refused from error
        if client.root.version == before:
            raise refused

    def check(self, desired: DesiredModel, held: Held) -> None:
        """Lets a version be installed, or says why not.

        Raises SluiceError(VERSION_NOT_SIGNED | VERSION_BELOW_FLOOR), and as `TrustClient.refresh` and
        `open_client`.
        """
        if held.owns(desired.manifest_digest):
            return  # needs nobody, and no network
        if self._root_path is None:
            raise SluiceError(
                errors_pb2.VERSION_NOT_SIGNED,
                f"{desired.model}@{desired.version} is not installed: no root is pinned on this box",
                hint="put the file of `sluice trust root` on it, name it as trust.root, restart the agent",
                obj=f"{desired.model}@{desired.version}",
            )
        with self._lock:
            client = self._client(self._root_path)
            entry = f"{desired.manifest_digest} {desired.rollout_id}"
            if self._state.accepted(desired.model) == entry and _is_stored(client, desired):
                return
            self._source.begin()
            client.refresh()
            named = client.version(desired.model, desired.version)
            decide(held, desired.model, desired.version, desired.manifest_digest, named)
            self._state.save_accepted(desired.model, entry)

    def _now(self, root: Root) -> datetime:
        del root
        return max(datetime.now(timezone.utc), self._issued)


def _is_stored(client: TrustClient, desired: DesiredModel) -> bool:
    """Whether the stored copy proves a version that was accepted, whatever its dates."""
    from updater.trust.roles import named, target_path

    try:
        target = client.stored_target(target_path(desired.model, desired.version))
    except SluiceError as error:
        log.warning("the stored metadata is fetched again: %s", error)
        return False
    return target is not None and named(target).digest == desired.manifest_digest


class Source:
    """Brings metadata from a control plane, in so much time altogether for each refresh.

    Args:
        control: that is called.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._until = 0.0

    def begin(self) -> None:
        """A refresh begins: its time runs from now."""
        self._until = time.monotonic() + limits.REFRESH_TIMEOUT_S

    def __call__(self, role: str, version: int | None) -> Iterable[bytes] | None:
        """As `client.Fetch`. Raises SluiceError(CONTROL_UNREACHABLE) when the time is over."""
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise SluiceError(
                errors_pb2.CONTROL_UNREACHABLE,
                f"{self._control.address} did not bring signed metadata in {limits.REFRESH_TIMEOUT_S:g} s",
                hint="new roots that came are kept; the next attempt goes on behind them",
                obj=self._control.address,
            )
        data = self._control.get_metadata(role, version, min(left_s, limits.METADATA_TIMEOUT_S))
        return (data,) if data else None


def open_client(
    root_path: Path,
    directory: Path,
    source: Source,
    clock: Callable[[Root], datetime] | None = None,
) -> TrustClient:
    """The verified copy of the signed metadata of a box.

    Args:
        root_path: of the pinned root.
        directory: for the copy.
        source: of metadata.
        clock: as `TrustClient` takes it.

    Raises SluiceError(CONFIG_INVALID) when the root cannot be read, and as `TrustClient`.
    """
    from updater.trust.client import TrustClient

    try:
        with os_errors("reading the pinned root", root_path), root_path.open("rb") as file:
            pinned = file.read(MAX_ROOT_BYTES + 1)
    except SluiceError as error:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            error.message,
            hint="put the file of `sluice trust root` there, or correct trust.root",
            obj=str(root_path),
        ) from error
    return TrustClient(directory, pinned, source, clock)
