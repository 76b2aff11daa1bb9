"""Rollouts as rows: made, loaded, saved, listed.

Every function takes a connection inside a transaction of fleet.database and blocks. What a rollout becomes is
decided in rollout.py; here it is written down together with the desired states that follow from it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from typing import Any, cast

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from fleet import catalog, devices, tables
from fleet.clock import SECOND, now_us, to_timestamp
from fleet.limits import DEFAULT_DEADLINE_S, MAX_DEADLINE_S
from fleet.rollout import RUNNING, Goal, Member, Outcome, Rollout
from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2
from updater.errors import SluiceError
from updater.manifest import Manifest

_MEMBER_COLUMNS = (
    "state",
    "step",
    "fetched_bytes",
    "fetch_total_bytes",
    "reason",
    "message",
    "ended_us",
)


def create(
    connection: Connection, request: rollouts_pb2.CreateRolloutRequest
) -> tuple[Rollout, dict[str, sync_pb2.DesiredState]]:
    """Makes a rollout, sets its members' desired version; returns it and the desired states to send.

    Raises SluiceError(MODEL_UNKNOWN | VERSION_UNKNOWN | VERSION_RETIRED | ROLLOUT_EMPTY | REQUEST_INVALID |
    ROLLOUT_STATE | LIMIT_EXCEEDED).
    """
    phase = _phase(request)
    row = catalog.version_row(connection, request.model, request.version)
    name = f"{row.model}@{row.version}"
    if row.retired:
        raise SluiceError(
            errors_pb2.VERSION_RETIRED,
            f"{name} is retired and may not be rolled out",
            hint="roll out another version",
            obj=name,
        )
    columns = tables.rollouts.c
    running = connection.execute(
        select(columns.id).where(columns.model == row.model, columns.state == RUNNING)
    ).scalar()
    if running:
        raise SluiceError(
            errors_pb2.ROLLOUT_STATE,
            f"rollout {running} of {row.model} is still running",
            hint="wait for it or abort it",
            obj=running,
        )
    ids = devices.select_ids(connection, phase.selector, accepted=True)
    if not ids:
        raise SluiceError(
            errors_pb2.ROLLOUT_EMPTY,
            "no accepted device meets the rollout's selector",
            hint="`sluice device list` shows the devices and their labels",
            obj=row.model,
        )
    rollout_id = secrets.token_hex(8)
    before = devices.reported_models(connection, ids, row.model)
    devices.set_desired(connection, ids, row.model, row.version, row.manifest_digest, rollout_id)
    desired = devices.desired_states(connection, ids)
    now = now_us()
    rollout = Rollout(
        id=rollout_id,
        goal=_goal(row),
        phase=phase,
        created_us=now,
        deadline_us=now + phase.deadline_s * SECOND,
        members={
            device_id: Member(
                device_id,
                desired[device_id].generation,
                before[device_id].active_version if device_id in before else 0,
            )
            for device_id in ids
        },
    )
    connection.execute(
        insert(tables.rollouts).values(
            id=rollout_id,
            model=row.model,
            version=row.version,
            state=rollout.state,
            phase=phase.SerializeToString(),
            verdict="",
            created_us=now,
            ended_us=0,
        )
    )
    connection.execute(
        insert(tables.rollout_devices),
        [
            {
                "rollout": rollout_id,
                "device": member.device_id,
                "generation": member.generation,
                "from_version": member.from_version,
                **_columns(member),
            }
            for member in rollout.members.values()
        ],
    )
    return rollout, desired


def save(connection: Connection, outcome: Outcome) -> dict[str, sync_pb2.DesiredState]:
    """Writes what an event led to; returns the desired states to send."""
    rollout = outcome.rollout
    columns = tables.rollouts.c
    connection.execute(
        update(tables.rollouts)
        .where(columns.id == rollout.id)
        .values(state=rollout.state, verdict=rollout.verdict, ended_us=rollout.ended_us)
    )
    _save_members(connection, rollout, outcome.changed)
    return _send_back(connection, rollout, outcome.send_back)


def load(connection: Connection, rollout_id: str) -> Rollout:
    """One rollout with its members. Raises SluiceError(ROLLOUT_UNKNOWN)."""
    row = connection.execute(select(tables.rollouts).where(tables.rollouts.c.id == rollout_id)).one_or_none()
    if row is None:
        raise SluiceError(
            errors_pb2.ROLLOUT_UNKNOWN,
            f"there is no rollout {rollout_id[:80]!r}",
            hint="`sluice rollout list` shows the rollouts",
            obj=rollout_id[:80],
        )
    members = connection.execute(
        select(tables.rollout_devices)
        .where(tables.rollout_devices.c.rollout == rollout_id)
        .order_by(tables.rollout_devices.c.device)
    ).all()
    return _rollout(connection, row, members)


def running(connection: Connection) -> list[Rollout]:
    """Every rollout that an earlier process left running."""
    columns = tables.rollouts.c
    ids = connection.execute(select(columns.id).where(columns.state == RUNNING)).scalars().all()
    return [load(connection, rollout_id) for rollout_id in ids]


def listed(
    connection: Connection, model: str, before: int | None, limit: int
) -> list[tuple[int, rollouts_pb2.Rollout]]:
    """Rollouts without devices, newest first, each with the number it is sorted by."""
    columns = tables.rollouts.c
    query = select(tables.rollouts).order_by(columns.number.desc()).limit(limit)
    if model:
        query = query.where(columns.model == model)
    if before is not None:
        query = query.where(columns.number < before)
    return [(row.number, message(_rollout(connection, row, ()))) for row in connection.execute(query).all()]


def message(rollout: Rollout) -> rollouts_pb2.Rollout:
    """The wire form."""
    result = rollouts_pb2.Rollout(
        id=rollout.id,
        model=rollout.goal.model,
        version=rollout.goal.version,
        state=rollout.state,
        phases=[rollout.phase],
        create_time=to_timestamp(rollout.created_us),
        verdict=rollout.verdict,
    )
    if rollout.ended_us:
        result.end_time.CopyFrom(to_timestamp(rollout.ended_us))
    for device_id in sorted(rollout.members):
        member = rollout.members[device_id]
        entry = result.devices.add(
            device_id=device_id,
            state=member.state,
            step=member.step,
            from_version=member.from_version,
            fetched_bytes=member.fetched_bytes,
            fetch_total_bytes=member.fetch_total_bytes,
            reason=member.reason,
            message=member.message,
        )
        if member.ended_us:
            entry.end_time.CopyFrom(to_timestamp(member.ended_us))
    return result


def _phase(request: rollouts_pb2.CreateRolloutRequest) -> rollouts_pb2.Phase:
    """The one phase, with its defaults filled in. Raises SluiceError(REQUEST_INVALID)."""
    if len(request.phases) > 1:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"the rollout has {len(request.phases)} phases; this release runs exactly one",
            hint="start one rollout after the other, each with its selector",
            obj="phases",
        )
    phase = rollouts_pb2.Phase()
    if request.phases:
        phase.CopyFrom(request.phases[0])
    phase.deadline_s = phase.deadline_s or DEFAULT_DEADLINE_S
    if phase.deadline_s > MAX_DEADLINE_S:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"deadline_s is {phase.deadline_s}; at most {MAX_DEADLINE_S} are allowed",
            obj="deadline_s",
        )
    if phase.max_failed_percent > 100:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"max_failed_percent is {phase.max_failed_percent}; it goes from 0 to 100",
            obj="max_failed_percent",
        )
    return phase


def _goal(version: Row[Any]) -> Goal:
    manifest = Manifest.parse(version.manifest)
    return Goal(
        manifest.model,
        manifest.version,
        version.manifest_digest,
        {variant.name: variant.model_file.digest for variant in manifest.variants},
    )


def _rollout(connection: Connection, row: Row[Any], members: Iterable[Row[Any]]) -> Rollout:
    phase = rollouts_pb2.Phase.FromString(row.phase)
    return Rollout(
        id=row.id,
        goal=_goal(catalog.version_row(connection, row.model, row.version)),
        phase=phase,
        created_us=row.created_us,
        deadline_us=row.created_us + phase.deadline_s * SECOND,
        members={
            member.device: Member(
                member.device,
                member.generation,
                member.from_version,
                **{name: getattr(member, name) for name in _MEMBER_COLUMNS},
            )
            for member in members
        },
        state=row.state,
        verdict=row.verdict,
        ended_us=row.ended_us,
    )


def _columns(member: Member) -> dict[str, Any]:
    return {name: getattr(member, name) for name in _MEMBER_COLUMNS}


def _save_members(connection: Connection, rollout: Rollout, ids: Collection[str]) -> None:
    if not ids:
        return
    columns = tables.rollout_devices.c
    statement = (
        update(tables.rollout_devices)
        .where(columns.rollout == rollout.id, columns.device == bindparam("of_device"))
        .values({name: bindparam(f"to_{name}") for name in _MEMBER_COLUMNS})
    )
    rows: list[dict[str, Any]] = []
    for device_id in ids:
        values = _columns(rollout.members[device_id])
        rows.append({"of_device": device_id, **{f"to_{name}": value for name, value in values.items()}})
    connection.execute(statement, rows)


def _send_back(
    connection: Connection, rollout: Rollout, ids: Collection[str]
) -> dict[str, sync_pb2.DesiredState]:
    """Points devices back to the version they came from, where this rollout's still is the desired one."""
    model = rollout.goal.model
    moved = devices.moved_by(connection, sorted(ids), model, rollout.id)
    by_version: dict[int, list[str]] = {}
    for device_id in moved:
        by_version.setdefault(rollout.members[device_id].from_version, []).append(device_id)
    for version, group in by_version.items():
        digest = _manifest_digest(connection, model, version)
        if digest:
            devices.set_desired(connection, group, model, version, digest, "")
        else:
            devices.forget_desired(connection, group, model)
    return devices.desired_states(connection, moved)


def _manifest_digest(connection: Connection, model: str, version: int) -> str:
    """Empty for a version that is not in the catalog: devices say what they run, and it may be anything."""
    columns = tables.versions.c
    found = connection.execute(
        select(columns.manifest_digest).where(columns.model == model, columns.version == version)
    ).scalar()
    return cast("str | None", found) or ""
