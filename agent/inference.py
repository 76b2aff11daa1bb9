"""The inference front: the Open Inference Protocol (KServe v2) over gRPC, for clients on the box.

A request finds its worker in the router, its tensors become arrays (tensors.py), the worker answers, and the
response says which version that was. If the worker died before it had the request, the request is given once
more to the worker that is active then; one that was running when its worker died is not repeated, because it
may be what killed it.

Rules: every wait ends at the client's deadline or at MAX_REQUEST_S; a client that has gone away is not
computed for; a message over its limit, or a request over the number that may wait, is refused by gRPC before
it takes a thread. Errors are the SluiceErrors of the rooms behind, as gRPC status with details.

There is no authentication: listen on loopback or a unix socket.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from importlib import metadata
from typing import NoReturn, TypeVar

import grpc

from agent.limits import (
    MAX_CONCURRENT_RPCS,
    MAX_MESSAGE_BYTES,
    MAX_REQUEST_S,
    RESTART_WAIT_S,
    SERVING_THREADS,
)
from agent.router import Router
from agent.tensors import decode_inputs, encode_outputs, is_raw, requested_outputs
from agent.worker import Worker, WorkerDied
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.wire import to_status

log = logging.getLogger(__name__)

SERVER_NAME = "sluice"
Response = TypeVar("Response")


class InferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """The protocol's six calls over a router."""

    # ruff: noqa: ARG002, N802 (signatures and names are the protocol's)

    def __init__(self, router: Router) -> None:
        self._router = router

    def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Always true: that this answers is the proof."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(
        self, request: pb.ServerReadyRequest, context: grpc.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Whether there is a model, and every model's active worker can answer."""
        models = self._router.models()
        return pb.ServerReadyResponse(ready=bool(models) and all(serving.ready for serving in models))

    def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Whether the model, in this version if one is named, can answer; false also for what is not here."""
        try:
            with self._router.acquire(request.name, request.version) as worker:
                return pb.ModelReadyResponse(ready=worker.alive)
        except SluiceError:  # the reasons why not; the call itself succeeds, as the protocol wants
            return pb.ModelReadyResponse(ready=False)

    def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Name and version; no protocol extensions."""
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=_installed_version())

    def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs of the active version or of the one named."""
        return _answer(context, lambda: self._metadata(request))

    def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> pb.ModelInferResponse:
        """One inference. Fails with the reasons of `Worker.infer` and `Router.acquire`."""
        return _answer(context, lambda: self._infer(request, context))

    def _metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        with self._router.acquire(request.name, request.version) as worker:
            serving = self._router.serving(request.name)
            loaded = [worker] if serving is None else serving.workers
            return pb.ModelMetadataResponse(
                name=worker.model,
                versions=sorted({str(item.version) for item in loaded if item.alive}, key=int),
                platform=f"{worker.runtime}_{worker.spec.format}",
                inputs=[_tensor_metadata(spec) for spec in worker.inputs],
                outputs=[_tensor_metadata(spec) for spec in worker.outputs],
            )

    def _infer(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> pb.ModelInferResponse:
        remaining_s = context.time_remaining()
        deadline = time.monotonic() + min(
            MAX_REQUEST_S, MAX_REQUEST_S if remaining_s is None else remaining_s
        )
        try:
            return self._infer_once(request, context, deadline)
        except WorkerDied as error:
            if error.delivered:
                raise
            log.info("a request is given to another worker: %s", error)
            return self._infer_once(request, context, deadline)

    def _infer_once(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext, deadline: float
    ) -> pb.ModelInferResponse:
        wait_s = min(RESTART_WAIT_S, deadline - time.monotonic())
        with self._router.acquire(request.model_name, request.model_version, wait_s=wait_s) as worker:
            inputs = decode_inputs(request, worker.inputs)
            wanted = requested_outputs(request, worker.outputs)
            outputs = worker.infer(inputs, deadline - time.monotonic(), still_wanted=context.is_active)
        response = pb.ModelInferResponse(
            model_name=worker.model, model_version=str(worker.version), id=request.id
        )
        encode_outputs(response, outputs, wanted, raw=is_raw(request))
        _check_size(response, worker)
        return response


class InferenceServer:
    """The gRPC server around `InferenceService`.

    Args:
        router: where requests find their workers.
        addresses: to listen on: "127.0.0.1:8500" (port 0 takes a free one) or
        "unix:/run/sluice/inference.sock". threads: that answer requests. concurrent_rpcs: calls running and
        waiting; more get RESOURCE_EXHAUSTED. message_bytes: largest request and response.
    """

    def __init__(
        self,
        router: Router,
        addresses: str | Sequence[str],
        *,
        threads: int = SERVING_THREADS,
        concurrent_rpcs: int = MAX_CONCURRENT_RPCS,
        message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._router = router
        self._wanted = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="inference")
        self._server = grpc.server(
            self._pool,
            maximum_concurrent_rpcs=concurrent_rpcs,
            options=(
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", message_bytes),
                ("grpc.so_reuseport", 0),  # a second agent on the same port must fail, not share it
            ),
        )
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(router), self._server)
        self.addresses: tuple[str, ...] = ()

    def start(self) -> None:
        """Binds and begins to answer; `addresses` then holds what was bound, with the real ports.

        Raises:
            SluiceError: CONFIG_INVALID when an address cannot be bound.
        """
        self.addresses = tuple(self._bind(address) for address in self._wanted)
        self._server.start()
        log.info("inference is served on %s", ", ".join(self.addresses))

    def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those running end within `grace_s`, then cancels them."""
        self._server.stop(grace_s).wait(grace_s + 5)
        self._pool.shutdown(wait=False)

    def _bind(self, address: str) -> str:
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                f"inference.address: cannot listen on {address}{_why_not(address)}",
                hint="end what listens there (`ss -ltnp` lists it), or set another inference.address",
                obj="inference.address",
            )
        return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"


def _why_not(address: str) -> str:
    """The system's reason why the address cannot be bound, which gRPC keeps to itself; "" if it is gone."""
    if address.startswith("unix"):
        return ""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        try:
            trial.bind((host, int(port)))
        except OSError as error:
            return f": {error.strerror or error}"
    return ""


def _answer(context: grpc.ServicerContext, call: Callable[[], Response]) -> Response:
    """Runs the call; errors become the call's status."""
    try:
        return call()
    except SluiceError as error:
        _abort(context, error)
    except Exception as error:
        log.exception("a call failed unexpectedly")
        _abort(
            context,
            SluiceError(
                errors_pb2.INTERNAL,
                f"unexpected {type(error).__name__}: {error}",
                hint="please report this with the agent's log",
            ),
        )


def _abort(context: grpc.ServicerContext, error: SluiceError) -> NoReturn:
    context.abort_with_status(to_status(error))
    raise AssertionError("abort_with_status raises")


def _check_size(response: pb.ModelInferResponse, worker: Worker) -> None:
    size = response.ByteSize()
    if size > MAX_MESSAGE_BYTES:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"the answer of {worker.spec} takes {size} bytes; at most {MAX_MESSAGE_BYTES} are allowed",
            hint="ask for fewer outputs or a smaller batch",
            obj=str(worker.spec),
        )


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _installed_version() -> str:
    try:
        return metadata.version(SERVER_NAME)
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree
