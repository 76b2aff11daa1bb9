"""Puts `Access` before every handler of the server: no call reaches one without it.

It stands inside the ErrorInterceptor, which turns what is raised here into a status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from fleet.access import Access, Call, Context
from fleet.interceptor import rewrap


class AccessInterceptor(aio.ServerInterceptor):
    """Wraps every handler of the server."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        access, method = self._access, handler_call_details.method

        async def given(call: Call, request: Any) -> Any:
            """What the handler gets: a message, or a stream of them."""
            return call.messages(request) if handler.request_streaming else await call.message(request)

        def single(behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Any:
            async def guarded(request: Any, context: Context) -> Any:
                async with access.call(method, context) as call:
                    return await behaviour(await given(call, request), context)

            return guarded

        def streaming(behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
            async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
                async with access.call(method, context) as call:
                    responses = behaviour(await given(call, request), context)
                    try:
                        async for response in responses:
                            call.answered(response)
                            yield response
                    finally:
                        await responses.aclose()  # type: ignore[attr-defined]  # an async generator

            return guarded

        return rewrap(handler, single, streaming)
