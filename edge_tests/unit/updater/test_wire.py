"""What gRPC says of a failed connection, in words for people."""

from __future__ import annotations

import grpc
import pytest

from sluice.api.v1 import errors_pb2
from updater.wire import from_rpc_error

_FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:8470: "
_SSL = (
    "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL "
    "routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED"
)


class Failed(grpc.RpcError):
    """A call that failed with a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


@pytest.mark.parametrize(
    ("details", "ends"),
    [
        (f"{_FAILED}{_SSL}: certificate has expired: OK", ": certificate has expired"),
        (f"{_FAILED}{_SSL}: certificate is not yet valid: OK", ": certificate is not yet valid"),
        (f"{_FAILED}{_SSL}", ": its certificate cannot be verified"),
        (
            f"{_FAILED}Failed to connect to remote host: Connection refused",
            "while asking: Connection refused",
        ),
        ("DNS resolution failed for box:1", "while asking: DNS resolution failed for box:1"),
    ],
)
def test_a_lost_connection_is_told_by_its_cause_alone(details: str, ends: str) -> None:
    found = from_rpc_error(Failed(grpc.StatusCode.UNAVAILABLE, details), "asking", "10.0.0.1:8470")
    assert found.reason == errors_pb2.CONTROL_UNREACHABLE
    assert found.message.endswith(ends)
    assert "last error" not in found.message
    assert found.hint


def test_a_call_to_the_port_of_enrolment_is_told_so() -> None:
    found = from_rpc_error(Failed(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), "asking", "box:8471")
    assert "the port where certificates are given" in found.hint
