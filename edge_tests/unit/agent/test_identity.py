"""The box's own credentials: enrolment, renewal, and that nothing of it ends the agent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import doctor_trust
from agent.config import AgentConfig
from agent.doctor import ABSENT, FAULT, examine
from agent.identity import CREDENTIALS, DIRECTORY, BoxIdentity
from edge_tests.harness import trust
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.serving import eventually
from fleet import ca
from sluice.api.v1 import errors_pb2, identity_pb2, identity_pb2_grpc
from updater.certificates import certificates
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.identity import Identity, Kind


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Issues for 6 s, so that renewals come while a test looks."""
    data = tmp_path_factory.mktemp("brief") / "control"
    with ControlPlane(data, "--certificate-life-s", "6") as running:
        yield running


@pytest.fixture
def config(control: ControlPlane, tmp_path: Path, request: pytest.FixtureRequest) -> AgentConfig:
    name = request.node.name[:60]
    slip = control.enrolling(name)
    return AgentConfig(
        control_address=control.address,
        enrolment_address=control.enrolment_address,
        device_id=name,
        control_bundle=Path(slip["control.bundle"]),
        control_token=slip["control.token"],
        state_dir=tmp_path / "state",
        reconnect_max_s=0.5,
    )


@pytest.fixture
def box(config: AgentConfig) -> Iterator[BoxIdentity]:
    made = BoxIdentity(config)
    made.start()
    yield made
    made.stop(30)  # a call may be under way
    assert not made.alive()


def test_it_enrols_by_itself_and_renews_with_a_new_key_each_time(
    config: AgentConfig, box: BoxIdentity
) -> None:
    renewed: list[int] = []
    box.on_renewed = lambda: renewed.append(box.generation)
    eventually(lambda: box.generation >= 1, "enrolled")
    first = box.credentials
    eventually(lambda: box.generation >= 3, "renewed twice")
    assert renewed[-2:] == [box.generation - 1, box.generation]
    assert box.credentials.key != first.key
    assert box.credentials.check(trust.now()).name == config.device_id
    assert Credentials.load(config.state_dir / DIRECTORY / CREDENTIALS) == box.credentials
    assert box.error == ""


def test_renewals_that_fail_for_a_week_lock_nobody_out(config: AgentConfig, control: ControlPlane) -> None:
    """A week to a certificate of a day is seven lives: here, of six seconds, more than one."""
    box = BoxIdentity(config)
    box.enrol()
    dead = BoxIdentity(replace(config, enrolment_address="127.0.0.1:9"))
    dead.start()
    try:
        leaf = dead.credentials.leaf
        assert leaf is not None
        eventually(lambda: trust.now() > leaf.not_valid_after_utc and dead.error, "expired, and still trying")
        assert "CONTROL_UNREACHABLE" in dead.error
        with pytest.raises(SluiceError) as caught:
            doctor_trust.certificate(dead._config, dead)
        assert caught.value.reason == errors_pb2.CERTIFICATE_EXPIRED
        assert "renews it as soon as" in caught.value.hint
    finally:
        dead.stop(10)
    back = BoxIdentity(config)
    back.start()
    try:
        eventually(lambda: back.generation, "renewed with a certificate that had expired")
        assert back.credentials.check(trust.now()).name == config.device_id
    finally:
        back.stop(10)


def test_damaged_credentials_are_made_anew(config: AgentConfig) -> None:
    BoxIdentity(config).enrol()
    path = config.state_dir / DIRECTORY / CREDENTIALS
    path.write_bytes(b"{")
    path.chmod(0o600)
    damaged = BoxIdentity(config)
    assert "KEY_UNAVAILABLE" in damaged.error
    path.unlink()
    damaged.start()
    try:
        eventually(lambda: damaged.generation, "enrolled again with the same key")
    finally:
        damaged.stop(10)


def test_without_a_certificate_calls_say_why(config: AgentConfig) -> None:
    box = BoxIdentity(replace(config, control_bundle=None))
    with pytest.raises(SluiceError) as caught:
        box.channel(config.control_address, [])
    assert caught.value.reason == errors_pb2.UNAUTHENTICATED
    with pytest.raises(SluiceError, match="no trust bundle") as caught:
        box.enrol()
    assert "bundle.pem" in caught.value.hint


def test_it_waits_for_approval_and_takes_it_up(control: ControlPlane, config: AgentConfig) -> None:
    box = BoxIdentity(replace(config, control_token=""))
    box.start()
    try:
        eventually(lambda: "ENROLMENT_PENDING" in box.error, "waits")
        mark = box.fingerprint()
        assert mark in box.error
        with pytest.raises(SluiceError, match=mark):
            doctor_trust.certificate(config, BoxIdentity(config))
        with control.channel() as channel:
            identity_pb2_grpc.IdentitiesStub(channel).Approve(
                identity_pb2.ApproveRequest(kind="device", name=config.device_id, fingerprint=mark)
            )
        eventually(lambda: box.generation, "let in")
    finally:
        box.stop(10)


def test_another_authoritys_files_are_followed(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("certificate", "key", "bundle")}
    identity = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box")

    def write() -> Credentials:
        held = trust.issue(identity)
        for name, data in (("certificate", held.chain), ("key", held.key), ("bundle", held.bundle)):
            paths[name].write_bytes(data)
            paths[name].chmod(0o600)
        return held

    first = write()
    config = AgentConfig(
        control_address="127.0.0.1:9",
        device_id="box",
        state_dir=tmp_path / "state",
        control_certificate=paths["certificate"],
        control_key=paths["key"],
        control_bundle=paths["bundle"],
    )
    box = BoxIdentity(config)
    assert box.credentials.chain == first.chain
    box.start()
    try:
        second = write()
        eventually(lambda: box.credentials.chain == second.chain and box.generation, "taken up")
    finally:
        box.stop(10)
    with pytest.raises(SluiceError, match="another authority"):
        box.enrol()


def _config(tmp_path: Path, address: str, held: Credentials) -> AgentConfig:
    held.save(tmp_path / "state" / DIRECTORY / CREDENTIALS)
    return AgentConfig(
        control_address=address, enrolment_address=address, device_id="box", state_dir=tmp_path / "state"
    )


def test_the_doctor_explains_each_failure_of_trust(control: ControlPlane, tmp_path: Path) -> None:
    good = trust.device("box")
    other = ca.create(tmp_path / "other", trust.TRUST_DOMAIN, trust.now())
    stranger = trust.issue(Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box"), by=other)
    assert "control/main" in doctor_trust.handshake(control.address, good)
    cases = {
        "does not trust": (control.address, replace(good, bundle=other.bundle)),
        "refuses this box's certificate": (control.address, replace(stranger, bundle=good.bundle)),
        "lacks the name": (control.address, replace(good, server_name="elsewhere.test")),
        "cannot be reached": ("127.0.0.1:9", good),
        "no trust bundle": (control.address, Credentials(b"")),
    }
    for says, (address, held) in cases.items():
        with pytest.raises(SluiceError) as caught:
            doctor_trust.handshake(address, held)
        assert says in caught.value.message
        assert caught.value.hint or says == "no trust bundle"


def test_the_doctor_explains_certificates(tmp_path: Path) -> None:
    box = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box")
    cases = {
        "was valid until": trust.issue(box, age_s=3 * 86_400),
        "is valid from": trust.issue(box, age_s=-3 * 86_400),
        "says device box": trust.issue(Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "another")),
        "belongs to another certificate": replace(trust.issue(box), key=trust.issue(box).key),
        "has no certificate yet": Credentials(trust.issuer().bundle),
    }
    for number, (says, held) in enumerate(cases.items()):
        with pytest.raises(SluiceError) as caught:
            config = _config(tmp_path / str(number), "127.0.0.1:9", held)
            doctor_trust.certificate(config, BoxIdentity(config))
        assert says in caught.value.message
    config = _config(tmp_path / "good", "127.0.0.1:9", trust.issue(box))
    assert "box" in doctor_trust.certificate(config, BoxIdentity(config))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_enrols_belongs_to_the_agents_user(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 12345, 12345)
    path = tmp_path / "state" / DIRECTORY / CREDENTIALS
    trust.device("box").save(path)
    for made in (path, path.parent):
        assert (made.stat().st_uid, made.stat().st_gid) == (12345, 12345)
    assert certificates(Credentials.load(path).chain)


def test_the_doctor_says_each_fault_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nobody = replace(
        _config(tmp_path, "127.0.0.1:9", Credentials(trust.issuer().bundle)), trust_root=Path(__file__)
    )
    found = {finding.check: finding for finding in examine(nobody)}
    assert found["certificate"].state == FAULT
    for check in ("control plane", "signatures"):
        assert (found[check].state, found[check].detail) == (ABSENT, "not tried: see certificate")

    box = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box")
    lonely = replace(
        _config(tmp_path / "lonely", "127.0.0.1:9", trust.issue(box)), trust_root=tmp_path / "no"
    )
    found = {finding.check: finding for finding in examine(lonely)}
    assert found["trust"].state == FAULT
    assert "cannot be reached" in found["trust"].detail
    assert found["control plane"].detail == "not tried: see trust"
    # A root that is not there is a fault of its own, whatever else is wrong.
    assert found["signatures"].state == FAULT
    assert str(tmp_path / "no") in found["signatures"].detail

    lost = replace(
        _config(tmp_path / "lost", "127.0.0.1:9", Credentials(b"")), control_bundle=tmp_path / "gone"
    )
    caplog.clear()
    found = {finding.check: finding for finding in examine(lost)}
    assert str(tmp_path / "gone") in found["certificate"].detail
    assert "enrolment" not in found
    assert "no root is pinned" in found["signatures"].detail
    assert not caplog.records
