"""The operator's calls about identities: tokens, who waits, who is let in and put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc

from sluice.api.v1 import identity_pb2, identity_pb2_grpc

PAGE_SIZE = 200


class IdentityCalls:
    """Calls over a ControlClient's connection, with its retries.

    Args:
        channel: of the client.
        call: the client's way to make a unary call: method, request, what it does, `once`.
        pages: the client's way through a paged list.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        call: Callable[..., Any],
        pages: Callable[..., Iterator[identity_pb2.Identity]],
    ) -> None:
        self._stub = identity_pb2_grpc.IdentitiesStub(channel)
        self._call = call
        self._pages = pages

    def token(
        self,
        kind: str,
        name: str = "",
        *,
        role: str = "",
        life_s: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> identity_pb2.CreateTokenResponse:
        """A new enrolment token. Raises SluiceError(REQUEST_INVALID | LIMIT_EXCEEDED)."""
        request = identity_pb2.CreateTokenRequest(
            kind=kind, name=name, role=role, life_s=life_s, labels=dict(labels or {})
        )
        response: identity_pb2.CreateTokenResponse = self._call(
            self._stub.CreateToken, request, "making a token", once=True
        )
        return response

    def list(self, kind: str = "", *, attention: bool = False) -> Iterator[identity_pb2.Identity]:
        """Identities by kind and name; with `attention` only those that wait for an operator."""

        def page(token: str) -> tuple[Sequence[identity_pb2.Identity], str]:
            request = identity_pb2.ListIdentitiesRequest(
                kind=kind, page_size=PAGE_SIZE, page_token=token, attention_only=attention
            )
            response = self._call(self._stub.ListIdentities, request, "listing identities")
            return response.identities, response.next_page_token

        return self._pages(page)

    def approve(self, kind: str, name: str, fingerprint: str) -> identity_pb2.Identity:
        """Accepts who waits with this fingerprint. Raises SluiceError(DEVICE_UNKNOWN | IDENTITY_CONFLICT)."""
        request = identity_pb2.ApproveRequest(kind=kind, name=name, fingerprint=fingerprint)
        found: identity_pb2.Identity = self._call(self._stub.Approve, request, f"approving {kind} {name}")
        return found

    def reject(self, kind: str, name: str) -> identity_pb2.Identity:
        """Refuses who waits. Raises SluiceError(DEVICE_UNKNOWN | IDENTITY_CONFLICT)."""
        request = identity_pb2.RejectRequest(kind=kind, name=name)
        found: identity_pb2.Identity = self._call(self._stub.Reject, request, f"rejecting {kind} {name}")
        return found

    def revoke(self, kind: str, name: str) -> identity_pb2.Identity:
        """Puts an identity out, at once."""
        request = identity_pb2.RevokeRequest(kind=kind, name=name)
        found: identity_pb2.Identity = self._call(self._stub.Revoke, request, f"revoking {kind} {name}")
        return found
