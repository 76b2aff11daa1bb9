"""Devices as rows: registration, labels, selection, desired state.

Every function takes a connection inside a transaction of fleet.database and blocks. A device is accepted on
its first Hello. Its desired state is a version for each model, and a generation that grows with each change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, case, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from fleet import assignments, identities, tables
from fleet.clock import now_us, to_timestamp
from fleet.limits import (
    MAX_DEVICES,
    MAX_FEATURES,
    MAX_GENERATION,
    MAX_LABEL_CHARACTERS,
    MAX_LABELS,
    MAX_NAMED_IN_ERROR,
    MAX_RUNTIMES,
    MAX_SELECTED_DEVICES,
    MAX_TEXT_CHARACTERS,
)
from sluice.api.v1 import devices_pb2, errors_pb2, sync_pb2
from updater.errors import SluiceError

ID_RULE = "1 to 64 of a-z A-Z 0-9 - _ . starting with a letter or digit"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IN_CLAUSE = 500  # values in one IN (…)


def check_device_id(text: str) -> str:
    """`text` if it may name a device; raises SluiceError(DEVICE_ID_INVALID)."""
    if not _ID.fullmatch(text):
        raise SluiceError(
            errors_pb2.DEVICE_ID_INVALID,
            f"not a device id: {text[:80]!r}; it must be {ID_RULE}",
            hint="set the id in the agent's configuration",
            obj=text[:80],
        )
    return text


def check_hello(hello: sync_pb2.Hello) -> None:
    """Raises SluiceError(DEVICE_ID_INVALID | LIMIT_EXCEEDED)."""
    check_device_id(hello.device_id)
    check_labels(hello.labels)
    capabilities = hello.capabilities
    texts = [hello.agent_version, hello.boot_id, capabilities.architecture, capabilities.board]
    for runtime in capabilities.runtimes:
        texts += [runtime.name, runtime.version, *runtime.formats, *runtime.accelerators]
    if any(len(text) > MAX_TEXT_CHARACTERS for text in (*texts, *capabilities.delta_features)):
        raise _over("characters in one text of Hello", max(map(len, texts)), MAX_TEXT_CHARACTERS)
    if len(capabilities.runtimes) > MAX_RUNTIMES:
        raise _over("runtimes", len(capabilities.runtimes), MAX_RUNTIMES)
    if len(capabilities.delta_features) > MAX_FEATURES:
        raise _over("delta features", len(capabilities.delta_features), MAX_FEATURES)
    if hello.desired_generation > MAX_GENERATION:
        raise _over("is the desired generation of Hello", hello.desired_generation, MAX_GENERATION)


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises SluiceError(LIMIT_EXCEEDED | REQUEST_INVALID)."""
    if len(labels) > MAX_LABELS:
        raise _over("labels", len(labels), MAX_LABELS)
    for key, value in labels.items():
        if not key:
            raise SluiceError(errors_pb2.REQUEST_INVALID, "a label's key is empty", obj="labels")
        longest = max(len(key), len(value))
        if longest > MAX_LABEL_CHARACTERS:
            raise _over("characters in a label", longest, MAX_LABEL_CHARACTERS)


def register(connection: Connection, hello: sync_pb2.Hello) -> bool:
    """Writes down who said Hello; returns whether the device is new.

    Raises SluiceError(LIMIT_EXCEEDED) when no more devices are taken.
    """
    now = now_us()
    known: dict[str, Any] = {
        "agent_version": hello.agent_version,
        "boot_id": hello.boot_id,
        "capabilities": hello.capabilities.SerializeToString(),
        "own_labels": json.dumps(dict(hello.labels), sort_keys=True),
        "seen_us": now,
    }
    columns = tables.devices.c
    # A device that is ahead has seen generations which this database lost: go on above them.
    generation = case(
        (columns.generation < hello.desired_generation, hello.desired_generation + 1),
        else_=columns.generation,
    )
    changed = connection.execute(
        update(tables.devices).where(columns.id == hello.device_id).values(**known, generation=generation)
    )
    if changed.rowcount:
        return False
    count = connection.execute(select(func.count()).select_from(tables.devices)).scalar_one()
    if count >= MAX_DEVICES:
        raise _over("devices are registered", count, MAX_DEVICES)
    connection.execute(
        insert(tables.devices).values(
            id=hello.device_id,
            state=devices_pb2.DEVICE_STATE_ACCEPTED,
            operator_labels=json.dumps(identities.labels_of(connection, hello.device_id), sort_keys=True),
            reported=b"",
            generation=hello.desired_generation + 1 if hello.desired_generation else 0,
            created_us=now,
            **known,
        )
    )
    return True


def enrolled(connection: Connection, device_id: str, labels: Mapping[str, str]) -> None:
    """Gives a device that is known already its token's labels, and takes it in again."""
    row = connection.execute(select(tables.devices).where(tables.devices.c.id == device_id)).one_or_none()
    if row is not None:
        merged = json.loads(row.operator_labels) | dict(labels)
        connection.execute(
            update(tables.devices)
            .where(tables.devices.c.id == device_id)
            .values(
                state=devices_pb2.DEVICE_STATE_ACCEPTED, operator_labels=json.dumps(merged, sort_keys=True)
            )
        )


def set_state(connection: Connection, device_id: str, state: devices_pb2.DeviceState.ValueType) -> None:
    """Changes whether a device takes part; one that never said Hello has nothing to change."""
    connection.execute(update(tables.devices).where(tables.devices.c.id == device_id).values(state=state))


def device(connection: Connection, device_id: str, online: bool) -> devices_pb2.Device:
    """One device. Raises SluiceError(DEVICE_UNKNOWN)."""
    row = _row(connection, device_id)
    return _message(row, desired_states(connection, [device_id])[device_id], online)


def devices(
    connection: Connection, selector: devices_pb2.Selector, after: str, limit: int, online: Collection[str]
) -> list[devices_pb2.Device]:
    """Selected devices by id, behind `after`. Raises SluiceError(REQUEST_INVALID | LIMIT_EXCEEDED)."""
    ids = [device_id for device_id in select_ids(connection, selector, accepted=False) if device_id > after]
    ids = ids[:limit]
    desired = desired_states(connection, ids)
    columns = tables.devices.c
    rows = [
        row
        for part in _parts(ids)
        for row in connection.execute(
            select(tables.devices).where(columns.id.in_(part)).order_by(columns.id)
        ).all()
    ]
    return [_message(row, desired[row.id], row.id in online) for row in rows]


def select_ids(connection: Connection, selector: devices_pb2.Selector, *, accepted: bool) -> list[str]:
    """Ids of the devices that meet every condition, in order.

    With `accepted`, only devices in state ACCEPTED, and an id that names no device is refused.

    Raises SluiceError(REQUEST_INVALID | LIMIT_EXCEEDED).
    """
    if len(selector.device_ids) > MAX_SELECTED_DEVICES:
        raise _over("device ids in a selector", len(selector.device_ids), MAX_SELECTED_DEVICES)
    check_labels(selector.labels)
    wanted = set(selector.device_ids)
    columns = tables.devices.c
    rows = connection.execute(
        select(columns.id, columns.state, columns.own_labels, columns.operator_labels).order_by(columns.id)
    ).all()
    unknown = sorted(wanted - {row.id for row in rows})
    if accepted and unknown:
        named = ", ".join(name[:80] for name in unknown[:MAX_NAMED_IN_ERROR])
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"{len(unknown)} of the selected devices are unknown: {named}",
            hint="`sluice device list` shows the devices",
            obj=unknown[0][:80],
        )
    return [
        row.id
        for row in rows
        if (not wanted or row.id in wanted)
        and (not accepted or row.state == devices_pb2.DEVICE_STATE_ACCEPTED)
        and (not selector.labels or selector.labels.items() <= _labels(row).items())
    ]


def label(
    connection: Connection, device_id: str, to_set: Mapping[str, str], to_remove: Collection[str]
) -> None:
    """Changes the operator's labels.

    Raises SluiceError(DEVICE_UNKNOWN | LIMIT_EXCEEDED | REQUEST_INVALID).
    """
    labels: dict[str, str] = json.loads(_row(connection, device_id).operator_labels)
    labels = {key: value for key, value in labels.items() if key not in to_remove} | dict(to_set)
    check_labels(labels)
    connection.execute(
        update(tables.devices)
        .where(tables.devices.c.id == device_id)
        .values(operator_labels=json.dumps(labels, sort_keys=True))
    )


def desired_states(connection: Connection, ids: Sequence[str]) -> dict[str, sync_pb2.DesiredState]:
    """The whole desired state of each device."""
    states: dict[str, sync_pb2.DesiredState] = {}
    columns, wanted = tables.devices.c, tables.desired_models.c
    for part in _parts(ids):
        for row in connection.execute(select(columns.id, columns.generation).where(columns.id.in_(part))):
            states[row.id] = sync_pb2.DesiredState(generation=row.generation)
        query = select(tables.desired_models).where(wanted.device.in_(part)).order_by(wanted.model)
        for row in connection.execute(query):
            states[row.device].models.add(
                model=row.model,
                version=row.version,
                manifest_digest=row.manifest_digest,
                rollout_id=row.rollout,
            )
    return states


def set_desired(
    connection: Connection, ids: Sequence[str], model: str, version: int, manifest_digest: str, rollout: str
) -> None:
    """Points devices at a version of a model; their generation grows."""
    if not ids:
        return
    statement = upsert(tables.desired_models)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["device", "model"],
            set_={name: statement.excluded[name] for name in ("version", "manifest_digest", "rollout")},
        ),
        [
            {
                "device": device_id,
                "model": model,
                "version": version,
                "manifest_digest": manifest_digest,
                "rollout": rollout,
            }
            for device_id in ids
        ],
    )
    assignments.assign(connection, ids, model, version)
    _grow(connection, ids)


def forget_desired(connection: Connection, ids: Sequence[str], model: str) -> None:
    """Leaves devices as they are for a model: it is no longer in their desired state."""
    wanted = tables.desired_models.c
    for part in _parts(ids):
        connection.execute(
            delete(tables.desired_models).where(wanted.model == model, wanted.device.in_(part))
        )
    _grow(connection, ids)


def moved_by(connection: Connection, ids: Sequence[str], model: str, rollout: str) -> list[str]:
    """Those of `ids` whose desired version of a model still is the one that a rollout set."""
    wanted = tables.desired_models.c
    return [
        row.device
        for part in _parts(ids)
        for row in connection.execute(
            select(wanted.device).where(
                wanted.model == model, wanted.rollout == rollout, wanted.device.in_(part)
            )
        )
    ]


def reported_models(
    connection: Connection, ids: Sequence[str], model: str
) -> dict[str, sync_pb2.ReportedModel]:
    """What devices last said about one model; those that said nothing are absent."""
    columns = tables.devices.c
    found: dict[str, sync_pb2.ReportedModel] = {}
    for part in _parts(ids):
        for row in connection.execute(select(columns.id, columns.reported).where(columns.id.in_(part))):
            state = sync_pb2.ReportedState.FromString(row.reported)
            entry = next((entry for entry in state.models if entry.model == model), None)
            if entry is not None:
                found[row.id] = entry
    return found


def active_versions(connection: Connection, model: str) -> dict[int, set[str]]:
    """Versions of a model that devices report as active, with the variants they run."""
    columns = tables.devices.c
    active: dict[int, set[str]] = {}
    for row in connection.execute(select(columns.reported).where(func.length(columns.reported) > 0)):
        for entry in sync_pb2.ReportedState.FromString(row.reported).models:
            if entry.model == model and entry.active_version:
                active.setdefault(entry.active_version, set()).add(entry.variant)
    return active


def save_reports(connection: Connection, reports: Mapping[str, tuple[bytes, int]]) -> None:
    """Keeps reported states (serialized, and when they came)."""
    if reports:
        connection.exec_driver_sql(
            "UPDATE devices SET reported = ?, seen_us = ? WHERE id = ?",
            [(data, seen, device_id) for device_id, (data, seen) in reports.items()],
        )


def _grow(connection: Connection, ids: Sequence[str]) -> None:
    columns = tables.devices.c
    for part in _parts(ids):
        connection.execute(
            update(tables.devices).where(columns.id.in_(part)).values(generation=columns.generation + 1)
        )


def _row(connection: Connection, device_id: str) -> Row[Any]:
    row = connection.execute(select(tables.devices).where(tables.devices.c.id == device_id)).one_or_none()
    if row is None:
        raise SluiceError(
            errors_pb2.DEVICE_UNKNOWN,
            f"there is no device {device_id[:80]!r}",
            hint="`sluice device list` shows the devices",
            obj=device_id[:80],
        )
    return row


def _labels(row: Any) -> dict[str, str]:
    labels: dict[str, str] = json.loads(row.own_labels) | json.loads(row.operator_labels)
    return labels


def _message(row: Row[Any], desired: sync_pb2.DesiredState, online: bool) -> devices_pb2.Device:
    return devices_pb2.Device(
        id=row.id,
        state=row.state,
        online=online,
        last_seen_time=to_timestamp(row.seen_us),
        create_time=to_timestamp(row.created_us),
        labels=_labels(row),
        capabilities=sync_pb2.Capabilities.FromString(row.capabilities),
        desired=desired,
        reported=sync_pb2.ReportedState.FromString(row.reported),
        agent_version=row.agent_version,
    )


def _parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _IN_CLAUSE):
        yield values[start : start + _IN_CLAUSE]


def _over(what: str, count: int, limit: int) -> SluiceError:
    return SluiceError(errors_pb2.LIMIT_EXCEEDED, f"{count} {what}; at most {limit} are taken", obj=what)
