"""MiniLM pairs for the benchmarks: `python -m benchmarks.minilm` makes them and says what they are.

A real encoder of 22 million parameters, fine-tuned, pruned, quantised and exported here: how, says
benchmarks/minilm_models.py. The first run takes minutes and a gigabyte; then .cache/minilm/ holds the files
with a manifest of their digests, and they are made again only when the recipe or a file has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updater.digests import digest_file

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "minilm"
PYTHON = ROOT / ".cache" / "minilm-venv" / "bin" / "python"
RECIPE = ROOT / "benchmarks" / "minilm_models.py"
CONSTRAINTS = ROOT / "constraints-minilm.txt"
MAKE_S = 3600.0
NICENESS = 10

# Name: old model, new model, what happened between them.
PAIRS: dict[str, tuple[str, str, str]] = {
    "minilm_f32_all": (
        "base",
        "tuned",
        "float32, all tuned: 40 AdamW steps of 8, rate 2e-5, no decay",
    ),
    "minilm_f32_two_layers": ("base", "two_layers", "float32, layers 4 and 5 tuned"),
    "minilm_f32_decay": ("base", "decay", "float32, 10 AdamW steps with decay 0.01"),
    "minilm_f32_pruned": ("base", "pruned", "float32, half of each matrix set to zero by magnitude"),
    "minilm_f32_reexported": ("base", "reexported", "same weights: TorchScript exporter → torch.export's"),
    "minilm_bf16": ("base_bf16", "tuned_bf16", "bfloat16 weights, all tuned"),
    "minilm_f16": ("base_f16", "tuned_f16", "float16, all tuned"),
    "minilm_i8_tensor": ("base_i8_tensor", "tuned_i8_tensor", "int8 per tensor, dynamic, all tuned"),
    "minilm_i8_channel": ("base_i8_channel", "tuned_i8_channel", "int8 per channel, dynamic, all tuned"),
    "minilm_f32_to_i8": ("base", "base_i8_tensor", "float32 → int8 per tensor, same weights"),
    "minilm_f32_to_f16": ("base", "base_f16", "float32 → float16, same weights"),
}


@dataclass(frozen=True)
class MiniLmPair:
    """Two ONNX files and what happened between them."""

    name: str
    old: Path
    new: Path
    what: str


def recipe_digest() -> str:
    """Changes with the code and the versions that make the models."""
    return hashlib.sha256(RECIPE.read_bytes() + b"\0" + CONSTRAINTS.read_bytes()).hexdigest()


def why_stale(cache: Path) -> str:
    """What is wrong with the cached models; empty when they can be used."""
    path = cache / "manifest.json"
    if not path.is_file():
        return "there are none yet"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["recipe"] != recipe_digest():
            return "the recipe has changed"
        for name, digest in manifest["files"].items():
            file = cache / name
            if not file.is_file() or digest_file(file) != digest:
                return f"{name} is missing or not what was made"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the manifest cannot be read: {error}"
    return ""


def missing() -> str:
    """Why the models cannot be made here; empty when they can."""
    return "" if PYTHON.is_file() else f"{PYTHON.parent.parent} is not there: make minilm-venv"


def make(cache: Path) -> None:
    """Makes every model anew; `cache` changes only when all are there. Raises RuntimeError."""
    if why := missing():
        raise RuntimeError(why)
    fresh = cache.with_name(f"{cache.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    done = subprocess.run(
        [str(PYTHON), str(RECIPE), str(fresh)],
        stdout=sys.stderr,
        timeout=MAKE_S,
        check=False,
        preexec_fn=lambda: os.nice(NICENESS),
    )
    if done.returncode != 0:
        raise RuntimeError(f"making the MiniLM models ended with {done.returncode}")
    manifest = {
        "recipe": recipe_digest(),
        "machine": f"{platform.machine()}, {platform.platform()}",
        "cosine_to_base": json.loads((fresh / "checks.json").read_bytes()),
        "files": {path.name: digest_file(path) for path in sorted(fresh.glob("*.onnx"))},
    }
    (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(cache, ignore_errors=True)
    fresh.rename(cache)


def pairs(cache: Path = CACHE) -> list[MiniLmPair]:
    """All pairs, made first if need be. Raises RuntimeError."""
    if why := why_stale(cache):
        print(f"making the MiniLM models: {why} (minutes, once)", file=sys.stderr)
        make(cache)
    return [
        MiniLmPair(name, cache / f"{old}.onnx", cache / f"{new}.onnx", what)
        for name, (old, new, what) in PAIRS.items()
    ]


def main() -> int:
    try:
        found = pairs()
    except RuntimeError as error:
        print(f"no MiniLM pairs: {error}", file=sys.stderr)
        return 1
    cosines = json.loads((CACHE / "manifest.json").read_bytes())["cosine_to_base"]
    for pair in found:
        sizes = f"{pair.old.stat().st_size:>11,} → {pair.new.stat().st_size:>11,} bytes"
        print(f"{pair.name:22} {sizes}  cosine {cosines[pair.new.name]:.4f}  {pair.what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
