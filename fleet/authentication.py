"""Whether a caller still counts: checked at every call, and at once on calls and streams under way.

The handshake has proven chain and key. Here each call is held against what changes while a connection stands:
the certificate's dates, the trust domain, and what an operator revoked. A stream ends when its certificate
does, or the moment that its caller is revoked. Nothing here says what a caller may do.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from grpc import aio

from fleet.caller import Caller, read_caller
from fleet.interceptor import Context, rewrap
from sluice.api.v1 import errors_pb2
from updater.certificates import check_period
from updater.errors import SluiceError
from updater.identity import Identity, Kind


class Callers:
    """What is void, and who has streams now.

    Args:
        trust_domain: that every caller must belong to.
        void: certificates that count no longer: kind and name, and the end (microseconds) up to which.
    """

    def __init__(self, trust_domain: str, void: Mapping[tuple[str, str], int]) -> None:
        self._trust_domain = trust_domain
        self._void = dict(void)
        self._streams: dict[tuple[str, str], set[_Stream]] = {}

    def check(self, caller: Caller | None, now: datetime.datetime) -> Identity:
        """Who it is. Raises SluiceError(UNAUTHENTICATED | CERTIFICATE_INVALID | _EXPIRED | _REVOKED)."""
        if caller is None:
            raise SluiceError(
                errors_pb2.UNAUTHENTICATED, "the caller showed no certificate", hint="enrol first"
            )
        identity = caller.identity
        if identity.trust_domain != self._trust_domain:
            raise SluiceError(
                errors_pb2.CERTIFICATE_INVALID,
                f"{identity} is not of the trust domain {self._trust_domain}",
                hint="the certificate was made for another fleet",
                obj=str(identity),
            )
        check_period(caller.start, caller.end, now, "the caller's certificate")
        if caller.end.timestamp() * 1e6 <= self._void.get((identity.kind.value, identity.name), 0):
            raise _revoked(identity)
        return identity

    def check_now(self, caller: Caller) -> None:
        """As `check`, by this machine's clock."""
        self.check(caller, datetime.datetime.now(datetime.UTC))

    def revoke(self, kind: Kind, name: str, until_us: int) -> int:
        """Voids certificates that end by `until_us` and ends the streams that they opened; says how many."""
        key = (kind.value, name)
        self._void[key] = until_us
        ended = [s for s in self._streams.get(key, ()) if s.caller.end.timestamp() * 1e6 <= until_us]
        for stream in ended:
            stream.end(_revoked(stream.caller.identity))
        return len(ended)

    @contextmanager
    def stream(self, caller: Caller, now: datetime.datetime) -> Iterator[None]:
        """While the block, a call, runs in this task, revocation and the certificate's end raise there."""
        key = (caller.identity.kind.value, caller.identity.name)
        stream = _Stream(caller)
        self._streams.setdefault(key, set()).add(stream)
        left_s = max(0.0, (caller.end - now).total_seconds())
        timer = asyncio.get_running_loop().call_later(left_s, stream.end, _ended(caller))
        try:
            yield
        except asyncio.CancelledError:
            if stream.why is None:
                raise
            stream.task.uncancel()
            raise stream.why from None
        finally:
            timer.cancel()
            streams = self._streams[key]
            streams.discard(stream)
            if not streams:
                del self._streams[key]


class _Stream:
    def __init__(self, caller: Caller) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self.caller = caller
        self.why: SluiceError | None = None

    def end(self, why: SluiceError) -> None:
        if self.why is None:
            self.why = why
            self.task.cancel()


class AuthenticationInterceptor(aio.ServerInterceptor):
    """Refuses calls of whoever does not count. Stands behind the ErrorInterceptor, before authorisation."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        return None if handler is None else rewrap(handler, self._single, self._stream)

    def _single(self, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def checked(request: Any, context: Context) -> Any:
            now = datetime.datetime.now(datetime.UTC)
            caller = read_caller(context)
            self._callers.check(caller, now)
            assert caller is not None
            with self._callers.stream(caller, now):  # it may be an upload that lasts
                return await behaviour(request, context)

        return checked

    def _stream(self, behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
        async def checked(request: Any, context: Context) -> AsyncIterator[Any]:
            now = datetime.datetime.now(datetime.UTC)
            caller = read_caller(context)
            self._callers.check(caller, now)
            assert caller is not None
            responses = behaviour(request, context)
            try:
                with self._callers.stream(caller, now):
                    async for response in responses:
                        yield response
            finally:
                await responses.aclose()  # type: ignore[attr-defined]  # an async generator

        return checked


def _revoked(identity: Identity) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_REVOKED,
        f"the certificate of {identity.kind.value} {identity.name} was revoked",
        hint="an operator decided so; to take part again, enrol anew",
        obj=str(identity),
    )


def _ended(caller: Caller) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_EXPIRED,
        f"the certificate of {caller.identity} ended while the stream stood",
        hint="connect again with the renewed one",
        obj=str(caller.identity),
    )
