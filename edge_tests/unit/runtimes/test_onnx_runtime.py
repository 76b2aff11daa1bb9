"""What is particular to ONNX Runtime; what all runtimes share is in the conformance suite."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, load, numpy_helper, save

from edge_tests.harness.models import samples, tiny_onnx, unknown_operator_onnx, write_onnx
from runtimes import registry
from runtimes.interface import InferenceFailed, InputInvalid, LoadOptions, ModelRejected, TensorSpec
from runtimes.onnx_runtime import OnnxRuntime


def test_bf16_crosses_as_raw_bits(tmp_path):
    path = write_onnx(
        tmp_path / "bf16",
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["wide", "two"], ["product"]),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.BFLOAT16),
            helper.make_node("Identity", ["product"], ["z"]),
        ],
        inputs={"x": (TensorProto.BFLOAT16, ["batch"])},
        outputs={"y": (TensorProto.BFLOAT16, ["batch"]), "z": (TensorProto.FLOAT, ["batch"])},
        constants=[numpy_helper.from_array(np.float32([2]), "two")],
    )
    values = np.float32([1.5, -3, 0.25])
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    with registry.load(path) as model:
        assert model.inputs == (TensorSpec("x", "BF16", (-1,)),)
        answer = model.run({"x": bits})
    assert answer["y"].dtype == np.uint16
    assert (answer["y"].astype(np.uint32) << 16).view(np.float32).tolist() == [3, -6, 0.5]
    assert answer["z"].tolist() == [3, -6, 0.5]


@pytest.mark.parametrize(
    ("element", "datatype", "dtype"),
    [
        (TensorProto.BOOL, "BOOL", np.bool_),
        (TensorProto.UINT8, "UINT8", np.uint8),
        (TensorProto.UINT16, "UINT16", np.uint16),
        (TensorProto.UINT32, "UINT32", np.uint32),
        (TensorProto.UINT64, "UINT64", np.uint64),
        (TensorProto.INT8, "INT8", np.int8),
        (TensorProto.INT16, "INT16", np.int16),
        (TensorProto.INT32, "INT32", np.int32),
        (TensorProto.INT64, "INT64", np.int64),
        (TensorProto.FLOAT16, "FP16", np.float16),
        (TensorProto.FLOAT, "FP32", np.float32),
        (TensorProto.DOUBLE, "FP64", np.float64),
    ],
)
def test_every_datatype(tmp_path, element, datatype, dtype):
    path = write_onnx(
        tmp_path / "same",
        [helper.make_node("Identity", ["x"], ["y"])],
        inputs={"x": (element, [2])},
        outputs={"y": (element, [2])},
    )
    values = np.array([0, 1]).astype(dtype)
    with registry.load(path) as model:
        assert model.inputs[0].datatype == datatype
        answer = model.run({"x": values})["y"]
    assert answer.dtype == dtype
    np.testing.assert_array_equal(answer, values)


def test_a_sequence_output_is_rejected(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    path = tmp_path / "sequence"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    with pytest.raises(ModelRejected, match=r"'y' is a seq\(tensor\(float\)\)"):
        registry.load(path)


def test_an_unknown_operator_is_named(tmp_path):
    with pytest.raises(ModelRejected, match="Frobnicate") as caught:
        registry.load(unknown_operator_onnx(tmp_path / "model"))
    assert "opset" in caught.value.hint


def test_a_newer_file_version_is_rejected(tmp_path):
    model = load(tiny_onnx(tmp_path / "model"))
    model.ir_version = 999
    save(model, tmp_path / "newer")
    with pytest.raises(ModelRejected, match="999"):
        registry.load(tmp_path / "newer")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = write_onnx(
        tmp_path / "same",
        [helper.make_node("Identity", ["x"], ["y"])],
        inputs={"x": (TensorProto.STRING, [2])},
        outputs={"y": (TensorProto.STRING, [2])},
    )
    with (
        registry.load(path) as model,
        pytest.raises(InputInvalid, match="element 1 of the input 'x' is not UTF-8"),
    ):
        model.run({"x": np.array([b"fine", b"\xff\xfe"], np.object_)})


def test_the_librarys_own_failure_is_named(tmp_path):
    """Two inputs whose free dimensions disagree: only the kernel can see it."""
    path = write_onnx(
        tmp_path / "sum",
        [helper.make_node("Add", ["a", "b"], ["y"])],
        inputs={"a": (TensorProto.FLOAT, ["n"]), "b": (TensorProto.FLOAT, ["m"])},
        outputs={"y": (TensorProto.FLOAT, ["k"])},
    )
    with registry.load(path) as model:
        with pytest.raises(InferenceFailed, match="onnxruntime failed during inference"):
            model.run({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
        assert model.run({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})["y"].tolist() == [2, 2]


def test_external_data_is_read_beside_the_model(tmp_path):
    expected_path = tiny_onnx(tmp_path / "inside", hidden=64)
    save(
        load(expected_path),
        tmp_path / "outside.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    inputs = samples(3)
    with registry.load(expected_path) as inside, registry.load(tmp_path / "outside.onnx") as outside:
        np.testing.assert_array_equal(inside.run(inputs)["y"], outside.run(inputs)["y"])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelRejected, match=r"weights\.bin"):
        registry.load(tmp_path / "outside.onnx")


def test_only_the_cpu_is_claimed_without_an_accelerator():
    """Every build lists a remote provider besides; listing is not working."""
    import onnxruntime

    listed = onnxruntime.get_available_providers()
    claimed = OnnxRuntime().probe().accelerators
    assert claimed[-1] == "cpu"
    if listed == ["AzureExecutionProvider", "CPUExecutionProvider"]:
        assert claimed == ("cpu",)


def test_the_library_keeps_nothing_of_its_own(tmp_path):
    model, home = tiny_onnx(tmp_path / "tiny.onnx"), tmp_path / "home"
    home.mkdir()
    unset = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    script = (
        "import sys, pathlib; from runtimes import registry; registry.load(pathlib.Path(sys.argv[1])).close()"
    )
    subprocess.run(
        [sys.executable, "-c", script, model], env=environment | {"HOME": str(home)}, timeout=60, check=True
    )
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 257}, {"threads": -1}, {"accelerators": ()}])
def test_options_out_of_bounds(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LoadOptions(**options)
