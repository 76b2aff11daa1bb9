"""Figures of serving in Prometheus' text format, and the small HTTP server that gives them out.

`render` is pure. The server answers `GET /metrics`, one request after the other in one thread; it is there
only if the configuration has `metrics.address`, and its modules are loaded only then. Names are in base units
and end as Prometheus wants them (`_seconds`, `_bytes`, `_total`).

Rules: a connection has METRICS_CONNECTION_S for its request and its answer, so that one that sends nothing
delays the next by no more; nothing but the figures can be asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from agent.figures import SECONDS, Snapshot, Sum
from agent.limits import MAX_BATCH, METRICS_CONNECTION_S
from agent.router import Router, Serving
from agent.worker import Worker
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PATH = "/metrics"

Labels = tuple[tuple[str, str], ...]


def render(models: Iterable[Serving]) -> str:
    """The figures of every version that is loaded."""
    loaded = [
        (_labels(serving, place, worker), worker) for serving in models for place, worker in _workers(serving)
    ]
    figures = [(labels, worker.figures.snapshot()) for labels, worker in loaded]
    lines: list[str] = []

    def family(name: str, kind: str, what: str, samples: Iterable[str]) -> None:
        lines.extend((f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples))

    name = "sluice_inference_requests_total"
    outcomes = [
        _sample(name, (*labels, ("outcome", outcome)), total.count)
        for labels, found in figures
        for outcome, total in (("success", found.success), ("failure", found.fail))
    ]
    family(name, "counter", "Requests by outcome.", outcomes)
    name = "sluice_inference_samples_total"
    family(name, "counter", "Samples answered.", (_sample(name, at, found.samples) for at, found in figures))
    name = "sluice_inference_cache_lookups_total"
    lookups = [
        _sample(name, (*labels, ("outcome", outcome)), total.count)
        for labels, found in figures
        for outcome, total in (("hit", found.hits), ("miss", found.misses))
    ]
    family(name, "counter", "Look-ups in the response cache.", lookups)
    name = "sluice_inference_request_duration_seconds"
    times = [line for at, found in figures for line in _histogram(name, at, found.durations, found.success)]
    family(name, "histogram", "From decoded to answered, of requests that succeeded.", times)
    name = "sluice_inference_queue_duration_seconds"
    waits = [line for at, found in figures for line in _histogram(name, at, found.waits, found.parts.queue)]
    family(name, "histogram", "Wait for the worker, of requests that succeeded.", waits)
    name = "sluice_inference_batch_samples"
    sizes = [line for at, found in figures for line in _batches(name, at, found)]
    family(name, "histogram", "Samples in a batch that a worker ran.", sizes)
    name = "sluice_inference_cascade_samples_total"
    cascades = [
        _sample(name, (*labels, ("outcome", outcome)), getattr(found.cascade, outcome))
        for labels, found in figures
        if found.cascade is not None
        for outcome in ("kept", "escalated", "failed")
    ]
    family(name, "counter", "Samples of cascades, by which model answered.", cascades)
    name = "sluice_worker_up"
    family(
        name, "gauge", "1 if the worker can answer.", (_sample(name, at, int(w.alive)) for at, w in loaded)
    )
    name = "sluice_worker_processes"
    running = [_sample(name, at, sum(not each.ended for each in w.instances)) for at, w in loaded]
    family(name, "gauge", "Processes of the worker that run.", running)
    name = "sluice_worker_memory_bytes"
    memory = [_sample(name, labels, worker.resident_bytes()) for labels, worker in loaded]
    family(name, "gauge", "Resident memory of the worker's processes.", memory)
    name = "sluice_worker_process_private_bytes"
    own = [_sample(name, at, max(each.private_bytes() for each in w.instances)) for at, w in loaded]
    family(name, "gauge", "Memory of its own of the worker's largest process.", own)
    name = "sluice_worker_process_private_limit_bytes"
    most = [_sample(name, at, w.memory_limit) for at, w in loaded if w.memory_limit]
    family(name, "gauge", "Memory of its own over which a process is renewed.", most)
    name = "sluice_worker_renewals_total"
    renewals = [_sample(name, labels, worker.renewals) for labels, worker in loaded]
    family(name, "counter", "Processes renewed because they held too much memory.", renewals)
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Serves the figures of a router at an address, from `start` to `stop`."""

    def __init__(self, router: Router, address: str) -> None:
        self._router = router
        self._wanted = address
        self._stop: Callable[[], None] = lambda: None
        self.address = ""

    def start(self) -> None:
        """Binds and begins to answer. Raises SluiceError(CONFIG_INVALID) when it cannot bind."""
        from agent.metrics_http import serve  # only now: most boxes need no HTTP

        try:
            port, self._stop = serve(self._wanted, PATH, CONTENT_TYPE, self._body, METRICS_CONNECTION_S)
        except OSError as error:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                f"metrics.address: cannot listen on {self._wanted}: {error.strerror or error}",
                hint="end what listens there, or set another metrics.address",
                obj="metrics.address",
            ) from error
        self.address = f"{self._wanted.rpartition(':')[0]}:{port}"
        log.info("metrics are served on http://%s%s", self.address, PATH)

    def stop(self) -> None:
        """Ends the server; no effect when it was not started."""
        self._stop()

    def _body(self) -> bytes:
        return render(self._router.models()).encode()


def _workers(serving: Serving) -> Iterator[tuple[str, Worker]]:
    for worker in serving.workers:
        yield serving.place(worker), worker


def _labels(serving: Serving, place: str, worker: Worker) -> Labels:
    return (("model", serving.model), ("version", str(worker.version)), ("slot", place))


def _histogram(name: str, labels: Labels, classes: Sequence[int], total: Sum) -> Iterator[str]:
    """Cumulative classes of seconds, then sum and count."""
    below = 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), classes):
        below += count
        yield _sample(f"{name}_bucket", (*labels, ("le", bound)), below)
    yield _sample(f"{name}_sum", labels, total.seconds)
    yield _sample(f"{name}_count", labels, total.count)


def _batches(name: str, labels: Labels, found: Snapshot) -> Iterator[str]:
    """Cumulative classes of batch sizes, powers of two up to the largest batch, then sum and count."""
    counts = {size: parts.infer.count for size, parts in found.batches}
    bound = 1
    while bound <= MAX_BATCH:
        below = sum(count for size, count in counts.items() if size <= bound)
        yield _sample(f"{name}_bucket", (*labels, ("le", str(bound))), below)
        bound *= 2
    yield _sample(f"{name}_bucket", (*labels, ("le", "+Inf")), found.executions)
    yield _sample(f"{name}_sum", labels, sum(size * count for size, count in counts.items()))
    yield _sample(f"{name}_count", labels, found.executions)


def _sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
    return f"{name}{{{inside}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
