"""The protocol's calls: each finds its answer in the rooms behind, and turns their errors into its status.

ModelInfer and ModelStreamInfer take and give `messages.Request` and `Response` instead of protobuf's
messages; inference.py registers them with their own (de)serialisers. Other calls have the generated types.
"""

# ruff: noqa: ARG002, N802 (signatures and names are the protocol's)

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc

from agent import describe
from agent.batch_terms import Overloaded
from agent.limits import CACHE_BYTES
from agent.messages import Request, Response
from agent.peer import Peers
from agent.repository import Repository
from agent.requests import Inference
from agent.router import Router
from agent.shared_memory import Regions
from agent.streams import Streams
from agent.worker import Worker
from inference import open_inference_pb2 as pb
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.wire import to_status

if TYPE_CHECKING:
    from agent.tracing import Tracing

log = logging.getLogger(__name__)

SERVER_NAME = "sluice"
EXTENSIONS = ("model_configuration", "model_repository", "statistics", "system_shared_memory")
PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own: clients with a retry policy wait for so long
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Status(grpc.Status):
    """What `abort_with_status` takes."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


class InferenceService:
    """The calls over a router and a repository; the methods are named as the protocol names them."""

    def __init__(
        self,
        router: Router,
        repository: Repository,
        peers: Peers,
        tracing: Tracing | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._router = router
        self._repository = repository
        self._regions = Regions()
        self._peers = peers
        self._inference = Inference(router, self._regions, self._peers, tracing, cache_bytes)
        self._streams = Streams(self._inference)

    # Health.

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

    # What is here.

    def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Name, version and the extensions offered."""
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=_installed_version(), extensions=EXTENSIONS
        )

    def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs of the active version or of the one named."""
        return _answer(context, lambda: self._describe(request.name, request.version, describe.metadata))

    def ModelConfig(
        self, request: pb.ModelConfigRequest, context: grpc.ServicerContext
    ) -> pb.ModelConfigResponse:
        """How the active version or the one named is served."""
        return _answer(
            context,
            lambda: pb.ModelConfigResponse(
                config=self._describe(request.name, request.version, describe.config)
            ),
        )

    def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> pb.ModelStatisticsResponse:
        """Figures of every version loaded, of one model's, or of one version."""
        return _answer(context, lambda: describe.statistics(self._loaded(request.name, request.version)))

    # Inference.

    def ModelInfer(self, request: Request, context: grpc.ServicerContext) -> Response:
        """One inference."""
        return _answer(context, self._inference.answer, request, context)

    def ModelStreamInfer(
        self, requests: Iterator[Request], context: grpc.ServicerContext
    ) -> Iterator[Response | pb.ModelStreamInferResponse]:
        """Inferences over one stream, see streams.py."""
        try:
            yield from self._streams.answer(requests, context)
        except SluiceError as error:
            _abort(context, error)

    # The repository.

    def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: grpc.ServicerContext
    ) -> pb.RepositoryIndexResponse:
        """The versions on this box."""
        return _answer(context, lambda: self._repository.index(ready=request.ready))

    def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> pb.RepositoryModelLoadResponse:
        """Serves a model that was unloaded."""
        _answer(context, lambda: self._repository.load(request))
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> pb.RepositoryModelUnloadResponse:
        """Ends a model's workers."""
        _answer(context, lambda: self._repository.unload(request))
        return pb.RepositoryModelUnloadResponse()

    # Shared memory.

    def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryStatusResponse:
        """The caller's regions."""
        found = _answer(context, lambda: self._regions.status(request.name, self._user(context)))
        response = pb.SystemSharedMemoryStatusResponse()
        for item in found:
            response.regions[item.name].CopyFrom(
                pb.SystemSharedMemoryStatusResponse.RegionStatus(
                    name=item.name, key=item.key, offset=item.offset, byte_size=item.size
                )
            )
        return response

    def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Makes a region known."""
        _answer(
            context,
            lambda: self._regions.register(
                request.name, request.key, request.offset, request.byte_size, self._user(context)
            ),
        )
        return pb.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forgets one of the caller's regions, or all."""
        _answer(context, lambda: self._regions.unregister(request.name, self._user(context)))
        return pb.SystemSharedMemoryUnregisterResponse()

    def _user(self, context: grpc.ServicerContext) -> int | None:
        return self._peers.user(context.peer())

    def _describe(self, name: str, version: str, how: Callable[[Worker, Sequence[Worker]], Answer]) -> Answer:
        with self._router.acquire(name, version) as worker:
            serving = self._router.serving(name)
            return how(worker, (worker,) if serving is None else serving.workers)

    def _loaded(self, name: str, version: str) -> list[Worker]:
        """The workers meant, by name and version."""
        if version:
            with self._router.acquire(name, version) as worker:
                return [worker]
        serving = self._router.serving(name) if name else None
        if name and serving is None:
            raise self._router.unknown(name)
        models = self._router.models() if serving is None else (serving,)
        workers = [worker for item in models for worker in item.workers]
        return sorted(workers, key=lambda worker: (worker.model, worker.version))


def _answer(context: grpc.ServicerContext, call: Callable[..., Answer], *arguments: Any) -> Answer:
    """Runs the call; errors become the call's status."""
    try:
        return call(*arguments)
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
    status = to_status(error)
    if isinstance(error, Overloaded):
        status = _Status(
            status.code,
            status.details,
            (*status.trailing_metadata, (PUSHBACK, str(max(1, math.ceil(error.retry_s * 1000))))),
        )
    context.abort_with_status(status)
    raise AssertionError("abort_with_status raises")


def _installed_version() -> str:
    try:
        return metadata.version(SERVER_NAME)
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree
