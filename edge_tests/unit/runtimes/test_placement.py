"""Which accelerator a model ends up on, and what is said of the others.

No machine here has an accelerator, so two are made up: a runtime that wraps ONNX Runtime on the CPU and says
of some names that it runs on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_tests.harness import models
from runtimes import placement, probing, registry
from runtimes.detect import ONNX
from runtimes.interface import (
    CPU,
    ExternalDelegate,
    InferenceFailed,
    LoadOptions,
    Model,
    Probe,
    Runtime,
    RuntimeUnavailable,
)
from runtimes.onnx_runtime import OnnxRuntime


class Unrunnable(Model):
    """Loaded, and fails on every input."""

    def __init__(self, real: Model) -> None:
        self.runtime, self.inputs, self.outputs = real.runtime, real.inputs, real.outputs
        self.close = real.close  # type: ignore[method-assign]

    def run(self, inputs):
        raise InferenceFailed("the driver is too old")

    def close(self) -> None:
        raise NotImplementedError


class Board(Runtime):
    """Has "fast" which works, "broken" which fails the probe, and "fussy" which fails on the model."""

    name = "board"
    formats = (ONNX,)

    def __init__(self) -> None:
        self.real = OnnxRuntime()
        self.loaded: list[LoadOptions] = []

    def probe(self) -> Probe:
        return Probe(self.name, "1", self.formats, ("fast", CPU))

    def check_accelerator(self, accelerator: str, delegates: tuple[ExternalDelegate, ...] = ()) -> None:
        if accelerator == "broken":
            raise RuntimeUnavailable("board answered [[nan]] on a tiny model")
        if accelerator not in ("fast", "fussy"):
            raise RuntimeUnavailable(f"this build has no accelerator {accelerator!r}")

    def load(self, path: Path, options: LoadOptions) -> Model:
        self.loaded.append(options)
        model = self.real.load(path, LoadOptions(threads=options.threads))
        return Unrunnable(model) if options.accelerators[0] == "fussy" else model


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setattr(registry, "RUNTIMES", (board,))
    registry.probe.cache_clear()
    yield board
    registry.probe.cache_clear()


def place(path: Path, *accelerators: str) -> placement.Placed:
    return placement.load(path, format=ONNX, preferred="", options=LoadOptions(2, accelerators))


@pytest.mark.parametrize(
    ("wanted", "accelerator", "reasons"),
    [
        (("cpu",), "cpu", []),
        (("fast", "cpu"), "fast", []),
        (("cpu", "fast"), "cpu", []),
        (("broken", "fast", "cpu"), "fast", ["broken is not used: board answered [[nan]]"]),
        (("none", "cpu"), "cpu", ["none is not used: this build has no"]),
        (("fussy", "broken", "cpu"), "cpu", ["fussy is not used: the driver", "broken is not used"]),
    ],
)
def test_the_first_that_works(
    board: Board, tmp_path: Path, wanted: tuple[str, ...], accelerator: str, reasons: list[str]
) -> None:
    path = models.tiny_onnx(tmp_path / "m.onnx")
    placed = place(path, *wanted)
    with placed.model:
        assert placed.accelerator == accelerator
        assert [
            given[: len(said)] for given, said in zip(placed.passed_over, reasons, strict=True)
        ] == reasons
        assert board.loaded[-1].accelerators == wanted[wanted.index(accelerator) :]
        assert placed.model.run(models.samples(2))["y"].shape == (2, 4)


def test_without_the_cpu_nothing_falls_back_to_it(board: Board, tmp_path: Path) -> None:
    path = models.tiny_onnx(tmp_path / "m.onnx")
    with pytest.raises(RuntimeUnavailable, match="tiny model"):
        place(path, "none", "broken")
    with pytest.raises(InferenceFailed, match="too old"):
        place(path, "fussy")


def test_a_model_too_large_to_try_is_not_tried(board: Board, tmp_path: Path) -> None:
    path = models.write_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        inputs={"x": (TensorProto.FLOAT, [1, placement.MAX_TRIAL_BYTES])},
        outputs={"y": (TensorProto.FLOAT, [1, placement.MAX_TRIAL_BYTES])},
    )
    placed = place(path, "fast", "cpu")
    placed.model.close()
    assert placed.accelerator == "cpu"
    assert "at most" in placed.passed_over[0]


def test_the_real_library_passes_over_what_its_build_lacks(tmp_path: Path) -> None:
    """No machine here has CUDA's libraries; "azure" is in every build and is no accelerator."""
    path = models.tiny_onnx(tmp_path / "m.onnx")
    placed = place(path, "cuda", "azure", "cpu")
    with placed.model, registry.load(path) as plain:
        assert placed.accelerator == "cpu"
        assert len(placed.passed_over) == 2
        assert "cuda" in placed.passed_over[0]
        assert "is a server" in placed.passed_over[1]
        x = models.samples(3)
        np.testing.assert_array_equal(placed.model.run(x)["y"], plain.run(x)["y"])
    with pytest.raises(RuntimeUnavailable):
        place(path, "azure")
    assert probing.MODELS[ONNX].exists()
