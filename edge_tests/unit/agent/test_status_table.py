from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from agent import swap
from agent.logs import KeyValueFormatter
from agent.notify import notify, watchdog_interval_s
from agent.status_table import ENDS, WIDTH, duration, render, size
from sluice.api.v1 import admin_pb2, errors_pb2, sync_pb2


def full_status() -> admin_pb2.GetStatusResponse:
    status = admin_pb2.GetStatusResponse(
        device_id="d" * 64,
        agent_version="0.1.0",
        control_address="control.example:8470",
        control_error="CONTROL_UNREACHABLE: " + "no answer " * 30,
        store_bytes=5_000_000_000,
    )
    for number in range(3):
        status.reported.models.append(
            sync_pb2.ReportedModel(
                model="detector-" + "x" * 55,
                variant="onnx-" + "y" * 59,
                active_version=123456,
                previous_version=123455,
                target_version=123457,
                step=sync_pb2.UPDATE_STEP_FETCHING,
                fetched_bytes=50,
                fetch_total_bytes=200,
                healthy=number > 0,
                failure=sync_pb2.UpdateFailure(
                    version=123457, reason=errors_pb2.DISK_FULL, message="word " * 50, attempts=3
                ),
            )
        )
        status.swaps.append(full_swap())
        status.workers.append(
            admin_pb2.WorkerStatus(
                model="detector-" + "x" * 55, version=123456, role="active", runtime="tflite-runtime"
            )
        )
    return status


def full_swap() -> admin_pb2.SwapStatus:
    return admin_pb2.SwapStatus(
        model="detector-" + "x" * 55,
        from_version=123456,
        to_version=123457,
        phase="shadowing",
        phase_ms=4200,
        left_ms=75_000,
        gap_ms=1234,
        compared=1000,
        mismatched=10,
        unanswered=2,
        dropped=30,
        cosine_min=0.98765,
        max_abs_error=123456.789,
        requests=1024,
        failures=1000,
        p95_ms=1234.5,
        previous_p95_ms=1.25,
        passed=[admin_pb2.PassedPhase(phase="warming", ms=12_345)] * 32,
        failure="word " * 50,
    )


def test_a_change_of_version_is_told_in_full() -> None:
    text = render(admin_pb2.GetStatusResponse(swaps=[full_swap()]))
    for part in (
        ": shadowing for 4.2 s, 75 s left",
        "nothing answered for 1.2 s",
        "1000 compared, 10 unlike, 2 unanswered, 30 dropped; cosine 0.9877",
        "1024 requests, 1000 failed",
        "p95 1234.5 ms, before 1.2 ms",
        "warming 12 s, warming 12 s",
    ):
        assert part in " ".join(text.split()), part
    ended = admin_pb2.SwapStatus(model="m", to_version=2, phase="reverted", phase_ms=130_000, left_ms=5)
    assert "m - -> 2: reverted, 2 min ago\n" in render(admin_pb2.GetStatusResponse(swaps=[ended]))
    assert set(ENDS) == {phase.value for phase in swap.ENDS}


def test_fits_80_columns() -> None:
    text = render(full_status())
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in (
        "not connected",
        "fetching 25 %",
        "DISK_FULL (3 attempts, trying on)",
        "NO",
        "123457",
        "5.0 GB",
    ):
        assert part in text


def test_renewals_are_told_once_for_each_version() -> None:
    row = admin_pb2.WorkerStatus(model="m", version=2, memory_limit_bytes=600_000_000, renewals=3)
    other = admin_pb2.WorkerStatus(model="m", version=1, memory_limit_bytes=600_000_000, renewals=1)
    text = render(admin_pb2.GetStatusResponse(workers=[row, row, other]))
    assert text.endswith(
        "\n\nm@2: renewed 3 times for holding over 600.0 MB\nm@1: renewed 1 time for holding over 600.0 MB\n"
    )
    row.renewals = 0
    assert "renewed" not in render(admin_pb2.GetStatusResponse(workers=[row]))


def test_empty_box() -> None:
    text = render(admin_pb2.GetStatusResponse(device_id="d", control_connected=True))
    assert "no models yet" in text
    assert "connected" in text


def test_figures_for_people() -> None:
    assert [size(value) for value in (0, 999, 1500, 22_800_000)] == ["0 B", "999 B", "1.5 kB", "22.8 MB"]
    assert [duration(value) for value in (59, 60, 3700, 400_000)] == [
        "59 s",
        "1 min",
        "1 h 1 min",
        "4 d 15 h",
    ]


def test_log_is_one_line_whatever_happens() -> None:
    record = logging.LogRecord("agent.x", logging.WARNING, "f", 1, 'a "quoted"\nline %s', ("\\",), None)
    line = KeyValueFormatter().format(record)
    assert "\n" not in line
    assert line.endswith('level=warning source=agent.x message="a \\"quoted\\"\\nline \\\\"')
    assert line.startswith("time=20")


@pytest.mark.parametrize("abstract", [False, True])
def test_notify_reaches_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@sluice-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1", "STATUS=serving")
        assert peer.recv(100) == b"READY=1\nSTATUS=serving"


def test_notify_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    assert not notify("READY=1")


def test_watchdog_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 30.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval_s() is None
    monkeypatch.delenv("WATCHDOG_USEC")
    assert watchdog_interval_s() is None


def test_why_there_is_no_link_stands_beside_the_link() -> None:
    status = admin_pb2.GetStatusResponse(
        device_id="d", control_address="c:8470", control_error="CONTROL_UNREACHABLE: nobody answers"
    )
    lines = render(status).splitlines()
    link = next(index for index, line in enumerate(lines) if line.startswith("control "))
    assert lines[link + 1].strip() == "CONTROL_UNREACHABLE: nobody answers"
    refused = "a desired state was refused: SIGNATURE_INVALID"
    status.MergeFrom(admin_pb2.GetStatusResponse(control_connected=True, control_error=refused))
    assert refused in render(status)
    status.control_error = ""
    assert len(render(status).splitlines()) == len(lines) - 1


def test_a_change_that_was_undone_says_what_answers_now() -> None:
    swap = admin_pb2.SwapStatus(
        model="detector", from_version=1, to_version=2, phase="committed", phase_ms=180_000
    )
    reported = sync_pb2.ReportedState(models=[sync_pb2.ReportedModel(model="detector", active_version=1)])
    text = render(admin_pb2.GetStatusResponse(device_id="d", reported=reported, swaps=[swap]))
    assert "detector 1 -> 2: committed, 3 min ago; version 1 answers now\n" in text
    reported.models[0].active_version = 2
    text = render(admin_pb2.GetStatusResponse(device_id="d", reported=reported, swaps=[swap]))
    assert "answers now" not in text
