"""Telemetry over gRPC: each batch counts once, whatever is sent twice."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, failing
from fleet import limits, telemetry
from fleet.clock import SECOND, to_timestamp
from fleet.database import Database
from sluice.api.v1 import telemetry_pb2

EPOCH = "0123456789abcdef" * 2


def metric(value: float, second: int = 0, name: str = "system.cpu.utilization") -> telemetry_pb2.Metric:
    return telemetry_pb2.Metric(
        name=name,
        value=value,
        unit="1",
        attributes={"cpu": "0"},
        time=to_timestamp((1_700_000_000 + second) * SECOND),
    )


def report(operator: Operator, *sequences: int, epoch: str = EPOCH, device: str = "box-1") -> int:
    """Sends batches whose one point has the batch's number as value and time."""
    request = telemetry_pb2.ReportRequest(device_id=device, epoch=epoch)
    for number in sequences:
        request.batches.add(sequence=number, metrics=[metric(number, number)])
    return operator.telemetry.Report(request).acked_sequence


def values(operator: Operator, **fields: object) -> list[float]:
    request = telemetry_pb2.QueryMetricsRequest(
        device_id="box-1",
        name="system.cpu.utilization",
        **fields,  # type: ignore[arg-type]
    )
    return [point.value for point in operator.telemetry.QueryMetrics(request).metrics]


def test_repeated_batches_count_once(control: ControlPlane, operator: Operator) -> None:
    assert report(operator, 1, 2) == 2
    assert report(operator, 1, 2) == 2
    assert report(operator, 2, 3) == 3
    control.kill()
    control.start()
    with Operator(control.address) as again:
        assert report(again, 3) == 3
        assert report(again, 4) == 4
        assert values(again) == [1, 2, 3, 4]


def test_a_gap_is_taken_and_acknowledged(operator: Operator) -> None:
    assert report(operator, 5, 9) == 9
    assert report(operator) == 9
    assert values(operator) == [5, 9]


def test_outboxes_and_devices_are_counted_apart(operator: Operator) -> None:
    assert report(operator, 1, 2) == 2
    assert report(operator, 1, epoch="f" * 32) == 1
    assert report(operator, 1, device="box-2") == 1
    assert values(operator) == [1, 1, 2]


def test_the_newest_points_come_oldest_first(operator: Operator) -> None:
    report(operator, *range(1, 11))
    assert values(operator, limit=3) == [8, 9, 10]
    assert values(operator, since=to_timestamp(1_700_000_009 * SECOND)) == [9, 10]
    point = operator.telemetry.QueryMetrics(
        telemetry_pb2.QueryMetricsRequest(device_id="box-1", name="system.cpu.utilization", limit=1)
    ).metrics[0]
    assert point == metric(10, 10)
    assert failing(lambda: values(operator, limit=10_001)).code == "LIMIT_EXCEEDED"


def batches(*sequences: int) -> telemetry_pb2.ReportRequest:
    request = telemetry_pb2.ReportRequest(device_id="box-1", epoch=EPOCH)
    for number in sequences:
        request.batches.add(sequence=number)
    return request


def one(point: telemetry_pb2.Metric) -> telemetry_pb2.ReportRequest:
    request = batches(1)
    request.batches[0].metrics.append(point)
    return request


BAD = {
    "descending": (batches(2, 1), "REQUEST_INVALID"),
    "doubled": (batches(1, 1), "REQUEST_INVALID"),
    "zero": (batches(0), "REQUEST_INVALID"),
    "beyond the largest": (batches(1 << 63), "REQUEST_INVALID"),
    "too many": (batches(*range(1, 66)), "LIMIT_EXCEEDED"),
    "no epoch": (telemetry_pb2.ReportRequest(device_id="box-1", epoch="x"), "REQUEST_INVALID"),
    "no device": (telemetry_pb2.ReportRequest(epoch=EPOCH), "DEVICE_ID_INVALID"),
    "no number": (one(metric(math.nan)), "REQUEST_INVALID"),
    "no name": (one(metric(1, name="")), "REQUEST_INVALID"),
    "long unit": (one(telemetry_pb2.Metric(name="m", unit="x" * 33)), "LIMIT_EXCEEDED"),
    "attributes": (
        one(telemetry_pb2.Metric(name="m", attributes={f"a{index}": "" for index in range(17)})),
        "LIMIT_EXCEEDED",
    ),
    "metrics": (
        telemetry_pb2.ReportRequest(
            device_id="box-1",
            epoch=EPOCH,
            batches=[telemetry_pb2.Batch(sequence=1, metrics=[metric(1)] * 513)],
        ),
        "LIMIT_EXCEEDED",
    ),
}


def test_bad_reports_are_refused_whole(operator: Operator) -> None:
    for name, (request, code) in BAD.items():
        error = failing(lambda request=request: operator.telemetry.Report(request))  # type: ignore[misc]
        assert error.code == code, name
    assert report(operator, 1) == 1
    assert values(operator) == [1]


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_infinite_values_are_kept(operator: Operator, infinite: float) -> None:
    operator.telemetry.Report(one(metric(infinite)))
    assert values(operator) == [infinite]


async def stored(database: Database, numbers: Sequence[int]) -> None:
    for number in numbers:
        request = batches(number)
        request.batches[0].metrics.append(metric(number, number))
        await database.write(lambda c, request=request: telemetry.store(c, request))  # type: ignore[misc]


async def left(database: Database) -> list[float]:
    request = telemetry_pb2.QueryMetricsRequest(device_id="box-1", name="system.cpu.utilization")
    answer = await database.read(lambda c: telemetry.query(c, request))
    return [point.value for point in answer.metrics]


def test_old_and_surplus_points_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        database = Database(tmp_path / "control.db")
        try:
            await stored(database, range(1, 21))
            assert await telemetry.prune(database) == 0
            monkeypatch.setattr(telemetry, "TELEMETRY_KEEP_ROWS", 5)
            monkeypatch.setattr(telemetry, "TELEMETRY_PRUNE_ROWS", 4)
            assert await telemetry.prune(database) == 15
            assert await left(database) == [16, 17, 18, 19, 20]
            monkeypatch.setattr(telemetry, "TELEMETRY_KEEP_S", -limits.TELEMETRY_KEEP_S)
            assert await telemetry.prune(database) == 5
            assert await left(database) == []
            await stored(database, [20, 21])  # what was counted once stays counted
            assert await left(database) == [21]
        finally:
            database.close()

    asyncio.run(scenario())
