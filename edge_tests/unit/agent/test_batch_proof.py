"""Batches are used only for models that answer the same in them; and what a variant's options may say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent import describe, options
from agent.batch_proof import batches_are_safe
from agent.limits import MAX_BATCH, MAX_QUEUE
from agent.scheduling import Policy
from edge_tests.harness import models, serving

ROWS = (TensorProto.FLOAT, ["batch", 4])


def onnx(path: Path, *nodes: object, output: tuple[int, list[object]] = ROWS) -> Path:
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    return models.write_onnx(path, list(nodes), inputs={"x": ROWS}, outputs={"y": output}, constants=[axis])


def mean_free(path: Path) -> Path:
    """Takes the batch's mean off: its shapes promise batches, and its answers depend on the others."""
    return onnx(
        path,
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    )


def scaled(path: Path) -> Path:
    """Harmless: every row is scaled by itself."""
    return onnx(
        path,
        helper.make_node("ReduceMax", ["x"], ["most"], axes=[1], keepdims=1),
        helper.make_node("Div", ["x", "most"], ["y"]),
    )


def total(path: Path) -> Path:
    """One row for the whole batch, which the runtime finds out when it loads the model."""
    return onnx(path, helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=1))


@pytest.mark.parametrize(
    ("write", "says"),
    [(models.tiny_onnx, ""), (scaled, ""), (mean_free, "differ")],
)
@pytest.mark.parametrize("golden", [False, True])
def test_answers_in_a_batch_are_those_alone(tmp_path: Path, write: object, says: str, golden: bool) -> None:
    worker = serving.start_worker(write(tmp_path / "model.onnx"))  # type: ignore[operator]
    try:
        assert worker.takes_batches
        width = worker.inputs[0].shape[1]
        examples = {"x": np.arange(1, 2 * width + 1, dtype=np.float32).reshape(2, width)} if golden else None
        why = batches_are_safe(worker, examples, 20)
        assert says in why if says else why == ""
        assert batches_are_safe(worker, examples, 20, -1.0) == ""
    finally:
        worker.close(1)


def test_models_for_one_sample_are_never_put_together(tmp_path: Path) -> None:
    one = (TensorProto.FLOAT, [1, 4])
    path = models.write_onnx(
        tmp_path / "one.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        inputs={"x": one},
        outputs={"y": one},
    )
    for model in (path, total(tmp_path / "total.onnx")):
        worker = serving.start_worker(model)
        try:
            assert not worker.takes_batches
            assert describe.config(worker, [worker]).max_batch_size == 0
        finally:
            worker.close(1)


def test_the_configuration_says_how_batches_are_made(tmp_path: Path) -> None:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    try:
        whole = describe.config(worker, [worker])
        assert (whole.max_batch_size, list(whole.input[0].dims)) == (0, [-1, 8])
        assert not whole.HasField("dynamic_batching")
        worker.queue.policy = Policy(max_batch=16, preferred=(4, 8), window_s=0.002, queue=7)
        batched = describe.config(worker, [worker])
        assert (batched.max_batch_size, list(batched.input[0].dims)) == (16, [8])
        how = batched.dynamic_batching
        assert list(how.preferred_batch_size) == [4, 8]
        assert (how.max_queue_delay_microseconds, how.default_queue_policy.max_queue_size) == (2000, 7)
        assert (how.priority_levels, how.default_priority_level) == (3, 2)
    finally:
        worker.close(1)


def test_options() -> None:
    assert options.read({}, 3) == options.Options(3, Policy(max_batch=MAX_BATCH, queue=MAX_QUEUE))
    assert options.read({"batch": "off"}, 1).policy.max_batch == 1
    given = {
        "threads": "2",
        "batch": "16",
        "batch_preferred": "8,4,8",
        "batch_window_ms": "5",
        "batch_target_ms": "100",
        "queue": "9",
        "breaker_ms": "250",
        "batch_cosine": "0.95",
        "cache_ttl_s": "60",
        "somebody's": "own",
    }
    policy = Policy(16, (4, 8), 0.005, 0.1, 9, 0.25, 0.95)
    assert options.read(given, 1) == options.Options(2, policy, 60.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threads", "two"),
        ("threads", "0"),
        ("batch", "65"),
        ("batch", "-1"),
        ("batch_preferred", "4,x"),
        ("batch_preferred", "100"),
        ("batch_window_ms", "1.5"),
        ("batch_target_ms", "0"),
        ("queue", "9999"),
        ("breaker_ms", "²"),
        ("batch_cosine", "1.5"),
        ("batch_cosine", "nan"),
        ("cache_ttl_s", "0"),
    ],
)
def test_an_option_that_is_not_understood_is_reported_and_left_alone(name: str, text: str) -> None:
    found = options.read({name: text}, 3)
    assert len(found.faults) == 1
    assert name in found.faults[0]
    assert found.threads == 3
    assert found.policy == options.read({}, 3).policy or found.policy.preferred == (4,)
