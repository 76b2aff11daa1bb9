from __future__ import annotations

import pytest

from agent.chooser import Box, RuntimeFacts, choose
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.manifest import File, Manifest, Variant

FILE = File("model.onnx", "model", "sha256:" + "0" * 64, 10)
ORT = RuntimeFacts("onnxruntime", "1", ("onnx",), ("cpu",))
ORT_CUDA = RuntimeFacts("onnxruntime", "1", ("onnx",), ("cpu", "cuda"))
LITE = RuntimeFacts("litert", "2", ("tflite",), ("cpu",))
LEGACY = RuntimeFacts("tflite-runtime", "2", ("tflite",), ("cpu",))


def box(*runtimes: RuntimeFacts, memory: int = 1 << 30, board: str = "Raspberry Pi 5") -> Box:
    return Box("aarch64", board, 4, memory, runtimes)


def manifest(*variants: Variant) -> Manifest:
    return Manifest("m", 3, variants)


def variant(name: str, form: str = "onnx", **fields: object) -> Variant:
    return Variant(name, form, (FILE,), **fields)  # type: ignore[arg-type]


def test_order_decides_among_equals() -> None:
    choice = choose(manifest(variant("a", "tflite"), variant("b")), box(ORT, LITE))
    assert (choice.variant.name, choice.runtime) == ("a", "litert")


def test_accelerator_beats_cpu() -> None:
    both = manifest(variant("cpu"), variant("gpu", accelerator="cuda"))
    assert choose(both, box(ORT_CUDA)).variant.name == "gpu"
    assert choose(both, box(ORT)).variant.name == "cpu"


def test_named_runtime_is_taken() -> None:
    only = manifest(variant("a", "tflite", runtime="tflite-runtime"))
    assert choose(only, box(LITE, LEGACY)).runtime == "tflite-runtime"


@pytest.mark.parametrize("board", ["Raspberry Pi 5", "aarch64"])
def test_board_by_name_or_architecture(board: str) -> None:
    assert choose(manifest(variant("a", boards=(board,))), box(ORT)).variant.name == "a"


def test_refusal_says_why_for_each_variant() -> None:
    offered = manifest(
        variant("lite", "tflite"),
        variant("gpu", accelerator="cuda"),
        variant("big", min_memory_bytes=1 << 40),
        variant("other", boards=("x86_64",)),
        variant("named", runtime="litert"),
    )
    with pytest.raises(SluiceError) as caught:
        choose(offered, box(ORT))
    error = caught.value
    assert error.reason == errors_pb2.NO_COMPATIBLE_VARIANT
    for part in (
        "lite: no runtime on this box reads tflite (working here: onnxruntime)",
        "gpu: needs cuda",
        "big: needs 1099511627776 bytes of memory",
        "other: is for x86_64, this is Raspberry Pi 5 (aarch64)",
        "named: needs the runtime litert",
    ):
        assert part in error.message
    with pytest.raises(SluiceError, match="working here: none"):
        choose(offered, box())
