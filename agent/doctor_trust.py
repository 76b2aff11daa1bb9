"""The doctor's look at trust: this box's certificate, the bundle, and whether both sides accept each other.

Each failure ends in a sentence on what is wrong and a hint on what to do. What gRPC reports of a failed
handshake names no cause, so the handshake with the control plane is made here once more with Python's ssl
module, which does.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import cast

from agent import update_limits as limits
from agent.config import AgentConfig
from agent.identity import BoxIdentity
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, check_dates, identity_of
from updater.credentials import Credentials
from updater.errors import SluiceError

# OpenSSL's X509_V_ERR_* and what each means here.
_NOT_YET = 9
_EXPIRED = 10
_OTHER_AUTHORITY = (18, 19, 20, 21)
_OTHER_NAME = (62, 64)


def certificate(config: AgentConfig, box: BoxIdentity) -> str:
    """Looks at the certificate that the box holds; returns what is found. Raises SluiceError."""
    held = box.credentials
    if not held.bundle:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            box.error
            or "this box was given no trust bundle, so it cannot tell its control plane from another",
            hint="copy bundle.pem from the control machine and name it in control.bundle",
        )
    if not config.state_dir.is_dir():
        raise SluiceError(
            errors_pb2.UNAUTHENTICATED,
            "this box has no certificate yet",
            hint="start the agent once, as its own user: it makes its state directory and its key",
        )
    mark = box.fingerprint() if not config.control_certificate else ""
    if not held.chain:
        raise SluiceError(
            errors_pb2.UNAUTHENTICATED,
            f"this box has no certificate yet; its fingerprint is {mark}",
            hint="run `sluice-agent enrol --token TOKEN`, or let an operator approve it: "
            f"sluice device approve {config.device_id} --fingerprint {mark}",
        )
    leaf = certificates(held.chain)[0]
    identity = identity_of(leaf)
    if identity.name != config.device_id:
        raise SluiceError(
            errors_pb2.CERTIFICATE_INVALID,
            f"the certificate is for {identity} and the configuration says device {config.device_id}",
            hint="correct device_id, or remove the identity directory and enrol anew",
        )
    now = datetime.now(timezone.utc)
    try:
        check_dates(leaf, now, "this box's certificate")
    except SluiceError as error:
        if now >= leaf.not_valid_after_utc and not config.control_certificate:
            error.hint = (
                "the agent renews it as soon as it reaches the enrolment address "
                f"{config.enrolment_address}; is the clock right? if the control plane knows this box no "
                f"longer, an operator approves its fingerprint {mark} {box.error}".rstrip()
            )
        raise
    held.check(now)
    detail = f"{identity}, until {leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%S UTC}"
    return f"{detail}, fingerprint {mark}" if mark else detail


def handshake(address: str, held: Credentials) -> str:
    """Speaks TLS with an address as the agent would; returns who answered.

    Raises SluiceError with the cause.
    """
    if not held.bundle:
        raise SluiceError(errors_pb2.CONFIG_INVALID, "not tried: there is no trust bundle")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=held.bundle.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with tempfile.TemporaryDirectory() as scratch:
        if held.chain:
            path = Path(scratch) / "pair.pem"
            path.touch(mode=0o600)
            path.write_bytes(held.key + held.chain)
            context.load_cert_chain(path)
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=limits.CHECK_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=held.server_name) as secure,
        ):
            secure.settimeout(limits.CHECK_TIMEOUT_S)
            found = secure.getpeercert() or {}
            # TLS 1.3 refuses a client's certificate only after the handshake: the first bytes tell.
            if not secure.recv(1):
                raise _refused(address, "it closed the connection")
            entries = cast("tuple[tuple[str, str], ...]", found.get("subjectAltName", ()))
            names = [value for kind, value in entries if kind == "URI"]
            return f"{address} is {', '.join(names) or held.server_name}"
    except ssl.SSLCertVerificationError as error:
        raise _untrusted(address, error, held) from error
    except ssl.SSLError as error:
        raise _refused(address, str(error.reason or error)) from error
    except OSError as error:
        raise SluiceError(
            errors_pb2.CONTROL_UNREACHABLE,
            f"{address} cannot be reached: {error.strerror or error}",
            hint="check the address, the network, and that the control plane runs",
        ) from error


def _refused(address: str, why: str) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_INVALID,
        f"{address} refuses this box's certificate: {why}",
        hint="was it made by another authority, or is the control plane's clock wrong? else enrol again",
    )


def _untrusted(address: str, error: ssl.SSLCertVerificationError, held: Credentials) -> SluiceError:
    clock = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    if error.verify_code in (_NOT_YET, _EXPIRED):
        when = "not valid yet" if error.verify_code == _NOT_YET else "expired"
        side = (
            "behind"
            if error.verify_code == _NOT_YET
            else "ahead, or the control plane stopped renewing its own"
        )
        return SluiceError(
            errors_pb2.CERTIFICATE_EXPIRED,
            f"to this box the certificate of {address} is {when}: its clock says {clock}",
            hint=f"the clock is probably {side}; set it, e.g. by systemd-timesyncd",
        )
    if error.verify_code in _OTHER_AUTHORITY:
        return SluiceError(
            errors_pb2.CERTIFICATE_INVALID,
            f"{address} shows a certificate of an authority that this box does not trust",
            hint="is it the right address? after the authority was made anew, give this box its bundle.pem",
        )
    if error.verify_code in _OTHER_NAME:
        return SluiceError(
            errors_pb2.CERTIFICATE_INVALID,
            f"{address} is trusted but no control plane: its certificate lacks the name {held.server_name}",
            hint="is it the right address? with another authority, set control.server_name",
        )
    return SluiceError(
        errors_pb2.CERTIFICATE_INVALID,
        f"{address} cannot be trusted: {error.verify_message}",
        hint="compare the bundle here with the control machine's",
    )
