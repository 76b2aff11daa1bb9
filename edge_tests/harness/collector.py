"""An OTLP collector for traces: a real gRPC server that keeps what it is sent."""

from __future__ import annotations

import threading
from concurrent import futures
from types import TracebackType

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from edge_tests.harness.serving import eventually


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a free port of loopback; with `hang` it takes messages and answers none until closed."""

    def __init__(self, *, hang: bool = False) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self.messages = 0
        self._hang = hang
        self._closed = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(  # noqa: N802 - the protocol's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.messages += 1
        if self._hang:
            self._closed.wait(60)
        for group in request.resource_spans:
            self.resource = {item.key: item.value.string_value for item in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, count: int) -> list[Span]:
        """The spans, once there are so many."""
        eventually(lambda: len(self.spans) >= count, f"{count} spans came, not {len(self.spans)}")
        return list(self.spans)

    def close(self) -> None:
        self._closed.set()
        self._server.stop(0).wait(5)

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def attributes(span: Span) -> dict[str, str | int]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}
