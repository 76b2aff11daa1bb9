"""Records calls that were turned away: one by one at a moderate rate, beyond it as a count for each caller.

So nobody fills the disk by being denied, and no denial goes without a trace: what was only counted is
recorded within FLUSH_S. A denial stays one when it cannot be recorded; the control plane's own log then
says so.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from fleet import audit_record, log
from fleet.audit_log import AuditLog
from fleet.clock import now_us
from fleet.limits import DENIALS_BURST, DENIALS_PER_S, MAX_CALLERS
from fleet.quotas import Bucket
from updater.errors import SluiceError

FLUSH_S = 60.0
_OTHERS = json.dumps({"caller": "others"})  # beyond the callers that are counted apart


class Denials:
    """The denials of one control plane."""

    def __init__(self, audit: AuditLog, clock: Callable[[], float]) -> None:
        self._audit = audit
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._counted: dict[str, int] = {}
        self._flushing: asyncio.Task[None] | None = None

    async def note(self, who: Mapping[str, Any], method: str, error: SluiceError) -> None:
        """Records or counts one denial.

        Args:
            who: as `audit_record.caller_fields` gives it.
            method: that was called.
            error: why it was turned away.
        """
        name = json.dumps(who, sort_keys=True)
        bucket = self._buckets.pop(name, None) or Bucket(DENIALS_PER_S, DENIALS_BURST, self._clock())
        self._buckets[name] = bucket
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if bucket.take(1, self._clock()):
            if len(self._counted) >= MAX_CALLERS:
                name = _OTHERS
            self._counted[name] = self._counted.get(name, 0) + 1
            if self._flushing is None:
                self._flushing = asyncio.create_task(self._flush_later())
            return
        await self._append(audit_record.denied(who, method, error, now_us()))

    async def flush(self) -> None:
        """Records what was only counted, and ends what waits to do so."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
            self._flushing = None
        await self._record_counts()

    async def _flush_later(self) -> None:
        while self._counted:
            await asyncio.sleep(FLUSH_S)
            await self._record_counts()
        self._flushing = None

    async def _record_counts(self) -> None:
        while self._counted:
            name, count = self._counted.popitem()
            await self._append(audit_record.denied_more(json.loads(name), count, now_us()))

    async def _append(self, entry: Mapping[str, Any]) -> None:
        try:
            await self._audit.append(entry)
        except SluiceError as error:
            log.warning("denial_not_recorded", error, **{key: entry[key] for key in entry if key != "time"})
