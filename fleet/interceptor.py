"""Turns what a handler raises into a gRPC status: SluiceError into its code, anything else into INTERNAL.

A caller learns of a defect only that it happened and under which id; the log has the traceback under that id.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc import aio

from fleet import log
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.wire import to_status

Context = aio.ServicerContext[Any, Any]


class ErrorInterceptor(aio.ServerInterceptor):
    """Wraps every handler of the server."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        return rewrap(
            handler, lambda inner: _guard_single(inner, method), lambda inner: _guard_stream(inner, method)
        )


def rewrap(
    handler: Any, single: Callable[[Any], Any], stream: Callable[[Any], Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler like this one around what `single` or `stream`, by how it answers, makes of its behaviour."""
    kinds = (handler.request_streaming, handler.response_streaming)
    behaviour, make = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }[kinds]
    wrapped = stream(behaviour) if handler.response_streaming else single(behaviour)
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _guard_single(behaviour: Callable[[Any, Context], Awaitable[Any]], method: str) -> Any:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await behaviour(request, context)
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of the process
            await _abort(context, method, error)

    return guarded


def _guard_stream(behaviour: Callable[[Any, Context], AsyncIterator[Any]], method: str) -> Any:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        responses = behaviour(request, context)
        try:
            async for response in responses:
                yield response
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of the process
            await _abort(context, method, error)
        finally:
            await responses.aclose()  # type: ignore[attr-defined]  # an async generator

    return guarded


async def _abort(context: Context, method: str, error: Exception) -> NoReturn:
    if not isinstance(error, SluiceError):
        incident = secrets.token_hex(6)
        log.warning("call_failed", error, method=method, peer=context.peer(), incident=incident)
        error = SluiceError(
            errors_pb2.INTERNAL,
            "the control plane failed on this call by a defect of its own",
            hint=f"report it with the control plane's log around incident {incident}",
            obj=incident,
        )
    elif error.reason in (errors_pb2.INTERNAL, errors_pb2.IO_FAILED, errors_pb2.STORE_CORRUPT):
        log.warning("call_failed", error, method=method, peer=context.peer(), reason=error.code)
    else:
        log.event("call_refused", method=method, peer=context.peer(), reason=error.code, obj=error.obj)
    status: Any = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")
