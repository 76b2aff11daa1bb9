"""Answers checked inputs by a version and, where it has a cascade, by those after it.

One request goes down the cascade: the version answers, the samples it is unsure of (cascade.py) are asked
of the next model in one request of their own, which is queued and put together with others there, and so
on. The answers are put together again in the samples' order.

Rules: the whole way ends at the request's deadline; when a model further down is not there, too busy, too
late or fails, the answer that there is already is given, and counted as one that should have been handed
on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from agent import cascade as rules
from agent.cache import Inputs
from agent.cascade import Arrays, Member
from agent.figures import Timing
from agent.limits import CASCADE_SPARE, MAX_CASCADE_STEPS
from agent.router import Router
from agent.worker import Worker
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One version's part in a request, for traces.

    Attributes:
        model: its name.
        version: of it.
        samples: that it was asked for.
        began: when it was asked (time.monotonic).
        ended: when its answer was there, or its error.
        timing: where the time went; None for one that failed.
        error: why it failed.
    """

    model: str
    version: int
    samples: int
    began: float
    ended: float
    timing: Timing | None = None
    error: SluiceError | None = None


@dataclass
class Answered:
    """The outputs, and how they came about.

    Attributes:
        outputs: of the first version.
        timing: of all steps together.
        escalated: samples that another model answered.
        by: the last version that answered any of them, "model@version"; empty if none did.
        own: the first version's own outputs.
        own_timing: its own.
    """

    outputs: Arrays
    timing: Timing
    own: Arrays
    own_timing: Timing
    escalated: int = 0
    by: str = ""


@dataclass
class Cascading:
    """One request's way.

    Attributes:
        router: where the models after the first are found.
        ask: has a worker answer checked inputs until a deadline (time.monotonic). Raises SluiceError.
        deadline: of the request.
        steps: what was asked of whom, in order.
    """

    router: Router
    ask: Callable[[Worker, Inputs, float], tuple[Arrays, Timing]]
    deadline: float
    steps: list[Step] = field(default_factory=list)

    def answer(self, worker: Worker, inputs: Inputs, depth: int = 1) -> Answered:
        """The answer to inputs that the worker's `check` returned. Raises SluiceError when it has none."""
        samples = worker.samples(inputs)
        left_s = self.deadline - time.monotonic()
        until = self.deadline - (0 if depth == 1 else CASCADE_SPARE * left_s)
        outputs, timing = self._step(worker, inputs, samples, until)
        answered = Answered(outputs, replace(timing), outputs, timing)
        if worker.cascade is not None and depth < MAX_CASCADE_STEPS:
            self._hand_on(worker, inputs, samples, answered, depth)
        return answered

    def _step(self, worker: Worker, inputs: Inputs, samples: int, deadline: float) -> tuple[Arrays, Timing]:
        began = time.monotonic()
        try:
            outputs, timing = self.ask(worker, inputs, deadline)
        except SluiceError as error:
            self.steps.append(
                Step(worker.model, worker.version, samples, began, time.monotonic(), error=error)
            )
            raise
        self.steps.append(Step(worker.model, worker.version, samples, began, time.monotonic(), timing))
        return outputs, timing

    def _hand_on(self, worker: Worker, inputs: Inputs, samples: int, answered: Answered, depth: int) -> None:
        """Replaces what the worker is unsure of in `answered`."""
        cascade = worker.cascade
        assert cascade is not None
        scored = answered.outputs.get(rules.scored_output(cascade, worker.outputs))
        if scored is None:
            return
        which = rules.unsure(cascade, scored, samples)
        parts = (inputs, answered.outputs)
        if samples > 1 and not all(rules.separable(arrays, samples) for arrays in parts):
            which = np.full(samples, which.any())
        count = int(which.sum())
        if not count:
            worker.figures.cascaded(kept=samples)
            return
        try:
            further = self._further(cascade, inputs, which, depth)
            outputs = rules.merged(answered.outputs, further.outputs, which)
            if outputs is None:
                why = f"the answers of {further.by} have another shape"
                raise SluiceError(errors_pb2.CASCADE_INVALID, why)
        except SluiceError as error:
            log.debug("%s keeps %d samples it is unsure of: %s", worker.spec, count, error)
            worker.figures.cascaded(kept=samples - count, failed=count)
            return
        worker.figures.cascaded(kept=samples - count, escalated=count)
        answered.outputs, answered.escalated, answered.by = outputs, count, further.by
        for part in ("queue_s", "input_s", "infer_s", "output_s"):
            total_s = getattr(answered.timing, part) + getattr(further.timing, part)
            setattr(answered.timing, part, total_s)

    def _further(self, cascade: rules.Cascade, inputs: Inputs, which: np.ndarray, depth: int) -> Answered:
        with self.router.acquire(*cascade.target) as worker:
            began = time.monotonic()
            try:
                chosen = rules.rows_of(inputs, _names(worker.inputs, inputs), which)
                checked = worker.check(chosen)
                further = self.answer(worker, checked, depth + 1)
            except SluiceError:
                worker.figures.failed(time.monotonic() - began)
                raise
            worker.figures.answered(worker.samples(checked), further.timing)
            further.by = further.by or str(worker.spec)
            return further


def member_of(worker: Worker) -> Member:
    """The worker's version as the rules see it."""
    return Member(worker.model, worker.version, worker.inputs, worker.outputs, worker.cascade)


def check(worker: Worker, router: Router) -> None:
    """Whether the version can be served as the cascade it says it is, and those that hand on to it still can.

    Raises:
        SluiceError: CASCADE_INVALID, CASCADE_INCOMPLETE.
    """

    def find(model: str, version: str) -> Member | None:
        try:
            with router.acquire(model, version) as found:
                return member_of(found)
        except SluiceError:
            return None

    this = member_of(worker)
    rules.check(this, find)
    for serving in router.models():
        other = member_of(serving.active)
        if other.cascade is None or other.model == worker.model:
            continue
        if other.cascade.target == (worker.model, ""):
            why = rules.unfit(other, this)
            if why:
                raise SluiceError(
                    errors_pb2.CASCADE_INVALID,
                    f"{worker.spec} cannot take the place of what {other} hands on to: {why}",
                    hint=f"roll out a version of {other.model} without the cascade first",
                    obj=str(worker.spec),
                )


def _names(specs: tuple[TensorSpec, ...], inputs: Inputs) -> list[str]:
    return [spec.name for spec in specs if spec.name in inputs]
