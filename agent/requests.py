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
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import grpc

from agent.batching import Overloaded
from agent.cache import Arrays, Cache, key_of
from agent.cascading import Answered, Cascading, Step
from agent.figures import Timing
from agent.limits import (
    LEAST_RETRY_S,
    MAX_MESSAGE_BYTES,
    MAX_READ_BYTES,
    MAX_REQUEST_S,
    RESTART_WAIT_S,
)
from agent.messages import Request, Response
from agent.peer import Peers
from agent.router import Router
from agent.scheduling import Priority
from agent.shared_memory import Region, Regions
from agent.tensors import decode_inputs, encode_outputs, is_raw, requested_outputs, whole_number
from agent.worker import Worker, WorkerDied
from inference import open_inference_pb2 as pb
from runtimes.interface import InputInvalid
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

if TYPE_CHECKING:  # it is imported only where it is configured
    from agent.tracing import Tracing

log = logging.getLogger(__name__)
# Parameters of a cascade's answers: how many of its samples another model gave, and which ("model@version").
ESCALATED, ESCALATED_TO = "cascade_escalated", "cascade_to"


class Inference:
    """Answers requests. Args: where workers, shared memory and callers' users are found; None: no traces."""

    def __init__(
        self, router: Router, regions: Regions, peers: Peers, tracing: Tracing | None = None
    ) -> None:
        self._router = router
        self._tracing = tracing
        self._regions = regions
        self._peers = peers
        self._lock = threading.Lock()  # of the cache
        self._cache = Cache()
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
        on_end = on_end or context.add_callback
        steps: list[Step] = []
        failure = None
        try:
            return self._twice(request, context, deadline, on_end, steps)
        except SluiceError as error:
            failure = error
            raise
        finally:
            if self._tracing is not None:
                name = request.message.model_name
                self._tracing.record(context.invocation_metadata(), method, name, began, steps, failure)

    def _twice(
        self,
        request: Request,
        context: grpc.ServicerContext,
        deadline: float,
        on_end: Callable[[Callable[[], None]], bool],
        steps: list[Step],
    ) -> Response:
        try:
            return self._once(request, context, deadline, on_end, steps)
        except WorkerDied as error:
            if error.delivered:
                raise
            log.info("a request is given to another worker: %s", error)
            steps.clear()
            return self._once(request, context, deadline, on_end, steps)

    def _once(
        self,
        request: Request,
        context: grpc.ServicerContext,
        deadline: float,
        on_end: Callable[[Callable[[], None]], bool],
        steps: list[Step],
    ) -> Response:
        message = request.message
        wait_s = min(RESTART_WAIT_S, deadline - time.monotonic())

        def find(name: str) -> Region:
            return self._regions.find(name, self._peers.user(context.peer()))

        with (
            self._router.acquire(message.model_name, message.model_version, wait_s=wait_s) as worker,
            self._budget() as reserve,
        ):
            began = time.monotonic()
            try:
                priority, patience_s = _handling(message)
                inputs = worker.check(decode_inputs(request, worker.inputs, find, reserve))
                wanted = requested_outputs(message, worker.outputs, find)

                def ask(asked: Worker, given: Arrays, until: float) -> tuple[Arrays, Timing]:
                    return self._cached(
                        asked,
                        given,
                        lambda: asked.queue.infer(
                            given,
                            until,
                            priority=priority,
                            queue_until=began + patience_s,
                            still_wanted=context.is_active,
                            on_end=on_end,
                        ),
                    )

                answered = Cascading(self._router, ask, deadline, steps).answer(worker, inputs)
                ran = time.monotonic()
                response = encode_outputs(
                    pb.ModelInferResponse(
                        model_name=worker.model, model_version=str(worker.version), id=message.id
                    ),
                    answered.outputs,
                    wanted,
                    raw=is_raw(request),
                )
                if worker.cascade is not None:
                    _attribute(response, answered)
                _check_size(response, worker)
            except SluiceError as error:
                judged = not isinstance(error, Overloaded)  # that is the load's fault
                worker.figures.failed(time.monotonic() - began, judged=judged)
                raise
            timing = answered.timing
            timing.output_s += time.monotonic() - ran
            worker.figures.answered(worker.samples(inputs), timing)
            # What another model answered says nothing about this one.
            if worker.shadow is not None and not answered.escalated:
                worker.shadow.offer(inputs, answered.outputs, timing)
        return response

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
        self, worker: Worker, inputs: Arrays, infer: Callable[[], tuple[Arrays, Timing]]
    ) -> tuple[Arrays, Timing]:
        """The answer from the cache, if the version wants that and it is there, else from the worker."""
        if worker.cache_s <= 0:
            return infer()
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


def _attribute(response: Response, answered: Answered) -> None:
    """Says of a cascade's answer how many samples another model gave, and which."""
    response.message.parameters[ESCALATED].int64_param = answered.escalated
    if answered.by:
        response.message.parameters[ESCALATED_TO].string_param = answered.by


def _handling(message: pb.ModelInferRequest) -> tuple[Priority, float]:
    """The request's priority, and for how long it may wait in the queue, seconds."""
    parameters = message.parameters
    if not parameters:
        return Priority.NORMAL, math.inf
    sequence = parameters.get("sequence_id")
    if sequence is not None and (sequence.int64_param or sequence.uint64_param or sequence.string_param):
        raise _invalid("sequence_id: sequences are not offered; send each request whole")
    try:
        level = whole_number(parameters, "priority")
        timeout_us = whole_number(parameters, "timeout")
    except InputInvalid as error:
        raise _invalid(error.message) from error
    if level not in (0, *Priority):
        raise _invalid(f"priority {level}: it is 1 (high), 2 (normal) or 3 (low)")
    if timeout_us < 0:
        raise _invalid(f"timeout {timeout_us}: it is a number of microseconds")
    return Priority(level) if level else Priority.NORMAL, timeout_us / 1e6 if timeout_us else math.inf


def _invalid(why: str) -> SluiceError:
    return SluiceError(errors_pb2.INPUT_INVALID, f"the request's parameter {why}")


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
