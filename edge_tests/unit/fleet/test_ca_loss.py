"""An authority's keys lost, stolen, dropped: what ends at once, and how everybody comes back."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent.config import AgentConfig
from agent.identity import BoxIdentity
from edge_tests.harness import trust
from edge_tests.harness.applicant import let_in
from edge_tests.harness.command import sluice
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, eventually, failing
from fleet import ca
from fleet.authority import Authority
from sluice.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    errors_pb2,
    registry_pb2,
    sync_pb2,
    sync_pb2_grpc,
)
from updater.certificates import certificates
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


def _box(control: ControlPlane, place: Path, name: str) -> BoxIdentity:
    """A box that enrolled with a token, and has the bundle of that moment."""
    slip = control.enrolling(name)
    bundle = place / f"{name}.pem"
    bundle.write_bytes(Path(slip["control.bundle"]).read_bytes())
    config = AgentConfig(
        control_address=control.address,
        enrolment_address=control.enrolment_address,
        device_id=name,
        control_bundle=bundle,
        control_token=slip["control.token"],
        state_dir=place / name,
    )
    box = BoxIdentity(config)
    box.enrol()
    return box


def _comes_in(control: ControlPlane, box: BoxIdentity) -> bool:
    return let_in(control.address, box.credentials) is None


def test_recovery_a_roots_key_is_lost_without_a_backup(tmp_path: Path) -> None:
    """Both roots are accepted; a box moves over when it next renews, also one that was away for long."""
    with ControlPlane(tmp_path / "control") as control:
        place = control.data / "ca"
        first = ca.load(place)
        box, away = _box(control, tmp_path, "box"), _box(control, tmp_path, "away")
        refused = sluice("--json", "control", "ca", "rotate", "--root", "--key-lost", "--data", control.data)
        assert "it is not lost" in refused.expect(3).document["error"]["message"]
        (place / ca.ROOT_KEY).unlink()
        sluice("control", "ca", "rotate", "--root", "--key-lost", "--data", control.data).expect()
        bundle = ca.load(place).bundle
        assert bundle != first.bundle
        eventually(lambda: _renewed(box) == bundle, "the new root reaches the box")
        assert _comes_in(control, box)
        assert _comes_in(control, away)
        # Nobody was touched; now, or when the old intermediate ends, the new root's takes over.
        eventually(lambda: _renewed(away) == bundle, "the one that was away comes back in time")
        sluice("control", "ca", "rotate", "--data", control.data).expect()
        new = ca.load(place)
        assert new.certificate.issuer == new.roots[0].subject
        eventually(lambda: control.log.count("authority_changed") == 2, "the control plane issues by it")
        for each in (box, away):
            each.renew()
            assert _comes_in(control, each)
            assert certificates(each.credentials.chain)[1] == new.certificate
        # What leads to the old root alone may go then.
        sluice("control", "ca", "drop", ca.root_fingerprint(first.roots[0]), "--data", control.data).expect()
        eventually(lambda: let_in(control.address, trust.operator()) is not None, "the old root is gone")
        for each in (box, away):
            each.renew()
            assert _comes_in(control, each)


def _renewed(box: BoxIdentity) -> bytes:
    box.renew()
    return box.credentials.bundle


def test_a_replaced_root_waits_for_boxes_as_long_as_the_intermediate_lasts(tmp_path: Path) -> None:
    made = trust.now() - timedelta(days=600)  # of two years
    ca.create(tmp_path, "late.test", made)
    (tmp_path / ca.ROOT_KEY).unlink()
    ca.replace_root(tmp_path, trust.now())
    before = ca.load(tmp_path).certificate
    Authority(tmp_path, 3600.0)
    assert ca.load(tmp_path).certificate == before  # at two thirds of its life another would be replaced
    ca.create(tmp_path / "later", "late.test", trust.now() - timedelta(days=710))
    (tmp_path / "later" / ca.ROOT_KEY).unlink()
    ca.replace_root(tmp_path / "later", trust.now())
    Authority(tmp_path / "later", 3600.0)
    last = ca.load(tmp_path / "later")
    assert last.certificate.issuer == last.roots[0].subject


def test_recovery_a_roots_key_is_stolen(tmp_path: Path) -> None:
    """A new root and the old one dropped, at once: boxes come back by themselves, the thief does not."""
    with ControlPlane(tmp_path / "control") as control:
        place = control.data / "ca"
        box = _box(control, tmp_path, "box")
        stolen = ca.load(place)
        thief = trust.issue(Identity(trust.TRUST_DOMAIN, Kind.OPERATOR, "thief", Role.ADMIN), by=stolen)
        assert let_in(control.address, thief) is None
        sluice("control", "ca", "rotate", "--root", "--data", control.data).expect()
        old = ca.root_fingerprint(stolen.roots[0])
        sluice("control", "ca", "drop", old, "--data", control.data).expect()
        eventually(lambda: let_in(control.address, thief) is not None, "the thief is out")
        assert not _comes_in(control, box)
        box.renew()  # as its agent does when it is refused: it knows the old root alone, and gets by
        assert _comes_in(control, box)
        assert box.credentials.bundle == ca.load(place).bundle


def test_recovery_the_issuers_file_is_lost_and_the_roots_key_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`root.key`, brought back from where it was kept, makes an authority that boxes know already."""
    monkeypatch.setenv("SLUICE_PROFILE", str(shutil.copytree(trust.profile(), tmp_path / "profile")))
    with ControlPlane(tmp_path / "control") as control:
        box = _box(control, tmp_path, "box")
        control.stop()
        for name in (ca.ISSUER, ca.BUNDLE):
            (control.data / "ca" / name).unlink()
        # The trust domain and the operator are those of the profile that is there.
        made = sluice("--json", "control", "init", "--keys-elsewhere", "--data", control.data)
        assert made.expect().document["trust_domain"] == trust.TRUST_DOMAIN
        control.start()
        assert _comes_in(control, box)
        box.renew()
        assert _comes_in(control, box)
