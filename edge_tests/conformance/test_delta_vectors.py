"""The delta format's test vectors: complete, cited, as the code makes them, and kept by every decoder."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import zstandard

from edge_tests.conformance import delta as runner
from edge_tests.conformance import index
from edge_tests.conformance.index import DOCUMENT, VECTORS, Vector
from edge_tests.conformance.plain import delta as plain
from edge_tests.conformance.plain.fault import Fault
from edge_tests.conformance.vectors import __main__ as maker
from updater import delta, limits
from updater.digests import PREFIX
from updater.errors import SluiceError

ALL = index.load()
NAMED = {vector.name: vector for vector in ALL}
MOST_BYTES = 448 << 10  # of the folder
SLOWEST_S = 30  # a vector in process; most take some milliseconds

OWN = (sys.executable, "-m", "edge_tests.conformance.sluice_decoder")
PLAIN = (sys.executable, "-m", "edge_tests.conformance.plain")
PARTS = 8  # of the vectors, so that workers share them
# As executables only a few: a process takes a while to start.
FEW = (
    "two-blocks",
    "announced-another",
    "full-copy",
    "program-groups",
    "base-missing",
    "cut-payload",
    "max-block",
)


def outcome(vector: Vector, directory: Path) -> str | bytes:
    """What our decoder makes of a vector: the target or an error's code."""
    announced = vector.announced or ("", 0)
    out = directory / "out"
    applier = delta.Applier(
        VECTORS / vector.base if vector.base is not None else None,
        out,
        expected_target=PREFIX + announced[0] if vector.announced else None,
        expected_size=announced[1] if vector.announced else None,
    )
    try:
        applier.feed((VECTORS / vector.delta).read_bytes())
        applier.finish()
        return out.read_bytes()
    except SluiceError as error:
        return error.code
    finally:
        applier.discard()


@pytest.mark.timeout(SLOWEST_S)
@pytest.mark.parametrize("name", NAMED)
def test_our_decoder(tmp_path: Path, name: str) -> None:
    vector = NAMED[name]
    result = outcome(vector, tmp_path)
    assert list(tmp_path.iterdir()) == []
    if vector.errors:
        assert result in vector.errors
    else:
        assert isinstance(result, bytes), result
        assert (len(result), index.digest(result)) == (vector.size, vector.digest)
        if vector.target is not None:
            assert result == (VECTORS / vector.target).read_bytes()


def test_describe_refuses_the_same(tmp_path: Path) -> None:
    """`describe` reads the same structures; what it does not run (digests, predictions) it may let pass."""
    for vector in ALL:
        base = VECTORS / vector.base if vector.base is not None else None
        try:
            delta.describe(base, VECTORS / vector.delta)
        except SluiceError as error:
            assert vector.errors, (vector.name, error)
            assert error.code.startswith("DELTA_"), vector.name


def test_mixed_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself takes seconds to reach, so no vector does."""
    monkeypatch.setattr(limits, "MAX_MIXED_BYTES", 20)
    assert outcome(NAMED["skeleton-without-base"], tmp_path) in ("DELTA_LIMIT_EXCEEDED", "DELTA_INVALID")


@pytest.mark.parametrize("part", range(PARTS))
def test_the_plain_decoder(part: int) -> None:
    """It knows the document alone, and neither NumPy nor our code."""
    for vector in ALL[part::PARTS]:
        base = (VECTORS / vector.base).read_bytes() if vector.base is not None else None
        announced = (bytes.fromhex(vector.announced[0]), vector.announced[1]) if vector.announced else None
        try:
            result = plain.decode(base, (VECTORS / vector.delta).read_bytes(), announced)
        except Fault as fault:
            assert fault.code in vector.errors, vector.name
        else:
            assert not vector.errors, vector.name
            assert (len(result), index.digest(result)) == (vector.size, vector.digest), vector.name


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("command", [OWN, PLAIN], ids=["own", "plain"])
def test_decoders_as_executables(command: tuple[str, ...], name: str) -> None:
    result = runner.check(command, NAMED[name], VECTORS, runner.DEADLINE_S, runner.MEMORY_MIB)
    assert result.outcome == runner.PASSED, result


def test_the_files_are_those_of_the_index() -> None:
    files = {path.relative_to(VECTORS).as_posix() for path in maker.on_disk()}
    named = {name for v in ALL for name in (v.base, v.delta, v.target) if name is not None}
    assert files == named | {index.INDEX}
    assert sum((VECTORS / name).stat().st_size for name in files) < MOST_BYTES
    for vector in ALL:
        assert bool(vector.errors) != bool(vector.digest), vector.name


def test_the_files_are_what_the_code_makes() -> None:
    made = maker.files()
    found = {path.relative_to(VECTORS).as_posix(): path.read_bytes() for path in maker.on_disk()}
    version = ".".join(map(str, zstandard.ZSTD_VERSION))
    if f'"zstd": "{version}"' not in found[index.INDEX].decode():
        assert made.keys() == found.keys()  # another zstd may code frames in other bytes
        return
    changed = [name for name in made.keys() | found.keys() if made.get(name) != found.get(name)]
    assert changed == [], "run `make vectors`"


def test_rules_cite_vectors_and_vectors_are_cited() -> None:
    citations = index.cited()
    assert sorted(citations) == list(range(1, len(citations) + 1))
    assert all(citations.values()), "every rule cites a vector"
    assert index.uncited(list(NAMED), citations) == ([], [])
    for vector in ALL:
        assert vector.rules == index.rules_of(vector.name, citations), "run `make vectors`"


def test_vectors_reach_every_error_and_feature() -> None:
    text = DOCUMENT.read_text()
    codes = {code for vector in ALL for code in vector.errors}
    errors = text.split("## Errors")[1].split("\n## ")[0]
    assert codes == set(re.findall(r"`(DELTA_[A-Z_]+)`", errors))
    valid = [vector for vector in ALL if not vector.errors]
    assert {feature for vector in valid for feature in vector.features} == set(delta.FEATURES)


DECODERS = {
    "does nothing": ("", "no output"),
    "writes something else": ("open(out, 'w').write('x' * 400)", "wrote another target"),
    "writes too much": ("open(out, 'w').write('x' * 401)", "wrote 401 bytes"),
    "leaves files": ("open(out, 'w'); open(out + '.tmp', 'w')", "left behind: out.tmp"),
    "changes its base": ("open(base, 'a').write('x')", "changed its base"),
    "fails": ("sys.exit('DELTA_CORRUPT')", "exit status 1: DELTA_CORRUPT"),
    "hangs": ("time.sleep(60)", "ran longer"),
    "takes memory": ("x = bytearray(b'x' * (200 << 20)); time.sleep(60)", "held"),
}
REFUSERS = {
    "does nothing": ("", "succeeded"),
    "names no code": ("sys.exit(1)", "without a code"),
    "names another code": ("sys.exit('DELTA_CORRUPT')", "DELTA_CORRUPT; DELTA_TRUNCATED was due"),
    "leaves its output": ("open(out, 'w'); sys.exit('DELTA_TRUNCATED')", "left its output"),
    "crashes": ("os.kill(os.getpid(), 9)", "exit status -9"),
}


def decoder(script: str) -> list[str]:
    """An executable that runs a line of Python."""
    line = f"import os, sys, time; base, delta, out = sys.argv[1:]; {script}"
    return [sys.executable, "-S", "-c", line]


@pytest.mark.parametrize("kind", DECODERS)
def test_the_runner_finds_decoders_that_do_not_decode(kind: str) -> None:
    script, why = DECODERS[kind]
    result = runner.check(decoder(script), NAMED["two-blocks"], VECTORS, 1.5, 128)
    assert result.outcome == runner.FAILED
    assert why in result.why


@pytest.mark.parametrize("kind", REFUSERS)
def test_the_runner_finds_decoders_that_do_not_refuse(kind: str) -> None:
    script, why = REFUSERS[kind]
    result = runner.check(decoder(script), NAMED["cut-payload"], VECTORS, 1.5, 128)
    assert result.outcome == runner.FAILED
    assert why in result.why


def test_the_runners_table_fits_and_its_status_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    refuses = shlex.join(decoder("sys.exit('DELTA_TRUNCATED: as ever')"))
    assert runner.main(["--decoder", refuses, "--only", "cut-*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 60
    assert lines[-1].startswith("11 passed, 0 failed, 0 skipped of 11")
    assert runner.main(["--decoder", refuses, "--only", "cut-magic", "--only", "minimal", "--json"]) == 1
    assert '"counts": {\n  "passed": 1,\n  "FAILED": 1' in capsys.readouterr().out
    assert runner.main(["--decoder", refuses, "--only", "no such name"]) == 2
