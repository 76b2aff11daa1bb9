"""Drives running rollouts: gathers reports, lets rollout.py decide, writes, then tells devices and watchers.

One task for each running rollout. Reports wait as the newest of each member, so a burst costs one decision
and one transaction. What was decided counts only once it is written; if writing fails, the rollout stays as
it was and the same reports are looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from fleet import log, rollout, rollout_rows
from fleet.clock import now_us
from fleet.database import Database
from fleet.limits import TICK_S, WATCH_INTERVAL_S
from fleet.rollout import RUNNING, Outcome, Rollout
from fleet.sessions import Sessions
from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2
from sluice.api.v1.rollouts_pb2 import RolloutState
from updater.errors import SluiceError


class _Live:
    """A rollout in memory, with what waits for it."""

    def __init__(self, state: Rollout) -> None:
        self.rollout = state
        self.reports: dict[str, sync_pb2.ReportedState] = {}
        self.wake = asyncio.Event()
        self.changed = asyncio.Event()  # set and replaced at each change
        self.lock = asyncio.Lock()  # one decision at a time
        self.task: asyncio.Task[None] | None = None


class Conductor:
    """The running rollouts of one control plane.

    Args:
        clock: microseconds since 1970.
    """

    def __init__(self, database: Database, sessions: Sessions, clock: Callable[[], int] = now_us) -> None:
        self._database = database
        self._sessions = sessions
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._stopping: SluiceError | None = None

    async def start(self) -> None:
        """Resumes the rollouts that an earlier process left running."""
        for state in await self._database.read(rollout_rows.running):
            log.event("rollout_resumed", rollout=state.id, model=state.goal.model, version=state.goal.version)
            self._follow(state)

    async def stop(self) -> None:
        """Leaves running rollouts to the next process."""
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end_watches(self, why: SluiceError) -> None:
        """Ends every watch, because the control plane stops."""
        self._stopping = why
        for live in self._live.values():
            live.changed.set()

    def device_reported(self, device_id: str, reported: sync_pb2.ReportedState) -> None:
        """Takes a durable report; it is looked at soon."""
        for live in self._live.values():
            if device_id in live.rollout.members:
                live.reports[device_id] = reported
                live.wake.set()

    async def create(self, request: rollouts_pb2.CreateRolloutRequest) -> rollouts_pb2.Rollout:
        """Starts a rollout. Raises as `rollout_rows.create`."""
        state, desired = await self._database.write(lambda c: rollout_rows.create(c, request))
        log.event(
            "rollout_started",
            rollout=state.id,
            model=state.goal.model,
            version=state.goal.version,
            devices=len(state.members),
        )
        self._follow(state)
        self._sessions.offer(desired)
        return rollout_rows.message(state)

    async def get(self, rollout_id: str) -> Rollout:
        """A rollout as last written. Raises SluiceError(ROLLOUT_UNKNOWN)."""
        live = self._live.get(rollout_id)
        if live is not None:
            return live.rollout
        return await self._database.read(lambda c: rollout_rows.load(c, rollout_id))

    async def abort(self, rollout_id: str, *, revert: bool, why: str) -> Rollout:
        """Ends a running rollout. Raises SluiceError(ROLLOUT_UNKNOWN | ROLLOUT_STATE)."""
        live = self._live.get(rollout_id)
        if live is not None:
            async with live.lock:
                if live.rollout.state == RUNNING:
                    outcome = rollout.abort(live.rollout, revert=revert, why=why, now_us=self._clock())
                    await self._apply(live, outcome)
                    live.wake.set()
                    return live.rollout
        state = await self.get(rollout_id)
        name = RolloutState.Name(state.state).removeprefix("ROLLOUT_STATE_").lower()
        raise SluiceError(
            errors_pb2.ROLLOUT_STATE,
            f"rollout {rollout_id} has ended already: it is {name} ({state.verdict})",
            obj=rollout_id,
        )

    async def watch(self, rollout_id: str) -> AsyncGenerator[Rollout]:
        """The rollout now, then after each change, until it ended. Raises SluiceError(ROLLOUT_UNKNOWN)."""
        live = self._live.get(rollout_id)
        if live is None:
            yield await self.get(rollout_id)
            return
        while True:
            state, changed = live.rollout, live.changed
            yield state
            if state.state != RUNNING:
                return
            await changed.wait()
            if self._stopping is not None:
                raise self._stopping
            await asyncio.sleep(WATCH_INTERVAL_S)  # changes come in bursts

    def _follow(self, state: Rollout) -> None:
        live = _Live(state)
        self._live[state.id] = live
        live.task = asyncio.create_task(self._run(live), name=f"rollout-{state.id}")

    async def _run(self, live: _Live) -> None:
        try:
            while live.rollout.state == RUNNING:
                try:
                    async with asyncio.timeout(TICK_S):
                        await live.wake.wait()
                except TimeoutError:
                    pass
                live.wake.clear()
                async with live.lock:
                    await self._look(live)
        finally:
            if live.rollout.state != RUNNING:
                self._live.pop(live.rollout.id, None)

    async def _look(self, live: _Live) -> None:
        """One decision over the reports that wait and the time."""
        reports, live.reports = live.reports, {}
        now = self._clock()
        first = rollout.reported(live.rollout, reports, now)
        second = rollout.tick(first.rollout, now)
        if second.rollout == live.rollout:
            return
        outcome = Outcome(second.rollout, first.changed | second.changed, first.send_back | second.send_back)
        try:
            await self._apply(live, outcome)
        except SluiceError as error:
            log.warning("rollout_not_saved", error, rollout=live.rollout.id)
            live.reports = reports | live.reports
            await asyncio.sleep(TICK_S)
            live.wake.set()
        except Exception as error:  # noqa: BLE001 - a defect of ours must not stop a rollout for every device
            # The reports are not kept: one of them may be what fails. Devices report again at each heartbeat.
            log.warning("rollout_defect", error, rollout=live.rollout.id, devices=sorted(reports))
            await asyncio.sleep(TICK_S)

    async def _apply(self, live: _Live, outcome: Outcome) -> None:
        desired = await self._database.write(lambda c: rollout_rows.save(c, outcome))
        live.rollout = outcome.rollout
        changed, live.changed = live.changed, asyncio.Event()
        changed.set()
        self._sessions.offer(desired)
        if live.rollout.state != RUNNING:
            log.event(
                "rollout_ended",
                rollout=live.rollout.id,
                state=RolloutState.Name(live.rollout.state),
                verdict=live.rollout.verdict,
            )
