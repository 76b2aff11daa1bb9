"""What is particular to TensorFlow Lite files; what all runtimes share is in the conformance suite."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edge_tests.harness.fixtures import CONFORMANCE
from edge_tests.harness.models import samples, tiny_onnx, tiny_tflite, unknown_operator_tflite
from edge_tests.harness.tflite import Graph
from runtimes import registry
from runtimes.interface import InferenceFailed, LoadOptions, ModelRejected


def doubling(**names: str) -> tuple[Graph, int, int]:
    graph = Graph()
    source = graph.tensor(names.get("source", "source"), (-1, 2), "float32")
    target = graph.tensor(names.get("target", "target"), (-1, 2), "float32")
    graph.operator(
        schema.BuiltinOperator.ADD,
        [source, source],
        [target],
        options_type=schema.BuiltinOptions.AddOptions,
        options=schema.AddOptionsT(),
    )
    return graph, source, target


def test_both_formats_give_the_same_answers(tmp_path):
    inputs = samples(5)
    with (
        registry.load(tiny_onnx(tmp_path / "a", seed=3)) as first,
        registry.load(tiny_tflite(tmp_path / "b", seed=3)) as second,
    ):
        assert first.inputs == second.inputs
        assert first.outputs == second.outputs
        np.testing.assert_allclose(first.run(inputs)["y"], second.run(inputs)["y"], rtol=1e-5, atol=1e-6)


def test_a_signature_of_another_name_gives_the_names(tmp_path):
    graph, source, target = doubling()
    path = graph.write(tmp_path / "model", {"in": source}, {"out": target}, signature="predict")
    with registry.load(path) as model:
        assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["in", "out"]
        assert model.run({"in": np.ones((3, 2), np.float32)})["out"].tolist() == [[2, 2]] * 3


def test_tensors_without_names_are_numbered(tmp_path):
    graph, source, target = doubling(source="", target="")
    path = graph.write(tmp_path / "model", {"": source}, {"": target}, signature="")
    with registry.load(path) as model:
        assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["input_0", "output_0"]
        assert model.run({"input_0": np.ones((1, 2), np.float32)})["output_0"].tolist() == [[2, 2]]


def test_an_unknown_operator_is_named(tmp_path):
    with pytest.raises(ModelRejected, match="Frobnicate"):
        registry.load(unknown_operator_tflite(tmp_path / "model"))


@pytest.mark.parametrize(("name", "proven"), [("single", True), ("mixing", False), ("reshape", False)])
def test_batches_are_resized_only_when_that_was_seen_to_be_right(name, proven):
    rng = np.random.default_rng(1)
    with registry.load(CONFORMANCE / f"{name}.tflite") as model:
        equal = np.ones((3, 4), np.float32)
        model.run({"x": equal})
        if name != "reshape":  # fails at once, whatever the samples
            assert model._resizes is None  # equal samples prove nothing
        model.run({"x": rng.normal(size=(3, 4)).astype(np.float32)})
        assert model._resizes is proven


def test_a_free_dimension_may_vary_in_any_place(tmp_path):
    graph = Graph()
    source = graph.tensor("x", (1, -1), "float32")
    target = graph.tensor("y", (1, -1), "float32")
    graph.operator(
        schema.BuiltinOperator.ADD,
        [source, source],
        [target],
        options_type=schema.BuiltinOptions.AddOptions,
        options=schema.AddOptionsT(),
    )
    with registry.load(graph.write(tmp_path / "model", {"x": source}, {"y": target})) as model:
        assert model.inputs[0].shape == (1, -1)
        for length in (3, 1, 6):
            assert model.run({"x": np.ones((1, length), np.float32)})["y"].tolist() == [[2.0] * length]


def test_after_a_failure_the_interpreter_is_made_anew():
    with registry.load(CONFORMANCE / "words.tflite") as model:
        before = model._interpreter
        with pytest.raises(InferenceFailed):
            model.run({"texts": np.array(["a"], np.object_), "index": np.array([5], np.int32)})
        answer = model.run({"texts": np.array(["a"], np.object_), "index": np.array([0], np.int32)})
        assert answer["picked"].tolist() == [b"a"]
        assert model._interpreter is not before


@pytest.mark.parametrize("xnnpack", [True, False])
def test_xnnpack_takes_part_only_where_it_may(tmp_path, xnnpack):
    """Seen by the library's own list of operators, which its Python interface does not offer in public."""
    path = tiny_tflite(tmp_path / "m.tflite")
    with registry.load(path, options=LoadOptions(xnnpack=xnnpack)) as model:
        model.run(samples(1))
        names = {item["op_name"] for item in model._interpreter._get_ops_details()}
        assert ("DELEGATE" in names) == xnnpack, names
