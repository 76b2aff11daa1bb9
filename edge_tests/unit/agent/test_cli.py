"""`sluice-agent`: its JSON, its errors, its manual."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from agent import cli, documents
from agent.doctor import ABSENT, FAULT, OK, Finding
from edge_tests.harness.command import SLUICE
from fleet.cli import documents as operators
from sluice.api.v1 import admin_pb2, devices_pb2, errors_pb2, sync_pb2
from updater.errors import EXIT_OF_STATUS, SluiceError

ROOT = Path(__file__).parents[3]
MANUAL = (ROOT / "docs" / "agent-cli.md").read_text("utf-8")
SHAPES = MANUAL.split("## JSON shapes")[1]


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = [item for item in cli.parser()._actions if isinstance(item, argparse._SubParsersAction)]
    return dict(action.choices)


def names(descriptor: Descriptor) -> set[str]:
    return {field.name for field in descriptor.fields}


def filled() -> admin_pb2.GetStatusResponse:
    """A status with a number that JSON of protobuf would give as text in every place that has one."""
    status = admin_pb2.GetStatusResponse()
    status.reported.models.add().failure.SetInParent()
    status.desired.models.add()
    status.workers.add()
    status.swaps.add()
    fill(status)
    return status


def fill(message: Any) -> None:
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if field.is_repeated else [value]:
                fill(item)
        elif field.is_repeated:
            value.append("text")
        elif field.type == FieldDescriptor.TYPE_ENUM:
            setattr(message, field.name, field.enum_type.values[5].number)
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, field.name)
        else:
            setattr(message, field.name, 1)


def test_the_status_has_every_field_with_its_type() -> None:
    found = documents.status(filled())
    expected = names(admin_pb2.GetStatusResponse.DESCRIPTOR) | {"desired_generation", "time"}
    assert set(found) == expected
    assert set(found["workers"][0]) == names(admin_pb2.WorkerStatus.DESCRIPTOR)
    assert set(found["swaps"][0]) == names(admin_pb2.SwapStatus.DESCRIPTOR)
    assert set(found["reported"][0]) == names(sync_pb2.ReportedModel.DESCRIPTOR)
    assert set(found["reported"][0]["failure"]) == names(sync_pb2.UpdateFailure.DESCRIPTOR)
    assert set(found["desired"][0]) == names(sync_pb2.DesiredModel.DESCRIPTOR)
    assert found["uptime_s"] == 1
    assert found["control_connected"] is True
    assert found["time"] == "1970-01-01T00:00:01Z"
    assert found["reported"][0]["step"] == "warming_up"
    assert found["reported"][0]["failure"]["reason"] == errors_pb2.ErrorReason.keys()[5]
    assert json.loads(json.dumps(found)) == found


def test_an_empty_status_has_every_field_too() -> None:
    found = documents.status(admin_pb2.GetStatusResponse())
    assert set(found) == set(documents.status(filled()))
    assert (found["uptime_s"], found["time"], found["control_error"], found["workers"]) == (0, None, "", [])
    reported = documents.status(
        admin_pb2.GetStatusResponse(reported=sync_pb2.ReportedState(models=[sync_pb2.ReportedModel()]))
    )["reported"][0]
    assert (reported["step"], reported["failure"], reported["healthy"]) == ("", None, False)


def test_unknown_numbers_of_a_newer_agent_are_told_as_they_are() -> None:
    assert (documents.step(99), documents.reason(999)) == ("99", "999")


def test_models_look_as_in_the_operators_command() -> None:
    status = filled()
    device = devices_pb2.Device(reported=status.reported, desired=status.desired)
    shown = operators.device(device)
    found = documents.status(status)
    assert found["reported"] == shown["reported"]
    assert found["desired"] == shown["desired"]


def test_the_manual_has_every_command_and_option() -> None:
    assert set(re.findall(r"^### sluice-agent (\w+)$", MANUAL, re.MULTILINE)) == set(verbs())
    for name, verb in verbs().items():
        section = MANUAL.split(f"### sluice-agent {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
        assert f"$ sluice-agent {name}" in section or f"$ sudo -u sluice sluice-agent {name}" in section
        options = {text for action in verb._actions for text in action.option_strings} - {"-h", "--help"}
        documented = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
        assert documented == options
        for action in verb._actions:
            if not action.option_strings:
                assert f"`{action.metavar}`" in section


def test_the_manual_has_every_exit_code_and_field() -> None:
    table = MANUAL.split("## Exit codes")[1].split("\n## ")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert listed == {0, 1, 2, *EXIT_OF_STATUS.values(), 130, 141}
    found = documents.status(filled())
    fields = {*found, *found["workers"][0], *found["swaps"][0], *found["reported"][0], *found["desired"][0]}
    fields |= {*found["reported"][0]["failure"], *documents.finding(Finding("c", OK, "d"))}
    fields |= set(documents.revert("m", admin_pb2.RevertResponse()))
    assert {field for field in fields if f"`{field}`" not in SHAPES} == set()
    steps = {documents.step(value.number) for value in sync_pb2.UpdateStep.DESCRIPTOR.values} - {""}
    assert {word for word in (*steps, OK, FAULT, ABSENT) if f"`{word}`" not in SHAPES} == set()


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ([], *([name] for name in verbs())):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, "--help"])
        assert caught.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [[], ["dance"], ["status", "--wtch"], ["status", "--js"], ["revert"]])
def test_wrong_usage_is_an_error_like_others(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--json"]) == 2
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert set(error) == {"reason", "message", "hint", "object"}
    assert error["reason"] == "USAGE"
    assert f"sluice-agent: USAGE: {error['message']}\n  help: {error['hint']}\n" in told.err
    assert cli.main(arguments) == 2
    assert capsys.readouterr().out == ""


def test_an_error_is_told_once_with_its_hint_on_its_own_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "none.sock"
    assert cli.main(["status", "--watch", "--json", "--socket", str(place)]) == 8
    told = capsys.readouterr()
    assert told.out.count("\n") == 1
    assert json.loads(told.out)["error"]["object"] == str(place)
    first, second = told.err.splitlines()
    assert first == f"sluice-agent: AGENT_UNREACHABLE: no agent answers on {place}"
    assert second.startswith("  help: `systemctl status sluice-agent`")


def test_a_defect_is_told_with_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_options: argparse.Namespace) -> int:
        raise ZeroDivisionError("of course\x1b[31m")

    monkeypatch.setattr(cli, "_status", fail)
    assert cli.main(["status", "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["reason"] == "INTERNAL"
    assert "Traceback" in told.err
    assert "a defect in sluice-agent: ZeroDivisionError: of course\N{REPLACEMENT CHARACTER}[31m" in told.err


@pytest.mark.parametrize(
    ("findings", "code", "last"),
    [
        ([Finding("a", OK, "fine"), Finding("b", ABSENT, "not here")], 0, "no faults"),
        ([Finding("a", FAULT, "bad", "mend it")], 1, "1 fault"),
        (
            [
                Finding("a", FAULT, "bad"),
                Finding("b", FAULT, "", error=SluiceError(errors_pb2.DISK_FULL, "full")),
            ],
            6,
            "2 faults",
        ),
    ],
)
def test_the_doctor_counts_faults(
    findings: list[Finding],
    code: int,
    last: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('[control]\naddress = "127.0.0.1:1"\n')
    monkeypatch.setattr("agent.doctor.examine", lambda _config: iter(findings))
    assert cli.main(["doctor", "--config", str(config)]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last
    marks = {OK: "ok     ", FAULT: "FAULT  ", ABSENT: "-      "}
    assert lines[0] == f"{marks[findings[0].state]}a: {findings[0].detail}"
    assert [line for line in lines if "help:" in line] == [
        f"       help: {item.hint}" for item in findings if item.hint
    ]
    assert cli.main(["doctor", "--json", "--config", str(config)]) == code
    assert [item["state"] for item in json.loads(capsys.readouterr().out)["findings"]] == [
        finding.state for finding in findings
    ]


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n[control]\naddress = "127.0.0.1:1"\n')
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "doctor", "--config", str(config)],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_taken_port_is_the_configurations_fault_and_grpc_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config = tmp_path / "agent.toml"
        config.write_text(
            f'state_dir = "{tmp_path}/s"\n[control]\naddress = "127.0.0.1:1"\n'
            f'[inference]\naddress = "{address}"\n'
        )
        environment = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "run", "--log-level", "warning", "--config", str(config)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        served = subprocess.run(
            [str(SLUICE), "control", "serve", "--data", str(tmp_path / "c"), "--listen", address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 3
    why = f"cannot listen on {address}: Address already in use"
    assert done.stderr.splitlines() == [
        f"sluice-agent: CONFIG_INVALID: inference.address: {why}",
        "  help: end what listens there (`ss -ltnp` lists it), or set another inference.address",
    ]
    assert served.returncode == 3
    assert served.stderr.splitlines()[0] == f"sluice: CONFIG_INVALID: cannot listen on {address}"


def test_what_is_watched_keeps_its_top_in_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "5")
    text = "".join(f"line {number}\n" for number in range(9))
    assert cli._screen(text) == "\x1b[H\x1b[Jline 0\nline 1\nline 2\n…\n"
    assert cli._screen("line 0\n") == "\x1b[H\x1b[Jline 0\n"
