"""`sluice control init`: one command for authority, first operator and signing keys; and what it leaves when
it is interrupted.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from edge_tests.harness.command import Ran, sluice
from edge_tests.harness.killed import sluice_killed
from edge_tests.harness.local_control import LocalControl
from edge_tests.harness.models import tiny_onnx
from fleet.client import ControlClient
from fleet.profile import Profile
from fleet.trust_directory import TrustDirectory
from updater.trust import keys
from updater.trust.client import TrustClient


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An operator with nothing yet."""
    monkeypatch.setattr(keys, "SCRYPT_COST", 2)
    monkeypatch.setenv("SLUICE_PASSPHRASE", "correct horse")
    monkeypatch.setenv("SLUICE_PROFILE", str(tmp_path / "profile"))
    monkeypatch.setenv("SLUICE_TRUST", str(tmp_path / "trust"))
    return tmp_path


def init(place: Path, *options: object, code: int = 0) -> Ran:
    words = ("--json", "control", "init", "--data", place / "control", *options)
    return sluice(*words).expect(code)


def serving(place: Path) -> LocalControl:
    """The control plane of these files, whose address the profile names from now on."""
    control = LocalControl(place / "control")
    control.start()
    profile = Profile.open(place / "profile")
    replace(profile, control=control.address).save()
    return control


def check_whole(place: Path) -> None:
    """A version is signed, published, and believed by a box that was given the root."""
    control = serving(place)
    try:
        sluice("device", "list").expect()
        tiny_onnx(place / "tiny.onnx")
        sluice("model", "push", place / "tiny.onnx", "--name", "tiny").expect()
        assert sluice("--json", "trust", "verify").expect().document["trust"]["sound"]
        with ControlClient(control.address) as client:

            def fetch(role: str, version: int | None) -> tuple[bytes] | None:
                data = client.get_metadata(role, version)
                return (data,) if data else None

            box = TrustClient(place / "box", (place / "trust" / "root.json").read_bytes(), fetch)
            box.refresh()
            assert box.version("tiny", 1) is not None
    finally:
        control.stop()


def test_one_command_is_enough(place: Path) -> None:
    made = init(place, "--trust-domain", "one.test", "--operator", "ana").document
    assert made["made"] == ["authority", "operator", "signing"]
    assert (made["trust_domain"], made["trust"]) == ("one.test", str(place / "trust"))
    told = " ".join(made["next"])
    for step in (
        "ca/root.key off this machine",
        "control serve",
        "keys/root.json off",
        "trust.root",
        "device token",
    ):
        assert step in told
    here = TrustDirectory(place / "trust")
    assert [here.key(name).kind for name in ("root", "targets")] == ["sealed", "sealed"]
    check_whole(place)


def test_again_it_changes_nothing_and_says_what_there_is(place: Path) -> None:
    first = init(place).document

    def files() -> dict[Path, bytes]:
        return {
            path: path.read_bytes() for path in place.rglob("*") if path.is_file() and ".db" not in path.name
        }

    before = files()
    again = init(place).document
    assert again == first | {"made": []}
    assert files() == before
    assert (
        "all of it was there already" in sluice("control", "init", "--data", place / "control").expect().out
    )
    control = serving(place)
    try:  # beside a running control plane too
        assert init(place, "--control", control.address).document["made"] == []
    finally:
        control.stop()


def test_where_there_is_no_passphrase_nothing_is_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_PASSPHRASE")
    refused = init(place, code=5).document["error"]
    assert "no terminal to ask at" in refused["message"]
    assert not (place / "control" / "ca").exists()
    assert not (place / "profile").exists()
    (place / "phrase").write_text("too short\n")
    refused = init(place, "--passphrase-file", place / "phrase", code=5).document["error"]
    assert "a passphrase has 12 to 1024 characters" in refused["message"]
    assert not (place / "control" / "ca").exists()
    (place / "phrase").write_text("from this file\n")
    assert init(place, "--passphrase-file", place / "phrase").document["made"][-1] == "signing"


def test_killed_at_any_moment_it_finishes_when_run_again(place: Path) -> None:
    """At each second file before it has its name, at the others after."""
    number, came = 0, True
    while came:
        number += 1
        here = place / f"at-{number}"
        here.mkdir()
        env = {
            **os.environ,
            "SLUICE_PROFILE": str(here / "profile"),
            "SLUICE_TRUST": str(here / "trust"),
        }
        with pytest.MonkeyPatch.context() as patched:
            for name, value in env.items():
                patched.setenv(name, value)
            words = ["--json", "control", "init", "--data", str(here / "control")]
            came = sluice_killed(number, words, env, named=number % 2 == 0)
            init(here)
            assert init(here).document["made"] == []
            if number % 5 == 2:
                check_whole(here)
    assert number > 10  # as many files are written


def test_signing_keys_may_lie_elsewhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = init(place, "--keys-elsewhere").document
    assert (made["made"], made["trust"]) == (["authority", "operator"], "")
    assert not (place / "trust").exists()
    assert any("sluice trust init" in step for step in made["next"])
    made = init(place, "--keys-elsewhere", "--control", "10.0.0.1:9000").document
    assert f"sluice control serve --data {place / 'control'} --listen 10.0.0.1:9000" in " ".join(made["next"])
    # On the other machine, from the file that was carried there, before the control plane ever ran.
    public = place / "control" / "trust" / "online.pub"
    assert b"plain" not in public.read_bytes()
    sluice("trust", "init", "--online", public, "--offline").expect()
    control = serving(place)
    try:
        sluice("trust", "publish").expect()
    finally:
        control.stop()
    assert init(place).document["made"] == []
    check_whole(place)
    # Somebody else on the machine is told that others sign.
    monkeypatch.setenv("SLUICE_TRUST", str(place / "other"))
    assert any("sluice trust join" in step for step in init(place).document["next"])
    assert not (place / "other").exists()


def test_what_belongs_to_another_fleet_is_left_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(place, "--trust-domain", "one.test")
    domain = init(place, "--trust-domain", "two.test", code=3).document["error"]
    assert "cannot be changed" in domain["message"]
    second = place / "second"
    refused = sluice("--json", "control", "init", "--data", second).expect(5).document["error"]
    assert "of another fleet" in refused["message"]
    assert not second.exists()
    monkeypatch.setenv("SLUICE_PROFILE", str(place / "other"))
    refused = sluice("--json", "control", "init", "--data", second).expect(5).document["error"]
    assert "signs for another control plane" in refused["message"]
    refused = init(place, code=5).document["error"]
    assert "is set up already" in refused["message"]
    assert not (place / "other").exists()
