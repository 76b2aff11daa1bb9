"""How a request asks to be handled: priority, time in the queue, and what it hears when there is no room."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from agent import requests
from agent.inference import InferenceServer
from agent.inference_service import PUSHBACK
from agent.limits import CACHE_ENTRY_BYTES
from agent.router import Router
from agent.scheduling import Policy
from agent.worker import Worker
from edge_tests.harness import serving
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

Code = grpc.StatusCode
Parameter = pb.InferParameter


class Box:
    """A front over one slow model, whose queue holds two requests."""

    def __init__(self, directory: Path) -> None:
        self.router = router = Router()
        self.worker: Worker = serving.start_worker(serving.slow_onnx(directory / "slow.onnx"), "slow")
        self.worker.queue.policy = Policy(queue=2)
        self.steps = serving.steps_for(self.worker, 1.0)
        router.activate("slow", 1, self.worker)
        self.server = InferenceServer(router, "127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(self.server.addresses[0])
        self.stub = pb_grpc.GRPCInferenceServiceStub(self.channel)

    def ask(self, value: float, steps: int = 1, *, stub: Any = None, **parameters: Parameter) -> Any:
        inputs = serving.slow_inputs(value, steps)
        tensor = pb.ModelInferRequest.InferInputTensor
        request = pb.ModelInferRequest(
            model_name="slow",
            inputs=[
                tensor(name="x", datatype="FP32", shape=[1, 2]),
                tensor(name="steps", datatype="INT64", shape=[1]),
            ],
            raw_input_contents=[inputs["x"].tobytes(), inputs["steps"].tobytes()],
            parameters=parameters,
        )
        return (stub or self.stub).ModelInfer.future(request, timeout=60)

    def occupied(self) -> Any:
        before = self.worker.requests
        running = self.ask(0, self.steps)
        serving.eventually(lambda: self.worker.requests == before + 1, "it runs")
        return running

    def queued(self, value: float, **parameters: Parameter) -> Any:
        before = self.waiting()
        call = self.ask(value, **parameters)
        serving.eventually(lambda: self.waiting() == before + 1 or call.done(), "it waits")
        return call

    def waiting(self) -> int:
        return len(self.worker.queue._scheduler.waiting)

    def close(self) -> None:
        self.channel.close()
        self.server.stop(1)
        self.worker.close(0)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.close()


def uint(value: int) -> Parameter:
    return Parameter(uint64_param=value)


def answer(call: Any) -> float:
    return float(np.frombuffer(call.result().raw_output_contents[0], np.float32)[0])


def test_no_room_is_said_with_the_time_to_come_again(box: Box) -> None:
    running = box.occupied()
    low, normal = box.queued(1, priority=uint(3)), box.queued(2)
    high = box.ask(3, priority=uint(1))
    assert low.code() is Code.RESOURCE_EXHAUSTED
    assert "slow@1 is busy: its queue is full" in low.details()
    pushback = dict(low.trailing_metadata())[PUSHBACK]
    assert 10 <= int(pushback) <= 5000
    assert f"try again after {pushback} ms" in str(dict(low.trailing_metadata())["grpc-status-details-bin"])
    assert [answer(call) for call in (running, high, normal)] == [0, 3, 2]


def test_the_time_in_the_queue_is_bounded_if_asked(box: Box) -> None:
    running = box.occupied()
    hasty = box.queued(1, timeout=Parameter(int64_param=50_000))
    assert hasty.code() is Code.DEADLINE_EXCEEDED
    assert "waited for its turn" in hasty.details()
    assert not running.done()
    assert answer(running) == 0
    assert answer(box.ask(2, timeout=Parameter(int64_param=50_000))) == 2


def test_a_cancelled_request_leaves_the_queue_at_once(box: Box) -> None:
    running = box.occupied()
    gone = box.queued(1)
    gone.cancel()
    serving.eventually(lambda: box.waiting() == 0, "it left", within_s=0.9)
    assert answer(running) == 0


def test_answers_are_kept_for_a_version_that_wants_that(box: Box) -> None:
    assert [answer(box.ask(value)) for value in (1, 1)] == [1, 1]
    before = box.worker.requests
    box.worker.cache_s = 60.0
    assert [answer(box.ask(value)) for value in (1, 2, 1, 1)] == [1, 2, 1, 1]
    assert box.worker.requests == before + 2
    found = box.stub.ModelStatistics(pb.ModelStatisticsRequest(name="slow"), timeout=20).model_stats[0]
    assert (found.inference_stats.cache_hit.count, found.inference_stats.cache_miss.count) == (2, 2)
    assert found.inference_stats.success.count == 6
    assert box.stub.ModelConfig(pb.ModelConfigRequest(name="slow"), timeout=20).config.response_cache.enable
    successor = serving.start_worker(box.worker.spec.path, "slow")
    successor.succeed(box.worker)
    assert successor.cache_s == 60.0
    successor.close(0)


def test_no_more_answers_are_kept_than_the_bound_allows(box: Box) -> None:
    box.worker.cache_s = 60.0
    room = 2 * (CACHE_ENTRY_BYTES + 8)  # two answers of two FP32 values
    server = InferenceServer(box.router, "127.0.0.1:0", cache_bytes=room)
    server.start()
    try:
        with grpc.insecure_channel(server.addresses[0]) as channel:
            stub, before = pb_grpc.GRPCInferenceServiceStub(channel), box.worker.requests
            for value in (1, 2, 3, 1, 2):  # there is no room for the third, which was asked for no more often
                assert answer(box.ask(value, stub=stub)) == value
            assert box.worker.requests == before + 3
            assert answer(box.ask(3, stub=stub)) == 3
            assert box.worker.requests == before + 4
    finally:
        server.stop(1)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("priority", uint(4), "priority 4"),
        ("priority", Parameter(string_param="high"), "priority is a whole number"),
        ("timeout", Parameter(int64_param=-1), "timeout -1"),
        ("timeout", Parameter(bool_param=True), "timeout is a whole number"),
        ("sequence_id", Parameter(int64_param=7), "sequences are not offered"),
        ("sequence_id", Parameter(string_param="a"), "sequences are not offered"),
    ],
)
def test_parameters_that_are_not_understood(box: Box, name: str, value: Parameter, says: str) -> None:
    call = box.ask(1, **{name: value})
    assert call.code() is Code.INVALID_ARGUMENT
    assert says in call.details()


def test_parameters_that_say_nothing(box: Box) -> None:
    nothing = {"priority": uint(0), "sequence_id": Parameter(int64_param=0), "other": uint(9)}
    assert answer(box.ask(4, **nothing)) == 4


def test_inputs_in_shared_memory_have_a_bound_all_together(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_READ_BYTES", 20)
    memory = shared_memory.SharedMemory(create=True, size=64)
    try:
        region = pb.SystemSharedMemoryRegisterRequest(name="r", key=memory.name, byte_size=64)
        box.stub.SystemSharedMemoryRegister(region, timeout=20)
        steps = np.array([box.steps, 1], np.int64).tobytes()
        memory.buf[16:32] = steps

        def ask(offset: int) -> Any:
            tensor = pb.ModelInferRequest.InferInputTensor
            places = ((8, 0), (8, offset))
            found = [
                {
                    "shared_memory_region": Parameter(string_param="r"),
                    "shared_memory_byte_size": Parameter(int64_param=size),
                    "shared_memory_offset": Parameter(int64_param=start),
                }
                for size, start in places
            ]
            inputs = [
                tensor(name="x", datatype="FP32", shape=[1, 2], parameters=found[0]),
                tensor(name="steps", datatype="INT64", shape=[1], parameters=found[1]),
            ]
            return box.stub.ModelInfer.future(
                pb.ModelInferRequest(model_name="slow", inputs=inputs), timeout=60
            )

        before = box.worker.requests
        running = ask(16)
        serving.eventually(lambda: box.worker.requests == before + 1, "it runs")
        refused = ask(24)
        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert "would take over 20" in refused.details()
        assert PUSHBACK in dict(refused.trailing_metadata())
        assert answer(running) == 0
        assert answer(ask(24)) == 0  # given back
    finally:
        memory.close()
        memory.unlink()
