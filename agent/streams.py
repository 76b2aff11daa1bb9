"""ModelStreamInfer: inferences one after the other over one stream, answered in their order.

Each stream holds a thread while it stands, so streams have threads of their own and their number is bounded.
When all places are taken, the stream that has been idle longest, if for STREAM_IDLE_S or more, is cancelled
to make room: clients that open streams and send nothing cannot keep others out.

A request that fails is answered with its error and the stream goes on. A client that sends the metadata
`triton_grpc_error: true` gets the stream ended with the error's status instead, as Triton does.

Requests and answers are those of ModelInfer (messages.py), so that a stream's requests too are parsed and
checked once for each form.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from agent.limits import MAX_STREAMS, STREAM_IDLE_S
from agent.messages import Request, Response
from agent.requests import Inference
from inference import open_inference_pb2 as pb
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_METHOD = "ModelStreamInfer"
_WANTS_STATUS = ("triton_grpc_error", "true")
_WANTS_FINAL = "triton_enable_empty_final_response"
_IS_FINAL = {"triton_final_response": pb.InferParameter(bool_param=True)}  # each request has one answer


class Streams:
    """The streams that stand. Args: `infer` answers one request; `clock` as time.monotonic."""

    def __init__(self, inference: Inference, clock: Callable[[], float] = time.monotonic) -> None:
        self._inference = inference
        self._clock = clock
        self._lock = threading.Lock()
        self._idle_since: dict[grpc.ServicerContext, float | None] = {}

    def answer(
        self, requests: Iterator[Request], context: grpc.ServicerContext
    ) -> Iterator[Response | pb.ModelStreamInferResponse]:
        """The answers to one stream's requests, and its failures.

        Raises SluiceError when there is no place for it, or the client wants failures as the stream's status.
        """
        wants_status = _WANTS_STATUS in {(key, str(value)) for key, value in context.invocation_metadata()}
        with self._place(context):
            end = _End(context)
            for request in requests:
                self._mark(context, None)
                try:
                    response = self._inference.answer(request, context, end.tell, _METHOD)
                    final = request.message.parameters.get(_WANTS_FINAL)
                    yield response.with_parameters(_IS_FINAL) if final and final.bool_param else response
                except SluiceError as error:
                    if wants_status:
                        raise
                    yield _failure(request, error)
                self._mark(context, self._clock())

    @contextmanager
    def _place(self, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            if len(self._idle_since) >= MAX_STREAMS:
                self._make_room()
            self._idle_since[context] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._idle_since.pop(context, None)

    def _make_room(self) -> None:
        """Under the lock: ends the stream that was idle longest."""
        now = self._clock()
        idle = [(since, other) for other, since in self._idle_since.items() if since is not None]
        since, longest = min(idle, key=lambda item: item[0], default=(now, None))
        if longest is None or now - since < STREAM_IDLE_S:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{MAX_STREAMS} streams stand, which is the most, and none was idle for {STREAM_IDLE_S:g} s",
                hint="send requests by ModelInfer, or several over one stream",
            )
        del self._idle_since[longest]
        longest.cancel()

    def _mark(self, context: grpc.ServicerContext, since: float | None) -> None:
        with self._lock:
            if context in self._idle_since:
                self._idle_since[context] = since


class _End:
    """Tells the stream's present request when the client has gone: one callback for all of its requests."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._present: Callable[[], None] | None = None
        self._stands = context.add_callback(self._ended)

    def tell(self, callback: Callable[[], None]) -> bool:
        """Has `callback` called at the end, in place of the request's before; false: it has ended."""
        self._present = callback
        return self._stands

    def _ended(self) -> None:
        self._stands = False
        present = self._present
        if present is not None:
            present()


def _failure(request: Request, error: SluiceError) -> pb.ModelStreamInferResponse:
    message = request.message
    return pb.ModelStreamInferResponse(
        error_message=f"[StatusCode.{error.status.name}] {error.message}",
        infer_response=pb.ModelInferResponse(
            model_name=message.model_name, model_version=message.model_version, id=request.id
        ),
    )
