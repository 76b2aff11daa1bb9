"""The queue of a shadow: what it takes, and what it leaves; the comparing is tested with real workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.figures import Timing
from agent.judging import ShadowTerms
from agent.limits import SHADOW_QUEUE, SHADOW_QUEUE_BYTES
from agent.shadow import Shadow
from agent.worker import Worker
from edge_tests.harness import models, serving
from edge_tests.harness.serving import eventually

RAN = Timing(infer_s=0.001)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    yield made
    made.close(1)


def offer(shadow: Shadow, worker: Worker, times: int, timing: Timing = RAN) -> None:
    inputs = models.samples(1)
    outputs, _ = worker.run([worker.check(inputs)], 10)
    for _ in range(times):
        shadow.offer(inputs, outputs, timing)


def test_the_share_is_counted_and_cached_answers_are_left_out(worker: Worker) -> None:
    shadow = Shadow(worker, ShadowTerms(share=0.25))
    offer(shadow, worker, 3)
    offer(shadow, worker, 100, Timing())
    assert shadow.seen().compared == 0
    offer(shadow, worker, 1)
    eventually(lambda: shadow.seen().compared == 1, "the fourth was compared")
    offer(shadow, worker, 8)
    eventually(lambda: shadow.seen().compared == 3, "and two of eight")
    seen = shadow.seen()
    assert (seen.mismatched, seen.unanswered, seen.dropped) == (0, 0, 0)
    assert seen.cosine_min == pytest.approx(1.0)
    assert seen.times.p95_s > 0
    assert seen.previous.p95_s == pytest.approx(0.001)
    shadow.close()
    offer(shadow, worker, 4)
    assert shadow.seen().compared == 3


def test_what_does_not_fit_is_dropped_at_once(worker: Worker) -> None:
    shadow = Shadow(worker, ShadowTerms(share=1.0))
    with worker.instances[0]._turn:  # the worker is busy
        inputs = models.samples(1)
        for _ in range(SHADOW_QUEUE + 5):
            shadow.offer(inputs, {"y": np.zeros((1, 4), np.float32)}, RAN)
        assert shadow.seen().dropped in (4, 5)  # the thread may have taken one out already
        large = {"x": np.zeros((SHADOW_QUEUE_BYTES // 4 // 8 + 1, 8), np.float32)}
        before = shadow.seen().dropped
        shadow.offer(large, {}, RAN)
        assert shadow.seen().dropped == before + 1
    eventually(lambda: shadow.seen().compared >= SHADOW_QUEUE, "those taken were compared")
    assert shadow.seen().mismatched == shadow.seen().compared
    assert "y: cosine" in shadow.seen().worst
    shadow.close()


def test_memory_that_is_used_again_is_not_read_later(worker: Worker) -> None:
    shadow = Shadow(worker, ShadowTerms(share=1.0))
    inputs = models.samples(1)
    outputs, _ = worker.run([worker.check(inputs)], 10)
    mine = {"y": outputs["y"].copy()}
    with worker.instances[0]._turn:
        shadow.offer(inputs, mine, RAN)
        inputs["x"][:] = 99
        mine["y"][:] = -99
    eventually(lambda: shadow.seen().compared == 1, "it was compared")
    assert shadow.seen().mismatched == 0
    shadow.close()


def test_what_the_other_cannot_answer_is_counted_apart(worker: Worker) -> None:
    shadow = Shadow(worker, ShadowTerms(share=1.0))
    shadow.offer({"elsewhere": np.zeros((1, 8), np.float32)}, {"y": np.zeros((1, 4), np.float32)}, RAN)
    eventually(lambda: shadow.seen().unanswered == 1, "it failed")
    shadow.offer(models.samples(1), {"z": np.zeros((1, 4), np.float32)}, RAN)
    eventually(lambda: shadow.seen().mismatched == 1, "it has no such output")
    assert shadow.seen().worst == "z: it has no such output"
    shadow.close()
