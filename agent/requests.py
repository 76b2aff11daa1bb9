"""One inference request, from its message to its answer.

In order: the deadline (the call's own, at most MAX_REQUEST_S) -> the worker, from the router -> the inputs,
from the message or from shared memory -> the answer, from the cache for a version that wants that, else
from the worker's queue, and for a cascade from the models after it (cascading.py) -> the outputs, into the
response or into shared memory. If the worker died before it had the request, the request is given once more
to the worker that is active then; one that was running when its worker died is not repeated, because it may
be what killed it.

Rules: every wait ends at the deadline; a client that has gone away is not computed for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import grpc

from agent.batch_terms import Overloaded
from agent.cache import Arrays, Cache, Inputs, key_of
from agent.cascading import Answered, Cascading, Step
from agent.figures import Timing
from agent.limits import (
    CACHE_BYTES,
    LEAST_RETRY_S,
    MAX_MESSAGE_BYTES,
    MAX_READ_BYTES,
    MAX_REQUEST_S,
    RESTART_WAIT_S,
)
from agent.messages import Request, Response
from agent.peer import Peers
from agent.plans import Plan
from agent.plans import make as make_plan
from agent.router import Router
from agent.shared_memory import Region, Regions
from agent.staging import Staged
from agent.tensors import FindRegion, decode_inputs
from agent.worker import Worker
from agent.worker_spec import WorkerDied
from inference import open_inference_pb2 as pb
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

if TYPE_CHECKING:  # it is imported only where it is configured
    from agent.tracing import Tracing

log = logging.getLogger(__name__)
# Parameters of a cascade's answers: how many of its samples another model gave, and which ("model@version").
ESCALATED, ESCALATED_TO = "cascade_escalated", "cascade_to"


class _Call(NamedTuple):
    """One request on its way.

    Attributes:
        request: as it came.
        context: of the call.
        deadline: for the answer (time.monotonic).
        on_end: see `Batcher.infer`.
        steps: what is asked of whom is noted here, for traces; None: it is not.
    """

    request: Request
    context: grpc.ServicerContext
    deadline: float
    on_end: Callable[[Callable[[], None]], bool]
    steps: list[Step] | None


class Inference:
    """Answers requests.

    Args: where workers, shared memory and callers' users are found; where traces go, None: nowhere; how many
    bytes of outputs the response cache keeps.
    """

    def __init__(
        self,
        router: Router,
        regions: Regions,
        peers: Peers,
        tracing: Tracing | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._router = router
        self._tracing = tracing
        self._regions = regions
        self._peers = peers
        self._lock = threading.Lock()  # of the cache
        self._cache = Cache(cache_bytes)
        self._reading = 0  # bytes read from regions for requests under way, under the lock

    def answer(
        self,
        request: Request,
        context: grpc.ServicerContext,
        on_end: Callable[[Callable[[], None]], bool] | None = None,
        method: str = "ModelInfer",
    ) -> Response:
        """One inference.

        Args:
            request: as it came.
            context: of the call.
            on_end: see `Batcher.infer`; None: the call's own, which keeps every callback until the call ends.

            method: of the protocol, for traces.

        Raises:
            SluiceError: with the reasons of `Worker.infer`, `Router.acquire` and tensors.py.
        """
        began = time.monotonic()
        remaining_s = context.time_remaining()
        deadline = began + min(MAX_REQUEST_S, MAX_REQUEST_S if remaining_s is None else remaining_s)
        steps: list[Step] | None = None if self._tracing is None else []
        call = _Call(request, context, deadline, on_end or context.add_callback, steps)
        if self._tracing is None or steps is None:
            return self._twice(call)
        failure = None
        try:
            return self._twice(call)
        except SluiceError as error:
            failure = error
            raise
        finally:
            name = request.message.model_name
            self._tracing.record(context.invocation_metadata(), method, name, began, steps, failure)

    def _twice(self, call: _Call) -> Response:
        try:
            return self._once(call)
        except WorkerDied as error:
            if error.delivered:
                raise
            log.info("a request is given to another worker: %s", error)
            if call.steps is not None:
                call.steps.clear()
            return self._once(call)

    def _once(self, call: _Call) -> Response:
        request = call.request
        message = request.message
        wait_s = min(RESTART_WAIT_S, call.deadline - time.monotonic())

        def find(name: str) -> Region:
            return self._regions.find(name, self._peers.user(call.context.peer()))

        worker = self._router.take(message.model_name, message.model_version, wait_s=wait_s)
        began = time.monotonic()
        try:
            plan: Plan | None = request.form.plan
            if plan is not None and plan.specs is worker.inputs:
                inputs = plan.read(request, worker, find)
                if inputs is not None:
                    return self._run(call, plan, inputs, worker, find)
            with self._budget() as reserve:
                decoded = worker.check(decode_inputs(request, worker.inputs, find, reserve))
                plan = request.form.plan = make_plan(request, worker, decoded, find)
                return self._run(call, plan, decoded, worker, find)
        except SluiceError as error:
            judged = not isinstance(error, Overloaded)  # that is the load's fault
            worker.figures.failed(time.monotonic() - began, judged=judged)
            raise
        finally:
            worker.leave()

    def _run(self, call: _Call, plan: Plan, inputs: Inputs, worker: Worker, find: FindRegion) -> Response:
        """From the inputs to the response."""
        try:
            wanted = plan.outputs(call.request, worker, find)

            def ask(asked: Worker, given: Inputs, until: float) -> tuple[Arrays, Timing]:
                def infer() -> tuple[Arrays, Timing]:
                    return asked.queue.infer(
                        given,
                        until,
                        kind=plan.kind if given is inputs else None,
                        priority=plan.priority,
                        patience_s=plan.patience_s,
                        still_wanted=call.context.is_active,
                        on_end=call.on_end,
                    )

                return infer() if asked.cache_s <= 0 else self._cached(asked, given, infer)

            answered = None
            if worker.cascade is None and call.steps is None:
                outputs, timing = ask(worker, inputs, call.deadline)
            else:
                steps = [] if call.steps is None else call.steps
                answered = Cascading(self._router, ask, call.deadline, steps).answer(worker, inputs)
                outputs, timing = answered.outputs, answered.timing
            ran = time.monotonic()
            response = plan.answer(call.request, worker, outputs, wanted)
            if answered is not None and worker.cascade is not None:
                response = _attributed(response, answered)
            _check_size(response, worker)
            timing.output_s += time.monotonic() - ran
            worker.figures.answered(plan.samples, timing)
            if worker.shadow is not None:
                own = (outputs, timing) if answered is None else (answered.own, answered.own_timing)
                worker.shadow.offer(inputs, *own)
            return response
        finally:
            if isinstance(inputs, Staged):
                inputs.drop()

    @contextlib.contextmanager
    def _budget(self) -> Iterator[Callable[[int], None]]:
        """Grants bytes for inputs in regions, out of MAX_READ_BYTES for all, until the block ends."""
        granted = 0

        def reserve(size: int) -> None:
            nonlocal granted
            with self._lock:
                if self._reading + size > MAX_READ_BYTES:
                    raise Overloaded(
                        f"inputs in shared memory of requests under way take {self._reading} bytes; with "
                        f"{size} more they would take over {MAX_READ_BYTES}",
                        obj="",
                        retry_s=LEAST_RETRY_S,
                    )
                self._reading += size
                granted += size

        try:
            yield reserve
        finally:
            if granted:
                with self._lock:
                    self._reading -= granted

    def _cached(
        self, worker: Worker, inputs: Inputs, infer: Callable[[], tuple[Arrays, Timing]]
    ) -> tuple[Arrays, Timing]:
        """The answer from the cache, if it is there, else from the worker."""
        began = time.monotonic()
        key = key_of(worker.model, worker.version, inputs)
        with self._lock:
            found = self._cache.get(key, began)
        worker.figures.looked_up(time.monotonic() - began, hit=found is not None)
        if found is not None:
            return found, Timing()
        outputs, timing = infer()
        with self._lock:
            self._cache.put(key, outputs, worker.cache_s, time.monotonic())
        return outputs, timing


def _attributed(response: Response, answered: Answered) -> Response:
    """Says of a cascade's answer how many samples another model gave, and which."""
    more = {ESCALATED: pb.InferParameter(int64_param=answered.escalated)}
    if answered.by:
        more[ESCALATED_TO] = pb.InferParameter(string_param=answered.by)
    return response.with_parameters(more)


def _check_size(response: Response, worker: Worker) -> None:
    if response.raw and sum(map(len, response.raw)) < MAX_MESSAGE_BYTES // 2:
        return  # the rest, names and shapes, is small beside
    size = response.byte_size()
    if size > MAX_MESSAGE_BYTES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"the answer of {worker.spec} takes {size} bytes; at most {MAX_MESSAGE_BYTES} are allowed",
            hint="ask for fewer outputs or a smaller batch, or have the outputs written to shared memory",
            obj=str(worker.spec),
        )
