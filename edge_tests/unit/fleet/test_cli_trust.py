"""`sluice trust` against a control plane: set up, change, lose keys, recover; and what a device sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_tests.harness.command import Ran, sluice
from edge_tests.harness.local_control import LocalControl
from edge_tests.harness.models import tiny_onnx
from edge_tests.harness.operator import Operator, failing, manifest, onnx_model
from fleet.client import ControlClient
from fleet.publish import prepare, publish
from fleet.recipe import Recipe, VariantRecipe
from fleet.signing import Signing
from fleet.trust_directory import TrustDirectory
from sluice.api.v1 import errors_pb2, registry_pb2
from updater.errors import SluiceError
from updater.trust import keys, roles
from updater.trust.client import TrustClient
from updater.trust.documents import TIMESTAMP, read

Trust = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _cheap_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_COST", 2)
    monkeypatch.setenv("SLUICE_PASSPHRASE", "correct horse")


@pytest.fixture
def control(tmp_path: Path) -> Iterator[LocalControl]:
    with LocalControl(tmp_path / "control") as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "trust"


@pytest.fixture
def trust(control: LocalControl, place: Path) -> Trust:
    """Runs `sluice trust …` for the first operator."""

    def run(*arguments: object, code: int = 0, directory: Path = place) -> Ran:
        verb, *rest = arguments
        nested = ["key", rest.pop(0)] if verb == "key" else [verb]
        ran = sluice("--json", "--control", control.address, "trust", *nested, "--dir", directory, *rest)
        return ran.expect(code)

    return run


def device(control: LocalControl, pinned: Path, directory: Path) -> TrustClient:
    """A device that was given this root."""
    calls = ControlClient(control.address)

    def fetch(role: str, version: int | None) -> tuple[bytes] | None:
        data = calls.get_metadata(role, version)
        return (data,) if data else None

    return TrustClient(directory, pinned.read_bytes(), fetch)


def push(control: LocalControl, place: Path, name: str, number: int) -> str:
    """Signs a version and publishes that alone; returns the role that signed."""
    with ControlClient(control.address) as client:
        ((role, data),) = signing_at(place, client).sign_version(manifest(name, number, b"model"))
        client.publish_metadata([(role, data)])
        return role


def signing_at(place: Path, client: ControlClient) -> Signing:
    return Signing(TrustDirectory(place), client, lambda _name: "correct horse")


def test_init_pins_publishes_and_can_be_explained(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    made = trust("init").document["trust"]
    assert made["published"]
    assert {item["role"]: item["complete"] for item in made["signed"]} == {"root": True, "targets": True}
    listed = trust("key", "list").document["keys"]
    assert [(item["name"], item["kind"]) for item in listed] == [("root", "sealed"), ("targets", "sealed")]
    told = trust("verify").document["trust"]
    assert told["sound"]
    assert told["refusal"] is None
    assert {item["role"] for item in told["findings"]} == {"root", "timestamp", "snapshot", "targets"}
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    assert box.version("detector", 1) is None
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in (place / "keys").iterdir())


def test_a_registry_with_a_root_takes_only_signed_versions(
    control: LocalControl, trust: Trust, place: Path, operator: Operator
) -> None:
    model = onnx_model()
    operator.upload(model)
    one = manifest("detector", 1, model)
    trust("init")

    def publish() -> None:
        operator.registry.PublishVersion(registry_pb2.PublishVersionRequest(manifest=one.to_bytes()))

    assert failing(publish).reason == errors_pb2.VERSION_NOT_SIGNED
    with ControlClient(control.address) as client:
        client.publish_version(one.to_bytes(), signing_at(place, client).sign_version(one))
    assert (
        failing(
            lambda: operator.registry.PublishVersion(
                registry_pb2.PublishVersionRequest(manifest=manifest("detector", 2, model, x="y").to_bytes())
            )
        ).reason
        == errors_pb2.VERSION_NOT_SIGNED
    )


def test_a_dry_run_tells_and_changes_nothing(control: LocalControl, trust: Trust, place: Path) -> None:
    trust("init")
    trust("key", "new", "root-2")
    before = sorted((path, path.read_bytes()) for path in place.rglob("*.json"))
    told = trust("rotate", "root", "root", "root-2", "--dry-run").document["trust"]
    assert told["dry_run"]
    assert not told["published"]
    assert any("may no longer sign" in text for text in told["changes"][0]["what"])
    assert sorted((path, path.read_bytes()) for path in place.rglob("*.json")) == before
    with ControlClient(control.address) as client:
        assert client.get_trust().root_version == 1


def test_a_device_follows_every_rotation_however_long_it_was_away(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    push(control, place, "detector", 1)
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    assert box.version("detector", 1) is not None
    trust("rotate", "root", "root", "root-2")
    trust("rotate", "targets", "targets", "targets-2")
    trust("add-key", "root", "root-3", "--threshold", 2)
    trust("revoke", "root-2", code=3)  # the threshold could not be reached
    trust("rotate", "root", "root-2", "root-4")
    trust("renew", "root", "targets")
    push(control, place, "detector", 2)
    box.refresh()
    assert box.root.version == 6
    assert box.version("detector", 1) is not None
    assert box.version("detector", 2) is not None
    assert trust("verify").document["trust"]["sound"]


def test_a_team_signs_its_models_and_no_others(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    trust("delegate", "vision", "--model", "vision-*", "--model", "detector", "--key", "vision")
    team = tmp_path / "team"
    trust("root", "-o", tmp_path / "root.json")
    trust("join", tmp_path / "root.json", directory=team)
    (team / "keys").mkdir()
    (place / "keys" / "vision.json").rename(team / "keys" / "vision.json")
    assert push(control, team, "detector", 1) == "vision"
    assert push(control, team, "vision-night", 1) == "vision"
    with pytest.raises(SluiceError) as refused:
        push(control, team, "speech", 1)
    assert refused.value.reason == errors_pb2.KEY_UNAVAILABLE
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    assert box.version("detector", 1) is not None
    assert box.version("speech", 1) is None
    stored = box.stored_target("detector/1")
    assert stored is not None
    assert roles.named(stored) == box.version("detector", 1)
    trust("undelegate", "vision")
    box.refresh()
    assert box.version("detector", 1) is None
    assert trust("verify").document["trust"]["sound"]


def test_two_operators_sign_a_root_together(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    trust("key", "new", "bob", directory=other)
    trust("key", "export", "bob", "-o", tmp_path / "bob.pub", directory=other)
    trust("key", "import", "bob", tmp_path / "bob.pub")
    made = trust("init", "--root-key", "ada", "--root-key", "bob", "--root-threshold", 2).document["trust"]
    assert not made["published"]
    assert [item["missing"] for item in made["signed"]] == [{"root": 1}, {}]
    waiting = trust("publish").document["trust"]
    assert (waiting["root_version"], waiting["waiting"][0]["role"]) == (0, "root")
    pending = place / "pending" / "root.json"
    signed = trust("sign", pending, "--yes", directory=other).document["trust"]
    assert signed["signed"][0]["complete"]
    assert trust("publish").document["trust"]["root_version"] == 1
    assert trust("verify").document["trust"]["sound"]


def test_a_team_gets_models_with_a_key_that_only_it_holds(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    team, post = tmp_path / "team", tmp_path / "post"
    trust("key", "new", "eve", directory=team)
    trust("key", "export", "eve", "-o", tmp_path / "eve.pub", directory=team)
    trust("key", "import", "eve", tmp_path / "eve.pub")
    trust("join", place / "root.json", directory=team)
    made = trust("delegate", "vision", "--model", "vision-*", "--key", "eve").document["trust"]
    # Devices take a delegation only with something signed by its keys: both wait for the team.
    assert not made["published"]
    assert {item["role"]: item["complete"] for item in made["signed"]} == {"targets": True, "vision": False}
    assert trust("verify").document["trust"]["sound"]
    post.mkdir()
    shutil.copy(place / "pending" / "vision.json", post)
    refused = trust("sign", post / "vision.json", "--yes", directory=team, code=3).document["error"]
    assert (refused["reason"], "targets.json" in refused["hint"]) == ("METADATA_INVALID", True)

    forged = json.loads((place / "pending" / "targets.json").read_text())
    forged["signed"]["version"] += 1
    (post / "targets.json").write_text(json.dumps(forged))
    refused = trust("sign", post / "vision.json", "--yes", directory=team, code=10).document["error"]
    assert refused["reason"] == "SIGNATURE_INVALID"

    shutil.copy(place / "pending" / "targets.json", post)
    signed = trust("sign", post / "vision.json", "--yes", directory=team).document["trust"]
    assert signed["signed"][0]["complete"]
    trust("publish", directory=team)
    assert trust("verify").document["trust"]["sound"]
    assert push(control, team, "vision-a", 1) == "vision"
    with pytest.raises(SluiceError, match="targets signs it"):
        push(control, team, "other", 1)
    device(control, place / "root.json", tmp_path / "device").refresh()


def test_push_signs_and_without_keys_says_so(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    model = tiny_onnx(tmp_path / "m.onnx")

    def push_file(directory: Path) -> Ran:
        options = ("--name", "detector", "--trust", directory)
        return sluice("--json", "--control", control.address, "model", "push", model, *options)

    refused = push_file(tmp_path / "nobody").expect(5).document["error"]
    assert refused["reason"] == "KEY_UNAVAILABLE"
    assert push_file(place).expect().document["version"] == 1
    told = trust("verify").document["trust"]["findings"]
    assert any(item["what"].startswith("names detector/1: manifest sha256:") for item in told)


def test_what_was_published_before_trust_was_set_up_is_signed_by_pushing_it_again(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    command = ("--json", "--control", control.address, "model", "push", tiny_onnx(tmp_path / "m.onnx"))
    options = ("--name", "detector", "--trust", place)
    assert sluice(*command, *options).expect().document["created"]
    trust("init")
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    assert box.version("detector", 1) is None
    again = sluice(*command, *options).expect().document
    assert (again["version"], again["created"]) == (1, False)
    box.refresh()
    named = box.version("detector", 1)
    assert named is not None
    assert named.digest == again["manifest_digest"]


def test_two_operators_who_push_at_once_both_succeed(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    """They sign the same document and want the same numbers; what is published is what is signed."""
    trust("init")
    other = tmp_path / "other"
    trust("join", place / "root.json", directory=other)
    shutil.copytree(place / "keys", other / "keys")

    def push_some(directory: Path, seed: int) -> None:
        with ControlClient(control.address) as client:
            signing = signing_at(directory, client)
            for number in range(2):
                file = tiny_onnx(tmp_path / f"{seed}-{number}.onnx", seed * 10 + number)
                draft = prepare(Recipe(model="detector", variants=(VariantRecipe(file),)))
                publish(client, draft, sign=signing.sign_version)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(push_some, place, 1), pool.submit(push_some, other, 2)]:
            done.result()
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    with ControlClient(control.address) as client:
        versions = list(client.list_versions("detector"))
        assert [item.version for item in versions] == [4, 3, 2, 1]
        for item in versions:
            found = box.version("detector", item.version)
            assert found is not None
            assert found.digest == item.manifest_digest


def test_the_name_of_a_published_version_keeps_its_content(
    control: LocalControl, trust: Trust, place: Path, operator: Operator
) -> None:
    model = onnx_model()
    operator.upload(model)
    trust("init")
    one, other = manifest("detector", 1, model), manifest("detector", 1, model, other="content")
    with ControlClient(control.address) as client:
        signing = signing_at(place, client)
        client.publish_version(one.to_bytes(), signing.sign_version(one))
        forged = signing.sign_version(other)
        with pytest.raises(SluiceError) as refused:
            client.publish_metadata(forged)
        assert refused.value.reason == errors_pb2.VERSION_CONFLICT
        with pytest.raises(SluiceError) as rooted:
            two = manifest("detector", 2, model, x="y")
            root = (place / "root.json").read_bytes()
            client.publish_version(two.to_bytes(), [("root", root)])
        assert rooted.value.reason == errors_pb2.METADATA_INVALID


def test_the_control_plane_signs_anew_before_its_dates_run_out(
    control: LocalControl, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust("init")

    def timestamp() -> int:
        with ControlClient(control.address) as client:
            return read(TIMESTAMP, client.get_metadata(TIMESTAMP)).signed.version

    first = timestamp()
    control.stop()
    control.start()
    assert timestamp() == first  # a day has not passed
    control.stop()
    monkeypatch.setattr("fleet.trust.RESIGN_DAYS", -1.0)
    control.start()
    assert timestamp() > first
    assert trust("verify").document["trust"]["sound"]


# Losing keys, as docs/operator-guide.md tells it.


def test_recovery_a_targets_key_was_stolen(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    push(control, place, "detector", 1)
    thief = tmp_path / "thief"
    trust("join", place / "root.json", directory=thief)
    (thief / "keys").mkdir()
    (thief / "keys" / "targets.json").write_bytes((place / "keys" / "targets.json").read_bytes())
    (thief / "keys" / "targets.json").chmod(0o600)
    trust("rotate", "targets", "targets", "targets-2")
    with pytest.raises(SluiceError) as refused:
        push(control, thief, "detector", 2)
    assert refused.value.reason == errors_pb2.KEY_UNAVAILABLE
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    assert box.version("detector", 1) is not None
    assert box.version("detector", 2) is None


def test_recovery_one_of_two_root_keys_is_lost(trust: Trust, place: Path) -> None:
    trust("init", "--root-key", "ada", "--root-key", "bob")
    (place / "keys" / "bob.json").unlink()
    trust("revoke", _keyid(trust, "bob"))
    assert trust("verify").document["trust"]["sound"]


def _keyid(trust: Trust, gone: str) -> str:
    """The id of the root key that is not here, as `sluice trust verify` shows it."""
    here = {item["public"]["keyid"][:16] for item in trust("key", "list").document["keys"]}
    told = next(
        item["what"]
        for item in trust("verify").document["trust"]["findings"]
        if item["what"].startswith("root is signed by")
    )
    (found,) = {text.strip() for text in told.partition(":")[2].split(",")} - here
    return found


def test_recovery_every_root_key_is_lost(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    push(control, place, "detector", 1)
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    (place / "keys" / "root.json").unlink()
    trust("init", "--replace", "--root-key", "root-2")
    push(control, place, "detector", 2)
    box.refresh()  # the other keys still count
    assert box.version("detector", 2) is not None
    trust("renew", "root")
    with pytest.raises(SluiceError) as refused:
        box.refresh()  # until the new root is pinned, it stays with what it has
    assert refused.value.reason == errors_pb2.SIGNATURE_INVALID
    assert box.stored_target("detector/2") is not None
    again = device(control, place / "root.json", tmp_path / "box")
    again.refresh()
    assert again.version("detector", 1) is not None
    assert again.version("detector", 2) is not None


def test_recovery_the_online_key_is_lost_or_stolen(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    push(control, place, "detector", 1)
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    control.stop()
    (control.data / "trust" / "online.json").unlink()
    control.start()
    box.refresh()  # what was signed is still served
    trust("rotate", "online")
    push(control, place, "detector", 2)
    box.refresh()
    assert box.version("detector", 2) is not None


def test_recovery_a_control_plane_restored_from_an_old_backup(
    control: LocalControl, trust: Trust, place: Path, tmp_path: Path
) -> None:
    trust("init")
    control.stop()
    backup = {path: path.read_bytes() for path in control.data.glob("control.db*")}
    control.start()
    push(control, place, "detector", 1)
    trust("rotate", "root", "root", "root-2")
    box = device(control, place / "root.json", tmp_path / "box")
    box.refresh()
    control.stop()
    for path in control.data.glob("control.db*"):
        path.unlink()
    for path, data in backup.items():
        path.write_bytes(data)
    control.start()
    with pytest.raises(SluiceError) as old:
        box.refresh()
    assert old.value.reason == errors_pb2.METADATA_ROLLED_BACK
    assert not trust("verify", code=5).document["trust"]["sound"]
    trust("publish")
    box.refresh()
    assert box.version("detector", 1) is not None
    assert trust("verify").document["trust"]["sound"]


def test_a_wrong_passphrase_is_told_as_one(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    trust("init")
    monkeypatch.setenv("SLUICE_PASSPHRASE", "wrong")
    refused = trust("renew", "targets", code=5).document["error"]
    assert refused["reason"] == "KEY_UNAVAILABLE"
    assert "passphrase is wrong" in refused["message"]
