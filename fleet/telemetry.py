"""Telemetry intake: each batch of a device counted once, kept for a while, read back by metric.

A device sends its batches in ascending order, the lowest unacknowledged first, one call at a time. So one
number for each outbox (device and epoch) is enough: the highest sequence stored. Batches up to it are
repeats; it is written in the transaction that stores the points. A gap is accepted, because a full outbox
drops its oldest batches, and the sequence acknowledged is the highest stored.
"""

from __future__ import annotations

import json
import math
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.dialects.sqlite import insert as upsert

from fleet import log, tables
from fleet.clock import SECOND, from_timestamp, now_us, to_timestamp
from fleet.database import Database
from fleet.limits import (
    DEFAULT_POINTS,
    MAX_ATTRIBUTES,
    MAX_BATCHES,
    MAX_LABEL_CHARACTERS,
    MAX_METRIC_NAME_CHARACTERS,
    MAX_METRICS,
    MAX_POINTS,
    MAX_STORED_INTEGER,
    MAX_UNIT_CHARACTERS,
    TELEMETRY_KEEP_ROWS,
    TELEMETRY_KEEP_S,
    TELEMETRY_PRUNE_ROWS,
)
from sluice.api.v1 import errors_pb2, telemetry_pb2
from updater.errors import SluiceError

_EPOCH_CHARACTERS = 32


def check_report(request: telemetry_pb2.ReportRequest) -> None:
    """Raises SluiceError(REQUEST_INVALID | LIMIT_EXCEEDED). The device id is checked elsewhere."""
    if len(request.epoch) != _EPOCH_CHARACTERS or set(request.epoch) - set("0123456789abcdef"):
        raise _invalid(f"the epoch is not {_EPOCH_CHARACTERS} hex digits: {request.epoch[:80]!r}", "epoch")
    if len(request.batches) > MAX_BATCHES:
        raise _over("batches in one report", len(request.batches), MAX_BATCHES)
    before = 0
    for batch in request.batches:
        if not before < batch.sequence <= MAX_STORED_INTEGER:
            raise _invalid(f"batch {batch.sequence} comes after {before}: numbers must ascend", "sequence")
        before = batch.sequence
        if len(batch.metrics) > MAX_METRICS:
            raise _over(f"metrics in batch {batch.sequence}", len(batch.metrics), MAX_METRICS)
        for metric in batch.metrics:
            _check_metric(metric)


def store(connection: Connection, request: telemetry_pb2.ReportRequest) -> int:
    """Stores the batches not seen before; returns the sequence to acknowledge."""
    columns = tables.telemetry_epochs.c
    now = now_us()
    acked = connection.execute(
        select(columns.acked_sequence).where(
            columns.device == request.device_id, columns.epoch == request.epoch
        )
    ).scalar()
    known = acked or 0
    fresh = [batch for batch in request.batches if batch.sequence > known]
    if not fresh:
        return known
    if fresh[0].sequence > known + 1:
        log.event(
            "telemetry_gap",
            device=request.device_id,
            epoch=request.epoch,
            missing=fresh[0].sequence - known - 1,
        )
    points = [_point(request.device_id, metric, now) for batch in fresh for metric in batch.metrics]
    if points:
        connection.execute(insert(tables.telemetry_points), points)
    last = fresh[-1].sequence
    statement = upsert(tables.telemetry_epochs).values(
        device=request.device_id, epoch=request.epoch, acked_sequence=last, seen_us=now
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["device", "epoch"], set_={"acked_sequence": last, "seen_us": now}
        )
    )
    return last


def query(
    connection: Connection, request: telemetry_pb2.QueryMetricsRequest
) -> telemetry_pb2.QueryMetricsResponse:
    """The newest points of one metric, oldest first. Raises SluiceError(LIMIT_EXCEEDED)."""
    if request.limit > MAX_POINTS:
        raise _over("points asked for", request.limit, MAX_POINTS)
    columns = tables.telemetry_points.c
    wanted = (
        select(tables.telemetry_points)
        .where(columns.device == request.device_id, columns.name == request.name)
        .order_by(columns.time_us.desc(), columns.id.desc())
        .limit(request.limit or DEFAULT_POINTS)
    )
    if request.HasField("since"):
        wanted = wanted.where(columns.time_us >= from_timestamp(request.since))
    return telemetry_pb2.QueryMetricsResponse(
        metrics=[
            telemetry_pb2.Metric(
                name=row.name,
                value=row.value,
                unit=row.unit,
                attributes=json.loads(row.attributes),
                time=to_timestamp(row.time_us),
            )
            for row in reversed(connection.execute(wanted).all())
        ]
    )


async def prune(database: Database) -> int:
    """Deletes points over the limits of age and number, a few at a time; returns how many went."""
    gone = 0
    while deleted := await database.write(_prune_some):
        gone += deleted
    return gone


def _prune_some(connection: Connection) -> int:
    columns = tables.telemetry_points.c
    oldest = now_us() - int(TELEMETRY_KEEP_S * SECOND)
    aged = select(columns.id).where(columns.received_us < oldest).limit(TELEMETRY_PRUNE_ROWS)
    deleted = connection.execute(delete(tables.telemetry_points).where(columns.id.in_(aged))).rowcount
    if deleted:
        return deleted
    least, most = connection.execute(select(func.min(columns.id), func.max(columns.id))).one()
    if least is None or most - least < TELEMETRY_KEEP_ROWS:  # ids only grow, so they bound the number of rows
        return 0
    surplus = min(most - least + 1 - TELEMETRY_KEEP_ROWS, TELEMETRY_PRUNE_ROWS)
    return connection.execute(delete(tables.telemetry_points).where(columns.id < least + surplus)).rowcount


def _point(device: str, metric: telemetry_pb2.Metric, now: int) -> dict[str, Any]:
    return {
        "device": device,
        "name": metric.name,
        "value": metric.value,
        "unit": metric.unit,
        "attributes": json.dumps(dict(metric.attributes), sort_keys=True),
        "time_us": from_timestamp(metric.time) if metric.HasField("time") else now,
        "received_us": now,
    }


def _check_metric(metric: telemetry_pb2.Metric) -> None:
    if not 0 < len(metric.name) <= MAX_METRIC_NAME_CHARACTERS:
        raise _invalid(f"a metric's name has {len(metric.name)} characters", "name")
    if len(metric.unit) > MAX_UNIT_CHARACTERS:
        raise _over(f"characters in the unit of {metric.name}", len(metric.unit), MAX_UNIT_CHARACTERS)
    if math.isnan(metric.value):
        raise _invalid(f"the value of {metric.name} is not a number", metric.name)
    if len(metric.attributes) > MAX_ATTRIBUTES:
        raise _over(f"attributes of {metric.name}", len(metric.attributes), MAX_ATTRIBUTES)
    for key, value in metric.attributes.items():
        longest = max(len(key), len(value))
        if longest > MAX_LABEL_CHARACTERS:
            raise _over(
                f"characters in an attribute of {metric.name}",
                max(len(key), len(value)),
                MAX_LABEL_CHARACTERS,
            )


def _over(what: str, count: int, limit: int) -> SluiceError:
    return SluiceError(errors_pb2.LIMIT_EXCEEDED, f"{count} {what}; at most {limit} are taken", obj=what)


def _invalid(why: str, field: str) -> SluiceError:
    return SluiceError(errors_pb2.REQUEST_INVALID, why, obj=field)
