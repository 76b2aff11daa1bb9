"""Sets a control plane's trust up: authority, first operator, profile; and lets an operator in without one.

Works on the data directory itself, so whoever may write there is trusted as the administrator of the machine.
In order: authority, the operator's enrolment key, the operator's row, credentials, profile. Each is written
whole, and one that is there already stays: `initialise` may be run again after any end, and then makes what
is still missing.
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
from fleet.profile import ADDRESSES, CREDENTIALS, ENROLMENT_KEY, Profile
from fleet.tokens import Purpose
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, dns_names, fingerprint, key_to_pem, new_key, public_of
from updater.credentials import Credentials
from updater.errors import SluiceError, os_errors
from updater.identity import Identity, Kind, Role
from updater.keyfile import read_key

DATABASE = "control.db"


@dataclass(frozen=True)
class Initialised:
    """What there is now.

    Attributes:
        trust_domain: of the fleet.
        bundle: file to hand out to boxes.
        root_key: file to take off the machine; None where another authority issues, or where it was taken.
        root_fingerprint: of the authority; empty where another authority issues.
        server_names: DNS names in the control plane's certificate, where another authority issued it.
        made: what this run made: of "authority" and "operator".
    """

    trust_domain: str
    bundle: Path
    root_key: Path | None
    root_fingerprint: str
    server_names: tuple[str, ...] = ()
    made: tuple[str, ...] = ()


def default_trust_domain() -> str:
    """A trust domain after this machine's name."""
    name = re.sub(r"[^a-z0-9._-]", "-", platform.node().lower()).strip("-.")[:100]
    return f"{name or 'fleet'}.sluice"


def check(
    data: Path, trust_domain: str, operator: str, profile: Profile
) -> tuple[ca.Issuer | None, Identity]:
    """What is there of the authority, and who the operator will be; nothing is written. As `initialise`."""
    directory = data / DIRECTORY
    if (directory / ca.SERVER).exists():
        raise SluiceError(
            errors_pb2.STATE_LOCKED,
            f"{directory} holds another authority's certificate",
            hint="`sluice control init --certificate FILE --key FILE --bundle FILE` replaces it",
            obj=str(directory),
        )
    issuer = ca.load(directory) if ca.exists(directory) else None
    roots = _roots(directory, issuer)
    _check_profile(profile, roots)
    domain = trust_domain or _domain(issuer, profile)
    if issuer is not None and domain != issuer.trust_domain:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{directory} is of the trust domain {issuer.trust_domain}, which cannot be changed",
            hint="leave --trust-domain out, or name another directory with --data",
            obj=domain,
        )
    if (profile.directory / CREDENTIALS).exists():
        operator = profile.identity().name
    return issuer, Identity(domain, Kind.OPERATOR, operator, Role.ADMIN)


def _roots(directory: Path, issuer: ca.Issuer | None) -> set[str]:
    """Fingerprints of the roots that count here, or will: of a key that lies there alone, see `ca.create`."""
    if issuer is not None:
        return {ca.root_fingerprint(root) for root in issuer.roots}
    path = directory / ca.ROOT_KEY
    return {fingerprint(public_of(read_key(path)))} if path.exists() else set()


def _domain(issuer: ca.Issuer | None, profile: Profile) -> str:
    if issuer is not None:
        return issuer.trust_domain
    held = profile.identity() if (profile.directory / CREDENTIALS).exists() else None
    return held.trust_domain if held is not None else default_trust_domain()


def initialise(data: Path, trust_domain: str, operator: str, profile: Profile) -> Initialised:
    """Makes the embedded authority and the first operator, an admin, with a profile.

    Args:
        data: directory of the control plane.
        trust_domain: empty for that of the authority that is there, else one after this machine's name.
        operator: name.
        profile: of the operator, with the addresses that it shall name.

    Raises SluiceError(STATE_LOCKED) when the profile is of another fleet, when other operators were let in
    already, or when another authority issues; REQUEST_INVALID for another trust domain than the authority's;
    CERTIFICATE_INVALID for an impossible name.
    """
    directory = data / DIRECTORY
    issuer, identity = check(data, trust_domain, operator, profile)
    made = []
    if issuer is None:
        with os_errors("creating the data directory", data):
            data.mkdir(parents=True, exist_ok=True)
        issuer = ca.create(directory, identity.trust_domain, datetime.now(UTC))
        made.append("authority")
    ca.hand_out(directory, issuer)
    if _first_operator(data, issuer, identity, profile):
        made.append("operator")
    root_key = directory / ca.ROOT_KEY
    return Initialised(
        issuer.trust_domain,
        directory / ca.BUNDLE,
        root_key if root_key.exists() else None,
        ca.root_fingerprint(issuer.roots[0]),
        made=tuple(made),
    )


def _check_profile(profile: Profile, roots: set[str]) -> None:
    """Raises SluiceError(STATE_LOCKED) for a profile that is not of this authority."""
    if not profile.exists():
        return
    if (profile.directory / CREDENTIALS).exists():
        held = Credentials.load(profile.directory / CREDENTIALS)
        if roots & {ca.root_fingerprint(root) for root in certificates(held.bundle)}:
            return
    raise SluiceError(
        errors_pb2.STATE_LOCKED,
        f"{profile.directory} holds an operator's profile already, of another fleet",
        hint="name another directory in SLUICE_PROFILE, or move that one away",
        obj=str(profile.directory),
    )


def _first_operator(data: Path, issuer: ca.Issuer, identity: Identity, profile: Profile) -> bool:
    """Whether the operator, or what was missing of them, was made now."""
    # A key without credentials is of a run that ended half way.
    known = profile.key().public if (profile.directory / ENROLMENT_KEY).exists() else b""
    key, now = new_key(), datetime.now(UTC)
    database = Database(data / DATABASE)
    try:
        with database.engine.begin() as connection:
            if (profile.directory / CREDENTIALS).exists() and identities.is_accepted(connection, known):
                if (profile.directory / ADDRESSES).exists():
                    return False
                profile.save()
                return True
            others = identities.admins(connection, without=known)
            if others:
                raise SluiceError(
                    errors_pb2.STATE_LOCKED,
                    f"{data} is set up already, and {', '.join(others)} may let others in",
                    hint="ask for a token (`sluice operator token`); if every admin's profile is lost: "
                    "`sluice control admit NAME`",
                    obj=str(data),
                )
            chain = issuer.issue(identity, key.public_key(), CERTIFICATE_LIFE_S, now)
            expires_us = int(certificates(chain)[0].not_valid_after_utc.timestamp() * SECOND)
            counter = identities.admit(connection, identity, profile.key().public, expires_us, now_us())
    finally:
        database.close()
    profile.save(Credentials(issuer.bundle, chain, key_to_pem(key), counter))
    return True


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
    return Initialised(domain, directory / ca.BUNDLE, None, "", tuple(names), ("authority",))


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
