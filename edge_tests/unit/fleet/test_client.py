"""ControlClient against a real control plane, over good links and bad ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Device, Operator, onnx_model, running
from edge_tests.harness.relay import Relay
from fleet import client as client_module
from fleet.client import ClientLimits, ControlClient, RetryPolicy, check_address
from fleet.client_upload import UploadLimits
from sluice.api.v1 import errors_pb2, rollouts_pb2
from updater.digests import digest_bytes
from updater.errors import SluiceError

QUICK = RetryPolicy(attempts=4, first_s=0.02, longest_s=0.1)


def quick(**keywords: object) -> ClientLimits:
    return ClientLimits(retry=QUICK, **keywords)  # type: ignore[arg-type]


@pytest.fixture
def client(control: ControlPlane) -> Iterator[ControlClient]:
    with ControlClient(control.address, quick()) as made:
        yield made


@pytest.fixture
def relay(control: ControlPlane) -> Iterator[Relay]:
    with Relay(control.address) as made:
        yield made


def noise(path: Path, size: int) -> tuple[Path, str, int]:
    """A file that nothing compresses, with its digest and size."""
    data = np.random.default_rng(size).bytes(size)
    path.write_bytes(data)
    return path, digest_bytes(data), size


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("127.0.0.1:8470", "127.0.0.1:8470"),
        ("control.example", "control.example:8470"),
        ("[::1]:9000", "[::1]:9000"),
        ("[::1]", "[::1]:8470"),
        ("unix:/run/sluice.sock", "unix:/run/sluice.sock"),
    ],
)
def test_an_address_may_leave_out_the_port(given: str, target: str) -> None:
    assert check_address(given) == target


@pytest.mark.parametrize("given", ["", "a b", "host:", "host:0", "host:65536", "http://host", "::1", "unix:"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(SluiceError) as caught:
        check_address(given)
    assert caught.value.reason == errors_pb2.REQUEST_INVALID
    assert "--control" in caught.value.hint


def test_pauses_grow_to_their_limit_and_differ() -> None:
    policy = RetryPolicy(first_s=1.0, longest_s=4.0)
    for failures, step in ((1, 1.0), (2, 2.0), (3, 4.0), (50, 4.0), (5000, 4.0)):
        pauses = {policy.pause_s(failures) for _ in range(50)}
        assert all(step / 2 <= pause <= step for pause in pauses)
        assert len(pauses) > 1


def test_nobody_there_is_an_error_after_a_few_tries() -> None:
    with ControlClient("127.0.0.1:9", quick()) as nobody, pytest.raises(SluiceError) as caught:
        list(nobody.list_models())
    assert caught.value.reason == errors_pb2.CONTROL_UNREACHABLE
    assert caught.value.exit_code == 8


def test_a_control_plane_that_comes_back_is_waited_for(control: ControlPlane) -> None:
    control.stop()
    patient = ClientLimits(timeout_s=60, retry=RetryPolicy(attempts=1000, first_s=0.05, longest_s=0.2))
    starter = threading.Timer(0.5, control.start)
    starter.start()
    with ControlClient(control.address, patient) as client:
        assert list(client.list_models()) == []
    starter.join()


def test_a_silent_server_is_given_up(relay: Relay) -> None:
    relay.freeze()
    impatient = quick(timeout_s=0.5)
    with ControlClient(relay.address, impatient) as client, pytest.raises(SluiceError) as caught:
        client.get_model("m")
    assert caught.value.reason == errors_pb2.CONTROL_UNREACHABLE


def test_what_must_not_happen_twice_is_sent_once(
    relay: Relay, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.push("m", 1, onnx_model())
    relay.cut_after(1)
    pauses: list[float] = []  # between attempts of ours; gRPC itself may connect as often as it likes
    monkeypatch.setattr(client_module.time, "sleep", pauses.append)
    with ControlClient(relay.address, ClientLimits(retry=RetryPolicy(attempts=4))) as client:
        with pytest.raises(SluiceError) as caught:
            client.create_rollout("m", 1)
        assert not pauses
        assert "unknown" in caught.value.hint
        with pytest.raises(SluiceError):
            client.get_model("m")
        assert len(pauses) == 3, "an idempotent call is tried again"


def test_pages_are_put_together(
    client: ControlClient, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx_model()
    for name in "abcde":
        operator.push(name, 1, model)
    monkeypatch.setattr(client_module, "PAGE_SIZE", 2)
    assert [found.name for found in client.list_models()] == list("abcde")


def test_errors_of_the_server_arrive_whole(client: ControlClient) -> None:
    with pytest.raises(SluiceError) as caught:
        client.get_model("nothing")
    assert caught.value.reason == errors_pb2.MODEL_UNKNOWN
    assert "nothing" in caught.value.message
    assert caught.value.hint


def test_an_upload_happens_once(client: ControlClient, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 300_001)
    seen: list[tuple[int, int]] = []
    assert client.upload_file(path, digest, size, lambda *step: seen.append(step)) == size
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    assert client.upload_file(path, digest, size) == 0
    assert client.get_upload(digest).complete


def test_an_empty_file_can_be_uploaded(client: ControlClient, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 0)
    client.upload_file(path, digest, size)
    assert client.get_upload(digest).complete


def test_an_upload_goes_on_after_every_cut(relay: Relay, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 4_000_000)
    relay.cut_after(900_000)
    # On a busy machine several cuts in a row may bring nothing; only going on matters here.
    patient = ClientLimits(retry=RetryPolicy(attempts=40, first_s=0.02, longest_s=0.2))
    with ControlClient(relay.address, patient) as client:
        assert client.upload_file(path, digest, size) == size
        assert client.get_upload(digest).complete
    assert relay.connections > 4, "no connection lived long enough for the whole file"


def test_an_upload_that_gets_nowhere_ends(relay: Relay, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 1_000_000)
    relay.cut_after(1)
    with ControlClient(relay.address, quick()) as client, pytest.raises(SluiceError) as caught:
        client.upload_file(path, digest, size)
    assert caught.value.reason == errors_pb2.CONTROL_UNREACHABLE


def test_an_upload_that_stalls_ends_and_can_go_on(relay: Relay, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 8_000_000)
    limits = ClientLimits(
        timeout_s=1.0, retry=RetryPolicy(attempts=1), upload=UploadLimits(stall_s=0.5, poll_s=0.02)
    )

    def freeze(done: int, _total: int) -> None:
        if done > 1_000_000:
            relay.freeze()

    with ControlClient(relay.address, limits) as client:
        with pytest.raises(SluiceError) as caught:
            client.upload_file(path, digest, size, freeze)
        assert caught.value.reason == errors_pb2.CONTROL_UNREACHABLE
        assert "same command again" in caught.value.hint
    relay.thaw()
    with ControlClient(relay.address, quick()) as client:
        assert client.upload_file(path, digest, size) <= size
        assert client.get_upload(digest).complete


def test_a_file_that_changes_meanwhile_is_refused(client: ControlClient, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 100_000)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(SluiceError) as caught:
        client.upload_file(path, digest, size)
    assert caught.value.reason == errors_pb2.FILE_DIGEST_MISMATCH
    noise(path, 100_000)
    assert client.upload_file(path, digest, size) == size


def test_a_file_that_shrinks_meanwhile_is_refused(client: ControlClient, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 100_000)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(SluiceError, match="became shorter") as caught:
        client.upload_file(path, digest, size)
    assert caught.value.reason == errors_pb2.FILE_DIGEST_MISMATCH


def test_a_file_that_vanishes_meanwhile_is_named(client: ControlClient, tmp_path: Path) -> None:
    path, digest, size = noise(tmp_path / "f", 100_000)
    path.unlink()
    with pytest.raises(SluiceError, match=str(path)) as caught:
        client.upload_file(path, digest, size)
    assert caught.value.reason == errors_pb2.IO_FAILED


def test_a_watch_outlives_its_streams(control: ControlPlane, operator: Operator) -> None:
    manifest = operator.push("m", 1, onnx_model())
    with (
        Device(control.address, "box") as device,
        ControlClient(control.address, quick(watch_s=0.3)) as client,
    ):
        begun = client.create_rollout("m", 1)
        states = []

        def watch() -> None:
            states.extend(found.state for found in client.watch_rollout(begun.id))

        watcher = threading.Thread(target=watch)
        watcher.start()
        time.sleep(1.0)  # several streams come and go
        assert watcher.is_alive()
        assert len(states) > 1
        device.next_desired()
        device.report(running(manifest))
        watcher.join(30)
        assert not watcher.is_alive()
    assert states[-1] == rollouts_pb2.ROLLOUT_STATE_SUCCEEDED


def test_a_watch_of_nothing_is_refused(client: ControlClient) -> None:
    with pytest.raises(SluiceError) as caught:
        list(client.watch_rollout("nothing"))
    assert caught.value.reason == errors_pb2.ROLLOUT_UNKNOWN


def test_a_watch_ends_when_the_control_plane_is_gone(control: ControlPlane, operator: Operator) -> None:
    operator.push("m", 1, onnx_model())
    with Device(control.address, "box"), ControlClient(control.address, quick()) as client:
        begun = client.create_rollout("m", 1)
        watch = client.watch_rollout(begun.id)
        next(watch)
        control.kill()
        with pytest.raises(SluiceError) as caught:
            list(watch)
    assert caught.value.reason == errors_pb2.CONTROL_UNREACHABLE
