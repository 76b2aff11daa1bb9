"""A control plane behind TLS, in this process, and callers with certificates of any kind.

    with SecureControl(tmp_path / "control") as control:
        ann = control.operator("ann", "admin")

One port asks for client certificates; another, of the same server, does not, for callers without one.
Everything is real: sockets, handshakes, certificates, the services and their database. It runs in a thread of
this process, so that a test may look at its parts.
"""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from edge_tests.harness import trust
from edge_tests.harness.operator import Operator
from fleet import ca
from fleet.access import Access, Policy
from fleet.access_interceptor import AccessInterceptor
from fleet.config import ControlConfig
from fleet.control import Control
from fleet.quotas import Quotas
from fleet.server import make_server
from fleet.services.identities import EnrolmentService
from sluice.api.v1 import audit_pb2_grpc, identity_pb2_grpc, operators_pb2_grpc, trust_pb2_grpc
from sluice.api.v1.identity_pb2_grpc import add_EnrolmentServicer_to_server
from updater.certificates import key_to_pem, new_key, to_pem
from updater.credentials import Credentials

DOMAIN = trust.TRUST_DOMAIN
WAIT_S = 30.0


def issue(*uris: str, by: ca.Issuer | None = None) -> Credentials:
    """Credentials with these URIs, whatever they say, from the tests' authority or another."""
    issuer = by or trust.issuer()
    key = new_key()
    now = trust.now()
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .sign(issuer.key, hashes.SHA256())
    )
    return Credentials(trust.issuer().bundle, to_pem([leaf, *issuer.chain]), key_to_pem(key))


class Caller(Operator):
    """Every service over one channel of its own."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__("", channel=channel)
        self.operators = operators_pb2_grpc.OperatorsStub(channel)
        self.audit = audit_pb2_grpc.AuditStub(channel)
        self.trust = trust_pb2_grpc.TrustStub(channel)
        self.enrolment = identity_pb2_grpc.EnrolmentStub(channel)


class SecureControl:
    """A control plane in this process.

    Args:
        data: its data directory; created when absent.
        quotas: what a caller may take.
    """

    def __init__(self, data: Path, quotas: Quotas | None = None) -> None:
        self.address = ""
        self.enrolment_address = ""  # where no client certificate is asked for; every service is there too
        self.control: Control
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

    def caller(self, *uris: str) -> Caller:
        """Somebody whose certificate has these URIs; with none of them, somebody without a certificate."""
        if not uris:
            return self.showing(Credentials(trust.issuer().bundle), self.enrolment_address)
        return self.showing(issue(*uris))

    def showing(self, credentials: Credentials, address: str = "") -> Caller:
        """Somebody with any credentials."""
        alone = [("grpc.use_local_subchannel_pool", 1)]  # a caller is a connection
        return Caller(credentials.channel(address or self.address, alone))

    def device(self, device_id: str) -> Caller:
        return self.caller(f"spiffe://{DOMAIN}/device/{device_id}")

    def operator(self, name: str, role: str = "") -> Caller:
        return self.caller(f"spiffe://{DOMAIN}/operator/{name}" + (f"/{role}" if role else ""))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._config.data.mkdir(parents=True, exist_ok=True)
        trust.install(self._config.data)
        try:
            parts = self.control = Control(self._config)
            await parts.start()
            policy = Policy(parts.callers, self._quotas)
            access = Access(policy, parts.database, parts.operators, parts.audit)
            server = make_server(parts, AccessInterceptor(access))
            add_EnrolmentServicer_to_server(EnrolmentService(parts), server)
            credentials = [parts.authority.server_credentials(verify=verify) for verify in (True, False)]
            ports = [server.add_secure_port("127.0.0.1:0", each) for each in credentials]
            self.address, self.enrolment_address = (f"127.0.0.1:{port}" for port in ports)
            await server.start()
        except BaseException as error:
            self._failure = error
            self._ready.set()
            raise
        self._ready.set()
        await self._stop.wait()
        parts.end_streams()
        await server.stop(1)
        await access.stop()
        await parts.stop()
