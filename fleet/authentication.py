"""Whether a caller still counts: checked at every call, and at once on calls and streams under way.

The handshake has proven chain and key. Here each call is held against what changes while a connection
stands: the certificate's dates, the trust domain, what an operator revoked, and the roots that were dropped.
A call ends when its certificate does, or the moment that its caller is revoked or its authority dropped.
Nothing here says what a caller may do.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cryptography import x509

from fleet.caller import Caller
from fleet.limits import MAX_PROVEN_CALLERS
from sluice.api.v1 import errors_pb2
from updater.certificates import certificates, check_chain, check_period
from updater.errors import SluiceError
from updater.identity import Identity, Kind


class Callers:
    """What is void, and whose calls are under way.

    Args:
        trust_domain: that every caller must belong to.
        void: certificates that count no longer: kind and name, and the end (microseconds) up to which.
        bundle: PEM of the roots that handshakes are held against now.
    """

    def __init__(
        self, trust_domain: str, void: Mapping[tuple[str, str], int] | None = None, bundle: bytes = b""
    ) -> None:
        self.trust_domain = trust_domain
        self._void = dict(void or {})
        self._calls: dict[tuple[str, str], set[_Call]] = {}
        self._roots: Sequence[x509.Certificate] = certificates(bundle) if bundle else ()
        self._dropped = False  # a root, so that connections may stand that it let in
        self._proven: dict[bytes, bool] = {}  # whether a chain leads to a root, by its digest

    def check(self, caller: Caller | None, now: datetime.datetime) -> Identity:
        """Who it is. Raises SluiceError(UNAUTHENTICATED | CERTIFICATE_INVALID | _EXPIRED | _REVOKED).

        Cheap but for the first call of each certificate after a root was dropped.
        """
        if caller is None:
            raise SluiceError(
                errors_pb2.UNAUTHENTICATED, "the caller showed no certificate", hint="enrol first"
            )
        identity = caller.identity
        if identity.trust_domain != self.trust_domain:
            raise SluiceError(
                errors_pb2.CERTIFICATE_INVALID,
                f"{identity} is not of the trust domain {self.trust_domain}",
                hint="the certificate was made for another fleet",
                obj=str(identity),
            )
        check_period(caller.start, caller.end, now, "the caller's certificate")
        if caller.end.timestamp() * 1e6 <= self._void.get((identity.kind.value, identity.name), 0):
            raise _revoked(identity)
        if not self.leads(caller, now):
            raise _dropped(identity)
        return identity

    def leads(self, caller: Caller, now: datetime.datetime) -> bool:
        """Whether the chain that was proven in the handshake still leads to a root. From any thread."""
        if not self._dropped:
            return True
        proven = self._proven
        key = hashlib.sha256(caller.leaf + caller.between).digest()
        if key not in proven:
            if len(proven) >= MAX_PROVEN_CALLERS:
                proven.clear()
            proven[key] = _leads(caller, self._roots, now)
        return proven[key]

    def revoke(self, kind: Kind, name: str, until_us: int) -> int:
        """Voids certificates that end by `until_us` and ends the calls that they began; says how many."""
        key = (kind.value, name)
        self._void[key] = until_us
        ended = [call for call in self._calls.get(key, ()) if call.caller.end.timestamp() * 1e6 <= until_us]
        for call in ended:
            call.end(_revoked(call.caller.identity))
        return len(ended)

    def trust(self, bundle: bytes) -> list[Caller]:
        """Only callers whose chain leads to these roots count from now on.

        Returns those with calls under way that have to be looked at: give `end` those for whom `leads` is
        false.
        """
        roots = certificates(bundle)
        self._dropped = self._dropped or not set(self._roots) <= set(roots)
        self._roots = roots
        self._proven = {}
        return [call.caller for calls in self._calls.values() for call in calls] if self._dropped else []

    def end(self, callers: Sequence[Caller]) -> int:
        """Ends the calls under way of callers whose authority was dropped; says how many."""
        ended = 0
        for caller in callers:
            key = (caller.identity.kind.value, caller.identity.name)
            for call in [call for call in self._calls.get(key, ()) if call.caller == caller]:
                call.end(_dropped(caller.identity))
                ended += 1
        return ended

    @contextmanager
    def call(self, caller: Caller | None) -> Iterator[None]:
        """Checks who calls; while the block runs in this task, what `check` would say later raises there.

        Raises as `check`, by this machine's clock.
        """
        now = datetime.datetime.now(datetime.UTC)
        identity = self.check(caller, now)
        assert caller is not None  # as was checked
        key = (identity.kind.value, identity.name)
        call = _Call(caller)
        self._calls.setdefault(key, set()).add(call)
        left_s = max(0.0, (caller.end - now).total_seconds())
        timer = asyncio.get_running_loop().call_later(left_s, call.end, _ended(caller))
        try:
            yield
        except asyncio.CancelledError:
            if call.why is None:
                raise
            call.task.uncancel()
            raise call.why from None
        finally:
            timer.cancel()
            calls = self._calls[key]
            calls.discard(call)
            if not calls:
                del self._calls[key]


class _Call:
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


def _revoked(identity: Identity) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_REVOKED,
        f"the certificate of {identity.kind.value} {identity.name} was revoked",
        hint="an operator decided so; to take part again, enrol anew",
        obj=str(identity),
    )


def _leads(caller: Caller, roots: Sequence[x509.Certificate], now: datetime.datetime) -> bool:
    try:
        check_chain(certificates(caller.leaf + caller.between), roots, now)
    except SluiceError:
        return False
    return True


def _dropped(identity: Identity) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_INVALID,
        f"the authority that made the certificate of {identity.kind.value} {identity.name} was dropped",
        hint="renew it: the enrolment key is enough for that",
        obj=str(identity),
    )


def _ended(caller: Caller) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_EXPIRED,
        f"the certificate of {caller.identity} ended while the stream stood",
        hint="connect again with the renewed one",
        obj=str(caller.identity),
    )
