"""A box that was sent enough for now: it waits as long as it is told, goes on where it was, and no update
fails.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import tiny_onnx
from edge_tests.harness.operator import eventually
from edge_tests.harness.secure import Caller, SecureControl
from edge_tests.harness.signing import OperatorTrust
from fleet.client import ControlClient
from fleet.publish import prepare, publish
from fleet.quotas import DEVICE, Quotas
from fleet.recipe import Recipe, VariantRecipe
from sluice.api.v1 import devices_pb2, diff_pb2, errors_pb2, rollouts_pb2, sync_pb2
from updater.errors import SluiceError
from updater.wire import from_rpc_error

pytestmark = pytest.mark.e2e
BURST = 2 << 20
RATE = 2 << 20
HIDDEN = 100_000  # some 5 MB


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SecureControl]:
    monkeypatch.setattr("fleet.limits.SENT_AT_ONCE_BYTES", 1 << 20)
    quotas = Quotas(device=replace(DEVICE, sent_per_s=RATE, sent_burst=BURST))
    with SecureControl(tmp_path / "control", quotas) as running:
        yield running


def roll_out(client: ControlClient, operator: OperatorTrust, directory: Path) -> None:
    """Publishes a model that is more than is sent at once, for one box."""
    file = tiny_onnx(directory / "big.onnx", hidden=HIDDEN)
    recipe = Recipe(model="big", variants=(VariantRecipe(file),))
    publish(client, prepare(recipe), sign=operator.signing.sign_version)
    selector = devices_pb2.Selector(device_ids=["box"])
    client.create_rollout(
        "big", 1, [rollouts_pb2.Phase(selector=selector, deadline_s=600, max_failed_percent=0)]
    )


def test_a_download_that_is_too_much_pauses_and_goes_on(control: SecureControl, tmp_path: Path) -> None:
    with ControlClient(control.address) as client:
        operator = OperatorTrust(tmp_path / "trust", client)
        try:
            with AgentProcess(tmp_path / "a", control.address, "box") as agent:
                eventually(lambda: [device.id for device in client.list_devices()] == ["box"], "the box")
                began = time.monotonic()
                roll_out(client, operator, tmp_path)
                report = agent.wait_for_version("big", 1)
                took_s = time.monotonic() - began
                told = agent.log.read_text("utf-8")
        finally:
            operator.close()
    assert report.fetched_bytes == report.fetch_total_bytes > 2 * BURST
    assert took_s > (report.fetch_total_bytes - BURST) / RATE
    assert "to be sent to it" in told
    assert told.count("waiting") >= 2
    assert "failed" not in told
    assert not report.HasField("failure")


def test_what_is_sent_is_bounded_for_each_caller(control: SecureControl, tmp_path: Path) -> None:
    """The same on the wire: bytes come until the limit, the rest from there; nothing else is held up."""
    with ControlClient(control.address) as client:
        operator = OperatorTrust(tmp_path / "trust", client)
        operator.close()
        box, hello = control.device("box"), sync_pb2.Hello(device_id="box")
        box.sync.Poll(sync_pb2.PollRequest(hello=hello), timeout=30)
        roll_out(client, operator, tmp_path)
        offer = box.plan("big", 1, variant="onnx-float32").files[0].full
        began, got, refusals = time.monotonic(), 0, 0
        while got < offer.size:
            received, refused = fetch(box, offer.digest, got)
            got += received
            if refused is None:
                break
            refusals += 1
            assert refused.reason == errors_pb2.LIMIT_EXCEEDED
            assert 0 < refused.retry_s <= (1 << 20) / RATE + 0.01
            # Whoever does not wait gets nothing; other calls go on, and so does what it is told to install.
            assert fetch(box, offer.digest, got)[0] == 0
            box.devices.GetDevice(devices_pb2.GetDeviceRequest(id="box"), timeout=30)
            box.sync.Poll(sync_pb2.PollRequest(hello=hello), timeout=30)
            time.sleep(refused.retry_s)
        assert got == offer.size
        assert refusals >= 2
        assert got <= BURST + RATE * (time.monotonic() - began)


def fetch(box: Caller, digest: str, offset: int) -> tuple[int, SluiceError | None]:
    """How many bytes came from `offset` on, and why not more."""
    got = 0
    try:
        for part in box.diff.Fetch(diff_pb2.FetchRequest(digest=digest, offset=offset), timeout=60):
            assert part.offset == offset + got
            got += len(part.data)
    except grpc.RpcError as error:
        return got, from_rpc_error(error, "fetching", "the control plane")
    return got, None
