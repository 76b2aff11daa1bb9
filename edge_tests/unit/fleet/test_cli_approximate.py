"""`sluice delta approximate` on a classifier that was really trained and fine-tuned."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edge_tests.demo import digits
from edge_tests.demo.network import INPUT, OUTPUT, accuracy
from edge_tests.demo.onnx_export import export_float
from edge_tests.demo.tflite_export import export as export_int8
from edge_tests.harness.command import sluice
from edge_tests.harness.models import golden, tiny_onnx
from fleet.approximate import Outcome
from fleet.approximate_search import Trial
from fleet.cli.approximate_plot import plot_svg
from runtimes import registry
from updater import delta
from updater.approximate import EXACT, LayerFigures, Tally

ROOT = Path(__file__).parents[3]
METHODS = ("sign", "topk", "threshold", "lowrank")


@dataclass(frozen=True)
class Trained:
    """Two versions in two precisions, with golden files of the second."""

    old: Path
    new: Path
    golden: Path
    old_int8: Path
    new_int8: Path
    golden_int8: Path
    exact: int
    data: digits.Data

    def accuracy(self, path: Path) -> float:
        with registry.load(path) as model:
            answers = model.run({INPUT: self.data.held_out_images})[OUTPUT]
        return accuracy(answers, self.data.held_out_labels)

    def loss(self, path: Path) -> float:
        """Mean cross-entropy on images that no training saw."""
        with registry.load(path) as model:
            answers = model.run({INPUT: self.data.held_out_images})[OUTPUT]
        right = answers[np.arange(len(answers)), self.data.held_out_labels]
        return float(-np.log(np.maximum(right, 1e-12)).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("trained")
    data = digits.load_data()
    paths = {}
    for name, network in zip(("old", "new"), digits.train(data), strict=True):
        export_float(network, directory / f"{name}.onnx")
        paths[name] = export_int8(network, data.train_images, directory / f"{name}.tflite")
    old, new = directory / "old.onnx", directory / "new.onnx"
    samples = {INPUT: data.held_out_images[:32]}
    exact = delta.create(old, new, directory / "exact.delta").delta_size
    return Trained(
        old,
        new,
        golden(directory / "golden.npz", new, samples),
        paths["old"],
        paths["new"],
        golden(directory / "golden-int8.npz", paths["new"], samples),
        exact,
        data,
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_real_delta_fits_and_the_file_is_better_than_no_update(
    tmp_path: Path, trained: Trained, method: str
) -> None:
    out, patch, again = tmp_path / "near.onnx", tmp_path / "d.delta", tmp_path / "again.onnx"
    budget = trained.exact // 3
    told = (
        sluice(
            *("delta", "approximate", trained.old, trained.new, "-o", out, "--method", method),
            *("--budget", budget, "--golden", trained.golden, "--json"),
        )
        .expect()
        .document
    )
    made = delta.create(trained.old, out, patch).delta_size
    assert made == told["delta_size"] <= budget
    assert told["exact_delta_size"] == trained.exact
    assert out.stat().st_size == trained.new.stat().st_size
    delta.apply(trained.old, patch, again)
    assert again.read_bytes() == out.read_bytes()
    assert told["shortfalls"] == []
    assert told["cosine"] > told["base_cosine"]
    assert trained.loss(trained.new) < trained.loss(out) < trained.loss(trained.old)
    assert 0 < told["explained"] < 1
    assert sum(entry["coded_bytes"] for entry in told["layers"]) < made
    assert all(entry["relative_mse"] <= 0.002 for entry in told["layers"])


def test_codes_of_8_bits_can_be_kept_in_part(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "near.tflite"
    exact = delta.create(trained.old_int8, trained.new_int8, tmp_path / "d").delta_size
    told = (
        sluice(
            *("delta", "approximate", trained.old_int8, trained.new_int8, "-o", out, "--method", "topk"),
            *("--budget", exact * 3 // 4, "--golden", trained.golden_int8, "--json", "--max-layer-mse", 0.05),
        )
        .expect()
        .document
    )
    assert delta.create(trained.old_int8, out, tmp_path / "d").delta_size == told["delta_size"]
    assert told["delta_size"] <= exact * 3 // 4
    assert {entry["dtype"] for entry in told["layers"]} == {"int8"}
    assert trained.accuracy(out) >= trained.accuracy(trained.old_int8) - 0.02


def test_what_is_too_far_off_is_refused_unless_forced(tmp_path: Path, trained: Trained) -> None:
    out, plot = tmp_path / "near.onnx", tmp_path / "near.svg"
    arguments = (
        *("delta", "approximate", trained.old, trained.new, "-o", out, "--method", "topk"),
        *("--budget", trained.exact // 10, "--golden", trained.golden, "--plot", plot),
    )
    ended = sluice(*arguments, "--min-cosine", 1, "--max-layer-mse", 0).expect(9)
    assert "GOLDEN_MISMATCH" in ended.err
    assert "golden outputs have cosine 0.9" in ended.err
    assert "relative mean squared error of 3 of 3 layers is over 0: 'dense" in ended.err
    assert "REL. MSE" in ended.err  # the figures that led to it
    assert ended.out == ""
    assert not out.exists()
    assert plot.exists()
    error = sluice(*arguments, "--min-cosine", 1, "--json").expect(9).document["error"]
    assert error["reason"] == "GOLDEN_MISMATCH"
    assert "relative mean squared error" not in error["message"]
    told = sluice(*arguments, "--min-cosine", 1, "--force", "--json").expect().document
    assert len(told["shortfalls"]) == 1
    assert out.exists()


def test_the_plot_is_a_picture_with_every_try(tmp_path: Path, trained: Trained) -> None:
    plot = tmp_path / "near.svg"
    told = (
        sluice(
            *("delta", "approximate", trained.old, trained.new, "-o", tmp_path / "near.onnx"),
            *("--method", "threshold", "--budget", trained.exact // 10, "--golden", trained.golden),
            *("--plot", plot, "--json"),
        )
        .expect()
        .document
    )
    picture = ElementTree.fromstring(plot.read_text("utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    tries = [trial for trial in told["trials"] if trial["kept"]]
    assert len(picture.findall(f"{space}circle")) == 2 * len(tries)  # kept, and outputs
    texts = [element.text or "" for element in picture.iter(f"{space}text")]
    assert {entry["name"] for entry in told["layers"]} <= set(texts)
    assert "old.onnx → new.onnx" in texts
    assert f"{len(tries)} deltas were tried" in (picture.findtext(f"{space}desc") or "")


def test_what_people_see(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "near.onnx"
    ended = sluice(
        *("delta", "approximate", trained.old, trained.new, "-o", out, "--method", "topk"),
        *("--budget", trained.exact // 10, "--force"),
    ).expect()
    lines = ended.out.splitlines()
    assert "smaller than the file" in lines[0]
    assert "golden outputs were not checked" in lines[1]
    assert lines[3].split() == ["REL.", "MSE", "COSINE", "KEPT", "CHANGED", "CODED", "LAYER"]
    assert lines[-1].startswith("all else is the target's, exactly: ")


@pytest.mark.parametrize(
    ("more", "code", "why"),
    [
        (["--budget", "10000000", "--force"], 3, "which is within the budget"),
        (["--budget", "100", "--force"], 6, "no approximate update fits 100 bytes"),
        (["--budget", "5000"], 2, "--golden"),
        (["--budget", "0", "--force"], 2, "x>=1"),
        (["--budget", "5000", "--force", "--min-cosine", "2"], 2, "-1<=x<=1"),
        (["--budget", "5000", "--golden", "gone.npz"], 2, "does not exist"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, trained: Trained, more: list[str], code: int, why: str
) -> None:
    out = tmp_path / "near.onnx"
    ended = sluice("delta", "approximate", trained.old, trained.new, "-o", out, "--method", "topk", *more)
    assert why in ended.expect(code).err
    assert not out.exists()


def test_inputs_are_never_written(trained: Trained) -> None:
    arguments = ("delta", "approximate", trained.old, trained.new, "--method", "sign", "--budget", 9000)
    for path in (trained.old, trained.new, trained.golden):
        ended = sluice(*arguments, "--golden", trained.golden, "-o", path).expect(2)
        assert "is one of the inputs" in ended.err


def test_floats_only_methods_say_so_of_codes(tmp_path: Path, trained: Trained) -> None:
    ended = sluice(
        *("delta", "approximate", trained.old_int8, trained.new_int8, "-o", tmp_path / "o.tflite"),
        *("--method", "sign", "--budget", 5000, "--force"),
    ).expect(3)
    assert "acts on float weights" in ended.err
    assert "topk and threshold" in ended.err


def test_a_golden_file_of_another_model_is_refused(tmp_path: Path, trained: Trained) -> None:
    other = tiny_onnx(tmp_path / "other.onnx")
    wrong = golden(tmp_path / "wrong.npz", other, {"x": np.zeros((2, 8), np.float32)})
    ended = sluice(
        *("delta", "approximate", trained.old, trained.new, "-o", tmp_path / "o.onnx"),
        *("--method", "topk", "--budget", 5000, "--golden", wrong),
    )
    assert ended.code != 0
    assert "MODEL_LOAD_FAILED" in ended.err
    assert "'image'" in ended.err


def test_without_a_runtime_the_error_says_what_to_install(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "near.onnx"
    arguments = [
        *("sluice", "delta", "approximate", trained.old, trained.new, "-o", out, "--method", "topk"),
        *("--budget", 5000, "--golden", trained.golden),
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            (
                f"import sys; sys.modules['onnxruntime'] = None; sys.argv = {[str(a) for a in arguments]!r};"
                "from fleet.cli.main import main; main()"
            ),
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert "RUNTIME_UNAVAILABLE" in done.stderr
    assert "pip install 'sluice[onnx]'" in done.stderr
    assert not out.exists()


def test_names_from_a_file_are_text_in_the_plot() -> None:
    hostile = "</title><script>alert(1)</script>\"'&\x00\u202e"
    figures = LayerFigures(hostile, "float32", 100, 10, 1e-4, 0.9, 0.5, 1.0, 2.0)
    best = Trial(5, EXACT, 1000, Tally((figures,)), 0.99, (900,))
    outcome = Outcome("topk", "weights", 100, best, (best,), 9999, 5000, 0.9, (), (), ())
    picture = ElementTree.fromstring(plot_svg(outcome, 1200, hostile))
    space = "{http://www.w3.org/2000/svg}"
    assert not list(picture.iter(f"{space}script"))
    shown = hostile.replace("\x00", "\ufffd").replace("\u202e", "\ufffd")
    assert shown in [element.text for element in picture.iter(f"{space}text")]
