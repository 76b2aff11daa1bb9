"""Metrics: numbers that add up, in the form Prometheus reads, from a server that is not held up for long."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import metrics
from agent.figures import SECONDS, Timing
from agent.metrics import MetricsServer, render
from agent.router import Router
from agent.worker import Worker
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

LINE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\} (\S+)')


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), 'ti"ny\\', 3)
    yield worker
    worker.close(1)


@pytest.fixture
def router(worker: Worker) -> Router:
    router = Router()
    router.activate(worker.model, 3, worker)
    return router


def values(text: str) -> dict[str, float]:
    """Name with its labels but for model, version and slot, to value; every line must be of the format."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) sluice_[a-z_]+ .+", line)
            continue
        match = LINE.fullmatch(line)
        assert match, line
        labels = [item for item in match[2].split(",") if not item.startswith(("model", "version", "slot"))]
        assert 'version="3",slot="active"' in match[2]
        found["|".join([match[1], *labels])] = float(match[3])
    return found


def test_figures_add_up(worker: Worker, router: Router) -> None:
    for seconds in (0.0001, 0.003, 0.003, 40.0):
        worker.figures.answered(2, Timing(queue_s=seconds / 2, infer_s=seconds / 2))
    worker.figures.failed(0.1)
    for size, count in ((1, 2), (3, 1), (8, 1)):
        for _ in range(count):
            worker.figures.ran(size, Timing(infer_s=0.1))
    found = values(render(router.models()))
    assert found['sluice_inference_requests_total|outcome="success"'] == 4
    assert found['sluice_inference_requests_total|outcome="failure"'] == 1
    assert found["sluice_inference_samples_total"] == 8
    name = "sluice_inference_request_duration_seconds"
    assert found[f"{name}_count"] == found[f'{name}_bucket|le="+Inf"'] == 4
    assert found[f"{name}_sum"] == pytest.approx(40.0061)
    assert [found[f'{name}_bucket|le="{bound}"'] for bound in SECONDS] == [1] * 3 + [3] * 12
    waits = "sluice_inference_queue_duration_seconds"
    assert found[f'{waits}_bucket|le="0.0025"'] == 3
    batches = "sluice_inference_batch_samples"
    sizes = [found[f'{batches}_bucket|le="{bound}"'] for bound in (1, 2, 4, 8, 64)]
    assert sizes == [2, 2, 3, 4, 4]
    assert (found[f"{batches}_sum"], found[f"{batches}_count"]) == (13, 4)
    assert found["sluice_worker_up"] == 1
    assert found["sluice_worker_memory_bytes"] > 1 << 20
    assert 'model="ti\\"ny\\\\"' in render(router.models())


def test_the_previous_version_is_told_apart(router: Router, tmp_path: Path) -> None:
    model = router.models()[0].model
    new = serving.start_worker(models.tiny_onnx(tmp_path / "new.onnx"), model, 4)
    try:
        router.activate(model, 4, new)
        text = render(router.models())
        assert 'version="4",slot="active"' in text
        assert 'version="3",slot="previous"' in text
    finally:
        new.close(1)


def send_slowly(connection: socket.socket) -> None:
    """Until the server ends the connection, and for at most 9 s."""
    with contextlib.suppress(OSError):
        for _ in range(90):
            connection.sendall(b"G")
            time.sleep(0.1)


def test_the_server_answers_and_is_not_held_up(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS_CONNECTION_S", 0.5)
    server = MetricsServer(router, "127.0.0.1:0")
    server.start()
    host, _, port = server.address.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port))),  # sends nothing
            socket.create_connection((host, int(port))) as slow,
        ):
            trickle = threading.Thread(target=send_slowly, args=(slow,))
            trickle.start()
            began = time.monotonic()
            with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert values(answer.read().decode())["sluice_worker_up"] == 1
            assert time.monotonic() - began < 5
            trickle.join(10)
            assert not trickle.is_alive()
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            urllib.request.urlopen(f"http://{server.address}/etc/passwd", timeout=10)
        caught.value.close()
        other = MetricsServer(router, server.address)
        with pytest.raises(SluiceError, match="cannot listen") as refused:
            other.start()
        assert refused.value.reason == errors_pb2.CONFIG_INVALID
        other.stop()
    finally:
        server.stop()
