"""Streams: they hold up nothing else, their number is bounded, and idle ones make room."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from agent import requests
from agent import streams as module
from agent.inference import InferenceServer
from agent.limits import MAX_STREAMS
from agent.router import Router
from edge_tests.harness import models, serving
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

THREADS = 2
ROW = np.arange(8, dtype=np.float32).reshape(1, 8)


class Stream:
    """One client's stream; the client keeps it open until `close`."""

    def __init__(self, stub: pb_grpc.GRPCInferenceServiceStub, *metadata: tuple[str, str]) -> None:
        self._requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None), timeout=60, metadata=metadata)

    def ask(self, model: str = "tiny") -> pb.ModelStreamInferResponse:
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROW.shape)
        self._requests.put(
            pb.ModelInferRequest(
                model_name=model, id="7", inputs=[tensor], raw_input_contents=[ROW.tobytes()]
            )
        )
        answer: pb.ModelStreamInferResponse = next(self.call)
        return answer

    def close(self) -> None:
        self._requests.put(None)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    router = Router()
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    router.activate("tiny", 1, worker)
    server = InferenceServer(router, "127.0.0.1:0", threads=THREADS)
    server.start()
    with grpc.insecure_channel(server.addresses[0]) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)
    server.stop(1)
    worker.close(1)


def infer(stub: pb_grpc.GRPCInferenceServiceStub) -> str:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROW.shape)
    request = pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[ROW.tobytes()])
    return str(stub.ModelInfer(request, timeout=20).model_version)


def test_streams_that_stand_hold_up_no_other_call(stub: pb_grpc.GRPCInferenceServiceStub) -> None:
    assert MAX_STREAMS > THREADS
    standing = [Stream(stub) for _ in range(MAX_STREAMS)]
    for stream in standing:
        assert stream.ask().infer_response.id == "7"
    assert infer(stub) == "1"
    for stream in standing:
        stream.close()
        assert list(stream.call) == []
        assert stream.call.code() is grpc.StatusCode.OK


def test_one_too_many_is_refused_until_another_was_idle_for_long(
    stub: pb_grpc.GRPCInferenceServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = [Stream(stub) for _ in range(MAX_STREAMS)]
    for stream in standing:
        stream.ask()
    with pytest.raises(grpc.RpcError) as caught:
        Stream(stub).ask()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    standing[0].ask()  # of the others, the second is idle longest now
    monkeypatch.setattr(module, "STREAM_IDLE_S", 0.0)
    assert Stream(stub).ask().infer_response.id == "7"
    with pytest.raises(grpc.RpcError) as caught:
        next(standing[1].call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert standing[0].ask().infer_response.id == "7"


def test_a_failure_is_an_answer_or_the_streams_status(stub: pb_grpc.GRPCInferenceServiceStub) -> None:
    stream = Stream(stub)
    failed = stream.ask("none")
    assert failed.error_message.startswith("[StatusCode.NOT_FOUND] this box serves no model 'none'")
    assert (failed.infer_response.id, failed.infer_response.model_name) == ("7", "none")
    assert not stream.ask().error_message
    stream.close()
    strict = Stream(stub, ("triton_grpc_error", "true"))
    assert not strict.ask().error_message
    with pytest.raises(grpc.RpcError) as caught:
        strict.ask("none")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_requests_of_one_form_are_worked_out_once(
    stub: pb_grpc.GRPCInferenceServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ModelInfer and streams alike, whose contents and ids differ all the same."""
    made = []
    make_plan = requests.make_plan
    monkeypatch.setattr(requests, "make_plan", lambda *given: made.append(given) or make_plan(*given))
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROW.shape)

    def request(number: int) -> pb.ModelInferRequest:
        contents = [(ROW * number).tobytes()]
        return pb.ModelInferRequest(
            model_name="tiny", id=str(number), inputs=[tensor], raw_input_contents=contents
        )

    alone = [stub.ModelInfer(request(number), timeout=20) for number in range(5)]
    streamed = list(stub.ModelStreamInfer(map(request, range(5)), timeout=20))
    assert [answer.infer_response for answer in streamed] == alone
    assert len({answer.raw_output_contents[0] for answer in alone}) == 5
    assert len(made) == 1


def test_what_is_no_request_is_refused_and_the_stream_goes_on(stub: pb_grpc.GRPCInferenceServiceStub) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROW.shape)
    good = pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[ROW.tobytes()])
    good.parameters["triton_enable_empty_final_response"].bool_param = True
    bad = pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[b"short"])
    answers = list(stub.ModelStreamInfer(iter([good, bad, good]), timeout=20))
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert answers[0].infer_response.parameters["triton_final_response"].bool_param
    assert answers[0] == answers[2]
