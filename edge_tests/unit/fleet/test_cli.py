"""`sluice` as a whole: help, documentation, errors, exit codes, pipes, what it imports."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edge_tests.harness.command import SLUICE, run, sluice
from edge_tests.harness.models import tiny_onnx
from fleet.cli import delta as delta_module
from fleet.cli.app import cli
from fleet.cli.command import Command, Group
from updater.errors import EXIT_OF_STATUS

ROOT = Path(__file__).parents[3]
MANUAL = (ROOT / "docs" / "cli.md").read_text("utf-8")


def tree(group: Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, Group):
            yield from tree(command, (*path, name))


NODES = dict(tree())
VERBS = {path: command for path, command in NODES.items() if isinstance(command, Command)}


def ids(path: tuple[str, ...]) -> str:
    return "-".join(path)


def test_the_verbs_are_these() -> None:
    assert {" ".join(path) for path in VERBS} == {
        "control serve",
        "control init",
        "control admit",
        "control ca show",
        "control ca rotate",
        "control ca drop",
        "model push",
        "model list",
        "model show",
        "model alias",
        "model retire",
        "delta create",
        "delta apply",
        "delta describe",
        "delta approximate",
        "rollout start",
        "rollout watch",
        "rollout abort",
        "rollout list",
        "rollout show",
        "operator role",
        "operator roles",
        "audit list",
        "audit export",
        "audit verify",
        "device list",
        "device show",
        "device label",
        *(f"device {verb}" for verb in ("token", "pending", "approve", "reject", "revoke")),
        *(
            f"operator {verb}"
            for verb in ("enrol", "adopt", "whoami", "list", "token", "approve", "reject", "revoke")
        ),
        "trust init",
        "trust join",
        "trust verify",
        "trust sign",
        "trust publish",
        "trust root",
        "trust key new",
        "trust key import",
        "trust key export",
        "trust key list",
        "trust add-key",
        "trust rotate",
        "trust revoke",
        "trust threshold",
        "trust delegate",
        "trust undelegate",
        "trust renew",
        "trust allow",
        "trust withdraw",
    }


@pytest.mark.parametrize("path", [(), *NODES], ids=ids)
def test_help_fits_and_teaches(path: tuple[str, ...]) -> None:
    text = sluice(*path, "--help").expect().out
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text.split("Commands:")[-1].split("Examples:")[0] or path in VERBS
    if path in VERBS or not path:
        assert "Examples:\n" in text
        assert "--json" in text


@pytest.mark.parametrize("path", VERBS, ids=ids)
def test_examples_use_options_that_exist(path: tuple[str, ...]) -> None:
    command = VERBS[path]
    assert isinstance(command, Command)
    assert command.examples
    known = {name for option in command.params for name in option.opts}
    for _, example in command.examples:
        for line in example.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition("|")[0])
            assert tuple(words[1 : 1 + len(path)]) == path
            assert {word for word in words if word.startswith("-") and len(word) > 1} <= known


@pytest.mark.parametrize("path", VERBS, ids=ids)
def test_the_manual_has_every_command_and_option(path: tuple[str, ...]) -> None:
    heading = f"### sluice {' '.join(path)}\n"
    assert heading in MANUAL
    section = MANUAL.split(heading)[1].split("\n### ")[0].split("\n## ")[0]
    assert f"$ sluice {' '.join(path)}" in section, "no example"
    assert "`--json`:" in section, "no word on its JSON"
    for option in VERBS[path].params:
        if isinstance(option, click.Option) and not option.hidden and option.name != "json":
            assert f"`{option.opts[-1]}" in section or f"`{option.opts[0]}" in section, option.opts


def test_the_manual_has_every_exit_code() -> None:
    table = MANUAL.split("## Exit codes")[1].split("\n## ")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert listed == {0, 1, 2, *EXIT_OF_STATUS.values(), 130, 141}


def test_no_command_shows_the_help() -> None:
    for path in ((), ("model",)):
        ended = sluice(*path).expect(2)
        assert "Commands:" in ended.err
        assert ended.out == ""


def test_the_version_is_told() -> None:
    assert sluice("--version").expect().out.startswith("sluice 0.")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["frob"], "No such command 'frob'"),
        (["model", "frob"], "No such command 'frob'"),
        (["model", "push"], "give a model FILE with --name"),
        (["model", "push", "gone.onnx", "--name", "m"], "does not exist"),
        (["model", "push", str(SLUICE)], "sluice model push"),
        (["model", "push", "-f", str(SLUICE), "--name", "m"], "leave out FILE"),
        (["model", "push", str(SLUICE), "--name", "M!"], "1 to 64 of a-z"),
        (["model", "push", str(SLUICE), "--name", "m", "--version", "0"], "versions are 1, 2, 3"),
        (["model", "push", str(SLUICE), "--name", "m", "--annotation", "a"], "not key=value"),
        (
            ["model", "push", str(SLUICE), "--name", "m", "--annotation", "a=1", "--annotation", "a=2"],
            "'a' twice",
        ),
        (["model", "show", "m@"], "no version number"),
        (["model", "show", "m@1x"], "no version number"),
        (["model", "show", "m@" + "9" * 30], "no version number"),
        (["model", "show", "m:"], "an alias has"),
        (["model", "show", "../m"], "not a model"),
        (["model", "show", "m\n"], "not a model"),
        (["model", "alias", "m", "stable"], "--remove"),
        (["model", "alias", "m", "stable", "1", "--remove"], "--remove"),
        (["model", "retire", "m"], "say which version"),
        (["rollout", "start", "m", "--deadline", "soon"], "90s, 15m, 1h or 2d"),
        (["rollout", "start", "m", "--deadline", "0"], "90s, 15m, 1h or 2d"),
        (["rollout", "start", "m", "--max-failed", "101"], "0<=x<=100"),
        (["rollout", "abort", "r", "--why", "x" * 501], "at most 500"),
        (["device", "label", "d"], "Missing argument"),
        (["device", "label", "d", "key"], "neither key=value nor key-"),
        (["device", "label", "d", "=v"], "neither key=value nor key-"),
        (["device", "label", "d", "a=1", "a-"], "more than once: a"),
        (["device", "label", "d", "a=1", "a=2"], "more than once"),
        (["--timeout", "never", "model", "list"], "not a valid float"),
    ],
)
def test_wrong_usage(arguments: list[str], why: str) -> None:
    ended = sluice(*arguments, "--json").expect(2)
    error = ended.document["error"]
    assert set(error) == {"reason", "message", "hint", "object"}
    assert error["reason"] == "USAGE"
    assert why in error["message"]
    assert "--help" in error["hint"]
    assert why in ended.err


NOBODY = ("--control", "127.0.0.1:9", "--timeout", "5")


def test_an_error_says_what_why_and_what_next() -> None:
    ended = run(*NOBODY, "model", "list").expect(8)
    assert ended.out == ""
    first, second = ended.err.splitlines()
    assert first == (
        "sluice: CONTROL_UNREACHABLE: no answer from 127.0.0.1:9 while listing models: Connection refused"
    )
    assert second.startswith("  help: start it with `sluice control serve`")


@pytest.mark.parametrize(
    "arguments",
    [("--json", *NOBODY, "model", "list"), ("model", "list", "--json", *NOBODY), ("model", "list", *NOBODY)],
)
def test_global_options_stand_before_or_after_the_verb(arguments: tuple[str, ...]) -> None:
    ended = sluice(*arguments).expect(8)
    if "--json" in arguments:
        assert ended.document["error"]["reason"] == "CONTROL_UNREACHABLE"
        assert ended.document["error"]["object"] == "127.0.0.1:9"
    else:
        assert ended.out == ""


def test_the_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CONTROL", "127.0.0.1:9")
    assert "127.0.0.1:9" in sluice("model", "list").expect(8).err
    assert "127.0.0.1:19" in sluice("model", "list", "--control", "127.0.0.1:19").expect(8).err


def test_an_address_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "REQUEST_INVALID" in sluice("model", "list", "--control", "a b").expect(3).err


def test_a_traceback_only_with_debug() -> None:
    assert "Traceback" not in sluice(*NOBODY, "model", "list").err
    assert "Traceback" in sluice(*NOBODY, "model", "list", "--debug").expect(8).err


def test_a_defect_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(delta_module.engine, "create", broken)
    model = tiny_onnx(tmp_path / "m.onnx")
    ended = sluice("delta", "create", "-", model, "-o", tmp_path / "d", "--json").expect(1)
    error = ended.document["error"]
    assert error["reason"] == "INTERNAL"
    assert "ZeroDivisionError: by zero" in error["message"]
    assert "--debug" in error["hint"]
    assert "Traceback" not in ended.err


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    model = tiny_onnx(tmp_path / "m.onnx")
    with os.fdopen(write, "w") as closed:
        ended = run("delta", "describe", "-", model, stdout=closed)
    assert (ended.code, ended.err) == (141, "")


def test_pipes_get_whole_lines_without_colour(tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "m.onnx")
    ended = run("delta", "describe", "-", model, env={"COLUMNS": "20", "TERM": "xterm-256color"}).expect()
    assert "\x1b" not in ended.out + ended.err
    assert any(line.endswith("weights0") for line in ended.out.splitlines())
    assert all(line == line.rstrip() for line in ended.out.splitlines())


def isolated(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("package", ["click", "rich", "yaml"])
def test_a_missing_package_is_one_clear_line(package: str) -> None:
    done = isolated(f"import sys; sys.modules[{package!r}] = None; from fleet.cli.main import main; main()")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"sluice: the package {package} is missing; install it with: pip install 'sluice[control]'\n"
    )


def test_the_control_plane_is_imported_only_to_serve() -> None:
    done = isolated(
        "import sys, fleet.cli.app, json;"
        "print(json.dumps([m for m in sys.modules if m.partition('.')[0] in ('sqlalchemy', 'alembic')"
        " or m == 'fleet.server']))"
    )
    assert json.loads(done.stdout) == []


def test_serving_without_its_packages_says_what_to_install(tmp_path: Path) -> None:
    done = isolated(
        "import sys; sys.modules['sqlalchemy'] = None;"
        f"sys.argv = ['sluice', 'control', 'serve', '--data', {str(tmp_path)!r}];"
        "from fleet.cli.main import main; main()"
    )
    assert done.returncode == 3
    assert "needs the package sqlalchemy" in done.stderr
    assert "pip install 'sluice[control]'" in done.stderr
