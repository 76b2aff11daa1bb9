"""The MiniLM cache counts only when recipe and files are what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import minilm
from updater.digests import digest_file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "base.onnx").write_bytes(b"model")
    files = {"base.onnx": digest_file(tmp_path / "base.onnx")}
    manifest = {"recipe": minilm.recipe_digest(), "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_a_whole_cache_is_used(cache: Path) -> None:
    assert minilm.why_stale(cache) == ""


def test_a_changed_file_is_noticed(cache: Path) -> None:
    (cache / "base.onnx").write_bytes(b"MODEL")
    assert "base.onnx" in minilm.why_stale(cache)
    (cache / "base.onnx").unlink()
    assert "base.onnx" in minilm.why_stale(cache)


def test_a_changed_recipe_is_noticed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "recipe_digest", lambda: "another")
    assert minilm.why_stale(cache) == "the recipe has changed"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_broken_manifest_is_noticed(cache: Path, text: str) -> None:
    (cache / "manifest.json").write_text(text)
    assert "manifest" in minilm.why_stale(cache)


def test_no_cache_is_said(tmp_path: Path) -> None:
    assert minilm.why_stale(tmp_path / "none") == "there are none yet"


def test_every_pair_has_files_that_the_recipe_writes() -> None:
    recipe = minilm.RECIPE.read_text("utf-8")
    for old, new, _ in minilm.PAIRS.values():
        for name in (old, new):
            stem, _, suffix = name.partition("_")
            assert name in recipe or (stem in recipe and f"_{suffix}.onnx" in recipe), name
