"""`sluice delta` on real model files; no control plane anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_tests.harness.command import run, sluice
from edge_tests.harness.models import tiny_onnx, tiny_tflite
from updater.digests import digest_file


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return tiny_onnx(tmp_path / "old.onnx", hidden=256)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tiny_onnx(tmp_path / "new.onnx", hidden=256, change=1e-3)


@pytest.fixture
def delta(tmp_path: Path, old: Path, new: Path) -> Path:
    path = tmp_path / "d.delta"
    sluice("delta", "create", old, new, "-o", path).expect()
    return path


def test_create_and_apply_give_the_same_bytes(tmp_path: Path, old: Path, new: Path) -> None:
    path, out = tmp_path / "d.delta", tmp_path / "out.onnx"
    made = sluice("delta", "create", old, new, "-o", path, "--json").expect().document
    assert made == {
        "delta": str(path),
        "delta_digest": digest_file(path),
        "delta_size": path.stat().st_size,
        "base_digest": digest_file(old),
        "base_size": old.stat().st_size,
        "target_digest": digest_file(new),
        "target_size": new.stat().st_size,
    }
    assert made["delta_size"] < made["target_size"]
    applied = sluice("delta", "apply", old, path, "-o", out, "--json").expect().document
    assert applied == {
        "target": str(out),
        "target_digest": digest_file(new),
        "target_size": new.stat().st_size,
    }
    assert out.read_bytes() == new.read_bytes()


def test_the_installed_command_does_the_same(tmp_path: Path, old: Path, new: Path) -> None:
    path, out = tmp_path / "d.delta", tmp_path / "out.onnx"
    made = run("delta", "create", old, new, "-o", path).expect()
    assert made.err == ""
    assert made.out.startswith(f"{path}: ")
    assert "% of new.onnx" in made.out
    run("delta", "apply", old, path, "-o", out).expect()
    assert out.read_bytes() == new.read_bytes()


@pytest.mark.parametrize("base", [["-"], ["--full"]])
def test_a_full_copy_needs_no_base(tmp_path: Path, new: Path, base: list[str]) -> None:
    path, out = tmp_path / "f.delta", tmp_path / "out.onnx"
    made = sluice("delta", "create", *base, new, "-o", path, "--json").expect().document
    assert made["base_digest"] is None
    assert made["base_size"] == 0
    sluice("delta", "apply", *base, path, "-o", out).expect()
    assert out.read_bytes() == new.read_bytes()


def test_a_base_and_an_output_may_be_the_same_file(delta: Path, old: Path, new: Path) -> None:
    sluice("delta", "apply", old, delta, "-o", old).expect()
    assert old.read_bytes() == new.read_bytes()


def test_another_base_is_refused_and_nothing_is_written(tmp_path: Path, delta: Path, new: Path) -> None:
    out = tmp_path / "out.onnx"
    ended = sluice("delta", "apply", new, delta, "-o", out, "--json").expect(5)
    error = ended.document["error"]
    assert error["reason"] == "DELTA_WRONG_BASE"
    assert "as BASE" in error["hint"]
    assert error["hint"] in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.delta", "new.onnx", "old.onnx"]


def test_damage_has_its_exit_code(tmp_path: Path, old: Path, delta: Path) -> None:
    data = bytearray(delta.read_bytes())
    data[len(data) // 2] ^= 1
    delta.write_bytes(data)
    error = sluice("delta", "apply", old, delta, "-o", tmp_path / "o", "--json").expect(7).document["error"]
    assert error["reason"] == "DELTA_CORRUPT"
    delta.write_bytes(data[: len(data) // 2])
    error = sluice("--json", "delta", "apply", old, delta, "-o", tmp_path / "o").expect(7).document["error"]
    assert error["reason"] in ("DELTA_TRUNCATED", "DELTA_CORRUPT")
    assert not (tmp_path / "o").exists()


def test_a_model_is_no_delta(tmp_path: Path, old: Path, new: Path) -> None:
    ended = sluice("delta", "apply", old, new, "-o", tmp_path / "o").expect(7)
    assert "DELTA_INVALID: not a delta" in ended.err
    assert "help: make it again with `sluice delta create`" in ended.err


def test_describe_tells_where_the_bytes_go(old: Path, new: Path, delta: Path) -> None:
    of_files = sluice("delta", "describe", old, new, "--json").expect().document
    of_delta = sluice("delta", "describe", old, delta, "--json").expect().document
    assert of_files["target_size"] == of_delta["target_size"] == new.stat().st_size
    assert of_files["delta_size"] == of_delta["delta_size"] == delta.stat().st_size
    assert of_files["base_size"] == of_delta["base_size"] == old.stat().st_size
    names = {region["name"] for region in of_files["regions"]}
    assert {"weights0", "weights1"} <= names
    (weights,) = [region for region in of_files["regions"] if region["name"] == "weights0"]
    assert (weights["dtype"], weights["shape"]) == ("float32", [8, 256])
    assert sum(region["target_length"] for region in of_files["regions"]) == new.stat().st_size
    assert set(weights) == {
        "name",
        "base_name",
        "instruction",
        "predictor",
        "dtype",
        "shape",
        "target_offset",
        "target_length",
        "coded_bytes",
        "bits_per_weight",
    }
    assert weights["bits_per_weight"] == 8 * weights["coded_bytes"] / (8 * 256)


def test_describe_shows_the_costliest_first(old: Path, new: Path) -> None:
    lines = sluice("delta", "describe", old, new).expect().out.splitlines()
    assert lines[2].split() == ["CODED", "SHARE", "BITS/WEIGHT", "TYPE", "BY", "REGION"]
    assert lines[3].endswith("weights0")


def test_describe_keeps_long_lists_short(tmp_path: Path) -> None:
    pair = [tiny_tflite(tmp_path / f"{seed}.tflite", seed=seed) for seed in (1, 2)]
    regions = sluice("delta", "describe", *pair, "--json").expect().document["regions"]
    whole = sluice("delta", "describe", *pair, "--all").expect().out.splitlines()
    assert len(whole) == len(regions) + 3  # the total, a blank line, the heading


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["create", "OLD", "-o", "d"], "expected BASE and TARGET"),
        (["create", "OLD", "NEW"], "Missing option '-o' / '--output'"),
        (["create", "OLD", "gone", "-o", "d"], "'gone' does not exist"),
        (["create", "gone", "NEW", "-o", "d"], "'gone' does not exist"),
        (["create", "DIR", "NEW", "-o", "d"], "is a directory"),
        (["create", "OLD", "NEW", "-o", "NEW"], "is one of the inputs"),
        (["create", "OLD", "NEW", "-o", "DIR"], "takes the name of a file"),
        (["create", "OLD", "NEW", "-o", "gone/d"], "there is no directory 'gone'"),
        (["create", "--full", "OLD", "NEW", "-o", "d"], "expected --full TARGET"),
        (["describe", "OLD", "NEW", "--variant", "x"], "--variant goes with --server"),
        (["describe", "--server", "OLD"], "expects BASE and TARGET"),
    ],
)
def test_wrong_usage_is_exit_2(tmp_path: Path, old: Path, new: Path, arguments: list[str], why: str) -> None:
    places = {"OLD": str(old), "NEW": str(new), "DIR": str(tmp_path)}
    given = [places.get(argument, argument) for argument in arguments]
    ended = sluice("delta", *given, "--json").expect(2)
    error = ended.document["error"]
    assert error["reason"] == "USAGE"
    assert why in error["message"]
    assert f"sluice delta {arguments[0]} --help" in error["hint"]
    assert new.exists()
