"""What the documents name exists: files, links, functions, error codes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from sluice.api.v1.errors_pb2 import ErrorReason

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("agent", "benchmarks", "edge_tests", "fleet", "runtimes", "updater")
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
# Made at run time or on a box, so not in the repository.
ELSEWHERE = ("/etc/", "/opt/", "/usr/", "/var/", "/run/", "../")


@cache
def code() -> str:
    return "\n".join(path.read_text("utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def quoted(document: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([^`\n]+)`", prose))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_links_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    for text in quoted(document):
        looks_like_path = re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|md|proto|service|toml|txt|svg|conf)", text)
        if looks_like_path and not text.startswith(ELSEWHERE) and not (ROOT / text).exists():
            missing.append(text)
    assert not missing, f"{document.name} names what is not there: {sorted(missing)}"


def test_architecture_names_real_code() -> None:
    document = ROOT / "docs" / "architecture.md"
    unknown = []
    for text in quoted(document):
        if re.fullmatch(r"[A-Z]\w+\.[a-z]\w+", text):
            owner, name = text.split(".")
            if not re.search(rf"class {owner}\b", code()) or not re.search(rf"def {name}\b", code()):
                unknown.append(text)
        elif re.fullmatch(r"([a-z_]+\.)+[a-z_]+", text) and not text.endswith((".py", ".db")):
            *module, name = text.split(".")
            as_file = ROOT.joinpath(*module, name)
            if as_file.with_suffix(".py").exists() or as_file.is_dir():
                continue
            if any((ROOT / room).joinpath(*module, f"{name}.py").exists() for room in ROOMS):
                continue
            if not re.search(rf"def {name}\b", code()):
                unknown.append(text)
    assert not unknown, f"architecture.md names what is not in the code: {unknown}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_error_codes_exist(document: Path) -> None:
    known = set(ErrorReason.keys())
    prefixes = {name.split("_")[0] for name in known}
    named = {text for text in quoted(document) if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", text)}
    grpc_codes = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DATA_LOSS"}
    suspicious = {name for name in named - known - grpc_codes if name.split("_")[0] in prefixes}
    assert not suspicious, f"{document.name} names unknown error codes: {sorted(suspicious)}"


def test_every_threat_has_a_test() -> None:
    document = ROOT / "docs" / "security.md"
    text = document.read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    heads = [line for line in rows if line.startswith("| asset ")]
    threats = [line for line in rows if line not in heads]
    assert heads
    assert threats
    for threat in threats:
        named = re.findall(r"`(test_\w+)`", threat.split("|")[-2])
        assert named, f"no test: {threat}"
        missing = [name for name in named if not re.search(rf"def {name}\b", code())]
        assert not missing, f"docs/security.md names tests that do not exist: {missing}"
