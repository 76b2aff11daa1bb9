"""Who this box is: its enrolment key, its certificate, and the thread that keeps the certificate fresh.

On disk below STATE/identity: `enrolment.key`, made before it is first used and kept for good, and
`credentials.json` (key, chain, bundle, counter: updater/credentials.py), replaced whole at each renewal. The
thread enrols while there is no certificate, renews at two thirds of its life, and goes on trying as long as
it takes: with the enrolment key a certificate that expired long ago is renewed like any other. Nothing else
waits for it: serving needs no certificate, and calls to the control plane fail with the reason until there is
one.

With `control.certificate` and `control.key` another authority keeps the files; they are followed instead.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import grpc

from agent import update_limits as limits
from agent.config import AgentConfig
from agent.retry import Backoff
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, fingerprint, identity_of, renew_time
from updater.credentials import SERVER_NAME, Credentials
from updater.enrolment import Enroller
from updater.errors import SluiceError, os_errors
from updater.identity import Identity, Kind
from updater.keyfile import FileKey, read_secret

log = logging.getLogger(__name__)
DIRECTORY = "identity"
CREDENTIALS = "credentials.json"
ENROLMENT_KEY = "enrolment.key"
_NOT_KNOWN = (errors_pb2.UNAUTHENTICATED, errors_pb2.DEVICE_UNKNOWN)


class BoxIdentity:
    """The credentials of one box. Reading them is safe from every thread.

    Args:
        config: of the agent.

    What cannot be read raises nothing here, for serving must go on: `error` says it, and the thread tries on.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._path = config.state_dir / DIRECTORY / CREDENTIALS
        self._external = bool(config.control_certificate)
        self.error = ""
        self.generation = 0  # grows whenever the credentials change
        self.credentials = Credentials(b"")
        try:
            self.credentials = self._load()
        except SluiceError as error:
            self.error = str(error)
        self.on_renewed: Callable[[], None] = lambda: None
        self._backoff = Backoff(
            min(limits.RENEW_FIRST_S, config.reconnect_max_s),
            min(limits.RENEW_MOST_S, config.reconnect_max_s),
        )
        self._stop = threading.Event()
        self._look = threading.Event()  # set: something happened, look whether to renew
        self._refused = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="identity", daemon=True)

    def start(self) -> None:
        if self.error:
            log.warning("certificate: %s", self.error)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stop.set()
        self._look.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def alive(self) -> bool:
        """Whether the thread runs; for the watchdog."""
        return self._thread.is_alive()

    def refused(self) -> None:
        """The control plane takes the certificate no longer: renew as soon as the backoff allows."""
        self._refused = True
        self._look.set()

    def newer(self, generation: int, timeout_s: float) -> bool:
        """Waits for credentials after those of this generation; whether there are."""
        with self._changed:
            return self._changed.wait_for(lambda: self.generation != generation, timeout_s)

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel with the certificate held now. Raises SluiceError(UNAUTHENTICATED) without one."""
        held = self.credentials
        if not held.chain:
            raise SluiceError(
                errors_pb2.UNAUTHENTICATED,
                f"this box has no certificate yet{': ' + self.error if self.error else ''}",
                hint="" if self.error else "it asks for one; `sluice-agent doctor` says what is missing",
            )
        return held.channel(address, options)

    def enrol(self, token: str | None = None) -> Identity:
        """Enrols now, whatever is held; returns who this box is.

        Args:
            token: instead of the configured one; empty for none.

        Raises SluiceError as Enrolment.Enrol says.
        """
        if self._external:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                "this box gets its certificate from another authority (control.certificate)",
                hint="remove control.certificate and control.key to enrol here",
            )
        self._trusted()
        with Enroller(self._config.enrolment_address, self.credentials, self._key()) as enroller:
            identity = Identity(enroller.trust_domain(), Kind.DEVICE, self._config.device_id)
            found = enroller.enrol(
                identity,
                token=self._config.control_token if token is None else token,
                labels=self._config.labels,
            )
        self._take(found)
        return identity

    def renew(self) -> None:
        """Renews now. Raises SluiceError as Enrolment.Renew says."""
        identity = self._identity()
        with Enroller(self._config.enrolment_address, self.credentials, self._key()) as enroller:
            found = enroller.renew(identity)
        self._take(found)

    def fingerprint(self) -> str:
        """Of the enrolment key, as operators see it."""
        return fingerprint(self._key().public)

    def due(self, random_value: float) -> datetime:
        """When the certificate is renewed next: at once when there is none."""
        leaf = self.credentials.leaf
        return datetime.now(timezone.utc) if leaf is None else renew_time(leaf, random_value)

    def _run(self) -> None:
        jitter = random.random()  # noqa: S311 - spreads load, guards nothing
        while not self._stop.is_set():
            wait_s = (self.due(jitter) - datetime.now(timezone.utc)) / timedelta(seconds=1)
            if self._external:
                self._follow()
                self._stop.wait(limits.FOLLOW_FILES_S)
                continue
            if wait_s > 0 and not self._refused:
                # In steps, for the clock may jump while this waits.
                self._look.wait(min(wait_s, limits.RENEW_LOOK_S))
                self._look.clear()
                continue
            try:
                self._next()
            except SluiceError as error:
                if self.error != str(error):
                    log.warning("certificate: %s", error)
                self.error = str(error)
                self._stop.wait(self._backoff.next_wait_s())
            else:
                self._backoff.reset()
                self.error = ""
                jitter = random.random()  # noqa: S311

    def _next(self) -> None:
        """Renews; enrols where there is no certificate yet, or the control plane does not know this box."""
        found = self._load()
        if found.chain and found.chain != self.credentials.chain and not self._external:
            self._hold(found)  # `sluice-agent enrol` was faster
            return
        if not self.credentials.chain:
            self.enrol()
            return
        try:
            self.renew()
        except SluiceError as error:
            if error.reason not in _NOT_KNOWN:
                raise
            self._enrol_again()

    def _enrol_again(self) -> None:
        """The control plane knows this box no longer: it was restored from a backup, or made anew.

        A token that is in the configuration is used up, most likely: then an operator has to look.
        """
        try:
            self.enrol()
        except SluiceError as error:
            if error.reason != errors_pb2.TOKEN_INVALID or not self._config.control_token:
                raise
            log.warning("certificate: %s; asking for approval instead", error)
            self.enrol(token="")

    def _take(self, found: Credentials) -> None:
        found.save(self._path)
        self._hold(found)

    def _hold(self, found: Credentials) -> None:
        self.credentials = found
        self._refused = False
        with self._changed:
            self.generation += 1
            self._changed.notify_all()
        leaf = found.leaf
        assert leaf is not None
        log.info("certificate valid until %s", leaf.not_valid_after_utc.strftime("%Y-%m-%d %H:%M:%S UTC"))
        self.on_renewed()

    def _follow(self) -> None:
        """Takes up files that another authority's tool has replaced."""
        try:
            found = self._load()
        except SluiceError as error:
            self.error = str(error)
            return
        self.error = ""
        if found != self.credentials:
            self.credentials = found
            with self._changed:
                self.generation += 1
                self._changed.notify_all()
            self.on_renewed()

    def _load(self) -> Credentials:
        config = self._config
        if config.control_certificate:
            assert config.control_bundle is not None  # as config.py has checked
            assert config.control_key is not None
            chain = _read(config.control_certificate)
            return Credentials(
                _read(config.control_bundle), chain, read_secret(config.control_key), server_name=self._name()
            )
        held = Credentials.load(self._path) if self._path.exists() else Credentials(b"")
        if not held.bundle and config.control_bundle:
            held = Credentials(_read(config.control_bundle))
        return Credentials(held.bundle, held.chain, held.key, held.counter, self._name())

    def _name(self) -> str:
        return self._config.control_server_name or SERVER_NAME

    def _trusted(self) -> None:
        """Raises SluiceError(CONFIG_INVALID) while there is no bundle to trust the control plane by."""
        if not self.credentials.bundle:
            self.credentials = self._load()
        if not self.credentials.bundle:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                "this box was given no trust bundle, so it cannot tell its control plane from another",
                hint="copy bundle.pem from the control machine and name it in control.bundle",
                obj="control.bundle",
            )
        certificates(self.credentials.bundle)

    def _key(self) -> FileKey:
        return FileKey.open(self._path.with_name(ENROLMENT_KEY))

    def _identity(self) -> Identity:
        leaf = self.credentials.leaf
        assert leaf is not None
        held = identity_of(leaf)
        return Identity(held.trust_domain, Kind.DEVICE, self._config.device_id)


def _read(path: Path) -> bytes:
    with os_errors("reading", path):
        return path.read_bytes()
