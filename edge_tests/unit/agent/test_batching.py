"""The driver: threads with requests, one worker, and what each thread gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.batch_terms import Overloaded
from agent.batching import Batcher
from agent.figures import Figures, Timing
from agent.limits import MAX_WAITING_ON_STALL, SIZE_SEEN, STALL_S
from agent.scheduling import Policy, Priority
from agent.worker import Worker
from edge_tests.harness import models, serving
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

LONG = 30.0


class Fake:
    """A worker that answers y = 2x, when told to; a sample of 13 makes it fail."""

    def __init__(self) -> None:
        self.figures = Figures()
        self.batches: list[list[float]] = []
        self.go = threading.Event()
        self.go.set()
        self.busy = 0.0
        self.ended = False
        self.cost_s = 0.0
        self.error: Exception | None = None
        self.answer: Callable[[np.ndarray], np.ndarray] = lambda x: 2 * x

    def run(self, inputs: Sequence[Mapping[str, Any]], timeout_s: float) -> tuple[dict[str, Any], Timing]:
        x = np.concatenate([each["x"] for each in inputs])
        self.batches.append(x[:, 0].tolist())
        assert self.go.wait(timeout_s)
        if self.cost_s:
            time.sleep(self.cost_s)
        if self.error is not None:
            raise self.error
        if (x == 13).any():
            raise SluiceError(errors_pb2.INPUT_INVALID, "the model failed on these inputs: 13")
        return {"y": self.answer(x)}, Timing(infer_s=self.cost_s)

    def busy_s(self) -> float:
        return self.busy

    def timeout(self, why: str) -> SluiceError:
        return SluiceError(errors_pb2.WORKER_TIMEOUT, why)


class Box:
    """A batcher over a fake worker, and threads that ask it."""

    def __init__(self, policy: Policy, *, known: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        self.fake = Fake()
        self.batcher = Batcher("m@1")
        self.batcher.add(self.fake)
        self.batcher.policy = policy
        for size in known:  # each size makes a sample cheaper
            for _ in range(SIZE_SEEN):
                self.batcher._scheduler.curves.learn(1, size, 0.001, policy, time.monotonic())
        self.pool = ThreadPoolExecutor(40)

    def ask(self, *values: float, deadline_s: float = LONG, **options: Any) -> Future[list[float]]:
        x = np.array([[value] for value in values], np.float32)

        def infer() -> list[float]:
            outputs, _ = self.batcher.infer({"x": x}, time.monotonic() + deadline_s, **options)
            found: list[float] = outputs["y"][:, 0].tolist()
            return found

        return self.pool.submit(infer)

    def waiting(self) -> int:
        with self.batcher._lock:
            return len(self.batcher._scheduler.waiting)

    def queued(self, *futures: tuple[float, ...], **options: Any) -> list[Future[list[float]]]:
        """Requests that wait, in this order, behind one that runs until `fake.go`."""
        made = []
        for values in futures:
            before = self.waiting()
            made.append(self.ask(*values, **options))
            serving.eventually(lambda before=before: self.waiting() == before + 1, "it waits")
        return made

    def occupy(self) -> Future[list[float]]:
        self.fake.go.clear()
        running = self.ask(0.0)
        serving.eventually(lambda: len(self.fake.batches) > 0, "one runs")
        return running


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box(Policy(max_batch=8))
    yield box
    box.fake.go.set()
    box.pool.shutdown()
    assert not box.batcher._pending
    assert box.batcher._free == [box.fake]


def test_one_request_alone(box: Box) -> None:
    assert box.ask(3.0).result(LONG) == [6.0]
    assert box.fake.batches == [[3.0]]


def test_what_waits_becomes_one_batch_and_each_gets_its_part(box: Box) -> None:
    first = box.occupy()
    others = box.queued((1.0,), (2.0, 3.0), (4.0,))
    box.fake.go.set()
    assert first.result(LONG) == [0.0]
    assert [future.result(LONG) for future in others] == [[2.0], [4.0, 6.0], [8.0]]
    assert box.fake.batches == [[0.0], [1.0, 2.0, 3.0, 4.0]]
    sizes = [size for size, _ in box.fake.figures.snapshot().batches]
    assert sizes == [1, 4]


def test_no_batches_where_the_policy_forbids_them() -> None:
    box = Box(Policy())
    box.occupy()
    others = box.queued((1.0,), (2.0,))
    box.fake.go.set()
    assert [future.result(LONG) for future in others] == [[2.0], [4.0]]
    assert box.fake.batches == [[0.0], [1.0], [2.0]]
    box.pool.shutdown()


def test_nobody_fails_for_anothers_inputs(box: Box) -> None:
    box.occupy()
    good, bad, fine = box.queued((1.0,), (13.0,), (2.0,))
    box.fake.go.set()
    assert (good.result(LONG), fine.result(LONG)) == ([2.0], [4.0])
    with pytest.raises(SluiceError, match="failed on these inputs"):
        bad.result(LONG)


def test_outputs_without_the_batchs_size_end_batching(box: Box) -> None:
    box.fake.answer = lambda x: x.sum(axis=0, keepdims=True)
    box.occupy()
    others = box.queued((1.0,), (2.0,))
    box.fake.go.set()
    assert [future.result(LONG) for future in others] == [[1.0], [2.0]]
    assert box.batcher.policy.max_batch == 1


def test_a_dead_worker_fails_its_batch_and_the_lead_goes_on(box: Box) -> None:
    box.fake.error = SluiceError(errors_pb2.WORKER_DIED, "gone")
    running = box.occupy()
    others = box.queued((1.0,), (2.0,))
    box.fake.go.set()
    for future in (running, *others):
        with pytest.raises(SluiceError, match="gone"):
            future.result(LONG)
    box.fake.error = None
    assert box.ask(1.0).result(LONG) == [2.0]


def test_a_defect_fails_the_batch_and_nothing_hangs(box: Box) -> None:
    box.fake.error = RuntimeError("defect")
    running = box.occupy()
    (other,) = box.queued((1.0,))
    box.fake.go.set()
    for future in (running, other):
        with pytest.raises(RuntimeError, match="defect"):
            future.result(LONG)
    box.fake.error = None
    assert box.ask(1.0).result(LONG) == [2.0]


def test_a_deadline_ends_the_wait_in_the_queue(box: Box) -> None:
    running = box.occupy()
    (late,) = box.queued((1.0,), deadline_s=0.05)
    (bounded,) = box.queued((2.0,), patience_s=0.1)
    for future in (late, bounded):
        with pytest.raises(SluiceError, match="waited for its turn"):
            future.result(LONG)
    box.fake.go.set()
    assert running.result(LONG) == [0.0]
    assert box.fake.batches == [[0.0]]


def test_a_deadline_ends_the_wait_for_the_batch_it_is_in(box: Box) -> None:
    box.batcher.policy = Policy(max_batch=8, target_s=LONG)
    box.occupy()
    (patient,) = box.queued((1.0,))
    (hasty,) = box.queued((2.0,), deadline_s=2.0)
    box.fake.cost_s = 1.4
    box.fake.go.set()
    with pytest.raises(SluiceError, match="no answer within"):
        hasty.result(LONG)
    assert patient.result(LONG) == [2.0]


def test_a_client_that_leaves_is_not_computed_for(box: Box) -> None:
    box.occupy()
    left: list[Callable[[], None]] = []
    (gone,) = box.queued((1.0,), on_end=lambda callback: left.append(callback) or True)
    (stays,) = box.queued((2.0,))
    left[0]()
    with pytest.raises(SluiceError, match="no longer waits"):
        gone.result(LONG)
    box.fake.go.set()
    assert stays.result(LONG) == [4.0]
    assert box.fake.batches == [[0.0], [2.0]]
    with pytest.raises(SluiceError, match="no longer waits"):
        box.ask(1.0, still_wanted=lambda: False).result(LONG)


def test_a_client_that_had_left_before_it_waits(box: Box) -> None:
    running = box.occupy()
    with pytest.raises(SluiceError, match="no longer waits"):
        box.ask(1.0, on_end=lambda _callback: False).result(LONG)
    box.fake.go.set()
    assert running.result(LONG) == [0.0]


def test_the_lowest_priority_is_turned_away_with_a_hint() -> None:
    box = Box(Policy(queue=2))
    box.occupy()
    (low,) = box.queued((1.0,), priority=Priority.LOW)
    (normal,) = box.queued((2.0,))
    high = box.ask(3.0, priority=Priority.HIGH)
    with pytest.raises(Overloaded, match="m@1 is busy: its queue is full") as caught:
        low.result(LONG)
    assert caught.value.retry_s > 0
    assert "try again after" in caught.value.hint
    box.fake.go.set()
    assert (high.result(LONG), normal.result(LONG)) == ([6.0], [4.0])
    assert box.fake.batches == [[0.0], [3.0], [2.0]]
    box.pool.shutdown()


def test_behind_a_stalled_request_few_wait(box: Box) -> None:
    box.occupy()
    waiting = box.queued(*[(100.0 + number,) for number in range(MAX_WAITING_ON_STALL + 5)])
    box.fake.busy = STALL_S + 1
    serving.eventually(lambda: sum(future.done() for future in waiting) == 5, "five were turned away")
    box.fake.busy = 0.0
    box.fake.go.set()
    failed = [future for future in waiting if future.exception(LONG) is not None]
    assert len(failed) == 5


def test_a_window_gathers_a_fuller_batch() -> None:
    box = Box(Policy(max_batch=2, window_s=10.0))
    box.batcher._scheduler._interval_s = 0.0  # by the rate of arrivals, more are to be expected
    started = time.monotonic()
    first = box.ask(1.0)
    second = box.ask(2.0)
    assert (first.result(LONG), second.result(LONG)) == ([2.0], [4.0])
    assert time.monotonic() - started < 5
    box.pool.shutdown()


def test_a_storm_of_requests_is_answered_right(box: Box) -> None:
    box.batcher.policy = Policy(max_batch=8, queue=64)
    futures = [box.ask(float(number), priority=Priority(1 + number % 3)) for number in range(2000)]
    wrong = [
        number
        for number, future in enumerate(futures)
        if number != 13 and future.result(LONG) != [2.0 * number]
    ]
    assert not wrong
    assert futures[13].exception(LONG) is not None


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Worker]:
    worker = serving.start_worker(serving.slow_onnx(tmp_path / "slow.onnx"))
    yield worker
    worker.close(0)


def test_too_many_behind_a_slow_request_are_refused_by_a_real_worker(slow: Worker) -> None:
    steps = serving.steps_for(slow, STALL_S * 3)

    def ask(number: int) -> str:
        inputs = slow.check(serving.slow_inputs(number, steps if number == 0 else 1))
        try:
            slow.queue.infer(inputs, time.monotonic() + 60)
        except SluiceError as error:
            return error.code
        return "answered"

    with ThreadPoolExecutor(MAX_WAITING_ON_STALL + 5) as pool:
        first = pool.submit(ask, 0)
        serving.eventually(lambda: slow.requests == 2, "the slow request was sent")
        others = [pool.submit(ask, number + 1) for number in range(MAX_WAITING_ON_STALL + 4)]
        assert first.result(60) == "answered"
        answers = sorted(future.result(60) for future in others)
    assert answers == ["LIMIT_EXCEEDED"] * 4 + ["answered"] * MAX_WAITING_ON_STALL


def test_real_workers_batches_are_those_of_single_requests(tmp_path: Path) -> None:
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    try:
        worker.queue.policy = Policy(max_batch=16)
        batch = models.samples(64)["x"]
        expected = worker.infer({"x": batch}, 10)["y"]

        def ask(row: int) -> bool:
            one = worker.check({"x": batch[row % 64 : row % 64 + 1]})
            outputs, timing = worker.queue.infer(one, time.monotonic() + LONG)
            return timing.infer_s > 0 and np.allclose(outputs["y"], expected[row % 64], rtol=1e-5, atol=1e-6)

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(3000)))
        assert max(size for size, _ in worker.figures.snapshot().batches) > 1
    finally:
        worker.close(1)


def second(box: Box) -> Fake:
    """Another worker beside the box's."""
    other = Fake()
    other.go.clear()
    box.batcher.add(other)
    return other


def test_with_two_workers_nothing_waits_while_one_is_free(box: Box) -> None:
    other = second(box)
    box.fake.go.clear()
    first, further = box.ask(1.0), box.ask(2.0)
    serving.eventually(lambda: len(box.fake.batches) == len(other.batches) == 1, "both run")
    waiting = box.queued((3.0,), (4.0,))
    other.go.set()  # whichever is done first takes what waits, together
    assert [future.result(LONG) for future in waiting] == [[6.0], [8.0]]
    assert other.batches[1:] == [[3.0, 4.0]]
    box.fake.go.set()
    assert sorted([*first.result(LONG), *further.result(LONG)]) == [2.0, 4.0]
    serving.eventually(lambda: len(box.batcher._free) == 2, "both are free")
    box.batcher.remove(other)


def test_a_worker_that_ended_is_given_nothing(box: Box) -> None:
    other = second(box)
    box.fake.go.clear()
    running = [box.ask(1.0), box.ask(2.0)]
    serving.eventually(lambda: len(box.fake.batches) == len(other.batches) == 1, "both run")
    waiting = box.queued((3.0,))
    other.ended = True  # nobody has told the queue yet
    other.error = SluiceError(errors_pb2.WORKER_DIED, "it was running this request")
    other.go.set()
    serving.eventually(lambda: any(future.done() for future in running), "it ended")
    box.fake.go.set()
    failed = [future for future in running if future.exception(LONG) is not None]
    assert [future.result(LONG) for future in waiting] == [[6.0]]
    assert len(failed) == 1
    assert len(other.batches) == 1
    assert box.batcher._scheduler.workers == 1


def test_a_worker_that_comes_takes_what_waits(box: Box) -> None:
    first = box.occupy()
    waiting = box.queued((1.0,))
    other = Fake()
    box.batcher.add(other)
    assert waiting[0].result(LONG) == [2.0]
    assert other.batches == [[1.0]]
    assert not first.done()
    box.fake.go.set()
    first.result(LONG)
    serving.eventually(lambda: len(box.batcher._free) == 2, "both are free")
    box.batcher.remove(other)


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "is retired"])
def test_any_traffic_over_workers_that_come_and_go_is_answered(dies: bool) -> None:
    """Windows, priorities, deaths and renewals: everyone gets the own answer."""
    box = Box(Policy(max_batch=4, window_s=0.002))
    box.fake.cost_s = 0.001
    stop = threading.Event()
    left: list[tuple[Fake, int]] = []  # and how many batches each had run when it was out

    def come_and_go() -> None:
        while not stop.is_set():
            other = Fake()
            other.cost_s = 0.001
            box.batcher.add(other)
            time.sleep(0.01)
            if dies:
                other.ended = True
                box.batcher.remove(other)
            else:
                assert box.batcher.retire(other, LONG)
                left.append((other, len(other.batches)))

    changes = threading.Thread(target=come_and_go)
    changes.start()
    try:
        asked = [(value, box.ask(float(value), priority=Priority(1 + value % 3))) for value in range(14, 600)]
        for value, future in asked:
            try:
                assert future.result(LONG) == [2.0 * value]
            except Overloaded:
                continue
    finally:
        stop.set()
        changes.join()
    box.pool.shutdown()
    assert not box.batcher._pending
    assert box.batcher._free == [box.fake]
    assert box.batcher._scheduler.workers == 1
    assert all(len(other.batches) == ran for other, ran in left)
    assert dies or any(ran for _, ran in left)


def test_a_retired_worker_answers_what_it_runs_and_gets_nothing_more() -> None:
    box, other = Box(Policy()), Fake()
    assert not box.batcher.retire(box.fake, 0)  # the last one stays
    running = box.occupy()
    waiting = box.queued((1.0,), (2.0,))
    box.batcher.add(other)
    assert [future.result(LONG) for future in waiting] == [[2.0], [4.0]]
    assert not box.batcher.retire(box.fake, 0.05)
    assert box.batcher.retire(box.fake, 0.0)  # it has no place any more
    assert [box.ask(value).result(LONG) for value in (3.0, 4.0)] == [[6.0], [8.0]]
    box.fake.go.set()
    assert running.result(LONG) == [0.0]
    assert (box.fake.batches, box.batcher._free) == ([[0.0]], [other])
    box.batcher.add(box.fake)
    box.fake.batches.clear()
    running = box.occupy()
    with ThreadPoolExecutor(1) as pool:
        retired = pool.submit(box.batcher.retire, box.fake, LONG)
        serving.eventually(lambda: box.fake not in box.batcher._runners, "it is taken out")
        assert not retired.done()
        box.fake.go.set()
        assert retired.result(LONG)
    assert running.result(LONG) == [0.0]
    assert not box.batcher._released
    box.pool.shutdown()


def test_a_worker_is_retired_from_a_wait_for_a_fuller_batch() -> None:
    box, other = Box(Policy(max_batch=8, window_s=20.0)), Fake()
    box.batcher._scheduler._interval_s = 0.0  # by the rate of arrivals, more are to be expected
    waits = box.ask(1.0)
    serving.eventually(lambda: box.batcher._lingers, "it waits for more")
    box.batcher.add(other)
    assert box.batcher.retire(box.fake, LONG)
    assert box.batcher._runners == [other]
    assert waits.result(LONG) == [2.0]
    assert (box.fake.batches, other.batches) == ([], [[1.0]])
    box.pool.shutdown()
