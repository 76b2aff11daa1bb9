"""The control machine is lost: with a backup, and without one. What is gone, and that boxes come back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.applicant import Applicant, let_in
from edge_tests.harness.command import Ran, sluice
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.models import tiny_onnx
from edge_tests.harness.operator import eventually, failing
from fleet.profile import Profile
from sluice.api.v1 import errors_pb2
from updater.identity import Identity, Kind
from updater.trust import keys

pytestmark = pytest.mark.e2e
DOMAIN = "loss.test"


class Fleet:
    """A control plane that `sluice control init` set up, its operator, and one box that enrolled."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place = place
        self.data = place / "control"
        sluice("control", "init", "--data", self.data, "--trust-domain", DOMAIN, "--operator", "ana").expect()
        self.control = ControlPlane(self.data, "--heartbeat-interval-ms", "500", *options)
        self.control.start()
        self._address()
        self.files = [tiny_onnx(place / f"{n}.onnx", change=n / 1000) for n in (1, 2)]
        self.box = AgentProcess(
            place / "box",
            self.control.address,
            "box",
            settings=self.control.enrolling("box") | {"trust.root": str(place / "trust" / "root.json")},
            enrolled=False,
        )
        self.box.wait_for(lambda status: status.control_connected)

    def _address(self) -> None:
        """Ports are taken as they come: the profile names them."""
        profile = Profile.open()
        replace(profile, control=self.control.address, enrolment=self.control.enrolment_address).save()

    def push(self, *numbers: int) -> None:
        for number in numbers:
            pushed = sluice("--json", "model", "push", self.files[number - 1], "--name", "tiny").expect()
            assert pushed.document["version"] == number

    def roll_out(self, number: int) -> None:
        sluice("rollout", "start", f"tiny@{number}", "--device", "box", "--watch").expect()
        assert self.box.wait_for_version("tiny", number).healthy

    def applicant(self, name: str) -> Applicant:
        bundle = (self.data / "ca" / "bundle.pem").read_bytes()
        return Applicant(self.control.enrolment_address, Identity(DOMAIN, Kind.DEVICE, name), bundle=bundle)

    def token(self, name: str) -> str:
        token: str = sluice("--json", "device", "token", name).expect().document["token"]
        return token

    def close(self) -> None:
        self.box.stop()
        self.control.stop(check=False)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    monkeypatch.setattr(keys, "SCRYPT_COST", 2)
    monkeypatch.setenv("SLUICE_PASSPHRASE", "correct horse")
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "profile"))
    monkeypatch.setenv("SLUICE_TRUST", str(tmp_path / "trust"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Fleet(tmp_path, *getattr(request, "param", ()))
    try:
        yield made
    finally:
        made.close()


def test_recovery_the_control_machine_is_restored_from_a_backup(fleet: Fleet) -> None:
    fleet.push(1)
    fleet.roll_out(1)
    with fleet.applicant("gone") as gone, fleet.applicant("late") as late:
        out = gone.enrol(token=fleet.token("gone"))
        fleet.control.stop()
        backup = Path(shutil.copytree(fleet.data, fleet.place / "backup"))
        fleet.control.start()
        # What happens after the backup is lost: a version and its rollout, a box let in, another put out.
        fleet.push(2)
        fleet.roll_out(2)
        held = late.enrol(token=fleet.token("late"))
        sluice("device", "revoke", "gone").expect()
        assert let_in(fleet.control.address, out) is not None
        sluice("audit", "verify").expect()
        fleet.control.kill()
        shutil.rmtree(fleet.data)
        backup.rename(fleet.data)
        fleet.control.start()

        # The box comes back, and to the version that it was given then: its own last one, so nobody is asked.
        fleet.box.wait_for(lambda status: status.control_connected)
        assert fleet.box.wait_for_version("tiny", 1).healthy
        # It has seen newer metadata, and installs nothing on the older. Whoever signed last repairs that.
        assert _reason(sluice("--json", "trust", "verify")) == "METADATA_ROLLED_BACK"
        sluice("trust", "publish").expect()
        assert sluice("--json", "trust", "verify").expect().document["trust"]["sound"]
        fleet.push(2)
        fleet.roll_out(2)
        # Who was let in since is not known, and waits for approval; who was put out since is in again.
        assert failing(late.renew).reason == errors_pb2.UNAUTHENTICATED
        assert let_in(fleet.control.address, held) is None
        assert failing(late.enrol).reason == errors_pb2.ENROLMENT_PENDING
        sluice("device", "approve", "late", "--fingerprint", late.fingerprint).expect()
        assert let_in(fleet.control.address, late.enrol()) is None
        assert let_in(fleet.control.address, out) is None
        sluice("device", "revoke", "gone").expect()
        assert let_in(fleet.control.address, out) is not None
        # The audit log ends where the backup did, which is told until it is said to be known.
        assert _error(sluice("--json", "audit", "verify"))["reason"] == "AUDIT_BROKEN"
        sluice("audit", "verify", "--restored").expect()
        sluice("audit", "verify").expect()


@pytest.mark.parametrize("fleet", [("--certificate-life-s", "15")], indirect=True, ids=["15s"])
def test_recovery_the_control_machine_is_lost_and_the_keys_lay_elsewhere(fleet: Fleet) -> None:
    """No backup; but the authority's `root.key`, and the operator's directory with the signing keys."""
    fleet.push(1, 2)
    fleet.roll_out(2)
    fleet.control.kill()
    root_key = shutil.copy(fleet.data / "ca" / "root.key", fleet.place / "root.key")
    shutil.rmtree(fleet.data)

    (fleet.data / "ca").mkdir(parents=True, mode=0o700)
    shutil.copy(root_key, fleet.data / "ca" / "root.key")
    made = sluice("--json", "control", "init", "--keys-elsewhere", "--data", fleet.data).expect().document
    assert (made["trust_domain"], made["made"]) == (DOMAIN, ["authority", "operator"])
    fleet.control.start()
    fleet._address()
    sluice("trust", "rotate", "online").expect()
    assert sluice("--json", "trust", "verify").expect().document["trust"]["sound"]
    # The box trusts the same root as before; it serves on, and is let in again by its fingerprint.
    fleet.box.wait_for(lambda status: status.control_connected)
    assert fleet.box.model("tiny").active_version == 2
    mark = eventually(_pending, "it asks when its certificate is due")
    assert mark in fleet.box.command("doctor").stdout
    sluice("device", "approve", "box", "--fingerprint", mark).expect()
    eventually(lambda: "accepted" in sluice("--json", "device", "list").expect().out, "it is in")
    # The same files make the same versions, which are signed already.
    fleet.push(1, 2)
    fleet.roll_out(1)
    fleet.roll_out(2)


def _pending() -> str:
    """The fingerprint of the box that waits; empty before it does."""
    waiting = sluice("--json", "device", "pending").expect().document["identities"]
    return next((str(entry["fingerprint"]) for entry in waiting if entry["name"] == "box"), "")


def _error(ran: Ran) -> dict[str, str]:
    assert ran.code != 0, ran.out
    error: dict[str, str] = ran.document["error"]
    return error


def _reason(ran: Ran) -> str:
    assert ran.code != 0, ran.out
    reason: str = ran.document["trust"]["refusal"]["reason"]
    return reason
