"""Lets calls in: who calls, whether they may, how much, and what of it is written down.

In order, for each call: the caller's identity from the connection; the caller's quota; whether the caller
still counts (authentication.py), now and as long as the call lasts; the table
(authorisation.py); what a device may see (ownership.py), for each message of the call; then, for a call
that changes something, its record in the audit log, before the handler sees the request. When the call has
ended its outcome is recorded; a call that was turned away is recorded as that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message
from grpc import aio

from fleet import audit_record, log
from fleet.audit_chain import Head
from fleet.audit_log import AuditLog
from fleet.authentication import Callers
from fleet.authorisation import access_of, may, role_of, short_name
from fleet.caller import read_caller
from fleet.clock import now_us
from fleet.database import Database
from fleet.denials import Denials
from fleet.limits import FIRST_MESSAGE_S
from fleet.operators import Operators
from fleet.ownership import check_operator, rule_of
from fleet.quotas import Quotas, Usage, Usages
from sluice.api.v1 import errors_pb2, identity_pb2
from updater.certificates import read_request
from updater.errors import SluiceError
from updater.identity import Identity, Kind, Role

Context = aio.ServicerContext[Any, Any]
DIFF_METHODS = frozenset({"/sluice.api.v1.DiffModel/Plan", "/sluice.api.v1.DiffModel/Describe"})
DOWNLOADS = frozenset({"/sluice.api.v1.DiffModel/Fetch", "/sluice.api.v1.Audit/ReadRecords"})
# What a device hears of its desired state is little, and the last that it should wait for.
NEVER_OWED = frozenset({"/sluice.api.v1.Sync/Connect", "/sluice.api.v1.Sync/Poll"})
_DENIALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


@dataclass(frozen=True)
class Policy:
    """What a control plane goes by.

    Attributes:
        callers: whose identities count, and for how long: a call ends when they do no longer.
        quotas: what one caller may take.
    """

    callers: Callers
    quotas: Quotas = field(default_factory=Quotas)


class Access:
    """The way into one control plane.

    Args:
        policy: whom it lets in.
        clock: seconds that only move forward.
    """

    def __init__(
        self,
        policy: Policy,
        database: Database,
        operators: Operators,
        audit: AuditLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._database = database
        self._operators = operators
        self._audit = audit
        self._clock = clock
        self._usages = Usages(policy.quotas)
        self._denials = Denials(audit, clock)

    async def stop(self) -> None:
        """Records what was only counted so far."""
        await self._denials.flush()

    @asynccontextmanager
    async def call(self, method: str, context: Context) -> AsyncIterator[Call]:
        """One call, from its beginning to its end. Raises SluiceError when it is turned away."""
        call = Call(method, _address(context.peer()), self._database, self._audit)
        try:
            with ExitStack() as held:
                self._admit(call, context, held)
                yield call
        except SluiceError as error:
            # Whoever is not admitted is turned away, but for asking too often.
            stopped = not call.admitted and error.reason != errors_pb2.LIMIT_EXCEEDED
            if call.begun is None and (stopped or error.status in _DENIALS):
                await self._denials.note(call.who(), short_name(method), error)
            await call.ended(error.code, error.message)
            raise
        except aio.AbortError:
            await call.ended("ABORTED", "")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            await asyncio.shield(call.ended("CANCELLED", ""))
            raise
        except Exception as error:
            await call.ended("INTERNAL", type(error).__name__)
            raise
        else:
            await call.ended("OK", "")

    def _admit(self, call: Call, context: Context, held: ExitStack) -> None:
        callers, caller = self._policy.callers, None
        try:
            if not call.anonymous:  # what is for everybody asks nobody
                caller = read_caller(context)
        finally:  # also what cannot be read costs its sender something
            identity = call.identity = None if caller is None else caller.identity
            # Only identities of ours have quotas of their own: others choose their names as they like.
            ours = identity is not None and identity.trust_domain == callers.trust_domain
            usage = self._usages.usage(identity if ours else None, call.address, self._clock())
            usage.request(self._clock())
        if not call.anonymous:
            held.enter_context(callers.call(caller))
        if identity is not None:
            call.role = role_of(identity, self._operators.granted(identity))
        refusal = may(identity, call.role, call.method, trust_domain=callers.trust_domain)
        if refusal is not None:
            raise refusal
        call.admitted = True
        if call.method in DIFF_METHODS:
            held.enter_context(usage.diff())
        call.limit(usage, self._clock)
        if call.method not in NEVER_OWED:
            usage.answer(self._clock(), download=call.method in DOWNLOADS)


class Call:
    """One call that is under way.

    Attributes:
        identity: of the caller; None without a certificate, or where nobody is asked.
        role: of an operator.
        anonymous: its method is for everybody.
        admitted: it passed the table.
        begun: the head of its record, once that is written.
    """

    def __init__(self, method: str, address: str, database: Database, audit: AuditLog) -> None:
        self.method = method
        self.address = address
        self.identity: Identity | None = None
        self.role: Role | None = None
        self.admitted = False
        self.begun: Head | None = None
        self._database = database
        self._audit = audit
        self._usage: Usage | None = None
        self._clock: Callable[[], float] = time.monotonic
        access = access_of(method)
        self._recorded = access is not None and access.recorded
        self.anonymous = access is not None and access.anonymous
        self._recorded_after = access is not None and access.recorded_after
        self._asked: Message | None = None

    def limit(self, usage: Usage, clock: Callable[[], float]) -> None:
        """Messages count against a quota from now on."""
        self._usage, self._clock = usage, clock

    def who(self) -> dict[str, Any]:
        """The caller, for a record."""
        return audit_record.caller_fields(self.identity, self.role, self.address)

    async def message(self, request: Message) -> Message:
        """One message of the caller, as the handler shall see it. Raises SluiceError."""
        if self._usage is not None:
            self._usage.received(request.ByteSize(), self._clock())
        if self.identity is not None and self.identity.kind is Kind.DEVICE:
            request = await rule_of(self.method)(self._database, self.identity.name, request)
        elif self.identity is not None:
            check_operator(self.method, self.role, request)
        if self._recorded and self.begun is None:
            await self._begin(audit_record.call(self.who(), short_name(self.method), request, now_us()))
        elif self._recorded_after:
            self._asked = request
        return request

    def answered(self, response: Message) -> None:
        """Counts an answer, before it is sent. Raises SluiceError(LIMIT_EXCEEDED) for a download."""
        if self._usage is not None:
            self._usage.sent(response.ByteSize(), self._clock(), download=self.method in DOWNLOADS)

    async def _begin(self, entry: dict[str, Any]) -> None:
        """Records the beginning. A caller that leaves meanwhile leaves a record with an outcome too."""
        append = asyncio.ensure_future(self._audit.append(entry))
        try:
            self.begun = await asyncio.shield(append)
        except asyncio.CancelledError:
            self.begun = await append
            raise

    async def messages(self, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        """The caller's stream, as the handler shall see it."""
        if self._recorded:
            yield await self.message(await _first(requests))
        async for request in requests:
            yield await self.message(request)

    async def ended(self, code: str, message: str) -> None:
        """Records how it ended, if its beginning was recorded, or if it succeeded and that is."""
        name = short_name(self.method)
        if self.begun is not None:
            entry = audit_record.outcome(self.begun.sequence, name, code, message, now_us())
        elif self._asked is not None and code == "OK":
            entry = {**audit_record.call(self.who(), name, self._asked, now_us()), "outcome": code}
            if isinstance(self._asked, identity_pb2.EnrolRequest):
                entry["object"] = read_request(self._asked.request)[0].uri  # whom this call let in
        else:
            return
        try:
            await self._audit.append(entry)
        except SluiceError as error:
            # What was recorded as begun stays so, and nothing else begins until the log can be written again.
            log.warning("outcome_not_recorded", error, method=name, caller=self.who(), outcome=code)


async def _first(requests: AsyncIterator[Message]) -> Message:
    """The first message of a stream that changes something."""
    try:
        async with asyncio.timeout(FIRST_MESSAGE_S):
            return await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise SluiceError(
            errors_pb2.REQUEST_INVALID, "the stream did not say what it is about", obj="request"
        ) from None


def _address(peer: str) -> str:
    """Where a caller is, without its port, from "ipv4:10.0.0.7:40000", "ipv6:%5B::1%5D:40000" or "unix:…"."""
    family, _, rest = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6"):
        return family
    return rest.rpartition(":")[0].strip("[]")
