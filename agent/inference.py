"""The inference front: the Open Inference Protocol (KServe v2) with Triton's extensions, over gRPC, for
clients on the box.

This file is the server: addresses, threads and limits. inference_service.py holds the calls, requests.py
the way of one inference, streams.py the streams.

Rules: a message over its limit, or a call over the number that may wait, is refused by gRPC; a call whose
request does not come in is cut off (slow_requests.py); streams have threads of their own, so that they hold
up nothing else.

Over TCP there is no authentication: listen on loopback. A unix socket lets in root, the agent's own user
and the members of one group.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, cast

import grpc

from agent.inference_service import InferenceService
from agent.limits import CACHE_BYTES, MAX_CONCURRENT_RPCS, MAX_MESSAGE_BYTES, MAX_STREAMS, SERVING_THREADS
from agent.local_socket import LocalSocket
from agent.messages import parse_request, serialize_response, serialize_streamed
from agent.peer import Peers
from agent.repository import Repository
from agent.router import Router
from agent.slow_requests import Reading
from agent.thread_pool import ThreadPool
from inference import open_inference_pb2 as pb
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

if TYPE_CHECKING:
    from agent.tracing import Tracing

log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_INFER, _STREAM = "ModelInfer", "ModelStreamInfer"


class InferenceServer:
    """The gRPC server around `InferenceService`.

    Args:
        router: where requests find their workers.
        repository: what the repository calls see; None: what the router has loaded, which no client changes.
        tracing: where traces of requests go; None: there are none.
        addresses: to listen on: "127.0.0.1:8500" (port 0 takes a free one) or
        "unix:/run/sluice/inference.sock". threads: that answer requests. concurrent_rpcs: calls running and
        waiting; more get RESOURCE_EXHAUSTED. message_bytes: largest request and response.
        cache_bytes: of outputs that the response cache keeps.
        local: a unix socket before the server, which lets in whom it may; served beside the addresses.
    """

    def __init__(
        self,
        router: Router,
        addresses: str | Sequence[str],
        *,
        repository: Repository | None = None,
        tracing: Tracing | None = None,
        threads: int = SERVING_THREADS,
        concurrent_rpcs: int = MAX_CONCURRENT_RPCS,
        message_bytes: int = MAX_MESSAGE_BYTES,
        cache_bytes: int = CACHE_BYTES,
        local: LocalSocket | None = None,
    ) -> None:
        self._wanted = [addresses] if isinstance(addresses, str) else list(addresses)
        self._local = local
        if local is not None:
            self._wanted.append(local.address)
        self._pool = ThreadPool(threads, "inference")
        self._server = grpc.server(
            cast("futures.ThreadPoolExecutor", self._pool),  # gRPC takes any executor
            maximum_concurrent_rpcs=concurrent_rpcs,
            options=(
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", message_bytes),
                ("grpc.so_reuseport", 0),  # a second agent on the same port must fail, not share it
            ),
        )
        self._streams_pool = futures.ThreadPoolExecutor(MAX_STREAMS + 1, thread_name_prefix="stream")
        self._reading = Reading()
        service = InferenceService(
            router, repository or Repository(router), Peers(local=local), tracing, cache_bytes
        )
        self._server.add_registered_method_handlers(
            _SERVICE.full_name, _handlers(service, self._streams_pool, self._reading)
        )
        self.addresses: tuple[str, ...] = ()

    def start(self) -> None:
        """Binds and begins to answer; `addresses` then holds what was bound, with the real ports.

        Raises:
            SluiceError: CONFIG_INVALID when an address cannot be bound.
        """
        self.addresses = tuple(self._bind(address) for address in self._wanted)
        self._server.start()
        if self._local is not None:
            self._local.start()
            self.addresses = (*self.addresses[:-1], f"unix:{self._local.path}")
        self._reading.start()
        log.info("inference is served on %s", ", ".join(self.addresses))

    def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those running end within `grace_s`, then cancels them."""
        self._server.stop(grace_s).wait(grace_s + 5)
        if self._local is not None:
            self._local.stop()
        self._reading.stop()
        self._pool.shutdown(wait=False)
        self._streams_pool.shutdown(wait=False)

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


def _handlers(
    service: InferenceService, streams: futures.ThreadPoolExecutor, reading: Reading
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """The service's methods, with the (de)serialisers of the protocol's messages."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in _SERVICE.methods:
        behavior = getattr(service, method.name)
        parse: Callable[[bytes], Any] = getattr(pb, method.input_type.name).FromString
        serialize: Callable[[Any], bytes] = getattr(pb, method.output_type.name).SerializeToString
        if method.name == _INFER:
            parse, serialize = parse_request, serialize_response
        elif method.name == _STREAM:
            parse, serialize = parse_request, serialize_streamed
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]]
        if method.client_streaming:
            make, behavior = grpc.stream_stream_rpc_method_handler, _OnThreads(behavior, streams)
        else:
            make, behavior = grpc.stream_unary_rpc_method_handler, reading.whole(behavior)
        handlers[method.name] = make(behavior, parse, serialize)
    return handlers


class _OnThreads:
    """A behaviour that gRPC runs on a pool of its own: it reads the attribute."""

    def __init__(self, behavior: Callable[..., Any], pool: futures.ThreadPoolExecutor) -> None:
        self._behavior = behavior
        self.experimental_thread_pool = pool

    def __call__(self, *arguments: Any) -> Any:
        return self._behavior(*arguments)


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
