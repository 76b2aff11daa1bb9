from __future__ import annotations

from pathlib import Path

from agent.outbox import Outbox
from agent.telemetry import WorkerFigures, sample
from sluice.api.v1 import telemetry_pb2


def batch(text: str) -> telemetry_pb2.Batch:
    return telemetry_pb2.Batch(metrics=[telemetry_pb2.Metric(name=text, value=1, unit="1")])


def names(outbox: Outbox, most: int = 100) -> list[tuple[int, str]]:
    return [(item.sequence, item.metrics[0].name) for item in outbox.pending(most)]


def test_numbers_go_on_after_acknowledgement_and_restart(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.db", 1 << 20)
    assert [outbox.add(batch(name)) for name in "abc"] == [1, 2, 3]
    assert names(outbox, 2) == [(1, "a"), (2, "b")]
    outbox.acknowledge(3)
    assert outbox.count() == 0
    epoch = outbox.epoch
    outbox.close()
    again = Outbox(tmp_path / "o.db", 1 << 20)
    assert again.epoch == epoch
    assert len(epoch) == 32
    assert again.add(batch("d")) == 4
    again.close()


def test_oldest_goes_when_it_is_full_and_is_counted(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.db", 300)
    for number in range(10):
        outbox.add(batch(f"{number}" * 80))
    held = names(outbox)
    assert [sequence for sequence, _ in held] == [8, 9, 10]
    assert outbox.dropped() == 7
    outbox.add(batch("x" * 1000))
    assert names(outbox) == [(11, "x" * 1000)]
    outbox.close()


def test_damaged_file_begins_anew_under_another_epoch(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    first = Outbox(path, 1 << 20)
    epoch = first.epoch
    first.close()
    path.write_bytes(b"garbage that is no database " * 100)
    second = Outbox(path, 1 << 20)
    assert second.replaced
    assert second.epoch != epoch
    assert second.add(batch("a")) == 1
    second.close()


def test_sample_measures_the_box_and_its_workers(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.db", 1 << 20)
    worker = WorkerFigures("m", 3, "active", 0, 1, "onnxruntime", 4096, 7, 1)
    measured = sample(tmp_path, [worker], outbox)
    values = {(item.name, item.attributes.get("sluice.process", "")): item for item in measured.metrics}
    assert values["process.memory.usage", "worker"].value == 4096
    assert values["process.memory.usage", "agent"].value > 1 << 20
    assert values["sluice.inference.requests", "worker"].attributes["sluice.version"] == "3"
    assert 0 <= values["system.cpu.utilization", ""].value <= 1
    assert 0 < values["system.memory.utilization", ""].value <= 1
    assert {item.unit for item in measured.metrics} <= {"1", "By", "s", "Cel", "{request}", "{batch}"}
    assert all(item.time.seconds > 1_700_000_000 for item in measured.metrics)
    outbox.close()
