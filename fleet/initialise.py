"""Sets a control plane's trust up: authority, first operator, profile; and lets an operator in without one.

Works on the data directory itself, so whoever may write there is trusted as the administrator of the machine.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fleet import ca, identities, tokens
from fleet.authority import DIRECTORY
from fleet.clock import SECOND, now_us
from fleet.database import Database
from fleet.limits import CERTIFICATE_LIFE_S, TOKEN_LIFE_S
from fleet.profile import Profile
from fleet.tokens import Purpose
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, dns_names, key_to_pem, new_key
from updater.credentials import Credentials
from updater.errors import SluiceError, os_errors
from updater.identity import Identity, Kind, Role

DATABASE = "control.db"


@dataclass(frozen=True)
class Initialised:
    """What `initialise` made.

    Attributes:
        trust_domain: of the fleet.
        bundle: file to hand out to boxes.
        root_key: file to take off the machine; None where another authority issues.
        root_fingerprint: of the authority; empty where another authority issues.
        server_names: DNS names in the control plane's certificate, where another authority issued it.
    """

    trust_domain: str
    bundle: Path
    root_key: Path | None
    root_fingerprint: str
    server_names: tuple[str, ...] = ()


def default_trust_domain() -> str:
    """A trust domain after this machine's name."""
    name = re.sub(r"[^a-z0-9._-]", "-", platform.node().lower()).strip("-.")[:100]
    return f"{name or 'fleet'}.sluice"


def initialise(data: Path, trust_domain: str, operator: str, profile: Profile) -> Initialised:
    """Makes the embedded authority and the first operator, an admin, with a profile.

    Raises SluiceError(STATE_LOCKED) when either is there already, CERTIFICATE_INVALID for an impossible name.
    """
    identity = Identity(trust_domain, Kind.OPERATOR, operator, Role.ADMIN)
    if profile.exists():
        raise SluiceError(
            errors_pb2.STATE_LOCKED,
            f"{profile.directory} holds an operator's profile already",
            hint="name another directory in SLUICE_PROFILE, or move that one away",
            obj=str(profile.directory),
        )
    with os_errors("creating the data directory", data):
        data.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    directory = data / DIRECTORY
    issuer = ca.create(directory, trust_domain, now)
    key = new_key()
    chain = issuer.issue(identity, key.public_key(), CERTIFICATE_LIFE_S, now)
    expires_us = int(certificates(chain)[0].not_valid_after_utc.timestamp() * SECOND)
    public_key = profile.key().public
    database = Database(data / DATABASE)
    try:
        with database.engine.begin() as connection:
            counter = identities.admit(connection, identity, public_key, expires_us, now_us())
    finally:
        database.close()
    profile.save(Credentials(issuer.bundle, chain, key_to_pem(key), counter))
    return Initialised(
        trust_domain, directory / ca.BUNDLE, directory / ca.ROOT_KEY, ca.root_fingerprint(issuer.roots[0])
    )


def adopt(data: Path, certificate: Path, key: Path, bundle: Path) -> Initialised:
    """Sets a control plane up with another authority's certificate for it; nothing is issued here.

    Raises SluiceError(CERTIFICATE_INVALID | CERTIFICATE_EXPIRED | KEY_UNAVAILABLE | IO_FAILED).
    """
    with os_errors("reading", f"{certificate}, {key}, {bundle}"):
        server = Credentials(bundle.read_bytes(), certificate.read_bytes(), key.read_bytes())
        data.mkdir(parents=True, exist_ok=True)
    directory = data / DIRECTORY
    if (directory / ca.ISSUER).exists():
        raise SluiceError(
            errors_pb2.STATE_LOCKED, f"{directory} holds the embedded authority already", obj=str(directory)
        )
    domain = ca.adopt(directory, server, datetime.now(UTC))
    names = dns_names(certificates(server.chain)[0])
    return Initialised(domain, directory / ca.BUNDLE, None, "", tuple(names))


def admit(data: Path, operator: str, role: Role) -> str:
    """A token for an operator, made without one: the way back when every admin's profile is lost."""
    if not (data / DATABASE).exists():
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"{data} is no control plane's data directory",
            hint="name it with --data",
            obj=str(data),
        )
    database = Database(data / DATABASE)
    try:
        with database.engine.begin() as connection:
            now = now_us()
            purpose = Purpose(Kind.OPERATOR, operator, role.value, {})
            return tokens.create(connection, purpose, now + TOKEN_LIFE_S * SECOND, now)
    finally:
        database.close()
