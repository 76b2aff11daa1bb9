"""Errors over gRPC: a SluiceError becomes a status with google.rpc.ErrorInfo and back again.

The status message is for people; ErrorInfo carries the reason, the object and the hint for programs,
RetryInfo after how long the same call may succeed, where that is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason
from updater.errors import DOMAIN, SluiceError

# gRPC sends a status in HTTP/2 trailers, and peers refuse some of those over 8 KiB at random. The message
# goes twice, once with up to 3 bytes for each; the details once, in base64.
MAX_MESSAGE_BYTES = 1200
MAX_HINT_BYTES = 600
MAX_OBJECT_BYTES = 300
_HANDSHAKE = "CERTIFICATE_VERIFY_FAILED"  # what gRPC says when it does not trust the server
# gRPC's way to say why it has no connection: only the end of it tells something.
_CHATTER = re.compile(r"failed to connect to all addresses; last error: .*: (?=[^:]+$)")


def to_status(error: SluiceError) -> grpc.Status:
    """The status for `context.abort_with_status`."""
    info = error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN)
    if error.obj:
        info.metadata["object"] = _clipped(error.obj, MAX_OBJECT_BYTES)
    if error.hint:
        info.metadata["hint"] = _clipped(error.hint, MAX_HINT_BYTES)
    message = _clipped(error.message, MAX_MESSAGE_BYTES)
    proto = status_pb2.Status(code=error.status.value[0], message=message)
    proto.details.add().Pack(info)
    if error.retry_s > 0:
        again = error_details_pb2.RetryInfo()
        again.retry_delay.FromMilliseconds(math.ceil(error.retry_s * 1000))
        proto.details.add().Pack(again)
    status: grpc.Status = rpc_status.to_status(proto)
    return status


def _clipped(text: str, most: int) -> str:
    """The beginning of a text that takes `most` bytes at most."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def from_rpc_error(error: grpc.RpcError, doing: str, peer: str) -> SluiceError:
    """The SluiceError inside a failed call, or one that describes a failure of the connection itself.

    Args:
        error: what a stub raised; sync and aio errors both serve.
        doing: the call as a phrase: "planning the update".
        peer: the address called.
    """
    code = error.code() if isinstance(error, grpc.Call) or hasattr(error, "code") else None
    details = (error.details() if hasattr(error, "details") else "") or ""
    info, retry_s = _error_info(error)
    if info is not None:
        known = info.reason in list(ErrorReason.keys())
        reason = ErrorReason.Value(info.reason) if known else errors_pb2.INTERNAL
        return SluiceError(
            reason,
            details,
            hint=info.metadata.get("hint", ""),
            obj=info.metadata.get("object", ""),
            retry_s=retry_s,
        )
    if code is grpc.StatusCode.UNAVAILABLE and _HANDSHAKE in details:
        return SluiceError(
            errors_pb2.CONTROL_UNREACHABLE,
            f"no trust between here and {peer} while {doing}: {_distrust(details)}",
            hint="is this machine's clock right, and its trust bundle that of this control plane? on a box, "
            "`sluice-agent doctor` says which",
            obj=peer,
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return SluiceError(
            errors_pb2.CONTROL_UNREACHABLE,
            f"no answer from {peer} while {doing}: {_CHATTER.sub('', details) or code}",
            hint="check the address and that the control plane runs",
            obj=peer,
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return SluiceError(errors_pb2.LIMIT_EXCEEDED, f"{peer} refused while {doing}: {details}", obj=peer)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{peer} does not know this call ({doing}): {details}",
            hint="is this a control plane of this version, not a proxy (http_proxy, no_proxy), and not the "
            "port where certificates are given, which is the one after the control plane's?",
            obj=peer,
        )
    return SluiceError(errors_pb2.INTERNAL, f"{peer} failed while {doing}: {code}: {details}", obj=peer)


def _distrust(details: str) -> str:
    """What OpenSSL finds wrong with the server's certificate: "certificate has expired"."""
    cause = details.rpartition(_HANDSHAKE)[2].strip(": ").removesuffix(": OK")
    return cause or "its certificate cannot be verified"


def _error_info(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo | None, float]:
    """ErrorInfo of our domain among the call's status details, if any, and RetryInfo's delay in seconds."""
    found: error_details_pb2.ErrorInfo | None = None
    retry_s = 0.0
    if not hasattr(error, "trailing_metadata"):
        return found, retry_s
    trailers = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode("latin-1"))
        for detail in status.details:
            info, again = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and found is None:
                found = info
            elif detail.Unpack(again):
                retry_s = again.retry_delay.ToMilliseconds() / 1000
    return found, retry_s
