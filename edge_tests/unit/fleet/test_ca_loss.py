"""An authority's keys lost, stolen, dropped: what ends at once, and how everybody comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import grpc

from edge_tests.harness import trust
from edge_tests.harness.applicant import let_in
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, eventually, failing
from fleet import ca
from sluice.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    errors_pb2,
    registry_pb2,
    sync_pb2,
    sync_pb2_grpc,
)
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind, Role
from updater.keyfile import read_key
from updater.wire import from_rpc_error


def test_a_dropped_authority_acts_at_once_on_calls_and_open_streams(tmp_path: Path) -> None:
    """As revocation does: on a stream, an upload, a standing connection; whoever renewed is not disturbed."""
    place = tmp_path / "control" / "ca"
    issuer = ca.create(place, trust.TRUST_DOMAIN, trust.now())

    def made(kind: Kind, name: str, role: Role | None = None) -> Credentials:
        return trust.issue(Identity(trust.TRUST_DOMAIN, kind, name, role), by=ca.load(place))

    with ControlPlane(tmp_path / "control") as control:
        box, admin = made(Kind.DEVICE, "box"), made(Kind.OPERATOR, "ann", Role.ADMIN)
        old = ca.root_fingerprint(issuer.roots[0])
        ca.rotate_root(place, read_key(place / ca.ROOT_KEY), trust.now())
        other = made(Kind.DEVICE, "other")
        bundle = ca.load(place).bundle
        with (
            replace(box, bundle=bundle).channel(control.address) as channel,
            replace(other, bundle=bundle).channel(control.address) as renewed,
            replace(admin, bundle=bundle).channel(control.address) as operating,
        ):
            # The control plane takes the rotation up within a second.
            eventually(lambda: _listed(renewed, "other") is None, "the new root is trusted")
            streams = [_connected(channel, "box"), _connected(renewed, "other")]
            ann = Operator("", channel=operating)
            held = threading.Event()

            def parts() -> Iterator[registry_pb2.UploadFileRequest]:
                header = registry_pb2.UploadHeader(digest="sha256:" + "0" * 64, size=1000)
                yield registry_pb2.UploadFileRequest(header=header)
                held.wait(30)

            upload = ann.registry.UploadFile.future(parts(), timeout=60)
            assert _listed(channel, "box") is None
            eventually(lambda: "Registry.UploadFile" in _audit(control), "the upload is under way")
            began = time.monotonic()
            ca.drop_root(place, old)
            for ended in (lambda: list(streams[0]), upload.result):
                failure = failing(ended)
                assert failure.reason == errors_pb2.CERTIFICATE_INVALID, failure
                assert "was dropped" in failure.message
            assert time.monotonic() - began < 5
            held.set()
            # The connection stands still; the next call on it is refused as well.
            failure = _listed(channel, "box")
            assert failure is not None
            assert failure.reason == errors_pb2.CERTIFICATE_INVALID
            assert _listed(renewed, "other") is None
            assert streams[1].is_active()
            streams[1].cancel()
        assert let_in(control.address, box) is not None
        assert "authority_dropped" in control.log
        assert "ended=2" in control.log


def _connected(channel: grpc.Channel, name: str) -> Any:
    hello = sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id=name))
    call = sync_pb2_grpc.SyncStub(channel).Connect(chain([hello], _until(20)), timeout=60)
    assert next(call).HasField("welcome")
    assert next(call).HasField("desired")
    return call


def _listed(channel: grpc.Channel, name: str) -> SluiceError | None:
    """How a device's call about itself is refused; None when it is not."""
    try:
        devices_pb2_grpc.DevicesStub(channel).GetDevice(devices_pb2.GetDeviceRequest(id=name), timeout=20)
    except grpc.RpcError as error:
        found = from_rpc_error(error, "testing", "the control plane")
        return None if found.reason == errors_pb2.DEVICE_UNKNOWN else found
    return None


def _audit(control: ControlPlane) -> str:
    return "".join(path.read_text() for path in (control.data / "audit").iterdir())


def _until(seconds: float) -> Iterator[sync_pb2.ConnectRequest]:
    for _ in range(int(seconds * 2)):
        time.sleep(0.5)
        yield sync_pb2.ConnectRequest(reported=sync_pb2.ReportedState())
