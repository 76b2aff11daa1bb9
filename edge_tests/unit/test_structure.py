"""The house rules as tests: import rules, types, style, sizes, Python 3.10 on the box, stubs that match."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("agent", "fleet", "runtimes", "updater")
BOX_ROOMS = ("agent", "runtimes", "updater")  # what runs on Python 3.10 as well
MAX_LINES = 500
BIN = Path(sys.executable).parent


def run(*command: str) -> None:
    """Runs a checker in the repository; fails with all it printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    )


def sources(*rooms: str) -> list[Path]:
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    assert found, f"no sources in {rooms}"
    return [path for path in found if "_pb2" not in path.name]


def tracked_text() -> list[tuple[Path, str]]:
    """Every text file that git tracks, with its content."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing to list")
    texts = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            try:
                texts.append((path, path.read_text("utf-8")))
            except UnicodeDecodeError:
                continue
    return texts


def test_ruff_finds_nothing() -> None:
    run(str(BIN / "ruff"), "check", "--no-cache", ".")
    run(str(BIN / "ruff"), "format", "--no-cache", "--check", ".")


@pytest.mark.timeout(300)
def test_mypy_strict_finds_nothing() -> None:
    run(str(BIN / "mypy"))


def test_rooms_import_only_what_they_may() -> None:
    run(str(BIN / "lint-imports"), "--no-cache")


def test_stubs_match_the_proto_files() -> None:
    run(sys.executable, "proto/generate.py", "--check")


def test_box_rooms_keep_to_python_3_10() -> None:
    files = [str(path.relative_to(ROOT)) for path in sources(*BOX_ROOMS)]
    run(str(BIN / "vermin"), "--target=3.10-", "--no-tips", "--violations", "--eval-annotations", *files)


@pytest.mark.parametrize("room", [*ROOMS, "edge_tests", "benchmarks", "proto"])
def test_files_stay_short(room: str) -> None:
    long = {}
    for path in sources(room):
        lines = len(path.read_text("utf-8").splitlines())
        if lines > MAX_LINES:
            long[str(path.relative_to(ROOT))] = lines
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_modules_say_what_they_do() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*ROOMS)
        if (text := path.read_text("utf-8").strip()) and not text.startswith('"""')
    ]
    assert not silent, f"no docstring at the top: {silent}"


def test_constraints_pin_exactly_and_name_no_index() -> None:
    files = sorted(ROOT.glob("constraints*.txt"))
    assert files
    pin = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+( *;.*)?")
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            text = line.split("#")[0].strip()
            assert not text or pin.fullmatch(text), f"{path.name}: {line!r} is not an exact pin"


def test_no_unfinished_marks_in_the_repository() -> None:
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    hits = [
        f"{path.relative_to(ROOT)}:{number}"
        for path, text in tracked_text()
        for number, line in enumerate(text.splitlines(), 1)
        if mark.search(line) and path.name != "LICENSE"
    ]
    assert not hits, hits
