"""DiffModel: plans, delta bytes and a delta's anatomy (proto/sluice/api/v1/diff.proto)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from fleet.builds import AWAITED
from fleet.control import Control
from fleet.deltas import Failed
from fleet.limits import FETCH_BYTES
from sluice.api.v1 import diff_pb2, errors_pb2
from sluice.api.v1.diff_pb2_grpc import DiffModelServicer
from updater.digests import check_digest
from updater.errors import SluiceError, os_errors

_Context = aio.ServicerContext[Any, Any]


class DiffModelService(DiffModelServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def Plan(self, request: diff_pb2.PlanRequest, context: _Context) -> diff_pb2.PlanResponse:
        return await self._control.planner.plan(request)

    async def Fetch(
        self, request: diff_pb2.FetchRequest, context: _Context
    ) -> AsyncIterator[diff_pb2.FetchResponse]:
        control = self._control
        check_digest(request.digest, "the delta's digest")
        with control.deltas.fetching(request.digest):
            descriptor, size = await control.files(self._open, request.digest)
            try:
                if request.offset > size:
                    raise SluiceError(
                        errors_pb2.REQUEST_INVALID,
                        f"the offset {request.offset} lies beyond the delta's end at {size}",
                        obj=request.digest,
                    )
                offset = request.offset
                while offset < size:
                    data = await control.files(_read, descriptor, offset, request.digest)
                    yield diff_pb2.FetchResponse(data=data, offset=offset)
                    offset += len(data)
            finally:
                os.close(descriptor)

    async def Describe(
        self, request: diff_pb2.DescribeRequest, context: _Context
    ) -> diff_pb2.DescribeResponse:
        control = self._control
        for digest in filter(None, (request.base_digest, request.target_digest)):
            check_digest(digest, "a file's digest")
            await control.files(control.store.require, digest)
        if not request.target_digest:
            raise SluiceError(errors_pb2.REQUEST_INVALID, "the target is missing", obj="target_digest")
        found = await control.deltas.describe(request.base_digest, request.target_digest)
        if found is None:
            known = await control.deltas.find(request.base_digest, request.target_digest)
            if isinstance(known, Failed):
                raise SluiceError(
                    errors_pb2.DELTA_NOT_READY,
                    f"this delta could not be built: {known.message}",
                    obj=request.target_digest,
                )
            control.deltas.start(request.base_digest, request.target_digest, AWAITED)
            raise SluiceError(
                errors_pb2.DELTA_NOT_READY,
                "this delta is being computed",
                hint="ask again in a few seconds",
                obj=request.target_digest,
            )
        delta, regions = found
        return diff_pb2.DescribeResponse(
            delta_digest=delta.digest,
            delta_size=delta.size,
            base_size=delta.base_size,
            target_size=delta.target_size,
            regions=[diff_pb2.Region(**region) for region in regions],
        )

    def _open(self, digest: str) -> tuple[int, int]:
        """A descriptor and the delta's size. An open file stays readable even if it is evicted."""
        path = self._control.delta_store.path(digest)
        try:
            with os_errors("opening the delta", path):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except SluiceError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise SluiceError(
                errors_pb2.FILE_UNKNOWN,
                f"no delta {digest} is held; it may have been evicted",
                hint="ask Plan again",
                obj=digest,
            ) from error
        return descriptor, os.fstat(descriptor).st_size


def _read(descriptor: int, offset: int, digest: str) -> bytes:
    with os_errors("reading the delta", digest):
        data = os.pread(descriptor, FETCH_BYTES, offset)
    if not data:
        raise SluiceError(errors_pb2.STORE_CORRUPT, f"the delta {digest} lost its end", obj=digest)
    return data
