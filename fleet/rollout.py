"""A rollout as a state machine: values in, values out; no I/O, no clock of its own.

A rollout moves a fixed set of devices (its *members*, chosen when it is made) to one version in one phase.
Devices that register later belong to the next rollout: the verdict's denominator never moves. Events: reports
from members, the passing of time, an abort by the operator. Rules:

- A member is DONE only by its own word about what it runs: the version is active with the right manifest, the
  worker is healthy, the variant's model file is among the loaded digests, no update step is in progress, and
  the report answers the desired state that this rollout set (so an older report proves nothing).
- DONE reopens when a later report says otherwise; FAILED stays.
- A member fails when it says so for good (`final`), or when it is not DONE by the deadline.
- The rollout fails as soon as more than max_failed_percent of its members failed, or when all ended and none
  is DONE; it succeeds when all ended otherwise.
- When it fails or is aborted, members that are not DONE are sent back to the version they came from; an abort
  with revert sends DONE ones back too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2
from sluice.api.v1.errors_pb2 import ErrorReason
from sluice.api.v1.rollouts_pb2 import RolloutDeviceState, RolloutState
from sluice.api.v1.sync_pb2 import UpdateStep

_SECOND = 1_000_000  # microseconds

RUNNING = rollouts_pb2.ROLLOUT_STATE_RUNNING
WAITING = rollouts_pb2.ROLLOUT_DEVICE_STATE_WAITING
UPDATING = rollouts_pb2.ROLLOUT_DEVICE_STATE_UPDATING
DONE = rollouts_pb2.ROLLOUT_DEVICE_STATE_DONE
FAILED = rollouts_pb2.ROLLOUT_DEVICE_STATE_FAILED
ABORTED = rollouts_pb2.ROLLOUT_DEVICE_STATE_ABORTED

_IN_PROGRESS = frozenset(
    {
        sync_pb2.UPDATE_STEP_PLANNING,
        sync_pb2.UPDATE_STEP_FETCHING,
        sync_pb2.UPDATE_STEP_VERIFYING,
        sync_pb2.UPDATE_STEP_STAGING,
        sync_pb2.UPDATE_STEP_WARMING_UP,
        sync_pb2.UPDATE_STEP_SHADOWING,
        sync_pb2.UPDATE_STEP_ACTIVATING,
        sync_pb2.UPDATE_STEP_SOAKING,
    }
)


@dataclass(frozen=True)
class Member:
    """One device of a rollout.

    Attributes:
        generation: of the desired state that this rollout set; reports about older ones prove nothing.
        from_version: what the device ran when the rollout began; 0 when nothing.
        fetched_bytes, fetch_total_bytes: as last reported.
        reason, message: of a failure; while it is not final, of the last attempt.
        ended_us: when it became DONE, FAILED or ABORTED; 0 before.
    """

    device_id: str
    generation: int
    from_version: int
    state: RolloutDeviceState.ValueType = WAITING
    step: UpdateStep.ValueType = sync_pb2.UPDATE_STEP_UNSPECIFIED
    fetched_bytes: int = 0
    fetch_total_bytes: int = 0
    reason: ErrorReason.ValueType = errors_pb2.ERROR_REASON_UNSPECIFIED
    message: str = ""
    ended_us: int = 0


@dataclass(frozen=True)
class Goal:
    """What a member must report.

    Attributes:
        manifest_digest: of the version.
        model_digests: of the model file, by variant.
    """

    model: str
    version: int
    manifest_digest: str
    model_digests: Mapping[str, str]


@dataclass(frozen=True)
class Rollout:
    """A rollout at one moment. `deadline_us` is absolute; other times as in `Member`."""

    id: str
    goal: Goal
    phase: rollouts_pb2.Phase
    created_us: int
    deadline_us: int
    members: Mapping[str, Member] = field(default_factory=dict)
    state: RolloutState.ValueType = RUNNING
    verdict: str = ""
    ended_us: int = 0

    def count(self, state: RolloutDeviceState.ValueType) -> int:
        """Members in a state."""
        return sum(member.state == state for member in self.members.values())


@dataclass(frozen=True)
class Outcome:
    """What an event led to.

    Attributes:
        changed: ids of the members that differ.
        send_back: ids of the members to send back to the version they came from.
    """

    rollout: Rollout
    changed: frozenset[str] = frozenset()
    send_back: frozenset[str] = frozenset()


def reported(rollout: Rollout, reports: Mapping[str, sync_pb2.ReportedState], now_us: int) -> Outcome:
    """Members reported; several at once for the sake of large fleets. Reports of others are ignored."""
    if rollout.state != RUNNING:
        return Outcome(rollout)
    changes = {}
    for device_id, state in reports.items():
        member = rollout.members.get(device_id)
        if member is None:
            continue
        after = _after_report(rollout.goal, member, state, now_us)
        if after != member:
            changes[device_id] = after
    if not changes:
        return Outcome(rollout)
    return _judge(replace(rollout, members={**rollout.members, **changes}), frozenset(changes), now_us)


def tick(rollout: Rollout, now_us: int) -> Outcome:
    """Time passed: beyond the deadline, members that are not DONE have failed."""
    if rollout.state != RUNNING or now_us < rollout.deadline_us:
        return Outcome(rollout)
    changes = {
        device_id: _silent(rollout, member, now_us)
        for device_id, member in rollout.members.items()
        if member.state in (WAITING, UPDATING)
    }
    return _judge(replace(rollout, members={**rollout.members, **changes}), frozenset(changes), now_us)


def abort(rollout: Rollout, *, revert: bool, why: str, now_us: int) -> Outcome:
    """The operator ends it. An ended rollout stays as it is."""
    if rollout.state != RUNNING:
        return Outcome(rollout)
    text = "aborted by the operator" + (", with revert" if revert else "") + (f": {why}" if why else "")
    return _end(rollout, rollouts_pb2.ROLLOUT_STATE_ABORTED, text, frozenset(), now_us, revert=revert)


def _after_report(goal: Goal, member: Member, state: sync_pb2.ReportedState, now_us: int) -> Member:
    if member.state in (FAILED, ABORTED) or state.desired_generation < member.generation:
        return member
    entry = next((model for model in state.models if model.model == goal.model), sync_pb2.ReportedModel())
    # Until it has turned to the goal, step and bytes tell of the version before.
    turned = goal.version in (entry.target_version, entry.active_version, entry.failure.version)
    about = entry if turned else sync_pb2.ReportedModel()
    seen = replace(
        member,
        step=about.step,
        fetched_bytes=about.fetched_bytes,
        fetch_total_bytes=about.fetch_total_bytes,
        reason=errors_pb2.ERROR_REASON_UNSPECIFIED,
        message="",
    )
    if is_running(goal, entry):
        return replace(seen, state=DONE, ended_us=member.ended_us or now_us)
    failed = entry.failure.version == goal.version
    if failed:
        seen = replace(seen, reason=entry.failure.reason, message=entry.failure.message)
    elif entry.pinned_version not in (0, goal.version):
        seen = replace(seen, message=f"pinned to version {entry.pinned_version} on the device")
    if failed and entry.failure.final:
        return replace(seen, state=FAILED, ended_us=now_us)
    return replace(seen, state=UPDATING, ended_us=0)


def is_running(goal: Goal, entry: sync_pb2.ReportedModel) -> bool:
    """Whether a device says that it has loaded the goal's version and that it answers."""
    return (
        entry.active_version == goal.version
        and entry.active_manifest_digest == goal.manifest_digest
        and entry.healthy
        and entry.step not in _IN_PROGRESS
        and entry.variant in goal.model_digests
        and goal.model_digests[entry.variant] in entry.loaded_digests
    )


def _silent(rollout: Rollout, member: Member, now_us: int) -> Member:
    deadline = rollout.phase.deadline_s
    if member.step == sync_pb2.UPDATE_STEP_SOAKING:
        text = (
            f"the new version was still in its soak after {deadline} s: the deadline must be longer than that"
        )
    elif member.state == WAITING:
        text = f"the device did not take up the new version within {deadline} s: it was away, or refused it"
        text += " (`sluice-agent status` there says why)"
    else:
        step = UpdateStep.Name(member.step).removeprefix("UPDATE_STEP_")
        text = f"the device did not finish within {deadline} s; it last reported step {step}"
        if member.message:
            text += f" and {ErrorReason.Name(member.reason)}: {member.message}"
    return replace(
        member, state=FAILED, reason=errors_pb2.DEVICE_SILENT, message=text[:2000], ended_us=now_us
    )


def _judge(rollout: Rollout, changed: frozenset[str], now_us: int) -> Outcome:
    total, done, failed = len(rollout.members), rollout.count(DONE), rollout.count(FAILED)
    allowed = rollout.phase.max_failed_percent
    counts = f"{done} of {total} devices done, {failed} failed (at most {allowed} % may)"
    if failed * 100 > allowed * total:
        state, verdict = rollouts_pb2.ROLLOUT_STATE_FAILED, f"too many failures: {counts}"
    elif done + failed < total:
        return Outcome(rollout, changed)
    elif not done:
        state, verdict = rollouts_pb2.ROLLOUT_STATE_FAILED, f"no device got there: {counts}"
    else:
        state, verdict = rollouts_pb2.ROLLOUT_STATE_SUCCEEDED, counts
    return _end(rollout, state, verdict, changed, now_us)


def _end(
    rollout: Rollout,
    state: RolloutState.ValueType,
    verdict: str,
    changed: frozenset[str],
    now_us: int,
    *,
    revert: bool = False,
) -> Outcome:
    unfinished = {
        device_id: replace(member, state=ABORTED, ended_us=now_us)
        for device_id, member in rollout.members.items()
        if member.state in (WAITING, UPDATING)
    }
    send_back: frozenset[str] = frozenset()
    if state != rollouts_pb2.ROLLOUT_STATE_SUCCEEDED:
        send_back = frozenset(
            device_id
            for device_id, member in rollout.members.items()
            if member.from_version != rollout.goal.version and (revert or member.state != DONE)
        )
    ended = replace(
        rollout,
        members={**rollout.members, **unfinished},
        state=state,
        verdict=verdict,
        ended_us=now_us,
    )
    return Outcome(ended, changed | frozenset(unfinished), send_back)
