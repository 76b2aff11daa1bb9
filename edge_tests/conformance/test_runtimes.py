"""What every runtime must do, run over each that is installed: the same tests, the same arithmetic.

It needs nothing but pytest, NumPy and a runtime, so that it also runs beside tflite-runtime, where
neither `onnx` nor a writer for TensorFlow Lite files can be installed: the models are files in
`fixtures/`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_tests.conformance.expected import BIAS, CODE_OFFSET, WEIGHTS
from runtimes import registry
from runtimes.interface import (
    OPTIMIZATIONS,
    InferenceFailed,
    InputInvalid,
    LoadOptions,
    Model,
    ModelRejected,
    Runtime,
    RuntimeFailure,
    RuntimeUnavailable,
    TensorSpec,
)

FIXTURES = Path(__file__).resolve().parent / "fixtures"
MODULES = {"onnxruntime": "onnxruntime", "litert": "ai_edge_litert", "tflite-runtime": "tflite_runtime"}
MISSING = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
INSTALLED = [runtime for runtime in registry.RUNTIMES if runtime.name not in MISSING]

Load = Callable[..., Model]


@pytest.fixture(params=INSTALLED, ids=lambda runtime: runtime.name)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return request.param


@pytest.fixture
def load(runtime: Runtime):
    """Loads a fixture by its name without suffix; closes it when the test ends."""
    opened = []

    def load_fixture(name: str, **options) -> Model:
        model = runtime.load(fixture(runtime, name), LoadOptions(**options))
        opened.append(model)
        return model

    yield load_fixture
    for model in opened:
        model.close()


def fixture(runtime: Runtime, name: str) -> Path:
    return FIXTURES / f"{name}.{runtime.formats[0]}"


def batch_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)


def affine(x: np.ndarray) -> np.ndarray:
    return x @ WEIGHTS + BIAS


def thread_ids() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


# Probing


def test_a_probe_is_a_real_inference(runtime):
    probe = runtime.probe()
    assert probe.usable
    assert probe.runtime == runtime.name
    assert probe.version[0].isdigit()
    assert probe.formats == runtime.formats
    assert "cpu" in probe.accelerators


def test_every_runtime_is_known_here():
    assert [runtime.name for runtime in registry.RUNTIMES] == list(MODULES)
    assert INSTALLED, "there is no runtime to test: pip install 'sluice[onnx,tflite]'"


@pytest.mark.parametrize("name", MISSING)
def test_a_runtime_that_is_not_installed_says_so(name):
    probe = registry.probe(name)
    assert not probe.usable
    assert name in probe.error
    assert "pip install" in probe.hint
    pytest.skip(f"{name} is not installed, so nothing else of this suite was run on it")


def test_importing_the_interface_imports_no_library():
    code = (
        "import sys, runtimes.registry, runtimes.survey, runtimes.datatypes; "
        f"print([m for m in {list(MODULES.values())} if m in sys.modules])"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert child.stdout.strip() == "[]"


# Describing


def test_describe(load):
    model = load("affine")
    assert model.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert model.outputs == (TensorSpec("y", "FP32", (-1, 3)),)


def test_describe_a_fixed_batch(load):
    model = load("single")
    assert model.inputs == (TensorSpec("x", "FP32", (1, 4)),)
    assert model.outputs == (TensorSpec("y", "FP32", (1, 3)),)


def test_describe_several_tensors(load):
    model = load("pair")
    assert {spec.name for spec in model.inputs} == {"left", "right"}
    assert {spec.name for spec in model.outputs} == {"sum", "difference"}


def test_describe_codes_and_texts(load):
    assert load("codes").inputs == (TensorSpec("x", "INT8", (-1, 4)),)
    specs = {spec.name: spec for spec in load("words").inputs}
    assert specs["texts"] == TensorSpec("texts", "BYTES", (-1,))
    assert specs["index"] == TensorSpec("index", "INT32", (-1,))


def test_without_a_signature_tensors_give_the_names(runtime, load):
    if runtime.formats != ("tflite",):
        pytest.skip("only TensorFlow Lite files have signatures")
    model = load("unsigned")
    assert model.inputs[0].name == "x_tensor"
    assert model.outputs[0].name == "y_tensor"
    x = batch_of(2)
    np.testing.assert_allclose(model.run({"x_tensor": x})["y_tensor"], affine(x), rtol=1e-5, atol=1e-5)


# Running


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_run_any_batch(load, size):
    x = batch_of(size)
    answer = load("affine").run({"x": x})
    assert list(answer) == ["y"]
    assert answer["y"].dtype == np.float32
    np.testing.assert_allclose(answer["y"], affine(x), rtol=1e-5, atol=1e-5)


def test_batches_of_changing_size(load):
    model = load("affine")
    for size in (3, 1, 5, 5, 2, 1):
        x = batch_of(size, seed=size)
        np.testing.assert_allclose(model.run({"x": x})["y"], affine(x), rtol=1e-5, atol=1e-5)


def test_a_model_for_one_sample_takes_a_batch(load):
    model = load("single")
    for size in (1, 5, 3, 1, 4):
        x = batch_of(size, seed=size)
        answer = model.run({"x": x})["y"]
        assert answer.shape == (size, 3)
        np.testing.assert_allclose(answer, affine(x), rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_are_kept_apart(load):
    """A model that is only right for one sample answers each as if it had been sent alone, every time."""
    model = load("mixing")
    same = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(model.run({"x": same})["y"], 2 * same)
    for seed in range(3):
        x = batch_of(3, seed)
        np.testing.assert_allclose(model.run({"x": x})["y"], 2 * x, rtol=1e-5)


def test_a_model_that_cannot_be_resized_takes_a_batch(load):
    model = load("reshape")
    for size in (3, 1, 2, 3):
        x = batch_of(size, seed=size)
        np.testing.assert_array_equal(model.run({"x": x})["y"], x.reshape(size, 2, 2))


def test_several_inputs_and_outputs(load):
    model = load("pair")
    left, right = np.float32([[5, 7]]), np.float32([[1, 2]])
    answer = model.run({"right": right, "left": left})
    assert answer["sum"].tolist() == [[6, 9]]
    assert answer["difference"].tolist() == [[4, 5]]


def test_int8_codes_go_in_and_out_as_they_are(load):
    codes = np.array([[-100, -1, 0, 50], [1, 2, 3, 127]], np.int8)
    answer = load("codes").run({"x": codes})["y"]
    assert answer.dtype == np.int8
    expected = np.clip(codes.astype(int) + CODE_OFFSET, -128, 127)
    assert np.abs(answer.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", [np.object_, "S", "U"])
def test_texts(load, kind):
    texts = np.array(["one", "two", "", "vier"], dtype=kind)
    answer = load("words").run({"texts": texts, "index": np.array([3, 0, 2], np.int32)})["picked"]
    assert answer.dtype == np.object_
    assert answer.tolist() == [b"vier", b"one", b""]


def test_texts_beyond_ascii(load):
    texts = np.array(["grün".encode(), "漢字\0x"], np.object_)
    answer = load("words").run({"texts": texts, "index": np.array([1, 0], np.int32)})["picked"]
    assert answer.tolist() == ["漢字\0x".encode(), "grün".encode()]


def test_answers_belong_to_the_caller(load):
    model = load("affine")
    first = model.run({"x": batch_of(1)})["y"]
    kept = first.copy()
    model.run({"x": batch_of(1, seed=9)})
    np.testing.assert_array_equal(first, kept)
    first += 1
    np.testing.assert_array_equal(model.run({"x": batch_of(1)})["y"], kept)


def test_inputs_may_be_views(load):
    """Not contiguous, and read-only as arrays over a received message are."""
    x = np.asfortranarray(batch_of(6))[::2]
    x.flags.writeable = False
    np.testing.assert_allclose(load("affine").run({"x": x})["y"], affine(x), rtol=1e-5, atol=1e-5)


def test_four_threads_get_their_own_answers(load):
    model = load("affine")
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait(30)
        for turn in range(50):
            x = batch_of(1 + (seed + turn) % 5, seed=1000 * seed + turn)
            try:
                if not np.allclose(model.run({"x": x})["y"], affine(x), rtol=1e-5, atol=1e-5):
                    wrong.append(f"thread {seed}, turn {turn}")
            except RuntimeFailure as error:
                wrong.append(f"thread {seed}, turn {turn}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_threads_are_used_and_given_back(runtime):
    x = batch_of(2)

    def new_threads(threads: int, before: set[str]) -> tuple[Model, set[str]]:
        model = runtime.load(fixture(runtime, "affine"), LoadOptions(threads=threads))
        np.testing.assert_allclose(model.run({"x": x})["y"], affine(x), rtol=1e-5, atol=1e-5)
        return model, thread_ids() - before

    alone, helpers = new_threads(1, thread_ids())
    assert not helpers
    alone.close()
    several, helpers = new_threads(4, thread_ids())
    assert len(helpers) == 3  # and the caller's own
    several.close()
    deadline = time.monotonic() + 10  # /proc may list a thread for a moment after it was joined
    while helpers & thread_ids():
        assert time.monotonic() < deadline, "threads outlive the model"
        time.sleep(0.01)


# Inputs that do not fit


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, ["'x'", "missing", "FP32"]),
        ({"x": batch_of(1), "z": batch_of(1)}, ["'z'", "'x' FP32[-1, 4]"]),
        ({"x": batch_of(1).astype(np.float64)}, ["'x'", "FP32", "FP64"]),
        ({"x": batch_of(1).astype(">f4")}, ["'x'", "FP32", ">f4"]),
        ({"x": batch_of(1).astype(np.complex64)}, ["'x'", "FP32", "complex64"]),
        ({"x": batch_of(1)[0]}, ["'x'", "[-1, 4]", "rank 1", "[4]"]),
        ({"x": np.array(1, np.float32)}, ["'x'", "rank 0"]),
        ({"x": batch_of(1)[:, :3]}, ["'x'", "[-1, 4]", "[1, 3]"]),
        ({"x": np.zeros((0, 4), np.float32)}, ["'x'", "[0, 4]", "no sample"]),
        ({"x": [[1.0, 2.0, 3.0, 4.0]]}, ["'x'", "list"]),
        ({"x": np.array([["a", "b", "c", "d"]])}, ["'x'", "FP32", "BYTES"]),
    ],
)
def test_wrong_inputs_are_named(load, inputs, words):
    model = load("affine")
    with pytest.raises(InputInvalid) as caught:
        model.run(inputs)
    for word in words:
        assert word in str(caught.value)
    x = batch_of(2)
    np.testing.assert_allclose(model.run({"x": x})["y"], affine(x), rtol=1e-5, atol=1e-5)


def test_inputs_of_different_batches_are_refused(load):
    model = load("pair")
    with pytest.raises(InputInvalid, match=r"'left' has 2.*'right' has 3|'right' has 3.*'left' has 2"):
        model.run({"left": np.ones((2, 2), np.float32), "right": np.ones((3, 2), np.float32)})


def test_floats_for_an_int8_model_are_refused(load):
    with pytest.raises(InputInvalid, match=r"INT8.*FP32"):
        load("codes").run({"x": batch_of(1)})


def test_an_element_that_is_no_text_is_refused(load):
    inputs = {"texts": np.array(["a", 7], np.object_), "index": np.array([0], np.int32)}
    with pytest.raises(InputInvalid, match=r"element 1.*int"):
        load("words").run(inputs)


def test_an_inference_that_fails_leaves_the_model_usable(load):
    """An index beyond the texts is found by the library's kernel, not by us."""
    model = load("words")
    texts = np.array(["a", "b"], np.object_)
    with pytest.raises(InferenceFailed, match="during inference"):
        model.run({"texts": texts, "index": np.array([77], np.int32)})
    answer = model.run({"texts": texts, "index": np.array([1], np.int32)})
    assert answer["picked"].tolist() == [b"b"]


# Files that do not load


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_a_truncated_file_is_rejected(runtime, tmp_path, keep):
    data = fixture(runtime, "affine").read_bytes()
    path = tmp_path / "model"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelRejected) as caught:
        runtime.load(path, LoadOptions())
    assert str(path) in caught.value.message
    assert caught.value.hint
    with pytest.raises(ModelRejected):
        registry.load(path, preferred=runtime.name)


def test_every_cut_of_a_file_is_rejected(runtime, tmp_path):
    """Also by a library that would read beyond the end of the file, and die."""
    data = fixture(runtime, "affine").read_bytes()
    path = tmp_path / "model"
    for keep in range(len(data)):
        path.write_bytes(data[:keep])
        with pytest.raises(ModelRejected):
            runtime.load(path, LoadOptions())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 64,
        b"PK\x03\x04" + bytes(60),
        b"just text, no model",
        np.random.default_rng(7).bytes(4096),
    ],
    ids=["empty", "zeros", "zip", "text", "bytes"],
)
def test_a_foreign_file_is_rejected(runtime, tmp_path, content):
    path = tmp_path / f"model.{runtime.formats[0]}"
    path.write_bytes(content)
    with pytest.raises(ModelRejected):
        runtime.load(path, LoadOptions())
    with pytest.raises(ModelRejected):
        registry.load(path, preferred=runtime.name)


def test_a_file_of_the_other_format_is_rejected(runtime):
    other = {"onnx": "tflite", "tflite": "onnx"}[runtime.formats[0]]
    with pytest.raises(ModelRejected):
        runtime.load(FIXTURES / f"affine.{other}", LoadOptions())
    with pytest.raises(ModelRejected, match=f"said to be {runtime.formats[0]}.*{other}"):
        registry.load(FIXTURES / f"affine.{other}", format=runtime.formats[0])


def test_a_missing_file_is_rejected(runtime, tmp_path):
    with pytest.raises(ModelRejected, match="nowhere"):
        runtime.load(tmp_path / "nowhere", LoadOptions())
    with pytest.raises(ModelRejected, match="nowhere"):
        registry.load(tmp_path / "nowhere")


def test_the_name_of_a_file_does_not_matter(runtime, tmp_path):
    path = tmp_path / "sha256-0011"
    path.write_bytes(fixture(runtime, "affine").read_bytes())
    x = batch_of(2)
    with registry.load(path, preferred=runtime.name) as model:
        assert model.runtime == runtime.name
        np.testing.assert_allclose(model.run({"x": x})["y"], affine(x), rtol=1e-5, atol=1e-5)


def test_an_accelerator_that_is_not_there_is_refused(runtime):
    with pytest.raises(RuntimeUnavailable, match=r"'warp'.*cpu"):
        runtime.load(fixture(runtime, "affine"), LoadOptions(accelerators=("warp", "cpu")))
    with pytest.raises(RuntimeUnavailable, match=r"'warp'.*cpu"):
        runtime.check_accelerator("warp")
    runtime.check_accelerator("cpu")


def test_options_of_loading_leave_the_answers_as_they_are(load):
    x = batch_of(3)
    for options in (*({"optimization": level} for level in OPTIMIZATIONS), {"xnnpack": False}):
        answer = load("affine", **options).run({"x": x})["y"]
        np.testing.assert_allclose(answer, affine(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="off"):
        LoadOptions(optimization="most")


# Closing


def test_close(runtime):
    model = runtime.load(fixture(runtime, "affine"), LoadOptions())
    model.run({"x": batch_of(1)})
    model.close()
    model.close()
    with pytest.raises(InferenceFailed, match="closed"):
        model.run({"x": batch_of(1)})


def test_close_gives_the_file_back(runtime, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(fixture(runtime, "affine").read_bytes())
    with runtime.load(path, LoadOptions()) as model:
        model.run({"x": batch_of(1)})
    assert str(path) not in Path("/proc/self/maps").read_text()
    descriptors = Path("/proc/self/fd").iterdir()
    assert path not in [descriptor.readlink() for descriptor in descriptors if descriptor.is_symlink()]


def test_close_while_others_run(runtime):
    """Each call either answers rightly or says that the model is closed."""
    model = runtime.load(fixture(runtime, "affine"), LoadOptions())
    x = batch_of(3)
    wrong: list[str] = []
    running = threading.Event()

    def work() -> None:
        while True:
            try:
                answer = model.run({"x": x})["y"]
            except InferenceFailed as error:
                if "closed" not in str(error):
                    wrong.append(str(error))
                return
            running.set()
            if not np.allclose(answer, affine(x), rtol=1e-5, atol=1e-5):
                wrong.append("a wrong answer")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert running.wait(30)
    model.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
