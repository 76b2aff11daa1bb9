"""Registry: uploads, publication, versions and aliases (proto/sluice/api/v1/registry.proto)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio
from sqlalchemy import Connection, Row

from fleet import catalog, log, publication
from fleet.control import Control
from fleet.limits import UPLOAD_IDLE_S
from fleet.paging import cut_page, number_token, page_size, text_token
from sluice.api.v1 import errors_pb2, registry_pb2
from sluice.api.v1.registry_pb2_grpc import RegistryServicer
from updater.errors import SluiceError
from updater.manifest import Manifest

_Context = aio.ServicerContext[Any, Any]


class RegistryService(RegistryServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._database = control.database

    async def UploadFile(
        self, request_iterator: AsyncIterator[registry_pb2.UploadFileRequest], context: _Context
    ) -> registry_pb2.UploadFileResponse:
        uploads, files = self._control.uploads, self._control.files
        first = await _next(request_iterator)
        if first is None or first.WhichOneof("part") != "header":
            raise SluiceError(
                errors_pb2.REQUEST_INVALID, "an upload must begin with its header", obj="header"
            )
        header = first.header
        held, complete = await files(uploads.committed, header.digest)
        if complete:
            return registry_pb2.UploadFileResponse(digest=header.digest, committed_bytes=held)
        uploads.claim(header.digest)
        try:
            upload = await files(uploads.open, header.digest, header.size, header.offset)
            try:
                while (message := await _next(request_iterator)) is not None:
                    if message.WhichOneof("part") != "chunk":
                        raise SluiceError(
                            errors_pb2.REQUEST_INVALID,
                            "only chunks may follow the header",
                            obj="part",
                        )
                    await files(upload.write, message.chunk)
                await files(upload.finish)
            finally:
                await asyncio.shield(files(upload.close))  # a broken stream is cancelled here
        finally:
            uploads.release(header.digest)
        log.event("upload_ended", digest=header.digest, committed=upload.committed, size=header.size)
        return registry_pb2.UploadFileResponse(digest=header.digest, committed_bytes=upload.committed)

    async def GetUpload(
        self, request: registry_pb2.GetUploadRequest, context: _Context
    ) -> registry_pb2.GetUploadResponse:
        held, complete = await self._control.files(self._control.uploads.committed, request.digest)
        return registry_pb2.GetUploadResponse(committed_bytes=held, complete=complete)

    async def PublishVersion(
        self, request: registry_pb2.PublishVersionRequest, context: _Context
    ) -> registry_pb2.PublishVersionResponse:
        data = request.manifest
        manifest = await self._control.files(Manifest.parse, data)
        found = await self._database.read(lambda c: publication.find_published(c, manifest, data))
        if found is None:
            metadata = [(item.role, item.metadata) for item in request.metadata]
            if not metadata:
                await self._database.read(lambda c: self._control.trust.require_signed(c, manifest, data))
            await self._control.files(publication.check_files, self._control.store, manifest)

            def insert(connection: Connection) -> tuple[Row[Any], bool]:
                if metadata:
                    self._control.trust.publish_targets(connection, metadata)
                self._control.trust.require_signed(connection, manifest, data)
                return publication.insert_unless_published(connection, manifest, data)

            row, created = await self._database.write(insert)
        else:
            row, created = found, False
        if created:
            log.event("version_published", model=row.model, version=row.version, bytes=row.size_bytes)
            self._control.published(row.model, row.version)
        version = await self._control.files(catalog.version_message, row)
        return registry_pb2.PublishVersionResponse(version=version, created=created)

    async def GetVersion(
        self, request: registry_pb2.GetVersionRequest, context: _Context
    ) -> registry_pb2.Version:
        def find(connection: Connection) -> registry_pb2.Version:
            number = request.version
            if request.WhichOneof("which") == "alias":
                number = catalog.alias_number(connection, request.model, request.alias)
            return catalog.version_message(catalog.version_row(connection, request.model, number))

        return await self._database.read(find)

    async def ListVersions(
        self, request: registry_pb2.ListVersionsRequest, context: _Context
    ) -> registry_pb2.ListVersionsResponse:
        size, before = page_size(request.page_size), number_token(request.page_token)

        def find(connection: Connection) -> list[registry_pb2.Version]:
            rows = catalog.version_rows(connection, request.model, before, size + 1)
            return [catalog.version_message(row, with_manifest=False) for row in rows]

        found, token = cut_page(await self._database.read(find), size, lambda version: str(version.version))
        return registry_pb2.ListVersionsResponse(versions=found, next_page_token=token)

    async def GetModel(self, request: registry_pb2.GetModelRequest, context: _Context) -> registry_pb2.Model:
        return await self._database.read(lambda c: catalog.model(c, request.name))

    async def ListModels(
        self, request: registry_pb2.ListModelsRequest, context: _Context
    ) -> registry_pb2.ListModelsResponse:
        size, after = page_size(request.page_size), text_token(request.page_token)
        rows = await self._database.read(lambda c: catalog.models(c, after, size + 1))
        found, token = cut_page(rows, size, lambda model: model.name)
        return registry_pb2.ListModelsResponse(models=found, next_page_token=token)

    async def SetAlias(self, request: registry_pb2.SetAliasRequest, context: _Context) -> registry_pb2.Model:
        return await self._database.write(
            lambda c: catalog.set_alias(c, request.model, request.alias, request.version)
        )

    async def RetireVersion(
        self, request: registry_pb2.RetireVersionRequest, context: _Context
    ) -> registry_pb2.Version:
        row = await self._database.write(lambda c: catalog.retire(c, request.model, request.version))
        log.event("version_retired", model=row.model, version=row.version)
        return catalog.version_message(row)


async def _next(
    requests: AsyncIterator[registry_pb2.UploadFileRequest],
) -> registry_pb2.UploadFileRequest | None:
    """The next message of an upload, or None at its end."""
    try:
        async with asyncio.timeout(UPLOAD_IDLE_S):
            return await anext(requests, None)
    except TimeoutError:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"the upload sent nothing for {UPLOAD_IDLE_S:.0f} s and was ended; what came is kept",
            hint="ask GetUpload what is held and go on from there",
        ) from None
