"""Traces of requests as a real OTLP collector gets them, and what a bad collector costs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from agent.cascade import Cascade
from agent.inference import InferenceServer
from agent.limits import TRACE_CLOSE_S, TRACE_QUEUE
from agent.router import Router
from agent.tracing import Tracing
from edge_tests.harness import models, serving
from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.collector import Collector, attributes
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
ROW = np.arange(8, dtype=np.float32).reshape(1, 8)
REQUEST = "inference.GRPCInferenceService/ModelInfer"


class Box:
    """Models "tiny" and "large" behind a server with traces."""

    def __init__(self, directory: Path, tracing: Tracing | None) -> None:
        self.tracing = tracing
        self.router = Router()
        for seed, model in enumerate(("tiny", "large")):
            worker = serving.start_worker(models.tiny_onnx(directory / f"{model}.onnx", seed), model)
            self.router.activate(model, 1, worker)
        self.server = InferenceServer(self.router, "127.0.0.1:0", tracing=tracing)
        self.server.start()
        self.channel = grpc.insecure_channel(self.server.addresses[0])
        self.stub = pb_grpc.GRPCInferenceServiceStub(self.channel)

    def ask(self, traceparent: str = "", model: str = "tiny", row: np.ndarray = ROW) -> pb.ModelInferResponse:
        metadata = [("traceparent", traceparent), ("tracestate", "vendor=1")] if traceparent else []
        return self.stub.ModelInfer(request(model, row), timeout=20, metadata=metadata)

    def close(self) -> None:
        self.channel.close()
        self.server.stop(1)
        for served in self.router.models():
            for worker in self.router.remove(served.model):
                worker.close(0)


def request(model: str = "tiny", row: np.ndarray = ROW) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=row.shape)
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[row.tobytes()])


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def opened(directory: Path, address: str, **options: object) -> Box:
    return Box(directory, Tracing(address, device_id="box-1", **options))  # type: ignore[arg-type]


@pytest.fixture
def box(tmp_path: Path, collector: Collector) -> Iterator[Box]:
    box = opened(tmp_path, collector.address, attributes={"site": "mill"})
    yield box
    box.close()
    assert box.tracing is not None
    box.tracing.close()


def by_name(spans: list[Span]) -> dict[str, Span]:
    named = {span.name: span for span in spans}
    assert len(named) == len(spans)
    return named


def test_a_request_is_a_child_of_its_clients_span(box: Box, collector: Collector) -> None:
    before = time.time_ns()
    box.ask(SAMPLED)
    after = time.time_ns()
    spans = by_name(collector.wait_for(3))
    assert set(spans) == {REQUEST, "queue", "run"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    top = spans[REQUEST]
    assert top.parent_span_id.hex() == PARENT
    assert top.kind == Span.SPAN_KIND_SERVER
    assert top.trace_state == "vendor=1"
    for name in ("queue", "run"):
        assert spans[name].parent_span_id == top.span_id
    found = attributes(top)
    assert (found["sluice.model.name"], found["sluice.model.version"], found["sluice.samples"]) == (
        "tiny",
        1,
        1,
    )
    assert (found["rpc.method"], found["rpc.system"]) == ("ModelInfer", "grpc")
    order = [top.start_time_unix_nano, spans["queue"].start_time_unix_nano, spans["queue"].end_time_unix_nano]
    order += [spans["run"].start_time_unix_nano, spans["run"].end_time_unix_nano, top.end_time_unix_nano]
    assert order == sorted(order)
    slack = 5_000_000  # the wall clock and the monotonic one are read one after the other
    assert before - slack < order[0] < order[-1] < after + slack
    assert collector.resource["service.name"] == "sluice-agent"
    assert (collector.resource["device.id"], collector.resource["site"]) == ("box-1", "mill")


def test_a_request_without_a_client_span_begins_a_trace(box: Box, collector: Collector) -> None:
    box.ask()
    box.ask("00-not-a-traceparent-01")
    spans = collector.wait_for(6)
    tops = [span for span in spans if span.name == REQUEST]
    assert [top.parent_span_id for top in tops] == [b"", b""]
    assert len({span.trace_id for span in spans}) == 2


def test_the_clients_decision_is_kept(box: Box, collector: Collector) -> None:
    box.ask(NOT_SAMPLED)
    box.ask(SAMPLED)
    collector.wait_for(3)
    time.sleep(0.2)
    assert len(collector.spans) == 3


def test_a_failed_request_says_why(box: Box, collector: Collector) -> None:
    with pytest.raises(grpc.RpcError):
        box.ask(SAMPLED, model="none")
    with pytest.raises(grpc.RpcError):
        box.ask(SAMPLED, row=ROW[:, :3])
    spans = collector.wait_for(2)
    assert [span.name for span in spans] == [REQUEST] * 2
    assert [attributes(span)["error.type"] for span in spans] == ["MODEL_UNKNOWN", "INPUT_INVALID"]
    assert all(span.status.code == 2 for span in spans)
    assert "serves no model 'none'" in spans[0].status.message


def test_each_step_of_a_cascade_is_a_span(box: Box, collector: Collector) -> None:
    tiny = box.router.serving("tiny")
    assert tiny is not None
    tiny.active.cascade = Cascade("large", threshold=1.0)
    box.ask(SAMPLED)
    spans = collector.wait_for(7)
    top = next(span for span in spans if span.name == REQUEST)
    steps = [span for span in spans if span.name.startswith("cascade step")]
    assert [span.name for span in steps] == ["cascade step tiny", "cascade step large"]
    assert {span.parent_span_id for span in steps} == {top.span_id}
    below = [(span.name, span.parent_span_id) for span in spans if span.name in ("queue", "run")]
    assert sorted(below) == sorted((name, step.span_id) for name in ("queue", "run") for step in steps)
    assert steps[0].end_time_unix_nano <= steps[1].start_time_unix_nano


def test_requests_of_a_stream_and_answers_from_the_cache(box: Box, collector: Collector) -> None:
    tiny = box.router.serving("tiny")
    assert tiny is not None
    tiny.active.cache_s = 60.0
    answers = list(
        box.stub.ModelStreamInfer(
            iter([request(), request()]), timeout=20, metadata=[("traceparent", SAMPLED)]
        )
    )
    assert not any(answer.error_message for answer in answers)
    spans = collector.wait_for(5)
    tops = [span for span in spans if span.name.endswith("/ModelStreamInfer")]
    assert [top.parent_span_id.hex() for top in tops] == [PARENT] * 2
    below = [span.name for span in spans if span.parent_span_id == tops[1].span_id]
    assert below == ["cache"]


def test_a_share_is_sampled(tmp_path: Path, collector: Collector) -> None:
    box = opened(tmp_path, collector.address, sample_ratio=0.0)
    try:
        for _ in range(5):
            box.ask()
        box.ask(SAMPLED)
        assert len(collector.wait_for(3)) == 3
    finally:
        box.close()
        assert box.tracing is not None
        box.tracing.close()
    assert len(collector.spans) == 3


@pytest.mark.parametrize("kind", ["dead", "hangs"])
def test_a_bad_collector_harms_nothing(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with Collector(hang=True) as hanging:
        address = hanging.address if kind == "hangs" else "127.0.0.1:9"
        box = opened(tmp_path, address)
        try:
            answers = [box.ask(SAMPLED).raw_output_contents for _ in range(TRACE_QUEUE // 3 + 200)]
            assert len({answer[0] for answer in answers}) == 1
        finally:
            box.close()
        began = time.monotonic()
        assert box.tracing is not None
        box.tracing.close()
        assert time.monotonic() - began < TRACE_CLOSE_S + 1
    said = [record for record in caplog.records if record.getMessage().startswith("traces:")]
    assert len(said) <= 1, [record.getMessage() for record in said]


def test_a_whole_agent_traces_its_requests(tmp_path: Path, collector: Collector) -> None:
    """It serves nothing, so what is traced is the refusal; a run is traced as above."""
    settings = {"tracing.endpoint": collector.address, "tracing.attributes": {"site": "mill"}}
    with AgentProcess(tmp_path / "a", "127.0.0.1:9", "box-2", settings=settings) as agent:
        with grpc.insecure_channel(agent.address) as channel, pytest.raises(grpc.RpcError):
            pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
                request(), timeout=20, metadata=[("traceparent", SAMPLED)]
            )
        agent.stop()
    (span,) = collector.wait_for(1)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (collector.resource["device.id"], collector.resource["site"]) == ("box-2", "mill")


def test_without_an_endpoint_opentelemetry_is_not_imported(tmp_path: Path) -> None:
    """The daemon is built as `sluice-agent run` builds it, and answers a request."""
    script = f"""
import sys
from pathlib import Path
from agent.config import AgentConfig
from agent.daemon import Daemon
import grpc
from inference import open_inference_pb2 as pb, open_inference_pb2_grpc as pb_grpc

daemon = Daemon(AgentConfig("127.0.0.1:9", state_dir=Path({str(tmp_path)!r}), inference_address="127.0.0.1:0",
                            admin_socket=Path({str(tmp_path / "s")!r})))
daemon._inference.start()
with grpc.insecure_channel(daemon._inference.addresses[0]) as channel:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    try:
        stub.ModelInfer(pb.ModelInferRequest(model_name="none"), timeout=20)
    except grpc.RpcError as error:
        print(error.code().name)
daemon._inference.stop(0)
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split("\n")[:2] == ["NOT_FOUND", "[]"], done.stderr
