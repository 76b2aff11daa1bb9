"""Traces of requests, by W3C traceparent into OpenTelemetry: who waited where, as an OTLP collector shows it.

Loaded only where `tracing.endpoint` is configured, because of what it imports (the extra "tracing"). A
request becomes one span of kind SERVER, a child of the span that its client named in the metadata
`traceparent`, with a child for the wait in the queue and one for the run in the worker; in a cascade each
step is a span of its own between them. All are made once the request has ended, from the times that were
taken anyway.

Rules: the client's decision to sample is kept, and without one the configured share is sampled; at most
TRACE_QUEUE spans wait for the collector, and the oldest go first; a collector that is slow, dead or wrong
costs nobody an answer and the log one line a minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agent.capabilities import agent_version
from agent.cascading import Step
from agent.limits import (
    MAX_NAME_CHARACTERS,
    TRACE_BATCH,
    TRACE_CLOSE_S,
    TRACE_DELAY_S,
    TRACE_EXPORT_S,
    TRACE_LOG_S,
    TRACE_QUEUE,
)
from updater.errors import SluiceError

log = logging.getLogger(__name__)

SERVICE = "sluice-agent"
_HEADERS = ("traceparent", "tracestate")
_RPC = {"rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService"}
_LIBRARY_LOG = "opentelemetry"
_MAX_ATTRIBUTE_CHARACTERS = 256


class Tracing:
    """The way of spans from requests to a collector.

    Args:
        endpoint: host:port or https://host:port of a collector that takes OTLP over gRPC; plain text but for
            https.
        device_id: for the resource attribute "device.id".
        sample_ratio: share of the requests without a sampling decision that are traced, 0 to 1.
        attributes: further attributes of the resource.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        device_id: str,
        sample_ratio: float = 1.0,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        _quieten(_LIBRARY_LOG)
        self._exporter = OTLPSpanExporter(
            endpoint, insecure=not endpoint.startswith("https://"), timeout=TRACE_EXPORT_S
        )
        resource = {
            "service.name": SERVICE,
            "service.version": agent_version(),
            "service.instance.id": device_id,
            "device.id": device_id,
            **(attributes or {}),
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create(resource),
            span_limits=SpanLimits(max_attribute_length=_MAX_ATTRIBUTE_CHARACTERS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=TRACE_QUEUE,
                max_export_batch_size=TRACE_BATCH,
                schedule_delay_millis=TRACE_DELAY_S * 1000,
            )
        )
        self._tracer = self._provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        metadata: Iterable[tuple[str, str | bytes]],
        method: str,
        model: str,
        began: float,
        steps: Sequence[Step],
        error: SluiceError | None,
    ) -> None:
        """A request has ended. Never raises.

        Args:
            metadata: of the call.
            method: of the protocol.
            model: that the client named.
            began: when the request was there (time.monotonic).
            steps: what was asked of which version.
            error: why it failed; None if it was answered.
        """
        try:
            self._record(metadata, method, model, began, steps, error)
        except Exception:
            log.exception("a request could not be traced")

    def close(self) -> None:
        """Sends what waits, within TRACE_CLOSE_S, and ends."""
        flush = threading.Thread(target=self._provider.shutdown, name="trace-flush", daemon=True)
        flush.start()
        flush.join(TRACE_CLOSE_S)
        if flush.is_alive():
            log.warning("the trace collector does not answer; spans that wait for it are dropped")
            self._exporter.shutdown()

    def _record(
        self,
        metadata: Iterable[tuple[str, str | bytes]],
        method: str,
        model: str,
        began: float,
        steps: Sequence[Step],
        error: SluiceError | None,
    ) -> None:
        carrier = {key: value for key, value in metadata if key in _HEADERS and isinstance(value, str)}
        since_epoch = time.time() - time.monotonic()  # on the wall clock as it is now
        request = self._tracer.start_span(
            f"inference.GRPCInferenceService/{method}",
            context=self._propagator.extract(carrier, context=Context()),
            kind=SpanKind.SERVER,
            start_time=_ns(began + since_epoch),
            attributes={**_RPC, "rpc.method": method, "sluice.model.name": model[:MAX_NAME_CHARACTERS]},
        )
        if request.is_recording():
            context = set_span_in_context(request, Context())
            for step in steps:
                self._step(step, context, since_epoch, apart=len(steps) > 1)
            if steps:
                request.set_attribute("sluice.model.version", steps[0].version)
                request.set_attribute("sluice.samples", steps[0].samples)
            _fail(request, error)
        request.end()

    def _step(self, step: Step, context: Context, since_epoch: float, *, apart: bool) -> None:
        """Queue and run of one version, `apart` below a span of their own."""
        began, ended = step.began + since_epoch, step.ended + since_epoch
        names: dict[str, str | int] = {
            "sluice.model.name": step.model,
            "sluice.model.version": step.version,
            "sluice.samples": step.samples,
        }
        above: Span | None = None
        if apart:
            above = self._tracer.start_span(
                f"cascade step {step.model}", context=context, start_time=_ns(began), attributes=names
            )
            context = set_span_in_context(above, context)
        timing = step.timing
        if timing is None:  # the request failed while it waited or ran: which, the error tells
            self._span("queue and run", context, began, ended, names, step.error)
        elif timing.queue_s or timing.infer_s:
            ran = min(ended, began + timing.queue_s)
            self._span("queue", context, began, ran, names)
            self._span("run", context, ran, ended, names)
        else:
            self._span("cache", context, began, ended, names)
        if above is not None:
            _fail(above, step.error)
            above.end(_ns(ended))

    def _span(
        self,
        name: str,
        context: Context,
        began: float,
        ended: float,
        attributes: Mapping[str, str | int],
        error: SluiceError | None = None,
    ) -> None:
        span = self._tracer.start_span(name, context=context, start_time=_ns(began), attributes=attributes)
        _fail(span, error)
        span.end(_ns(ended))


def _fail(span: Span, error: SluiceError | None) -> None:
    if error is not None:
        span.set_attribute("error.type", error.code)
        span.set_status(Status(StatusCode.ERROR, error.message[:_MAX_ATTRIBUTE_CHARACTERS]))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


class _Seldom(logging.Filter):
    """Lets one record through every TRACE_LOG_S, whatever it says."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + TRACE_LOG_S
        return True


class _Forward(logging.Handler):
    """Hands the library's records to our log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("traces: %s", record.getMessage())


def _quieten(library: str) -> None:
    """The library says the same again and again of a collector that is away."""
    logger = logging.getLogger(library)
    if not any(isinstance(handler, _Forward) for handler in logger.handlers):
        handler = _Forward(logging.WARNING)
        handler.addFilter(_Seldom())
        logger.addHandler(handler)
        logger.propagate = False
