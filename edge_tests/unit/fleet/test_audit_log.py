"""The audit log on disk: durable when it says so, one chain over segments and restarts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fleet import audit_record, limits
from fleet.audit_chain import START, verify
from fleet.audit_log import AuditLog
from sluice.api.v1 import devices_pb2, errors_pb2, registry_pb2, rollouts_pb2
from updater import canonical
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.identity import parse


def scenario(directory: Path, work: Callable[[AuditLog], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        log = AuditLog(directory)
        try:
            await log.start()
            await work(log)
        finally:
            await log.stop()

    asyncio.run(run())


async def fill(log: AuditLog, count: int, size: int = 10) -> None:
    await asyncio.gather(*(log.append({"event": "call", "what": "x" * size}) for _ in range(count)))


def everything(log: AuditLog, **how: int) -> list[bytes]:
    return [record for portion in log.read(**how) for record in portion]


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_records_are_chained_over_restarts(tmp_path: Path) -> None:
    async def first(log: AuditLog) -> None:
        assert log.head == START
        await fill(log, 20)
        assert log.head.sequence == 20

    async def second(log: AuditLog) -> None:
        assert log.head.sequence == 20
        head = await log.append({"event": "call"})
        records = everything(log)
        assert verify(records).head == head == log.head
        assert len(records) == 21
        assert [len(everything(log, newest=n)) for n in (1, 5, 100)] == [1, 5, 21]
        assert len(everything(log, from_sequence=20)) == 2
        assert everything(log, from_sequence=99) == []

    scenario(tmp_path / "audit", first)
    scenario(tmp_path / "audit", second)
    (segment,) = files(tmp_path / "audit")
    assert segment.stat().st_mode & 0o077 == 0


def test_a_full_segment_is_sealed_and_the_chain_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AUDIT_SEGMENT_BYTES", 5000)

    async def work(log: AuditLog) -> None:
        for _ in range(6):
            await fill(log, 5, size=500)
        assert verify(everything(log)).head == log.head
        assert [len(everything(log, newest=n)) for n in (1, 12, 30)] == [1, 12, 30]
        assert len(everything(log, from_sequence=7)) == 24

    scenario(tmp_path / "audit", work)
    segments = files(tmp_path / "audit")
    assert [int(path.stem) for path in segments] == [1, 11, 21]
    assert [path.stat().st_mode & 0o777 for path in segments] == [0o400, 0o400, 0o600]
    assert verify(b"".join(path.read_bytes() for path in segments).splitlines()).head.sequence == 30
    # A segment that was begun when the power went, and holds nothing yet.
    (tmp_path / "audit" / f"{31:016d}.jsonl").touch()

    async def go_on(log: AuditLog) -> None:
        assert (await log.append({"event": "call"})).sequence == 31
        assert verify(everything(log)).head == log.head

    scenario(tmp_path / "audit", go_on)


def test_a_record_that_a_crash_cut_is_removed(tmp_path: Path) -> None:
    scenario(tmp_path / "audit", lambda log: fill(log, 3))
    (segment,) = files(tmp_path / "audit")
    whole = segment.read_bytes()
    segment.write_bytes(whole + whole.splitlines()[-1][:40])

    async def work(log: AuditLog) -> None:
        assert log.head.sequence == 3
        await fill(log, 1)
        assert verify(everything(log)).head.sequence == 4

    scenario(tmp_path / "audit", work)


@pytest.mark.parametrize("harm", ["changed", "removed", "renamed"])
def test_a_log_that_was_tampered_with_takes_no_more(tmp_path: Path, harm: str) -> None:
    scenario(tmp_path / "audit", lambda log: fill(log, 5))
    (segment,) = files(tmp_path / "audit")
    lines = segment.read_bytes().splitlines(keepends=True)
    if harm == "changed":
        segment.write_bytes(b"".join(lines).replace(b"xxxx", b"xxyx", 1))
    elif harm == "removed":
        segment.write_bytes(b"".join(lines[:2] + lines[3:]))
    else:
        segment.rename(segment.with_name(f"{2:016d}.jsonl"))

    async def run() -> None:
        log = AuditLog(tmp_path / "audit")
        try:
            for _ in range(2):  # the second answer is remembered
                with pytest.raises(SluiceError) as caught:
                    await log.append({"event": "call"})
                assert caught.value.code == "AUDIT_BROKEN"
                assert caught.value.message.startswith("nothing is changed while the audit log")
        finally:
            await log.stop()

    asyncio.run(run())


def test_a_write_that_fails_is_said_and_leaves_no_trace(tmp_path: Path) -> None:
    async def work(log: AuditLog) -> None:
        await fill(log, 2)
        segment = log._segment
        assert segment is not None
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, segment._descriptor)  # the file system is full from here on
        os.close(full)
        with pytest.raises(SluiceError) as caught:
            await log.append({"event": "call"})
        assert caught.value.code == "DISK_FULL"
        assert log.head.sequence == 2
        # There is room again: the file is opened anew, and the chain goes on.
        assert (await log.append({"event": "call"})).sequence == 3
        assert verify(everything(log)).head == log.head

    scenario(tmp_path / "audit", work)


def test_what_waits_for_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AUDIT_WAITING", 3)

    async def work(log: AuditLog) -> None:
        outcomes = await asyncio.gather(
            *(log.append({"event": "call"}) for _ in range(10)), return_exceptions=True
        )
        refused = [error for error in outcomes if isinstance(error, SluiceError)]
        assert {error.code for error in refused} == {"LIMIT_EXCEEDED"}
        assert 0 < len(refused) < 10
        assert log.head.sequence == 10 - len(refused)

    scenario(tmp_path / "audit", work)


def test_a_request_is_told_without_what_is_long_or_secret() -> None:
    phase = rollouts_pb2.Phase(
        selector=devices_pb2.Selector(device_ids=[f"box-{n}" for n in range(40)], labels={"büro": "x"}),
        deadline_s=60,
    )
    told = audit_record.requested(rollouts_pb2.CreateRolloutRequest(model="m", version=2, phases=[phase]))
    (first,) = told["phases"]
    assert (told["model"], told["version"], first["deadline_s"]) == ("m", 2, 60)
    assert first["selector"]["labels"] == ["büro=x"]
    assert first["selector"]["device_ids"][-2:] == ["box-15", "and 24 more"]
    manifest = registry_pb2.PublishVersionRequest(manifest=b"secret")
    assert audit_record.requested(manifest) == {"manifest": digest_bytes(b"secret")}
    many = devices_pb2.LabelDeviceRequest(id="x" * 999, set={"k" * 99 + str(n): "v" * 500 for n in range(30)})
    assert set(audit_record.requested(many)) == {"cut"}
    upload = registry_pb2.UploadFileRequest(header=registry_pb2.UploadHeader(size=(1 << 60)))
    assert audit_record.requested(upload) == {"header": {"size": str(1 << 60)}}


def test_the_longest_records_fit() -> None:
    who = audit_record.caller_fields(
        parse(f"spiffe://{'d' * 128}/operator/{'n' * 64}/admin"), None, "a" * 999
    )
    error = SluiceError(errors_pb2.PERMISSION_DENIED, "ü" * 5000, obj="ü" * 5000)
    request = devices_pb2.LabelDeviceRequest(id="ü" * 5000, set={"ü" * 80: "ü" * 900})
    for entry in (
        audit_record.denied(who, "M" * 100, error, 0),
        audit_record.call(who, "M" * 100, request, 0),
        audit_record.outcome((1 << 53) - 1, "M" * 100, "X" * 40, "ü" * 5000, 0),
    ):
        assert len(canonical.encode(entry)) < limits.AUDIT_RECORD_BYTES - 200
