"""Keys of `sluice trust` lost, dates run out: the rest of what docs/operator-guide.md tells, see
test_cli_trust.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_tests.harness.command import Ran, sluice
from edge_tests.harness.local_control import LocalControl
from edge_tests.harness.models import tiny_onnx
from fleet.client import ControlClient
from updater.errors import SluiceError
from updater.trust import keys
from updater.trust.client import TrustClient

Trust = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _cheap_seals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keys, "SCRYPT_COST", 2)
    monkeypatch.setenv("SLUICE_PASSPHRASE", "correct horse")
    monkeypatch.setenv("SLUICE_TRUST", str(tmp_path / "trust"))


@pytest.fixture
def control(tmp_path: Path) -> Iterator[LocalControl]:
    with LocalControl(tmp_path / "control") as running:
        yield running


@pytest.fixture
def trust(control: LocalControl) -> Trust:
    def run(*words: object, code: int = 0) -> Ran:
        return sluice("--json", "--control", control.address, "trust", *words).expect(code)

    return run


@pytest.fixture
def push(control: LocalControl, tmp_path: Path) -> Callable[[int], Ran]:
    def run(number: int) -> Ran:
        file = tiny_onnx(tmp_path / f"{number}.onnx", change=number / 1000)
        return sluice("--control", control.address, "model", "push", file, "--name", "detector")

    return run


def device(control: LocalControl, place: Path) -> TrustClient:
    """A box that was given the root."""
    calls = ControlClient(control.address)

    def fetch(role: str, version: int | None) -> tuple[bytes] | None:
        data = calls.get_metadata(role, version)
        return (data,) if data else None

    return TrustClient(place / "box", (place / "trust" / "root.json").read_bytes(), fetch)


def check_a_lost_key_is_replaced(
    role: str, control: LocalControl, trust: Trust, push: Callable[[int], Ran], tmp_path: Path
) -> None:
    """What the role's key signed before stands, and its successor signs from then on."""
    push(1).expect()
    key = tmp_path / "trust" / "keys" / f"{role}.json"
    lost = keys.read_key_file(key).public.keyid
    key.unlink()
    assert "KEY_UNAVAILABLE" in push(2).expect(5).err
    trust("rotate", role, lost[:12], f"{role}-2")
    push(2).expect()
    box = device(control, tmp_path)
    box.refresh()
    assert [box.version("detector", number) is not None for number in (1, 2)] == [True, True]


def test_recovery_a_targets_key_is_lost(
    control: LocalControl, trust: Trust, push: Callable[[int], Ran], tmp_path: Path
) -> None:
    trust("init")
    check_a_lost_key_is_replaced("targets", control, trust, push, tmp_path)


def test_recovery_a_delegated_roles_key_is_lost(
    control: LocalControl, trust: Trust, push: Callable[[int], Ran], tmp_path: Path
) -> None:
    trust("init")
    trust("delegate", "team", "--model", "detector", "--key", "team")
    check_a_lost_key_is_replaced("team", control, trust, push, tmp_path)


def test_recovery_everything_has_expired(
    control: LocalControl,
    trust: Trust,
    push: Callable[[int], Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as brief:
        life_s = 4.0
        for name in ("ROOT_DAYS", "TARGETS_DAYS"):
            brief.setattr(f"fleet.signing.{name}", life_s / 86_400)
        trust("init")
        began = time.monotonic()
        box = device(control, tmp_path)
        box.refresh()
    time.sleep(max(0.0, began + life_s + 1 - time.monotonic()))
    with pytest.raises(SluiceError) as expired:
        box.refresh()
    assert expired.value.code == "METADATA_EXPIRED"
    assert push(1).code != 0
    trust("renew", "root", "targets")
    box.refresh()
    push(1).expect()
    box.refresh()
    assert box.version("detector", 1) is not None
    assert trust("verify").document["trust"]["sound"]


def test_recovery_a_restored_control_plane_and_no_copy_of_what_it_lost(
    control: LocalControl,
    trust: Trust,
    push: Callable[[int], Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the keys and the first root are left of the operator's directory."""
    trust("init")
    push(1).expect()
    control.stop()
    backup = {path: path.read_bytes() for path in control.data.glob("control.db*")}
    control.start()
    push(2).expect()
    push(3).expect()
    box = device(control, tmp_path)
    box.refresh()
    control.stop()
    for path in control.data.glob("control.db*"):
        path.unlink()
    for path, data in backup.items():
        path.write_bytes(data)
    control.start()
    left = tmp_path / "left"
    monkeypatch.setenv("SLUICE_TRUST", str(left))
    trust("join", tmp_path / "trust" / "root.json")
    shutil.copytree(tmp_path / "trust" / "keys", left / "keys")
    renewed = 0
    while _refused(box):
        trust("renew", "targets")
        renewed += 1
        assert renewed <= 2
    assert renewed == 2  # as many as versions were signed since the backup
    for number in (2, 3):
        push(number).expect()
    box.refresh()
    assert [box.version("detector", number) is not None for number in (1, 2, 3)] == [True, True, True]


def _refused(box: TrustClient) -> bool:
    try:
        box.refresh()
    except SluiceError as error:
        assert error.code == "METADATA_ROLLED_BACK"
        return True
    return False
