"""The local socket: `sluice-agent status` and `revert` speak to a running agent through it.

gRPC behind a LocalSocket, which knows who calls: root, the agent's own user, and members of the group that
`admin.group` names may; everybody else who may open the socket is told that they may not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import TypeVar

import grpc

from agent import update_limits as limits
from agent.local_socket import LocalSocket
from sluice.api.v1 import admin_pb2, admin_pb2_grpc, errors_pb2
from updater.errors import SluiceError
from updater.wire import from_rpc_error, to_status

log = logging.getLogger(__name__)
_Reply = TypeVar("_Reply")


class AdminServer(admin_pb2_grpc.AdminServicer):
    """Serves Admin on a unix socket.

    Args:
        socket: its path; the directory is created when absent.
        private: a directory of the agent's own, for the socket behind it.
        group: whose members may administer this agent; None: no group's.
        status: composes the status.
        revert: goes back one version of a model; returns the versions left and taken.

    Raises SluiceError(IO_FAILED | CONFIG_INVALID) when the socket cannot be bound.
    """

    def __init__(
        self,
        socket: Path,
        private: Path,
        group: int | None,
        status: Callable[[], admin_pb2.GetStatusResponse],
        revert: Callable[[str], tuple[int, int]],
    ) -> None:
        self._group = group
        self._status = status
        self._revert = revert
        self._local = LocalSocket(
            socket, private, "admin", group=group, allow=None, most=limits.ADMIN_CONNECTIONS
        )
        self._pool = futures.ThreadPoolExecutor(limits.ADMIN_THREADS, thread_name_prefix="admin")
        self._server = grpc.server(self._pool, maximum_concurrent_rpcs=2 * limits.ADMIN_THREADS)
        admin_pb2_grpc.add_AdminServicer_to_server(self, self._server)
        try:
            self._server.add_insecure_port(self._local.address)
        except RuntimeError as error:
            raise SluiceError(
                errors_pb2.IO_FAILED,
                f"cannot listen on {socket}: {error}",
                hint="check the directory's permissions, or set admin.socket",
                obj=str(socket),
            ) from error

    def start(self) -> None:
        self._server.start()
        self._local.start()

    def stop(self, grace_s: float) -> None:
        self._server.stop(grace_s).wait(grace_s + 1)
        self._pool.shutdown(wait=False)
        self._local.stop()

    def GetStatus(  # noqa: N802 (the generated name)
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """See admin.proto."""
        del request
        return self._answer(context, self._status)

    def Revert(  # noqa: N802
        self, request: admin_pb2.RevertRequest, context: grpc.ServicerContext
    ) -> admin_pb2.RevertResponse:
        """See admin.proto."""
        left, taken = self._answer(context, lambda: self._revert(request.model))
        return admin_pb2.RevertResponse(from_version=left, to_version=taken)

    def _answer(self, context: grpc.ServicerContext, call: Callable[[], _Reply]) -> _Reply:
        """Runs the call for whoever may; errors become the call's status."""
        try:
            self._check(context.peer())
            return call()
        except SluiceError as error:
            context.abort_with_status(to_status(error))
        except Exception as error:
            log.exception("a local call failed unexpectedly")
            failure = SluiceError(errors_pb2.INTERNAL, f"unexpected {type(error).__name__}: {error}")
            context.abort_with_status(to_status(failure))
        raise AssertionError("abort_with_status raises")

    def _check(self, peer: str) -> None:
        """Raises SluiceError(PERMISSION_DENIED) unless the caller may administer this agent."""
        caller = self._local.caller(peer)
        if caller is not None and caller.may(os.geteuid(), self._group):
            return
        who = "an unknown caller" if caller is None else f"user {caller.user}"
        log.warning("%s may not administer this agent, and was told so", who)
        group = "" if self._group is None else f", and members of group {self._group}"
        raise SluiceError(
            errors_pb2.PERMISSION_DENIED,
            f"{who} may not administer this agent; root and its own user may{group}",
            hint="use `sudo -u sluice`, or name a group of yours in admin.group",
            obj=who,
        )


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
