"""Rollouts: started, watched, aborted (proto/sluice/api/v1/rollouts.proto)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc import aio

from fleet import rollout_rows
from fleet.control import Control
from fleet.limits import MAX_WHY_CHARACTERS
from fleet.paging import cut_page, number_token, page_size
from sluice.api.v1 import errors_pb2, rollouts_pb2
from sluice.api.v1.rollouts_pb2_grpc import RolloutsServicer
from updater.errors import SluiceError

_Context = aio.ServicerContext[Any, Any]


class RolloutsService(RolloutsServicer):
    """The service over one control plane."""

    def __init__(self, control: Control) -> None:
        self._database = control.database
        self._conductor = control.conductor

    async def CreateRollout(
        self, request: rollouts_pb2.CreateRolloutRequest, context: _Context
    ) -> rollouts_pb2.Rollout:
        return await self._conductor.create(request)

    async def GetRollout(
        self, request: rollouts_pb2.GetRolloutRequest, context: _Context
    ) -> rollouts_pb2.Rollout:
        return rollout_rows.message(await self._conductor.get(request.id))

    async def ListRollouts(
        self, request: rollouts_pb2.ListRolloutsRequest, context: _Context
    ) -> rollouts_pb2.ListRolloutsResponse:
        size, before = page_size(request.page_size), number_token(request.page_token)
        rows = await self._database.read(lambda c: rollout_rows.listed(c, request.model, before, size + 1))
        found, token = cut_page(rows, size, lambda row: str(row[0]))
        return rollouts_pb2.ListRolloutsResponse(
            rollouts=[rollout for _, rollout in found], next_page_token=token
        )

    async def WatchRollout(
        self, request: rollouts_pb2.WatchRolloutRequest, context: _Context
    ) -> AsyncIterator[rollouts_pb2.Rollout]:
        async with aclosing(self._conductor.watch(request.id)) as changes:
            async for rollout in changes:
                yield rollout_rows.message(rollout)

    async def AbortRollout(
        self, request: rollouts_pb2.AbortRolloutRequest, context: _Context
    ) -> rollouts_pb2.Rollout:
        if len(request.why) > MAX_WHY_CHARACTERS:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"the reason has {len(request.why)} characters; at most {MAX_WHY_CHARACTERS} are kept",
                obj="why",
            )
        return rollout_rows.message(
            await self._conductor.abort(request.id, revert=request.revert, why=request.why)
        )
