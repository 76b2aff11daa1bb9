"""Trust for tests: one certificate authority a test process, and credentials of whoever a test needs.

Every control plane of the harness gets this authority, so that credentials are made once and serve them all.
Importing this points SLUICE_PROFILE at an admin's profile, so that `sluice` and `ControlClient` work as they
would for an operator who ran `sluice control init`.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from agent.identity import CREDENTIALS, DIRECTORY
from fleet import ca
from fleet.authority import DIRECTORY as CA
from fleet.profile import Profile
from updater.certificates import key_to_pem, new_key
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind, Role

TRUST_DOMAIN = "fleet.test"
LIFE_S = 24 * 3600.0
ADMIN = "tester"
ENROLMENT: dict[str, str] = {}  # of the control planes that this process started: address, enrolment address


def now() -> datetime:
    return datetime.now(UTC)


@functools.cache
def place() -> Path:
    """A directory of this process, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="sluice-trust-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def issuer() -> ca.Issuer:
    """Made some days ago, so that what it issued may have expired."""
    return ca.create(place() / CA, TRUST_DOMAIN, now() - timedelta(days=10))


def install(data: Path) -> None:
    """Gives a control plane's data directory the authority, unless it has one."""
    issuer()
    if not (data / CA).exists():
        shutil.copytree(place() / CA, data / CA)


def issue(
    identity: Identity, *, by: ca.Issuer | None = None, life_s: float = LIFE_S, age_s: float = 0.0
) -> Credentials:
    """Credentials made so many seconds ago, by this authority or another."""
    authority = by or issuer()
    key = new_key()
    chain = authority.issue(identity, key.public_key(), life_s, now() - timedelta(seconds=age_s))
    return Credentials(issuer().bundle, chain, key_to_pem(key), counter=1)


@functools.cache
def device(device_id: str) -> Credentials:
    """A device's; of "box" where the id is none that a certificate could name."""
    try:
        return issue(Identity(TRUST_DOMAIN, Kind.DEVICE, device_id))
    except SluiceError:
        return device("box")


@functools.cache
def operator(role: Role = Role.ADMIN) -> Credentials:
    return issue(Identity(TRUST_DOMAIN, Kind.OPERATOR, ADMIN, role))


def channel(address: str, who: Credentials | None = None) -> grpc.Channel:
    """A channel to a control plane, as an admin unless `who` says otherwise."""
    return (who or operator()).channel(address)


def server_credentials() -> grpc.ServerCredentials:
    """For a test's own server that stands for a control plane."""
    held = issue(Identity(TRUST_DOMAIN, Kind.CONTROL, "test"))
    credentials: grpc.ServerCredentials = grpc.ssl_server_credentials(
        [(held.key, held.chain)], held.bundle, require_client_auth=True
    )
    return credentials


def enrol_box(state_dir: Path, device_id: str) -> None:
    """Puts credentials where an agent keeps its own, unless it has some."""
    path = state_dir / DIRECTORY / CREDENTIALS
    if not path.exists():
        device(device_id).save(path)


class BoxChannels:
    """What gives an agent's parts their channels, without the thread that renews."""

    def __init__(self, device_id: str = "box") -> None:
        self.generation = 0
        self.held = device(device_id)

    def refused(self) -> None:
        pass

    def newer(self, generation: int, timeout_s: float) -> bool:
        return False

    def channel(self, address: str, options: Any) -> grpc.Channel:
        return self.held.channel(address, options)


def profile() -> Path:
    """The admin's profile."""
    directory = place() / "profile"
    found = Profile(directory, "127.0.0.1:8470", "127.0.0.1:8471")
    if not found.exists():
        found.save(operator())
    return directory


os.environ["SLUICE_PROFILE"] = str(profile())
