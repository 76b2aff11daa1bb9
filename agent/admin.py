"""The local socket: `sluice-agent status` and `revert` speak to a running agent through it.

gRPC on a unix socket in a directory that only the agent's user and group may enter; the socket itself is
0660. A socket left behind by a killed agent is removed first: the lock on the state directory is held by
then, so it cannot belong to a live agent of the same state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import TypeVar

import grpc

from agent import update_limits as limits
from sluice.api.v1 import admin_pb2, admin_pb2_grpc, errors_pb2
from updater.errors import SluiceError, os_errors
from updater.wire import from_rpc_error, to_status

log = logging.getLogger(__name__)
_SOCKET_MODE = 0o660
_Reply = TypeVar("_Reply")


class AdminServer(admin_pb2_grpc.AdminServicer):
    """Serves Admin on a unix socket.

    Args:
        socket: its path; the directory is created when absent.
        status: composes the status.
        revert: goes back one version of a model; returns the versions left and taken.

    Raises SluiceError(IO_FAILED) when the socket cannot be bound.
    """

    def __init__(
        self,
        socket: Path,
        status: Callable[[], admin_pb2.GetStatusResponse],
        revert: Callable[[str], tuple[int, int]],
    ) -> None:
        self._socket = socket
        self._status = status
        self._revert = revert
        with os_errors("preparing the socket", socket):
            socket.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            socket.unlink(missing_ok=True)
        self._pool = futures.ThreadPoolExecutor(limits.ADMIN_THREADS, thread_name_prefix="admin")
        self._server = grpc.server(self._pool, maximum_concurrent_rpcs=2 * limits.ADMIN_THREADS)
        admin_pb2_grpc.add_AdminServicer_to_server(self, self._server)
        try:
            self._server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise SluiceError(
                errors_pb2.IO_FAILED,
                f"cannot listen on {socket}: {error}",
                hint="check the directory's permissions, or set admin.socket",
                obj=str(socket),
            ) from error
        with os_errors("restricting the socket", socket):
            socket.chmod(_SOCKET_MODE)

    def start(self) -> None:
        self._server.start()

    def stop(self, grace_s: float) -> None:
        self._server.stop(grace_s).wait(grace_s + 1)
        self._pool.shutdown(wait=False)
        self._socket.unlink(missing_ok=True)

    def GetStatus(  # noqa: N802 (the generated name)
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """See admin.proto."""
        del request
        return _answer(context, self._status)

    def Revert(  # noqa: N802
        self, request: admin_pb2.RevertRequest, context: grpc.ServicerContext
    ) -> admin_pb2.RevertResponse:
        """See admin.proto."""
        left, taken = _answer(context, lambda: self._revert(request.model))
        return admin_pb2.RevertResponse(from_version=left, to_version=taken)


class AdminClient:
    """The other end, for the command line.

    Args:
        socket: of the agent.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def status(self) -> admin_pb2.GetStatusResponse:
        """Raises SluiceError(AGENT_UNREACHABLE)."""
        try:
            return self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=limits.ADMIN_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._failed(error, "asking for its status") from error

    def revert(self, model: str) -> admin_pb2.RevertResponse:
        """Raises SluiceError(AGENT_UNREACHABLE | MODEL_UNKNOWN | NO_PREVIOUS_VERSION | ...)."""
        request = admin_pb2.RevertRequest(model=model)
        try:
            return self._stub.Revert(request, timeout=limits.ADMIN_REVERT_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._failed(error, f"reverting {model}") from error

    def _failed(self, error: grpc.RpcError, doing: str) -> SluiceError:
        failure = from_rpc_error(error, doing, str(self._socket))
        if failure.reason == errors_pb2.CONTROL_UNREACHABLE:
            return SluiceError(
                errors_pb2.AGENT_UNREACHABLE,
                f"no agent answers on {self._socket}",
                hint="`systemctl status sluice-agent` shows whether it runs; use `sudo -u sluice` to ask it",
                obj=str(self._socket),
            )
        return failure


def _answer(context: grpc.ServicerContext, call: Callable[[], _Reply]) -> _Reply:
    """Runs the call; errors become the call's status."""
    try:
        return call()
    except SluiceError as error:
        context.abort_with_status(to_status(error))
    except Exception as error:
        log.exception("a local call failed unexpectedly")
        failure = SluiceError(errors_pb2.INTERNAL, f"unexpected {type(error).__name__}: {error}")
        context.abort_with_status(to_status(failure))
    raise AssertionError("abort_with_status raises")
