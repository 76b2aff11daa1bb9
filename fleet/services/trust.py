"""Trust: signed metadata out and in (proto/sluice/api/v1/trust.proto)."""

from __future__ import annotations

from typing import Any

from grpc import aio
from sqlalchemy import Connection

from fleet import log
from fleet.control import Control
from fleet.limits import MAX_STORED_INTEGER
from sluice.api.v1 import trust_pb2
from sluice.api.v1.trust_pb2_grpc import TrustServicer
from updater.trust.documents import TARGETS, read, read_root
from updater.trust.repository import Publication

_Context = aio.ServicerContext[Any, Any]


class TrustService(TrustServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._trust = control.trust
        self._database = control.database
        self._sessions = control.sessions

    async def GetTrust(
        self, request: trust_pb2.GetTrustRequest, context: _Context
    ) -> trust_pb2.GetTrustResponse:
        return await self._database.read(self._trust.state)

    async def GetMetadata(
        self, request: trust_pb2.GetMetadataRequest, context: _Context
    ) -> trust_pb2.GetMetadataResponse:
        if request.version > MAX_STORED_INTEGER:
            return trust_pb2.GetMetadataResponse()
        data = await self._database.read(lambda c: self._trust.get(c, request.role, request.version))
        return trust_pb2.GetMetadataResponse(metadata=data)

    async def PublishMetadata(
        self, request: trust_pb2.PublishMetadataRequest, context: _Context
    ) -> trust_pb2.PublishMetadataResponse:
        submitted = [(item.role, item.metadata) for item in request.metadata]

        def add(connection: Connection) -> Publication:
            return self._trust.publish(connection, submitted, replace_root=request.replace_root)

        published = await self._database.write(add)
        if published.roots:
            await self._database.read(self._trust.look)
            self._sessions.resend_all()
        if published.changed:
            changed = [*(f"root {version}" for version in published.roots), *published.roles]
            log.event("metadata_published", roles=", ".join(changed), replaced_root=request.replace_root)
        return _answer(published)


def _answer(published: Publication) -> trust_pb2.PublishMetadataResponse:
    repository = published.repository
    assert repository.root is not None
    assert repository.online is not None
    return trust_pb2.PublishMetadataResponse(
        root_version=read_root(repository.root).signed.version,
        targets_version=read(TARGETS, repository.targets[TARGETS]).signed.version,
        snapshot_version=repository.online.snapshot.signed.version,
        timestamp_version=repository.online.timestamp.signed.version,
    )
