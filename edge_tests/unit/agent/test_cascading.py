"""Cascades of real workers, asked over gRPC."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent import cascading, describe
from agent.cascade import Cascade
from agent.figures import Timing
from agent.inference import InferenceServer
from agent.metrics import MetricsServer
from agent.router import Router
from agent.scheduling import Policy
from agent.worker import Worker
from edge_tests.harness import models, serving
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

SURE, UNSURE = [9.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]
THREE = [SURE, UNSURE, SURE]


def scaling_onnx(path: Path, factor: float, classes: int = 4) -> Path:
    """Logits y = factor * x: of one sign the samples tell how sure it is, and the factor who answered."""
    return models.write_onnx(
        path,
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        inputs={"x": (TensorProto.FLOAT, ["batch", classes])},
        outputs={"y": (TensorProto.FLOAT, ["batch", classes])},
        constants=[numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )


class Box:
    """Models "small" (y = x), "middle" (y = 2x) and "large" (y = 100x), served."""

    def __init__(self, directory: Path) -> None:
        self.router = Router()
        for model, factor, to in (("large", 100, ""), ("middle", 2, "large"), ("small", 1, "large")):
            self.add(directory, model, factor, to)
        self.server = InferenceServer(self.router, "127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(self.server.addresses[0])
        self.stub = pb_grpc.GRPCInferenceServiceStub(self.channel)

    def add(self, directory: Path, model: str, factor: float, to: str, version: int = 1) -> Worker:
        worker = serving.start_worker(
            scaling_onnx(directory / f"{model}-{version}.onnx", factor), model, version
        )
        worker.cascade = Cascade(to) if to else None
        worker.queue.policy = Policy(max_batch=8)
        self.router.activate(model, version, worker)
        return worker

    def worker(self, model: str) -> Worker:
        found = self.router.serving(model)
        assert found is not None
        return found.active

    def ask(
        self, rows: list[list[float]], model: str = "small", timeout_s: float = 20
    ) -> pb.ModelInferResponse:
        x = np.array(rows, np.float32)
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=x.shape)
        request = pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[x.tobytes()])
        return self.stub.ModelInfer(request, timeout=timeout_s)

    def close(self) -> None:
        self.channel.close()
        self.server.stop(1)
        for served in self.router.models():
            for worker in self.router.remove(served.model):
                worker.close(0)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.close()


def rows(response: pb.ModelInferResponse) -> list[list[float]]:
    (raw,) = response.raw_output_contents
    return np.frombuffer(raw, np.float32).reshape(tuple(response.outputs[0].shape)).tolist()


def times(factor: float, row: list[float]) -> list[float]:
    return pytest.approx([factor * value for value in row])  # type: ignore[return-value]


def test_only_the_samples_that_it_is_unsure_of_are_handed_on(box: Box) -> None:
    answer = box.ask([SURE])
    assert rows(answer) == [times(1, SURE)]
    assert answer.parameters["cascade_escalated"].int64_param == 0
    assert "cascade_to" not in answer.parameters
    answer = box.ask(THREE)
    assert rows(answer) == [times(1, SURE), times(100, UNSURE), times(1, SURE)]
    assert (answer.model_name, answer.model_version) == ("small", "1")
    assert answer.parameters["cascade_escalated"].int64_param == 1
    assert answer.parameters["cascade_to"].string_param == "large@1"
    assert rows(box.ask([UNSURE] * 2)) == [times(100, UNSURE)] * 2
    assert "cascade_escalated" not in box.ask([SURE], "large").parameters


def test_a_cascade_may_have_another_behind_it(box: Box) -> None:
    box.worker("small").cascade = Cascade("middle")
    half = [0.9, 0.0, 0.0, 0.0]  # of which "middle", with twice the logits, is sure enough
    box.worker("middle").cascade = Cascade("large", threshold=0.3)
    answer = box.ask([SURE, half, UNSURE])
    assert rows(answer) == [times(1, SURE), times(2, half), times(100, UNSURE)]
    assert answer.parameters["cascade_escalated"].int64_param == 2
    counts = [box.worker(model).figures.snapshot().cascade for model in ("small", "middle")]
    assert [(item.kept, item.escalated, item.failed) for item in counts if item] == [(1, 2, 0), (1, 1, 0)]


def test_figures_of_a_cascade(box: Box) -> None:
    box.ask(THREE)
    box.ask([UNSURE])
    small, large = (box.worker(model).figures.snapshot() for model in ("small", "large"))
    assert small.cascade is not None
    assert (small.cascade.kept, small.cascade.escalated, small.cascade.failed) == (2, 2, 0)
    assert small.cascade.share == 0.5
    assert (small.success.count, small.samples) == (2, 4)
    assert (large.success.count, large.samples, large.cascade) == (2, 2, None)
    assert small.success.seconds > large.success.seconds > 0
    found = box.stub.ModelStatistics(pb.ModelStatisticsRequest(name="small")).model_stats[0]
    assert found.response_stats["kept"].success.count == 2
    assert found.response_stats["escalated"].success.count == 2
    assert not describe.statistics([box.worker("large")]).model_stats[0].response_stats
    metrics = MetricsServer(box.router, "127.0.0.1:0")
    metrics.start()
    try:
        text = urllib.request.urlopen(f"http://{metrics.address}/metrics", timeout=10).read().decode()
    finally:
        metrics.stop()
    name = 'sluice_inference_cascade_samples_total{model="small",version="1",slot="active",outcome='
    for outcome, count in (("kept", 2), ("escalated", 2), ("failed", 0)):
        assert f'{name}"{outcome}"}} {count}\n' in text


def test_without_the_larger_model_the_small_one_answers(box: Box) -> None:
    (large,) = box.router.remove("large")
    try:
        assert rows(box.ask(THREE)) == [times(1, row) for row in THREE]
    finally:
        large.close(0)
    found = box.worker("small").figures.snapshot().cascade
    assert found is not None
    assert (found.kept, found.escalated, found.failed) == (2, 0, 1)


def test_a_larger_model_that_is_too_slow_does_not_cost_the_answer(box: Box) -> None:
    """It is stopped, so it does not answer; the request's deadline holds for both steps."""
    large = box.worker("large")
    os.kill(large.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = box.ask([UNSURE], timeout_s=1)
        assert 0.8 < time.monotonic() - began < 1.0
        assert rows(answer) == [times(1, UNSURE)]
    finally:
        os.kill(large.pid, signal.SIGCONT)
    serving.eventually(
        lambda: rows(box.ask([UNSURE])) == [times(100, UNSURE)], "the larger model answers again"
    )


def test_an_error_of_the_request_itself_is_an_error(box: Box) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        box.ask([[1.0, 2.0]])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_requests_of_several_clients_share_the_larger_models_batches(box: Box) -> None:
    calls = [
        box.stub.ModelInfer.future(
            pb.ModelInferRequest(
                model_name="small",
                inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])],
                raw_input_contents=[np.array([[number / 100, 0, 0, 0]], np.float32).tobytes()],
            ),
            timeout=20,
        )
        for number in range(40)
    ]
    assert [rows(call.result())[0][0] for call in calls] == pytest.approx(list(range(40)))


def test_declarations_are_checked_against_what_is_served(box: Box, tmp_path: Path) -> None:
    cascading.check(box.worker("small"), box.router)
    other = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), "other")
    try:
        other.cascade = Cascade("large")
        with pytest.raises(SluiceError, match=r"the input 'x'.*does not fit") as caught:
            cascading.check(other, box.router)
        assert caught.value.reason == errors_pb2.CASCADE_INVALID
        other.cascade = Cascade("huge")
        with pytest.raises(SluiceError) as caught:
            cascading.check(other, box.router)
        assert caught.value.reason == errors_pb2.CASCADE_INCOMPLETE
    finally:
        other.close(0)


def test_a_version_that_others_hand_on_to_must_fit_them(box: Box, tmp_path: Path) -> None:
    wider = serving.start_worker(scaling_onnx(tmp_path / "wide.onnx", 1, classes=5), "large", 2)
    try:
        with pytest.raises(SluiceError, match=r"large@2 cannot take the place of what \w+@1 hands on to"):
            cascading.check(wider, box.router)
    finally:
        wider.close(0)
    same = serving.start_worker(scaling_onnx(tmp_path / "same.onnx", 1), "large", 2)
    try:
        cascading.check(same, box.router)
        same.cascade = Cascade("small")
        with pytest.raises(SluiceError, match="a circle: large → small → large"):
            cascading.check(same, box.router)
    finally:
        same.close(0)


def test_a_shadow_sees_the_small_models_own_answers(box: Box) -> None:
    """It compares the next version of the small model, which is not the one that is handed on to."""
    seen: list[tuple[float, Timing]] = []

    class Shadow:
        def offer(self, _inputs: object, outputs: dict[str, np.ndarray], timing: Timing) -> None:
            seen.append((float(outputs["y"][0, 0]), timing))

    box.worker("small").shadow = Shadow()  # type: ignore[assignment]
    assert rows(box.ask([UNSURE])) == [times(100, UNSURE)]
    ((first, timing),) = seen
    assert first == pytest.approx(UNSURE[0])
    assert timing.infer_s < box.worker("small").figures.snapshot().parts.infer.seconds
