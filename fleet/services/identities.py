"""Enrolment and Identities: certificates given, approved, taken away (proto/sluice/api/v1/identity.proto)."""

from __future__ import annotations

from typing import Any

from grpc import aio

from fleet import identities, tokens
from fleet.clock import SECOND, now_us, to_timestamp
from fleet.control import Control
from fleet.devices import check_device_id, check_labels
from fleet.limits import MAX_TOKEN_LIFE_S, TOKEN_LIFE_S
from fleet.paging import cut_page, page_size, text_token
from fleet.tokens import Purpose
from sluice.api.v1 import errors_pb2, identity_pb2
from sluice.api.v1.identity_pb2_grpc import EnrolmentServicer, IdentitiesServicer
from updater.errors import SluiceError
from updater.identity import Kind, Role

_Context = aio.ServicerContext[Any, Any]


class EnrolmentService(EnrolmentServicer):
    """The service for callers without a certificate."""

    def __init__(self, control: Control) -> None:
        self._enrolments = control.enrolments
        self._authority = control.authority

    async def Challenge(
        self, request: identity_pb2.ChallengeRequest, context: _Context
    ) -> identity_pb2.ChallengeResponse:
        return self._enrolments.challenge()

    async def Enrol(
        self, request: identity_pb2.EnrolRequest, context: _Context
    ) -> identity_pb2.CertificateResponse:
        return await self._enrolments.enrol(request)

    async def Renew(
        self, request: identity_pb2.RenewRequest, context: _Context
    ) -> identity_pb2.CertificateResponse:
        return await self._enrolments.renew(request)

    async def GetBundle(
        self, request: identity_pb2.GetBundleRequest, context: _Context
    ) -> identity_pb2.GetBundleResponse:
        return identity_pb2.GetBundleResponse(
            bundle=self._authority.bundle, trust_domain=self._authority.trust_domain
        )


class IdentitiesService(IdentitiesServicer):
    """The service for operators."""

    def __init__(self, control: Control) -> None:
        self._enrolments = control.enrolments
        self._database = control.database

    async def CreateToken(
        self, request: identity_pb2.CreateTokenRequest, context: _Context
    ) -> identity_pb2.CreateTokenResponse:
        kind = _kind(request.kind)
        life_s = request.life_s or TOKEN_LIFE_S
        if life_s > MAX_TOKEN_LIFE_S:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"no token is good for {life_s} s: at most {MAX_TOKEN_LIFE_S // 86_400} days are given",
                hint="make it shorter, and another when it has ended",
                obj="life_s",
            )
        if request.name or kind is Kind.OPERATOR:
            check_device_id(request.name)  # operators' names follow the same rule
        roles = [role.value for role in Role]
        if request.role and (kind is not Kind.OPERATOR or request.role not in roles):
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"{request.role[:80]!r} is no role of this {kind.value}",
                hint=f"operators have one of: {', '.join(roles)}",
                obj="role",
            )
        check_labels(request.labels)
        purpose = Purpose(kind, request.name, request.role, dict(request.labels))
        now = now_us()
        expires = now + life_s * SECOND
        token = await self._database.write(lambda c: tokens.create(c, purpose, expires, now))
        return identity_pb2.CreateTokenResponse(token=token, expire_time=to_timestamp(expires))

    async def ListIdentities(
        self, request: identity_pb2.ListIdentitiesRequest, context: _Context
    ) -> identity_pb2.ListIdentitiesResponse:
        kind = _kind(request.kind).value if request.kind else ""
        size = page_size(request.page_size)
        after_kind, _, after_name = text_token(request.page_token).partition("/")
        rows = await self._database.read(
            lambda c: identities.page(
                c, kind, (after_kind, after_name), size + 1, attention=request.attention_only
            )
        )
        found, token = cut_page(rows, size, lambda row: f"{row.kind}/{row.name}")
        return identity_pb2.ListIdentitiesResponse(identities=found, next_page_token=token)

    async def Approve(self, request: identity_pb2.ApproveRequest, context: _Context) -> identity_pb2.Identity:
        return await self._enrolments.approve(_kind(request.kind), request.name, request.fingerprint)

    async def Reject(self, request: identity_pb2.RejectRequest, context: _Context) -> identity_pb2.Identity:
        return await self._enrolments.reject(_kind(request.kind), request.name)

    async def Revoke(self, request: identity_pb2.RevokeRequest, context: _Context) -> identity_pb2.Identity:
        check_device_id(request.name)
        return await self._enrolments.revoke(_kind(request.kind), request.name)


def _kind(text: str) -> Kind:
    for kind in (Kind.DEVICE, Kind.OPERATOR):
        if kind.value == text:
            return kind
    raise SluiceError(errors_pb2.REQUEST_INVALID, f"{text[:80]!r} is neither device nor operator", obj="kind")
