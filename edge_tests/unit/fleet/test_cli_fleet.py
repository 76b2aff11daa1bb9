"""`sluice model`, `rollout` and `device` against a real control plane, with devices driven by the test."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_tests.harness import command, trust
from edge_tests.harness.command import SLUICE, Ran, sluice, spawn
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.models import samples, tiny_onnx, tiny_tflite, write_golden
from edge_tests.harness.operator import Device, running
from edge_tests.harness.relay import Relay
from fleet.client import ControlClient
from fleet.publish import prepare, publish
from fleet.recipe import Recipe, VariantRecipe
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.digests import digest_file
from updater.manifest import Manifest

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One for all tests here: each uses models and devices of its own."""
    with ControlPlane(
        tmp_path_factory.mktemp("fleet") / "control", "--disk-reserve-bytes", "0"
    ) as running_one:
        yield running_one


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())
    return words[:60].strip("-")


@pytest.fixture(autouse=True)
def _address(control: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CONTROL", control.address)


def push(path: Path, name: str) -> Manifest:
    """Pushes by the command line, and returns the manifest as the control plane gives it."""
    sluice("model", "push", path, "--name", name).expect()
    with ControlClient(os.environ["SLUICE_CONTROL"]) as client:
        return Manifest.parse(client.get_version(name).manifest)


def test_push_list_show(name: str, tmp_path: Path) -> None:
    run = sluice
    model = tiny_onnx(tmp_path / "m.onnx")
    golden = write_golden(tmp_path / "g.npz", samples(2), {"y": np.zeros((2, 4), np.float32)})
    first = run("model", "push", model, "--name", name, "--golden", golden, "--annotation", "commit=abc")
    assert first.expect().out.splitlines()[0].startswith(f"published {name}@1 (onnx-float32; ")
    assert f"next: sluice rollout start {name}@1 --watch" in first.out

    again = run("model", "push", model, "--name", name, "--golden", golden, "--annotation", "commit=abc")
    assert again.expect().out == f"already published as {name}@1; nothing new was made\n"

    changed = tiny_onnx(tmp_path / "n.onnx", change=1e-3)
    made = run("model", "push", changed, "--name", name, "--json").expect().document
    size = changed.stat().st_size
    assert made == {
        "model": name,
        "version": 2,
        "created": True,
        "manifest_digest": made["manifest_digest"],
        "variants": ["onnx-float32"],
        "size_bytes": size,
        "uploaded_files": 1,
        "uploaded_bytes": size,
    }
    same = run("model", "push", changed, "--name", name, "--json").expect().document
    assert same == {**made, "created": False, "uploaded_files": 0, "uploaded_bytes": 0}

    listed = run("model", "list", "--json").expect().document["models"]
    (found,) = [entry for entry in listed if entry["name"] == name]
    assert set(found) == {"name", "latest_version", "aliases", "create_time"}
    assert found["latest_version"] == 2
    versions = run("model", "list", name, "--json").expect().document
    assert [entry["version"] for entry in versions["versions"]] == [2, 1]
    assert versions["model"] == found

    shown = run("model", "show", f"{name}@1", "--json").expect().document
    assert shown["model"] == found
    manifest = shown["version"]["manifest"]
    assert manifest["annotations"] == {"commit": "abc"}
    assert [entry["role"] for entry in manifest["variants"][0]["files"]] == ["model", "golden"]
    text = run("model", "show", f"{name}@1").expect().out
    assert digest_file(model).removeprefix("sha256:")[:12] in text
    assert "golden.npz" in text
    assert "commit=abc" in text


def test_a_version_number_that_is_not_the_next(name: str, tmp_path: Path) -> None:
    push(tiny_onnx(tmp_path / "m.onnx"), name)
    other = tiny_onnx(tmp_path / "n.onnx", seed=1)
    for number in (1, 3):
        ended = sluice("model", "push", other, "--name", name, "--version", number, "--json").expect(5)
        error = ended.document["error"]
        assert error["reason"] == "VERSION_NOT_NEXT"
        assert "--version 2" in error["hint"]
    with ControlClient(os.environ["SLUICE_CONTROL"]) as client:
        assert client.get_upload(digest_file(other)).committed_bytes == 0, "nothing was uploaded in vain"
    made = sluice("model", "push", other, "--name", name, "--version", 2, "--json").expect()
    assert made.document["version"] == 2


def test_a_recipe_becomes_variants(name: str, tmp_path: Path) -> None:
    tiny_onnx(tmp_path / "m.onnx", seed=77)
    tiny_tflite(tmp_path / "m.tflite", seed=77)
    (tmp_path / "labels.txt").write_text("zero\none\n")
    path = tmp_path / "model.yaml"
    path.write_text(
        f"model: {name}\nvariants:\n"
        "  - {file: m.onnx, files: [{role: labels, path: labels.txt}]}\n"
        "  - {name: small, file: m.tflite, boards: [aarch64]}\n"
    )
    made = sluice("model", "push", "-f", path, "--annotation", "by=ci", "--json").expect().document
    assert made["variants"] == ["onnx-float32", "small"]
    assert made["uploaded_files"] == 3
    shown = sluice("model", "show", name, "--json").expect().document["version"]["manifest"]
    assert shown["annotations"] == {"by": "ci"}
    assert shown["variants"][1]["boards"] == ["aarch64"]


def test_a_bad_recipe_publishes_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"model: {name}\nvariants: [{{file: gone.onnx}}]\n")
    error = sluice("model", "push", "-f", path, "--json").expect(3).document["error"]
    assert error["reason"] == "CONFIG_INVALID"
    sluice("model", "show", name).expect(4)


def test_foreign_and_truncated_files_are_refused(name: str, tmp_path: Path) -> None:
    foreign = tmp_path / "m.onnx"
    foreign.write_bytes(b"PK\x03\x04" + bytes(1000))
    error = sluice("model", "push", foreign, "--name", name, "--json").expect(3).document["error"]
    assert error["reason"] in ("MODEL_FILE_INVALID", "MODEL_FILE_TRUNCATED")
    whole = tiny_onnx(tmp_path / "whole.onnx").read_bytes()
    foreign.write_bytes(whole[:-10])
    error = sluice("model", "push", foreign, "--name", name, "--json").expect(3).document["error"]
    assert error["reason"] == "MODEL_FILE_TRUNCATED"


def test_two_pushers_at_once_both_publish(control: ControlPlane, name: str, tmp_path: Path) -> None:
    """Each may lose the race once; with a number of its own, neither loses its content."""
    drafts = [
        prepare(Recipe(name, (VariantRecipe(tiny_onnx(tmp_path / f"{seed}.onnx", seed=seed)),)))
        for seed in (1, 2)
    ]
    ready = threading.Barrier(2)
    versions: list[int] = []

    def run(index: int) -> None:
        with ControlClient(control.address) as client:
            ready.wait(DEADLINE_S)
            versions.append(publish(client, drafts[index]).manifest.version)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(versions) == [1, 2]


def test_aliases(name: str, tmp_path: Path) -> None:
    run = sluice
    push(tiny_onnx(tmp_path / "m.onnx"), name)
    changed = run("model", "alias", name, "stable", 1, "--json").expect().document
    assert changed["model"]["aliases"] == {"stable": 1}
    assert run("model", "show", f"{name}:stable", "--json").expect().document["version"]["version"] == 1
    assert f"{name}@1 (stable)" in run("model", "show", name).expect().out
    assert run("model", "alias", name, "stable", 9, "--json").expect(4).document["error"]["reason"] == (
        "VERSION_UNKNOWN"
    )
    assert run("model", "alias", name, "stable", "--remove").expect().out == f"{name}:stable is removed\n"
    error = run("model", "show", f"{name}:stable", "--json").expect(4).document["error"]
    assert error["reason"] == "ALIAS_UNKNOWN"
    assert error["hint"]


def test_a_retired_version_is_not_rolled_out(name: str, tmp_path: Path) -> None:
    push(tiny_onnx(tmp_path / "m.onnx"), name)
    assert sluice("model", "retire", f"{name}@1", "--json").expect().document["version"]["retired"]
    error = sluice("rollout", "start", name, "--json").expect(5).document["error"]
    assert error["reason"] == "VERSION_RETIRED"
    assert "retired" in sluice("model", "list", name).expect().out


def test_describe_by_the_server(name: str, tmp_path: Path) -> None:
    for change in (0.0, 1e-3):
        path = tiny_onnx(tmp_path / f"{change}.onnx", hidden=256, change=change)
        push(path, name)
    shown = sluice("delta", "describe", "--server", f"{name}@1", f"{name}@2", "--json").expect()
    assert shown.document["target_size"] == (tmp_path / "0.001.onnx").stat().st_size
    assert shown.document["delta_size"] < shown.document["target_size"]
    assert "weights0" in {region["name"] for region in shown.document["regions"]}
    full = sluice("delta", "describe", "--server", "--full", name, "--json").expect().document
    assert full["base_size"] == 0
    missing = sluice("delta", "describe", "--server", name, name, "--variant", "x", "--json").expect(5)
    assert missing.document["error"]["reason"] == "NO_COMPATIBLE_VARIANT"


def test_devices_are_listed_shown_and_labelled(control: ControlPlane, name: str, tmp_path: Path) -> None:
    run = sluice
    manifest = push(tiny_onnx(tmp_path / "m.onnx"), name)
    with Device(control.address, name, labels={"site": name}) as device:
        failure = sync_pb2.UpdateFailure(
            version=1, reason=errors_pb2.GOLDEN_MISMATCH, message="y is off\x1b[31m", attempts=2, final=True
        )
        device.report(running(manifest, failure=failure))
        deadline = time.monotonic() + DEADLINE_S
        while True:
            (found,) = run("device", "list", "--label", f"site={name}", "--json").expect().document["devices"]
            if found["reported"]:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert found["online"] is True
        assert found["state"] == "accepted"
        assert found["reported"][0]["active_version"] == 1
        assert found["reported"][0]["failure"]["reason"] == "GOLDEN_MISMATCH"
        assert run("device", "show", name, "--json").expect().document["device"]["id"] == name
        text = run("device", "show", name).expect().out
        assert f"{name}@1: GOLDEN_MISMATCH (given up): y is off" in text
        assert "\x1b" not in text, "a device must not steer the operator's terminal"
        labelled = run("device", "label", name, "ring=canary", "--json").expect().document["device"]
        assert labelled["labels"] == {"ring": "canary", "site": name}
        assert run("device", "label", name, "ring-").expect().out == f"{name}: site={name}\n"
    assert (
        run("device", "show", "nowhere", "--json").expect(4).document["error"]["reason"] == "DEVICE_UNKNOWN"
    )


def follow(device: Device, manifest: Manifest, *, fail: bool = False) -> threading.Thread:
    """Does as a device does: takes the next desired state, and reports how it went."""

    def work() -> None:
        device.next_desired()
        if not fail:
            device.report(running(manifest, fetched_bytes=2000, fetch_total_bytes=2000))
            return
        failure = sync_pb2.UpdateFailure(
            version=manifest.version,
            reason=errors_pb2.GOLDEN_MISMATCH,
            message="output y: cosine 0.31 is below 0.95",
            attempts=1,
            final=True,
        )
        device.report(
            sync_pb2.ReportedModel(model=manifest.model, step=sync_pb2.UPDATE_STEP_FAILED, failure=failure)
        )

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_rollout_that_succeeds(control: ControlPlane, name: str, tmp_path: Path) -> None:
    run = sluice
    manifest = push(tiny_onnx(tmp_path / "m.onnx"), name)
    with Device(control.address, name) as device:
        follow(device, manifest)
        ended = command.run("rollout", "start", name, "--device", name, "--watch", "--json").expect()
        rollout = ended.document["rollout"]
        assert (rollout["state"], rollout["version"]) == ("succeeded", 1)
        assert [(entry["device_id"], entry["state"]) for entry in rollout["devices"]] == [(name, "done")]
        assert rollout["end_time"]
        assert f"{name}  done" in ended.err, "changes are lines on stderr where there is no terminal"
    shown = run("rollout", "show", rollout["id"], "--json").expect().document["rollout"]
    assert shown == rollout
    listed = run("rollout", "list", "--model", name, "--json").expect().document["rollouts"]
    assert [entry["id"] for entry in listed] == [rollout["id"]]
    assert "devices" not in listed[0]
    assert f"{name}@1" in run("rollout", "list").expect().out
    again = run("rollout", "watch", rollout["id"]).expect()
    assert "succeeded  1 done" in again.out


def test_a_rollout_that_fails_is_exit_9(control: ControlPlane, name: str, tmp_path: Path) -> None:
    manifest = push(tiny_onnx(tmp_path / "m.onnx"), name)
    with Device(control.address, name) as device:
        follow(device, manifest, fail=True)
        ended = command.run("rollout", "start", name, "--device", name, "--watch").expect(9)
    assert "failed  1 failed" in ended.out
    assert "GOLDEN_MISMATCH: output y: cosine 0.31 is below 0.95" in ended.out


def test_a_rollout_can_be_aborted(control: ControlPlane, name: str, tmp_path: Path) -> None:
    run = sluice
    push(tiny_onnx(tmp_path / "m.onnx"), name)
    with Device(control.address, name):
        options = ("--device", name, "--deadline", "30m", "--max-failed", 10)
        begun = run("rollout", "start", f"{name}@1", *options, "--json").expect().document["rollout"]
        assert begun["state"] == "running"
        (phase,) = begun["phases"]
        assert (phase["deadline_s"], phase["max_failed_percent"]) == (1800, 10)
        second = run("rollout", "start", name, "--device", name, "--json").expect(5).document["error"]
        assert second["reason"] == "ROLLOUT_STATE"
        assert "sluice rollout" in second["hint"]
        ended = run("rollout", "abort", begun["id"], "--revert", "--why", "a test", "--json").expect()
        assert ended.document["rollout"]["state"] == "aborted"
        assert "a test" in ended.document["rollout"]["verdict"]
        run("rollout", "abort", begun["id"]).expect(5)
        run("rollout", "watch", begun["id"]).expect(9)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["model", "show", "nothing"], "MODEL_UNKNOWN"),
        (["model", "list", "nothing"], "MODEL_UNKNOWN"),
        (["model", "alias", "nothing", "stable", "1"], "MODEL_UNKNOWN"),
        (["model", "retire", "nothing@1"], "MODEL_UNKNOWN"),
        (["rollout", "start", "nothing"], "MODEL_UNKNOWN"),
        (["rollout", "start", "nothing:stable"], "MODEL_UNKNOWN"),
        (["rollout", "show", "nothing"], "ROLLOUT_UNKNOWN"),
        (["rollout", "watch", "nothing"], "ROLLOUT_UNKNOWN"),
        (["rollout", "abort", "nothing"], "ROLLOUT_UNKNOWN"),
        (["device", "label", "nothing", "a=1"], "DEVICE_UNKNOWN"),
    ],
)
def test_what_is_unknown_is_exit_4(arguments: list[str], reason: str) -> None:
    ended = sluice(*arguments, "--json").expect(4)
    error = ended.document["error"]
    assert error["reason"] == reason
    assert "`sluice " in error["hint"], "the next command is named"


def stop_when(process: subprocess.Popen[str], seen: str) -> Ran:
    """Presses Ctrl-C once the command has said `seen` on stderr."""
    assert process.stderr is not None
    said = ""
    deadline = time.monotonic() + DEADLINE_S
    while seen not in said:
        assert time.monotonic() < deadline, said
        if select.select([process.stderr], [], [], 0.5)[0]:
            said += os.read(process.stderr.fileno(), 4096).decode()
        assert process.poll() is None, said
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    return Ran(process.returncode, out, said + err)


def test_ctrl_c_stops_watching_only(control: ControlPlane, name: str, tmp_path: Path) -> None:
    push(tiny_onnx(tmp_path / "m.onnx"), name)
    with Device(control.address, name):
        begun = sluice("rollout", "start", name, "--device", name, "--json").expect()
        rollout = begun.document["rollout"]["id"]
        with spawn("rollout", "watch", rollout, "--json") as process:
            ended = stop_when(process, "waiting").expect(130)
        assert ended.document["error"]["reason"] == "INTERRUPTED"
        assert f"sluice rollout watch {rollout}" in ended.document["error"]["hint"]
        state = sluice("rollout", "show", rollout, "--json").expect().document["rollout"]["state"]
        assert state == "running"
        sluice("rollout", "abort", rollout).expect()


def test_ctrl_c_in_a_push_keeps_what_was_uploaded(control: ControlPlane, name: str, tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "m.onnx", hidden=400_000)
    size = model.stat().st_size
    digest = digest_file(model)
    with Relay(control.address) as relay, ControlClient(control.address) as client:
        relay.cut_after(3_000_000)
        with spawn("model", "push", model, "--name", name, "--control", relay.address) as process:
            deadline = time.monotonic() + DEADLINE_S
            while client.get_upload(digest).committed_bytes == 0:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            relay.freeze()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "run the same command again" in err
    assert out == ""
    with ControlClient(control.address) as client:
        assert client.get_upload(digest).committed_bytes > 0
    made = command.run(
        "model", "push", model, "--name", name, "--control", control.address, "--json"
    ).expect()
    assert 0 < made.document["uploaded_bytes"] < size


def terminal(*arguments: object, columns: int = 80) -> tuple[int, str]:
    """Runs `sluice` with a terminal of so many columns; its exit code and all it wrote there."""
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [str(SLUICE), *map(str, arguments)],
        stdin=far,
        stdout=far,
        stderr=far,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(far)
    written = b""
    with contextlib.suppress(OSError):  # how a terminal says that its last writer has gone
        while piece := os.read(near, 65536):
            written += piece
    os.close(near)
    return process.wait(DEADLINE_S), written.decode()


def lines(written: str) -> list[str]:
    """What was written, without colours and cursor movements, as lines."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "").split("\n")


def test_tables_fit_a_terminal_of_80_columns(control: ControlPlane, tmp_path: Path) -> None:
    long = "x" * 60
    manifest = push(tiny_onnx(tmp_path / "m.onnx"), f"{long}-1")
    push(tiny_tflite(tmp_path / "m.tflite"), f"{long}-1")
    sluice("model", "alias", f"{long}-1", f"{long}-2", 1).expect()
    labels = {"site": "a-harbour-with-a-long-name", "ring": "canary", "owner": "the-vision-team"}
    with Device(control.address, f"{long}-3", labels=labels) as device:
        follow(device, manifest, fail=True)
        ended = sluice("rollout", "start", f"{long}-1@1", "--device", device.id, "--watch", "--json")
        rollout = ended.expect(9).document["rollout"]["id"]
        for arguments in (
            ["model", "list"],
            ["model", "list", f"{long}-1"],
            ["model", "show", f"{long}-1@1"],
            *(["device", *verb] for verb in (["list"], ["show", device.id])),
            *(["rollout", *verb] for verb in (["list"], ["show", rollout])),
            ["delta", "describe", "--server", "--full", f"{long}-1"],
        ):
            code, written = terminal(*arguments)
            while code == 8:  # the delta is being computed; the test's own timeout bounds this
                code, written = terminal(*arguments)
            assert code == 0, written
            assert max(map(len, lines(written))) <= 80, "\n".join(lines(written))


def test_a_terminal_shows_the_rollout_live(control: ControlPlane, name: str, tmp_path: Path) -> None:
    manifest = push(tiny_onnx(tmp_path / "m.onnx"), name)
    with Device(control.address, name) as device:
        begun = sluice("rollout", "start", name, "--device", name, "--json").expect()
        threading.Timer(1.0, follow(device, manifest).join).start()
        code, written = terminal("rollout", "watch", begun.document["rollout"]["id"])
    assert code == 0
    assert "\x1b[" in written
    assert "succeeded  1 done" in "\n".join(lines(written))


def test_a_terminal_shows_a_bar_for_a_long_upload(control: ControlPlane, name: str, tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "m.onnx", hidden=600_000)
    with Relay(control.address) as relay:
        relay.freeze()
        threading.Timer(1.5, relay.thaw).start()
        code, written = terminal("model", "push", model, "--name", name, "--control", relay.address)
    assert code == 0, written
    assert "m.onnx" in written
    assert "━" in written
    assert f"published {name}@1" in "\n".join(lines(written))


def test_serving_from_the_command_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    trust.install(data)
    with spawn("control", "serve", "--data", data, "--listen", "127.0.0.1:0", "--json") as process:
        deadline = time.monotonic() + DEADLINE_S
        while not (data / "address").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        address = (data / "address").read_text()
        assert command.run("model", "list", "--control", address, "--json").expect().document == {
            "models": []
        }
        again = ("control", "serve", "--data", data, "--listen", "127.0.0.1:0", "--json")
        second = command.run(*again).expect(5)
        assert second.document["error"]["reason"] == "STATE_LOCKED"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
    ended = Ran(process.returncode, out, err).expect()
    assert ended.document == {"control": {"data": str(data), "listen": "127.0.0.1:0"}}
    bad = command.run("control", "serve", "--data", data, "--listen", "nowhere", "--json").expect(3)
    assert bad.document["error"]["reason"] == "CONFIG_INVALID"
