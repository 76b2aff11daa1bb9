"""The commands of trust: set up, let in, put out, rotate; and a profile that renews itself."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_tests.harness import trust
from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.applicant import Applicant, let_in
from edge_tests.harness.command import Ran, sluice
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import eventually
from fleet import ca
from fleet.profile import Profile
from updater.certificates import certificates, renew_time
from updater.credentials import Credentials
from updater.identity import Identity, Kind, Role


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Set up by `sluice control init`, by an operator whose profile lies beside it."""
    place = tmp_path_factory.mktemp("init")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SLUICE_PROFILE", str(place / "ana"))
        early = sluice("control", "serve", "--data", place / "control", "--listen", "127.0.0.1:0").expect(3)
        assert "sluice control init" in early.err
        made = sluice(
            *("control", "init", "--data", place / "control", "--trust-domain", "cli.test"),
            *("--operator", "ana", "--keys-elsewhere", "--json"),
        ).expect()
        assert made.document["trust_domain"] == "cli.test"
        assert Path(made.document["root_key"]).stat().st_mode & 0o777 == 0o600
        assert len(made.document["next"]) == 4
        with ControlPlane(place / "control", "--disk-reserve-bytes", "0") as running:
            ana = Profile.open(place / "ana")
            replace(ana, control=running.address, enrolment=running.enrolment_address).save(
                Credentials.load(ana.directory / "credentials.json")
            )
            yield running


@pytest.fixture(autouse=True)
def ana(control: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first operator's profile, which names the control plane as well."""
    profile = control.data.parent / "ana"
    monkeypatch.setenv("SLUICE_PROFILE", str(profile))
    return profile


def applicant(control: ControlPlane, name: str) -> Applicant:
    bundle = (control.data / "ca" / "bundle.pem").read_bytes()
    return Applicant(control.enrolment_address, Identity("cli.test", Kind.DEVICE, name), bundle=bundle)


def test_the_first_operator_is_an_admin() -> None:
    shown = sluice("operator", "whoami", "--json").expect().document
    assert shown["identity"] == "spiffe://cli.test/operator/ana/admin"
    (entry,) = [
        found
        for found in sluice("operator", "list", "--json").expect().document["identities"]
        if found["name"] == "ana"
    ]
    assert (entry["role"], entry["state"], entry["certificates"]) == ("admin", "accepted", 1)
    assert sluice("device", "list").expect().out.startswith("no devices yet")


def test_without_a_profile_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "nobody"))
    ended = sluice("device", "list", "--json").expect(10)
    assert ended.document["error"]["reason"] == "UNAUTHENTICATED"
    assert "sluice operator enrol" in ended.document["error"]["hint"]


def _enrol(control: ControlPlane, name: str, role: str, token: str) -> Ran:
    return sluice(
        *("operator", "enrol", name, "--role", role, "--token", token, "--control", control.address),
        *("--enrolment", control.enrolment_address, "--bundle", control.data / "ca" / "bundle.pem", "--json"),
    )


def test_operators_let_others_in(
    control: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slip = sluice("operator", "token", "ben", "--role", "viewer", "--json").expect().document["token"]
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "ben"))
    made = _enrol(control, "ben", "viewer", slip).expect().document
    assert made["identity"] == "spiffe://cli.test/operator/ben/viewer"
    assert "STATE_LOCKED" in _enrol(control, "ben", "viewer", slip).expect(5).err
    assert sluice("operator", "whoami", "--json").expect().document["fingerprint"] == made["fingerprint"]
    monkeypatch.setenv("SLUICE_PROFILE", str(control.data.parent / "ana"))
    sluice("operator", "revoke", "ben").expect()
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "ben"))
    assert "CERTIFICATE_REVOKED" in sluice("device", "list").expect(10).err
    # Whoever took the profile stays out when ben comes back with another key.
    monkeypatch.setenv("SLUICE_PROFILE", str(control.data.parent / "ana"))
    slip = sluice("operator", "token", "ben", "--role", "viewer", "--json").expect().document["token"]
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "ben-again"))
    time.sleep(1)  # dates of certificates are whole seconds
    _enrol(control, "ben", "viewer", slip).expect()
    sluice("device", "list").expect()
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "ben"))
    assert "CERTIFICATE_REVOKED" in sluice("device", "list").expect(10).err


def test_every_admins_profile_lost(
    control: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "again"))
    slip = sluice("control", "admit", "cho", "--data", control.data, "--json").expect().document["token"]
    _enrol(control, "cho", "admin", slip).expect()
    sluice("operator", "list").expect()
    assert "CONFIG_INVALID" in sluice("control", "admit", "x", "--data", tmp_path).expect(3).err


def test_a_profile_renews_itself_after_any_absence(
    control: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "profile"
    shutil.copytree(control.data.parent / "ana", directory)
    monkeypatch.setenv("SLUICE_PROFILE", str(directory))
    issuer = ca.load(control.data / "ca")
    held = Credentials.load(directory / "credentials.json")
    old = trust.issue(Identity("cli.test", Kind.OPERATOR, "ana", Role.ADMIN), by=issuer, life_s=2)
    Profile.open(directory).save(replace(held, chain=old.chain, key=old.key))
    leaf = certificates(old.chain)[0]
    eventually(lambda: trust.now() > leaf.not_valid_after_utc, "it has expired")
    sluice("device", "list").expect()
    renewed = Credentials.load(directory / "credentials.json")
    assert renewed.counter == held.counter + 1
    now = trust.now()
    assert now < renew_time(certificates(renewed.chain)[0], 0.5)
    # Not again before it is due.
    sluice("device", "list").expect()
    assert Credentials.load(directory / "credentials.json") == renewed


def test_devices_are_let_in_and_put_out(control: ControlPlane) -> None:
    with applicant(control, "pi-1") as box:
        slip = sluice("device", "token", "pi-1", "--label", "site=harbour", "--for", "2d", "--json")
        held = box.enrol(token=slip.expect().document["token"])
        assert let_in(control.address, held) is None
        revoked = sluice("device", "revoke", "pi-1", "--json").expect().document["identity"]
        assert revoked["state"] == "revoked"
        assert let_in(control.address, held) is not None
    assert sluice("device", "pending").expect().out == "no device waits\n"
    with applicant(control, "pi-2") as box:
        with pytest.raises(Exception, match="waits for an operator"):
            box.enrol()
        assert box.fingerprint in sluice("device", "pending").expect().out
        wrong = sluice("device", "approve", "pi-2", "--fingerprint", "0000-0000", "--json").expect(5)
        assert wrong.document["error"]["reason"] == "IDENTITY_CONFLICT"
        sluice("device", "approve", "pi-2", "--fingerprint", box.fingerprint).expect()
        assert let_in(control.address, box.enrol()) is None
        ended = sluice("device", "reject", "pi-2", "--json").expect(5)
        assert "sluice device revoke" in ended.document["error"]["hint"]
    assert "is it spelled right?" in sluice("device", "revoke", "pi-typo").expect().out
    assert sluice("device", "revoke", "pi-2").expect().out == "pi-2 is revoked\n"
    with applicant(control, "pi-5") as box:
        box.enrol(token=sluice("device", "token", "pi-5", "--json").expect().document["token"])
        with applicant(control, "pi-5") as other:
            with pytest.raises(Exception, match="another key"):
                other.enrol()
            rows = [row.split() for row in sluice("device", "pending").expect().out.splitlines()[1:]]
            assert [row[:3] for row in rows] == [
                ["pi-5", "accepted", box.fingerprint],
                ["pi-5", "asks", other.fingerprint],
            ]
        sluice("device", "reject", "pi-5").expect()
    with applicant(control, "pi-3") as box:
        with pytest.raises(Exception, match="waits for an operator"):
            box.enrol()
        sluice("device", "reject", "pi-3").expect()
        with pytest.raises(Exception, match="rejected it"):
            box.enrol()
    assert sluice("device", "revoke", "no/such", "--json").expect(3).document["error"]["reason"]


def test_a_running_control_plane_takes_up_rotations(control: ControlPlane, tmp_path: Path) -> None:
    with applicant(control, "pi-9") as box:
        slip = sluice("device", "token", "--json").expect().document["token"]
        held = box.enrol(token=slip)
        before = sluice("control", "ca", "show", "--data", control.data, "--json").expect().document
        (old,) = before["roots"]
        after = sluice(
            *("control", "ca", "rotate", "--data", control.data, "--root", "--json"),
        ).expect()
        assert [root["fingerprint"] for root in after.document["roots"]][1:] == [old["fingerprint"]]
        # The box knows only the old root; what the control plane shows from now on leads there too.
        eventually(lambda: box.renew().bundle.count(b"BEGIN") == 2, "the new root reaches the box")
        assert let_in(control.address, held) is None
        key = shutil.copy(control.data / "ca" / "root.key", tmp_path / "root.key")
        (control.data / "ca" / "root.key").unlink()
        missing = sluice("control", "ca", "rotate", "--data", control.data, "--json").expect(5)
        assert missing.document["error"]["reason"] == "KEY_UNAVAILABLE"
        sluice("control", "ca", "rotate", "--data", control.data, "--root-key", key).expect()
        newest = box.renew()
        sluice("control", "ca", "drop", old["fingerprint"][:9], "--data", control.data).expect()
        eventually(lambda: let_in(control.address, held) is not None, "the old root counts no longer")
        assert let_in(control.address, newest) is None
        assert let_in(control.address, box.renew()) is None


def test_another_authority_serves_a_whole_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ca.create(tmp_path / "theirs", "spire.test", trust.now())

    def files(identity: Identity) -> list[Path]:
        held = trust.issue(identity, by=theirs)
        paths = [tmp_path / f"{identity.name}.{end}" for end in ("pem", "key", "bundle")]
        for path, data in zip(paths, (held.chain, held.key, theirs.bundle), strict=True):
            path.touch(mode=0o600)
            path.write_bytes(data)
        return paths

    def options(identity: Identity) -> list[object]:
        names = ("--certificate", "--key", "--bundle")
        return [word for pair in zip(names, files(identity), strict=True) for word in pair]

    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "profile"))
    server = options(Identity("spire.test", Kind.CONTROL, "eu-1"))
    assert "belong together" in sluice("control", "init", "--data", tmp_path / "x", *server[:2]).expect(2).err
    server.append("--keys-elsewhere")
    made = sluice("control", "init", "--data", tmp_path / "control", *server, "--json").expect().document
    assert (made["trust_domain"], made["root_key"]) == ("spire.test", "")
    with ControlPlane(tmp_path / "control") as control:
        operator = options(Identity("spire.test", Kind.OPERATOR, "dee", Role.ADMIN))
        sluice("operator", "adopt", *operator, "--control", control.address).expect()
        assert sluice("device", "list").expect().out.startswith("no devices yet")
        box = Identity("spire.test", Kind.DEVICE, "box")
        certificate, key, bundle = map(str, files(box))
        agent = AgentProcess(
            tmp_path / "box",
            control.address,
            "box",
            enrolled=False,
            settings={
                "control.certificate": certificate,
                "control.key": key,
                "control.bundle": bundle,
            },
        )
        with agent:
            agent.wait_for(lambda status: status.control_connected)
            assert "ok     trust: " in agent.command("doctor").stdout
        with Applicant(control.enrolment_address, box, bundle=theirs.bundle) as applicant:
            slip = sluice("device", "token", "--json").expect().document["token"]
            with pytest.raises(Exception, match="another authority does"):
                applicant.enrol(token=slip)
        sluice("device", "revoke", "box").expect()
        assert let_in(control.address, trust.issue(box, by=theirs)) is not None
