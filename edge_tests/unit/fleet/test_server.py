"""The process: its address, its lock, its refusals, its word to systemd."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Device, Operator, eventually, failing, onnx_model
from fleet.config import ControlConfig
from fleet.notify import notify, watchdog_interval_s
from sluice.api.v1 import registry_pb2, rollouts_pb2
from updater.digests import digest_bytes
from updater.errors import SluiceError


def test_it_says_where_it_listens_and_cleans_up(control: ControlPlane) -> None:
    assert f"listening on {control.address}\n" in control.log
    assert (control.data / "address").read_text() == control.address
    control.stop()
    assert not (control.data / "address").exists()


def test_a_second_process_on_the_same_data_is_refused(control: ControlPlane) -> None:
    other = ControlPlane(control.data)
    other.log_path = control.data.with_name("other.log")
    address = (control.data / "address").read_text()
    with pytest.raises(AssertionError, match="STATE_LOCKED"):
        other.start()
    (control.data / "address").write_text(address)


def test_a_port_that_is_taken_is_refused(control: ControlPlane, tmp_path: Path) -> None:
    other = ControlPlane(tmp_path / "other")
    other.address = control.address
    with pytest.raises(AssertionError, match="CONFIG_INVALID: cannot listen"):
        other.start()


@pytest.mark.parametrize("listen", ["", "8470", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x"])
def test_a_malformed_address_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(SluiceError) as caught:
        ControlConfig(tmp_path, listen=listen).check()
    assert caught.value.code == "CONFIG_INVALID"


def test_an_interrupt_ends_it_like_a_stop(control: ControlPlane) -> None:
    assert control.process is not None
    control.process.send_signal(signal.SIGINT)
    assert control.process.wait(20) == 0
    assert control.log.rstrip().endswith("stopping")


def test_a_call_that_runs_may_finish_when_it_stops(control: ControlPlane) -> None:
    data, go_on = onnx_model(1), threading.Event()
    question = registry_pb2.GetUploadRequest(digest=digest_bytes(data))

    def parts() -> Iterator[registry_pb2.UploadFileRequest]:
        header = registry_pb2.UploadHeader(digest=digest_bytes(data), size=len(data))
        yield registry_pb2.UploadFileRequest(header=header)
        yield registry_pb2.UploadFileRequest(chunk=data[:1000])
        go_on.wait(30)
        yield registry_pb2.UploadFileRequest(chunk=data[1000:])

    with Operator(control.address) as operator:
        call = operator.registry.UploadFile.future(parts(), timeout=30)
        eventually(lambda: operator.registry.GetUpload(question).committed_bytes == 1000, "the first bytes")
        assert control.process is not None
        control.process.send_signal(signal.SIGTERM)
        eventually(lambda: " info stopping" in control.log, "the stop to begin")
        go_on.set()
        assert call.result().committed_bytes == len(data)
    control.stop()


def test_standing_streams_are_ended_at_once_when_it_stops(control: ControlPlane) -> None:
    with Operator(control.address) as operator, Device(control.address, "box-1") as device:
        operator.push("digits", 1, onnx_model(1))
        rollout = operator.rollouts.CreateRollout(rollouts_pb2.CreateRolloutRequest(model="digits"))
        watch = operator.rollouts.WatchRollout(rollouts_pb2.WatchRolloutRequest(id=rollout.id))
        next(watch)
        control.stop()
        for stream in (device.call, watch):
            error = failing(lambda stream=stream: list(stream))  # type: ignore[misc]
            assert (error.code, error.message) == ("CONTROL_UNREACHABLE", "the control plane is stopping")


def test_systemd_hears_of_readiness_of_life_and_of_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(20)
        env = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000"}
        with ControlPlane(tmp_path / "control", env=env):
            heard = [manager.recv(100) for _ in range(3)]
        assert heard == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        eventually(lambda: manager.recv(100) == b"STOPPING=1", "the end")


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval_s() is None
    monkeypatch.delenv("WATCHDOG_PID")
    assert watchdog_interval_s() == 15.0
