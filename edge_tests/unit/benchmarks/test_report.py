"""Sections of docs/benchmarks.md replace themselves and nothing else."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report
from benchmarks.report import Table


def test_a_section_is_added_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    report.write_section("one", "first\n", path)
    report.write_section("two", "second\n", path)
    before = path.read_text("utf-8")
    assert before.startswith(report.HEAD)
    report.write_section("one", "changed\n", path)
    assert path.read_text("utf-8") == before.replace("first", "changed")


def test_what_people_wrote_stays() -> None:
    document = "# Title\n\nWords.\n"
    once = report.with_section(document, "a", "1\n")
    assert once.startswith(document)
    assert (
        report.with_section(once + "\nMore words.\n", "a", "2\n")
        == once.replace("1", "2") + "\nMore words.\n"
    )


def test_markdown_names_machine_and_command() -> None:
    table = Table("Sizes", ["pair", "bytes"], [["a", "12"]])
    text = report.section("Deltas", "python -m benchmarks.delta", ["A note."], [table])
    assert "| a | 12 |" in text
    assert "`python -m benchmarks.delta`" in text
    assert report.machine() in text
