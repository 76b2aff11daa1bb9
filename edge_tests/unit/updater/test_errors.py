"""Errors: every reason has a status, travels over gRPC whole, and names what helps."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from sluice.api.v1 import errors_pb2, registry_pb2, registry_pb2_grpc
from sluice.api.v1.errors_pb2 import ErrorReason
from updater import wire
from updater.errors import EXIT_OF_STATUS, STATUS_OF_REASON, SluiceError, os_errors


def test_every_reason_has_a_status_and_an_exit_code() -> None:
    reasons = set(ErrorReason.values()) - {errors_pb2.ERROR_REASON_UNSPECIFIED}
    assert set(STATUS_OF_REASON) == reasons
    for reason in reasons:
        assert SluiceError(reason, "x").exit_code >= 1
    assert len(set(EXIT_OF_STATUS.values()) & {0, 1, 2}) == 0


class Failing(registry_pb2_grpc.RegistryServicer):
    """A registry whose GetModel fails with whatever stands in `error`."""

    error: SluiceError | None = None

    def GetModel(  # noqa: N802 - gRPC's name
        self, request: registry_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> registry_pb2.Model:
        if self.error is None:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
        context.abort_with_status(wire.to_status(self.error))
        raise AssertionError("abort returns never")


@pytest.fixture
def server() -> Iterator[tuple[Failing, str]]:
    servicer = Failing()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    registry_pb2_grpc.add_RegistryServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait(10)


def call(address: str, timeout: float = 10) -> SluiceError:
    with grpc.insecure_channel(address) as channel:
        stub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(registry_pb2.GetModelRequest(name="x"), timeout=timeout)
        return wire.from_rpc_error(caught.value, "asking for the model", address)


def test_errors_cross_the_wire_whole(server: tuple[Failing, str]) -> None:
    servicer, address = server
    for reason in STATUS_OF_REASON:
        servicer.error = SluiceError(reason, "größer als erlaubt", hint="do this", obj="digits@2")
        assert call(address).as_dict() == servicer.error.as_dict()


@pytest.mark.parametrize("letter", ["m", "é", "漢"])
def test_long_messages_still_arrive(server: tuple[Failing, str], letter: str) -> None:
    servicer, address = server
    long = letter * 9000
    servicer.error = SluiceError(errors_pb2.INTERNAL, long, hint=long, obj=long)
    for _ in range(20):  # gRPC refuses trailers over its soft limit at random
        error = call(address)
        assert error.reason == errors_pb2.INTERNAL
        assert set(error.message) == set(error.hint) == set(error.obj) == {letter}


def test_foreign_failures_are_named_too(server: tuple[Failing, str]) -> None:
    _, address = server
    assert call(address).reason == errors_pb2.LIMIT_EXCEEDED
    error = call("127.0.0.1:1", timeout=2)
    assert error.reason == errors_pb2.CONTROL_UNREACHABLE
    assert "127.0.0.1:1" in error.message


def test_system_errors_are_turned_at_the_edge() -> None:
    for number, reason in [(errno.ENOSPC, errors_pb2.DISK_FULL), (errno.EACCES, errors_pb2.IO_FAILED)]:
        with pytest.raises(SluiceError) as caught, os_errors("writing", "/x"):
            raise OSError(number, "no")
        assert caught.value.reason == reason
        assert "/x" in caught.value.message
        assert isinstance(caught.value.__cause__, OSError)
