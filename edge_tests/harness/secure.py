"""A control plane behind TLS, in this process, and callers with certificates of any kind.

    with SecureControl(tmp_path / "control") as control:
        with control.operator("ann", "admin") as ann: ...

One port asks for client certificates; another, of the same server, does not, for callers without one.
Everything is real: sockets, handshakes, certificates, the services and their database. It runs in a thread of
this process, so that a test may look at its parts.
"""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_tests.harness import trust
from edge_tests.harness.operator import Operator
from fleet.access import Access, Policy
from fleet.access_interceptor import AccessInterceptor
from fleet.authentication import AuthenticationInterceptor
from fleet.config import ControlConfig
from fleet.control import Control
from fleet.quotas import Quotas
from fleet.server import make_enrolment_server, make_server
from sluice.api.v1 import audit_pb2_grpc, identity_pb2_grpc, operators_pb2_grpc, trust_pb2_grpc

DOMAIN = trust.TRUST_DOMAIN
SERVER_NAME = "control.test"
WAIT_S = 30.0


@dataclass(frozen=True)
class Certified:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority for one test."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self.root = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, *uris: str, dns: str = "") -> Certified:
        """A certificate with these URIs, for both ends of a connection."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if dns:
            names.append(x509.DNSName(dns))
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        builder = self._builder(x509.Name([]), key).add_extension(usage, False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), True)
        return Certified(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )


class Caller(Operator):
    """Every service over one channel of its own."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__("", channel=channel)
        self.operators = operators_pb2_grpc.OperatorsStub(channel)
        self.audit = audit_pb2_grpc.AuditStub(channel)
        self.trust = trust_pb2_grpc.TrustStub(channel)
        self.identities = identity_pb2_grpc.IdentitiesStub(channel)


class SecureControl:
    """A control plane with certificates.

    Args:
        data: its data directory; created when absent.
        quotas: of its callers.
    """

    def __init__(self, data: Path, quotas: Quotas | None = None) -> None:
        self.authority = Authority()
        self.address = ""
        self.open_address = ""  # where no client certificate is asked for
        self.enrolment_address = ""
        self.control: Control
        self.access: Access
        self._config = ControlConfig(data=data, listen="127.0.0.1:0", disk_reserve_bytes=0)
        self._quotas = quotas or Quotas()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="control")
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Runs something on the control plane's event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(WAIT_S)

    def caller(self, *uris: str, authority: Authority | None = None) -> Caller:
        """Somebody whose certificate has these URIs; with none of them, somebody without a certificate."""
        if not uris:
            return Caller(self._channel(self.open_address, None))
        return Caller(self._channel(self.address, (authority or self.authority).issue(*uris)))

    def stranger(self, certified: Certified | None) -> Caller:
        """Somebody with any certificate, or none, at the port that asks for one."""
        return Caller(self._channel(self.address, certified))

    def device(self, device_id: str) -> Caller:
        return self.caller(f"spiffe://{DOMAIN}/device/{device_id}")

    def operator(self, name: str, role: str = "") -> Caller:
        return self.caller(f"spiffe://{DOMAIN}/operator/{name}" + (f"/{role}" if role else ""))

    def _channel(self, address: str, certified: Certified | None) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(
            self.authority.root,
            certified.key if certified else None,
            certified.certificate if certified else None,
        )
        options = (
            ("grpc.ssl_target_name_override", SERVER_NAME),
            ("grpc.use_local_subchannel_pool", 1),  # a caller is a connection
        )
        return grpc.secure_channel(address, credentials, options=options)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._config.data.mkdir(parents=True, exist_ok=True)
        try:
            trust.install(self._config.data)
            self.control = Control(self._config)
            await self.control.start()
            parts = self.control
            policy = Policy(DOMAIN, parts.callers.stands, self._quotas)
            self.access = Access(policy, parts.database, parts.operators, parts.audit)
            let_in = AccessInterceptor(self.access)
            server = make_server(self.control, let_in, AuthenticationInterceptor(parts.callers))
            own = self.authority.issue(f"spiffe://{DOMAIN}/control/one", dns=SERVER_NAME)
            pair = [(own.key, own.certificate)]
            asking = grpc.ssl_server_credentials(pair, self.authority.root, require_client_auth=True)
            self.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', asking)}"
            open_port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
            self.open_address = f"127.0.0.1:{open_port}"
            self.enrolment = make_enrolment_server(self.control, let_in)
            held = self.control.authority.server_credentials(verify=False)
            self.enrolment_address = f"127.0.0.1:{self.enrolment.add_secure_port('127.0.0.1:0', held)}"
            await server.start()
            await self.enrolment.start()
        except BaseException as error:
            self._failure = error
            self._ready.set()
            raise
        self._ready.set()
        await self._stop.wait()
        self.control.end_streams()
        await asyncio.gather(server.stop(1), self.enrolment.stop(1))
        await self.access.stop()
        await self.control.stop()
