"""The front over real gRPC: our own stubs as the client, real workers behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from agent.inference import InferenceServer
from agent.inference_service import EXTENSIONS
from agent.limits import MAX_MESSAGE_BYTES
from agent.router import Router
from agent.worker import Worker
from edge_tests.harness import models, serving
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.wire import from_rpc_error

FIXTURES = Path(__file__).parents[2] / "conformance" / "fixtures"
Code = grpc.StatusCode


class Front:
    """A server over a router, and a stub on it."""

    def __init__(self, directory: Path, **options: int) -> None:
        self.directory = directory
        self.router = Router()
        self.server = InferenceServer(self.router, "127.0.0.1:0", **options)
        self.server.start()
        self._channel = grpc.insecure_channel(
            self.server.addresses[0],
            options=(("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)),
        )
        self.stub = pb_grpc.GRPCInferenceServiceStub(self._channel)

    def serve(self, path: Path, model: str = "tiny", version: int = 1) -> Worker:
        worker = serving.start_worker(path, model, version)
        self.router.activate(model, version, worker)
        return worker

    def serve_tiny(self, version: int = 1) -> Worker:
        return self.serve(models.tiny_onnx(self.directory / f"{version}.onnx", seed=version), "tiny", version)

    def close(self) -> None:
        self._channel.close()
        self.server.stop(1)
        for served in self.router.models():
            for worker in served.workers:
                worker.close(0)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path)
    yield front
    front.close()


def raw_request(array: np.ndarray, **fields: str) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=array.shape)
    fields = {"model_name": "tiny", **fields}
    return pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[array.tobytes()], **fields)


def slow_request(value: float, steps: int) -> pb.ModelInferRequest:
    inputs = serving.slow_inputs(value, steps)
    tensor = pb.ModelInferRequest.InferInputTensor
    return pb.ModelInferRequest(
        model_name="slow",
        inputs=[
            tensor(name="x", datatype="FP32", shape=[1, 2]),
            tensor(name="steps", datatype="INT64", shape=[1]),
        ],
        raw_input_contents=[inputs["x"].tobytes(), inputs["steps"].tobytes()],
    )


def refused(front: Front, request: pb.ModelInferRequest, timeout_s: float = 20) -> SluiceError:
    with pytest.raises(grpc.RpcError) as caught:
        front.stub.ModelInfer(request, timeout=timeout_s)
    return from_rpc_error(caught.value, "inferring", "the box")


ROW = np.arange(8, dtype=np.float32).reshape(1, 8)


def test_raw_requests_get_raw_answers_with_version_and_id(front: Front) -> None:
    worker = front.serve_tiny(7)
    response = front.stub.ModelInfer(raw_request(ROW, id="request-1"), timeout=20)
    assert (response.model_name, response.model_version, response.id) == ("tiny", "7", "request-1")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [1, models.CLASSES])
    answer = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(1, -1)
    np.testing.assert_array_equal(answer, worker.infer({"x": ROW}, 10)["y"])


def test_typed_requests_get_typed_answers(front: Front) -> None:
    worker = front.serve_tiny()
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 8])
    tensor.contents.fp32_contents.extend(ROW.reshape(-1).tolist())
    response = front.stub.ModelInfer(pb.ModelInferRequest(model_name="tiny", inputs=[tensor]), timeout=20)
    assert not response.raw_output_contents
    np.testing.assert_array_equal(
        np.array(response.outputs[0].contents.fp32_contents, np.float32),
        worker.infer({"x": ROW}, 10)["y"].reshape(-1),
    )


def test_only_the_outputs_asked_for(front: Front) -> None:
    front.serve(FIXTURES / "pair.onnx", "pair")
    tensor = pb.ModelInferRequest.InferInputTensor
    ones = np.ones((1, 2), np.float32)
    request = pb.ModelInferRequest(
        model_name="pair",
        inputs=[tensor(name=name, datatype="FP32", shape=[1, 2]) for name in ("right", "left")],
        raw_input_contents=[ones.tobytes(), (3 * ones).tobytes()],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="difference")],
    )
    response = front.stub.ModelInfer(request, timeout=20)
    assert [output.name for output in response.outputs] == ["difference"]
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [2, 2]


def test_health_and_metadata(front: Front) -> None:
    stub = front.stub
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=20).live
    assert not stub.ServerReady(pb.ServerReadyRequest(), timeout=20).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="tiny"), timeout=20).ready
    first, second = front.serve_tiny(1), front.serve_tiny(10)
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=20).ready
    for version, ready in (("", True), ("1", True), ("10", True), ("2", False)):
        assert stub.ModelReady(pb.ModelReadyRequest(name="tiny", version=version), timeout=20).ready == ready
    server = stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=20)
    assert (server.name, list(server.extensions)) == ("sluice", list(EXTENSIONS))
    assert server.version
    found = stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"), timeout=20)
    assert (found.name, list(found.versions), found.platform) == ("tiny", ["1", "10"], "onnxruntime_onnx")
    (entry,), (exit_,) = found.inputs, found.outputs
    assert (entry.name, entry.datatype, list(entry.shape)) == ("x", "FP32", [-1, models.FEATURES])
    assert (exit_.name, exit_.datatype, list(exit_.shape)) == ("y", "FP32", [-1, models.CLASSES])
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny", version="3"), timeout=20)
    assert caught.value.code() is Code.NOT_FOUND
    serving.kill(second)
    assert not stub.ServerReady(pb.ServerReadyRequest(), timeout=20).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="tiny"), timeout=20).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="tiny", version="1"), timeout=20).ready
    assert first.alive


def test_refusals_name_what_is_wrong(front: Front) -> None:
    worker = front.serve_tiny(2)
    for request, status, reason, says in (
        (raw_request(ROW, model_name="other"), Code.NOT_FOUND, "MODEL_UNKNOWN", "it serves tiny"),
        (raw_request(ROW, model_version="9"), Code.NOT_FOUND, "VERSION_UNKNOWN", "loaded: 2"),
        (raw_request(ROW[:, :7]), Code.INVALID_ARGUMENT, "INPUT_INVALID", "shape [1, 7]"),
        (raw_request(ROW.reshape(8)), Code.INVALID_ARGUMENT, "INPUT_INVALID", "rank 1"),
        (pb.ModelInferRequest(model_name="tiny"), Code.INVALID_ARGUMENT, "INPUT_INVALID", "'x' is missing"),
        (pb.ModelInferRequest(), Code.NOT_FOUND, "MODEL_UNKNOWN", "no model ''"),
    ):
        error = refused(front, request)
        assert (error.code, error.status) == (reason, status)
        assert says in error.message
    assert worker.requests == 0
    serving.kill(worker)
    error = refused(front, raw_request(ROW))
    assert (error.code, error.status) == ("MODEL_NOT_SERVING", Code.UNAVAILABLE)


def test_messages_over_the_limit_are_refused(front: Front) -> None:
    front.serve_tiny()
    rows = np.zeros((MAX_MESSAGE_BYTES // 32, 8), np.float32)
    with pytest.raises(grpc.RpcError) as caught:
        front.stub.ModelInfer(raw_request(rows), timeout=60)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert front.stub.ModelInfer(raw_request(ROW), timeout=20)


def test_answers_over_the_limit_are_refused(front: Front) -> None:
    front.serve(widening_onnx(front.directory / "wide.onnx"), "tiny")
    error = refused(front, raw_request(np.zeros((9_000, 8), np.float32)), 60)
    assert error.reason == errors_pb2.LIMIT_EXCEEDED
    assert "ask for fewer outputs" in error.hint
    assert front.stub.ModelInfer(raw_request(ROW), timeout=20)


def widening_onnx(path: Path) -> Path:
    """[n, 8] becomes [n, 8, 256]."""
    from onnx import TensorProto, helper, numpy_helper

    ones = numpy_helper.from_array(np.ones((1, 256), np.float32), "ones")
    axes = numpy_helper.from_array(np.array([2], np.int64), "axes")
    return models.write_onnx(
        path,
        [
            helper.make_node("Unsqueeze", ["x", "axes"], ["column"]),
            helper.make_node("MatMul", ["column", "ones"], ["y"]),
        ],
        inputs={"x": (TensorProto.FLOAT, ["batch", 8])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 8, 256])},
        constants=[ones, axes],
    )


def test_calls_over_the_number_allowed_are_shed(tmp_path: Path) -> None:
    front = Front(tmp_path, threads=2, concurrent_rpcs=2)
    try:
        worker = front.serve(serving.slow_onnx(tmp_path / "slow.onnx"), "slow")
        steps = serving.steps_for(worker, 1.0)
        running = [front.stub.ModelInfer.future(slow_request(n, steps), timeout=60) for n in range(2)]
        serving.eventually(lambda: worker.requests == 2, "the first request runs")
        codes = set()
        while not running[1].done() and Code.RESOURCE_EXHAUSTED not in codes:
            with pytest.raises(grpc.RpcError) as caught:
                front.stub.ModelInfer(slow_request(9, 1), timeout=20)
            codes.add(caught.value.code())
        assert codes == {Code.RESOURCE_EXHAUSTED}
        for future in running:
            assert future.result()
    finally:
        front.close()


def test_the_clients_deadline_holds_and_the_worker_lives(front: Front) -> None:
    worker = front.serve(serving.slow_onnx(front.directory / "slow.onnx"), "slow")
    steps = serving.steps_for(worker, 1.0)
    with pytest.raises(grpc.RpcError) as caught:
        front.stub.ModelInfer(slow_request(1, steps), timeout=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    response = front.stub.ModelInfer(slow_request(5, 1), timeout=60)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [5, 5]
    assert worker.alive


def test_a_cancelled_request_is_not_computed(front: Front) -> None:
    worker = front.serve(serving.slow_onnx(front.directory / "slow.onnx"), "slow")
    steps = serving.steps_for(worker, 1.0)
    first = front.stub.ModelInfer.future(slow_request(1, steps), timeout=60)
    serving.eventually(lambda: worker.requests == 2, "the first request runs")
    second = front.stub.ModelInfer.future(slow_request(2, 1), timeout=60)
    time.sleep(0.2)
    second.cancel()
    assert first.result()
    assert front.stub.ModelInfer(slow_request(3, 1), timeout=60)
    assert worker.requests == 3


def test_a_stuck_model_does_not_stop_another(front: Front) -> None:
    stuck = front.serve(models.hanging_onnx(front.directory / "hanging.onnx"), "stuck")
    front.serve_tiny()
    calls = [
        front.stub.ModelInfer.future(raw_request(ROW, model_name="stuck"), timeout=20) for _ in range(30)
    ]
    serving.eventually(lambda: stuck.requests == 1, "one is stuck")
    assert front.stub.ModelInfer(raw_request(ROW), timeout=20).model_name == "tiny"
    shed = [call for call in calls if call.done()]
    assert {call.code() for call in shed} <= {Code.RESOURCE_EXHAUSTED}
    assert stuck.alive
    serving.kill(stuck)
    for call in calls:
        assert call.code() in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


def test_many_clients(front: Front) -> None:
    worker = front.serve_tiny()
    batch = models.samples(32)["x"]
    expected = worker.infer({"x": batch}, 10)["y"]

    def ask(number: int) -> bool:
        row = number % 32
        response = front.stub.ModelInfer(raw_request(batch[row : row + 1]), timeout=20)
        answer = np.frombuffer(response.raw_output_contents[0], np.float32)
        return np.allclose(answer, expected[row], rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


def test_a_port_is_not_shared(front: Front) -> None:
    other = InferenceServer(Router(), front.server.addresses)
    with pytest.raises(SluiceError, match=r"cannot listen on .*: Address already in use") as caught:
        other.start()
    assert caught.value.reason == errors_pb2.CONFIG_INVALID
    assert caught.value.exit_code == 3
    other.stop(0)


def test_unix_socket_and_port_together(tmp_path: Path) -> None:
    server = InferenceServer(Router(), ["127.0.0.1:0", f"unix:{tmp_path}/i.sock"])
    server.start()
    try:
        assert len(server.addresses) == 2
        for address in server.addresses:
            with grpc.insecure_channel(address) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                assert stub.ServerLive(pb.ServerLiveRequest(), timeout=20).live
    finally:
        server.stop(1)


def test_stop_lets_running_requests_end(front: Front) -> None:
    worker = front.serve(serving.slow_onnx(front.directory / "slow.onnx"), "slow")
    steps = serving.steps_for(worker, 0.5)
    running = front.stub.ModelInfer.future(slow_request(4, steps), timeout=60)
    serving.eventually(lambda: worker.requests == 2, "the request runs")
    stopper = threading.Thread(target=front.server.stop, args=(20,))
    stopper.start()
    assert running.result().model_name == "slow"
    stopper.join(30)
    assert not stopper.is_alive()
