"""The gate of low-priority work: levels, what it admits, and the requests that wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.batching import Batcher
from agent.host_gate import HostGate, Level
from agent.host_load import HostLoad, measured_load
from agent.inference import InferenceServer
from agent.limits import GATE_HALF_LIFE_S, GATE_LOOK_S, GATE_MARGIN, GATE_STALE_S, LOW_HOLD_S
from agent.router import Router
from agent.scheduling import Item, Policy, Priority, Scheduler
from edge_tests.harness import models, serving
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc


def settled(gate: HostGate, load: float, now: float) -> float:
    """Shows the gate one load for long enough; returns the time then."""
    for _ in range(30):
        now += 1.0
        gate.observe(load, now)
    return now


def test_levels_and_what_they_admit() -> None:
    gate = HostGate(4)
    assert gate.admits(0), "nothing is known yet"
    now = settled(gate, 0.95, 0)
    assert gate.level is Level.BUSY
    assert not gate.admits(now)
    now = settled(gate, 0.5, now)
    assert gate.level is Level.USUAL
    assert gate.admits(now)
    gate.began(1, now)
    assert not gate.admits(now), "one model's worker at a time"
    gate.ended(1, now)
    now = settled(gate, 0.1, now)
    assert gate.level is Level.IDLE
    for _ in range(3):
        assert gate.admits(now)
        gate.began(1, now)


def test_a_level_is_left_only_well_past_its_bound() -> None:
    gate = HostGate(4)
    now = settled(gate, 0.90, 0)
    now = settled(gate, 0.85 - GATE_MARGIN / 2, now)
    assert gate.level is Level.BUSY
    now = settled(gate, 0.85 - GATE_MARGIN * 1.1, now)
    assert gate.level is Level.USUAL
    now = settled(gate, 0.85 - GATE_MARGIN / 2, now)
    assert gate.level is Level.USUAL
    now = settled(gate, 0.29, now)
    assert gate.level is Level.IDLE
    now = settled(gate, 0.30 + GATE_MARGIN / 2, now)
    assert gate.level is Level.IDLE
    settled(gate, 0.30 + GATE_MARGIN * 1.1, now)
    assert gate.level is Level.USUAL


def test_a_load_that_swings_about_a_bound_does_not_make_the_gate_flap() -> None:
    gate, changes, now = HostGate(4), 0, settled(HostGate(4), 0.5, 0)
    now = settled(gate, 0.84, now)
    for turn in range(200):
        before, now = gate.level, now + 1
        changes += gate.observe(0.84 + (0.05 if turn % 2 else -0.05), now) is not before
    assert changes <= 1


def test_a_short_burst_does_not_shut_it() -> None:
    gate = HostGate(4)
    now = settled(gate, 0.5, 0)
    assert gate.observe(1.0, now + 0.25) is Level.USUAL
    assert gate.load < 0.85
    assert GATE_HALF_LIFE_S >= 1


def test_what_low_priority_work_uses_itself_does_not_shut_it() -> None:
    """One core of four is others'; the low-priority work that was let in fills the rest."""
    gate = HostGate(4)
    now = settled(gate, 0.25, 0)
    gate.began(3, now)
    now = settled(gate, 1.0, now)
    assert gate.level is Level.IDLE
    assert gate.load == pytest.approx(0.25, abs=0.01)
    gate.ended(3, now)
    settled(gate, 1.0, now)
    assert gate.level is Level.BUSY, "now others fill the box"


def test_bounds_that_switch_it_off() -> None:
    gate, now = HostGate(4, hold_load=1.0, spare_load=0.0), 0.0
    for load in (0.0, 1.0, 0.5):
        now = settled(gate, load, now)
        assert gate.level is Level.USUAL


def test_without_readings_nothing_is_held() -> None:
    gate = HostGate(4)
    now = settled(gate, 1.0, 0)
    assert not gate.admits(now + GATE_STALE_S - 1)
    assert gate.admits(now + GATE_STALE_S + 1)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 5), st.booleans()), max_size=40))
def test_the_load_stays_within_its_range(steps: list[tuple[float, float, bool]]) -> None:
    gate, now, running = HostGate(2), 0.0, 0
    for load, seconds, more in steps:
        now += seconds
        if more:
            gate.began(4, now)
            running += 1
        elif running:
            gate.ended(4, now)
            running -= 1
        gate.observe(load, now)
        assert 0 <= gate.load <= 1


def test_the_real_reading() -> None:
    measured_load()
    began = time.perf_counter()
    while time.perf_counter() - began < 0.3:
        pass
    assert 0 < measured_load() <= 1


# The queue.


def item(number: int, priority: Priority, arrived: float = 0.0) -> Item:
    return Item(number, "key", 1, 1, priority, arrived, arrived + 30)


def taken(scheduler: Scheduler, now: float) -> list[int]:
    batch = scheduler.take(now)
    if batch is None:
        return []
    scheduler.finished(batch, now, ran=False)
    return [each.number for each in batch.items]


def test_held_requests_are_gone_past_and_run_when_released() -> None:
    scheduler = Scheduler(Policy(max_batch=8))
    scheduler.hold_low = True
    for number, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.LOW, Priority.HIGH)):
        scheduler.submit(item(number, priority), 0.0)
    assert scheduler.low_waits
    assert [taken(scheduler, 0.1) for _ in range(3)] == [[3], [1], []]
    assert scheduler.wake_at(0.2) == pytest.approx(0.2 + GATE_LOOK_S)
    scheduler.hold_low = False
    assert [taken(scheduler, 0.3) for _ in range(2)] == [[0], [2]]
    assert not scheduler.low_waits


def test_a_held_request_runs_at_last() -> None:
    scheduler = Scheduler(Policy())
    scheduler.hold_low = True
    scheduler.submit(item(0, Priority.LOW), 0.0)
    scheduler.submit(item(1, Priority.LOW, 5.0), 5.0)
    assert taken(scheduler, LOW_HOLD_S - 0.1) == []
    assert taken(scheduler, LOW_HOLD_S + 0.1) == [0]
    assert taken(scheduler, LOW_HOLD_S + 0.1) == []


class Host:
    """A load that a test sets."""

    def __init__(self) -> None:
        self.load = 0.5
        self.now = 100.0
        self.gate = HostLoad(0.85, 0.30, read=lambda: self.load, clock=lambda: self.now)

    def settle(self, load: float) -> None:
        self.load = load
        for _ in range(30):
            self.now += 1
            self.gate.tick()


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def served(tmp_path: Path, host: Host) -> Iterator[tuple[pb_grpc.GRPCInferenceServiceStub, Batcher]]:
    router = Router()
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    worker.queue.gate = host.gate
    worker.queue.policy = Policy(max_batch=8)
    router.activate("tiny", 1, worker)
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(server.addresses[0]) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel), worker.queue
    server.stop(1)
    worker.close(0)


def request(priority: Priority) -> pb.ModelInferRequest:
    row = np.zeros((1, 8), np.float32)
    made = pb.ModelInferRequest(
        model_name="tiny",
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=row.shape)],
        raw_input_contents=[row.tobytes()],
    )
    made.parameters["priority"].int64_param = priority
    return made


def test_low_priority_requests_wait_while_the_box_is_busy(
    served: tuple[pb_grpc.GRPCInferenceServiceStub, Batcher], host: Host
) -> None:
    stub, _ = served
    host.settle(0.95)
    low = [stub.ModelInfer.future(request(Priority.LOW), timeout=20) for _ in range(3)]
    for _ in range(5):
        stub.ModelInfer(request(Priority.NORMAL), timeout=5)
    time.sleep(3 * GATE_LOOK_S)
    assert not any(call.done() for call in low)
    host.settle(0.5)
    assert all(call.result().model_version == "1" for call in low)


def test_a_held_requests_deadline_is_kept(
    served: tuple[pb_grpc.GRPCInferenceServiceStub, Batcher], host: Host
) -> None:
    stub, _ = served
    host.settle(0.95)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request(Priority.LOW), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.4 < time.monotonic() - began < 2
    short = request(Priority.LOW)
    short.parameters["timeout"].int64_param = 300_000
    with pytest.raises(grpc.RpcError, match="waited for its turn too long"):
        stub.ModelInfer(short, timeout=5)
    stub.ModelInfer(request(Priority.HIGH), timeout=5)


def test_one_model_at_a_time_runs_low_priority_work_unless_the_box_is_idle(
    served: tuple[pb_grpc.GRPCInferenceServiceStub, Batcher], host: Host
) -> None:
    stub, _ = served
    host.settle(0.5)
    with host.gate.low_work(1):  # another model's worker
        call = stub.ModelInfer.future(request(Priority.LOW), timeout=20)
        time.sleep(3 * GATE_LOOK_S)
        assert not call.done()
    assert call.result().model_version == "1"
    host.settle(0.1)
    with host.gate.low_work(1):
        assert stub.ModelInfer(request(Priority.LOW), timeout=5).model_version == "1"


def test_the_gate_hears_of_low_priority_runs_alone(
    served: tuple[pb_grpc.GRPCInferenceServiceStub, Batcher], host: Host
) -> None:
    stub, queue = served
    seen: list[int] = []
    real = host.gate.low_work

    def low_work(threads: int):
        seen.append(threads)
        return real(threads)

    host.gate.low_work = low_work  # type: ignore[method-assign]
    queue.threads = 2
    stub.ModelInfer(request(Priority.NORMAL), timeout=5)
    assert seen == []
    stub.ModelInfer(request(Priority.LOW), timeout=5)
    assert seen == [2]
