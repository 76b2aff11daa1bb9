"""Clients that mean ill, or just sit there: the front stays small and goes on answering the others."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from agent.inference import InferenceServer
from agent.limits import (
    MAX_CONCURRENT_RPCS,
    MAX_MESSAGE_BYTES,
    READ_CROWDED_S,
    READ_S,
    READING_MOST,
)
from agent.router import Router
from agent.slow_requests import overdue
from edge_tests.harness import models, serving
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
ROW = np.arange(8, dtype=np.float32).reshape(1, 8)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    router = Router()
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"))
    router.activate("tiny", 1, worker)
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    yield server.addresses[0]
    server.stop(1)
    worker.close(1)


def tensor(**fields: object) -> pb.ModelInferRequest.InferInputTensor:
    given = {"name": "x", "datatype": "FP32", "shape": ROW.shape, **fields}
    return pb.ModelInferRequest.InferInputTensor(**given)  # type: ignore[arg-type]


def infer(stub: pb_grpc.GRPCInferenceServiceStub, timeout: float = 20) -> None:
    request = pb.ModelInferRequest(model_name="tiny", inputs=[tensor()], raw_input_contents=[ROW.tobytes()])
    assert stub.ModelInfer(request, timeout=timeout).model_version == "1"


def connected(address: str, count: int) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    return [socket.create_connection((host, int(port)), timeout=20) for _ in range(count)]


def test_a_thousand_connections_that_send_nothing(address: str) -> None:
    process = psutil.Process()
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        infer(stub)
        before, threads = process.memory_info().rss, process.num_threads()
        idle = connected(address, 1000)
        try:
            for connection in idle[::2]:
                connection.sendall(PREFACE + SETTINGS)
            began = time.monotonic()
            for _ in range(50):
                infer(stub)
            assert time.monotonic() - began < 10
            assert process.num_threads() - threads < 40
            assert process.memory_info().rss - before < 64 << 20
        finally:
            for connection in idle:
                connection.close()
        infer(stub)


def test_a_request_that_trickles_in_holds_up_nobody(address: str) -> None:
    slow = connected(address, 40)
    try:
        for connection in slow:
            connection.sendall(PREFACE + SETTINGS)
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            for step in range(20):
                for connection in slow:
                    connection.sendall(bytes([0]))  # the first bytes of a frame's header, and no more
                if step % 4 == 0:
                    infer(stub)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server ended a connection that made no sense: as good
    finally:
        for connection in slow:
            connection.close()
    with grpc.insecure_channel(address) as channel:
        infer(pb_grpc.GRPCInferenceServiceStub(channel))


@pytest.mark.parametrize("kind", ["headers alone", "some of the message", "one byte after the other"])
def test_requests_that_do_not_come_in_hold_up_nobody(address: str, kind: str) -> None:
    """More of them than there are threads, and than calls may run: with its headers each takes one."""
    whole = pb.ModelInferRequest(model_name="tiny", inputs=[tensor()], raw_input_contents=[ROW.tobytes()])
    message = whole.SerializeToString()
    begun = bytes([0]) + len(message).to_bytes(4, "big") + message[:20]
    slow = connected(address, MAX_CONCURRENT_RPCS + 20)
    try:
        for connection in slow:
            connection.sendall(PREFACE + SETTINGS + headers_frame())
            if kind != "headers alone":
                connection.sendall(data_frame(begun))
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)

            def answered() -> bool:
                for connection in slow if kind.startswith("one byte") else ():
                    with contextlib.suppress(OSError):
                        connection.sendall(data_frame(b"x"))
                try:
                    infer(stub, timeout=1)
                except grpc.RpcError:
                    return False
                return True

            for _ in range(20):
                serving.eventually(answered, "a request among them was answered", within_s=10)
    finally:
        for connection in slow:
            connection.close()


def test_which_requests_are_cut_off() -> None:
    few = [(name, 0.0) for name in range(READING_MOST)]
    assert overdue(few, READ_S - 0.1) == []
    assert len(overdue(few, READ_S)) == READING_MOST
    crowd = [*few, ("late", 0.5), ("new", 2.0)]
    assert overdue(crowd, READ_CROWDED_S - 0.1) == []
    assert overdue(crowd, READ_CROWDED_S + 0.1) == [0, 1], "only as many as make room, the oldest first"
    assert overdue([("a", READ_S), ("b", 0.0)], READ_S) == ["b"]


def test_a_call_without_a_request(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(iter(()), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        infer(pb_grpc.GRPCInferenceServiceStub(channel))


def test_a_message_that_claims_two_gigabytes_is_refused_unread(address: str) -> None:
    """The length prefix says 2 GB; only that prefix is sent."""
    process = psutil.Process()
    before = process.memory_info().rss
    with grpc.insecure_channel(address, options=(("grpc.max_send_message_length", -1),)) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda size: bytes(size),
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(MAX_MESSAGE_BYTES + 1, timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        infer(pb_grpc.GRPCInferenceServiceStub(channel))
    # Client and server share this process: the client's own copies are all that may be left.
    assert process.memory_info().rss - before < 3 * MAX_MESSAGE_BYTES
    with connected(address, 1)[0] as connection:
        claim = data_frame(bytes([0]) + (2**31 - 1).to_bytes(4, "big"))
        connection.sendall(PREFACE + SETTINGS + headers_frame() + claim)
        connection.settimeout(20)
        seen = b""
        while b"larger than max" not in seen:
            data = connection.recv(65536)
            assert data, seen
            seen += data
    assert process.memory_info().rss - before < 3 * MAX_MESSAGE_BYTES


def headers_frame() -> bytes:
    """HEADERS of a call of ModelInfer on stream 1, literal fields without indexing."""

    def field(name: bytes, value: bytes) -> bytes:
        return bytes([0, len(name)]) + name + bytes([len(value)]) + value

    block = b"".join(
        (
            field(b":method", b"POST"),
            field(b":scheme", b"http"),
            field(b":path", b"/inference.GRPCInferenceService/ModelInfer"),
            field(b":authority", b"box"),
            field(b"te", b"trailers"),
            field(b"content-type", b"application/grpc"),
        )
    )
    return len(block).to_bytes(3, "big") + bytes([1, 4]) + (1).to_bytes(4, "big") + block


def data_frame(data: bytes) -> bytes:
    return len(data).to_bytes(3, "big") + bytes([0, 0]) + (1).to_bytes(4, "big") + data


def test_foreign_bytes_as_requests_have_a_clear_status(address: str) -> None:
    rng = random.Random(7)
    good = pb.ModelInferRequest(
        model_name="tiny", inputs=[tensor()], raw_input_contents=[ROW.tobytes()]
    ).SerializeToString()
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK}
    seen = set()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for number in range(400):
            data = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            if number % 5 == 0:
                data = bytearray(rng.randbytes(rng.randrange(200)))
            try:
                call(bytes(data), timeout=20)
                seen.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                seen.add(error.code())
        assert seen <= allowed, seen
        assert grpc.StatusCode.INVALID_ARGUMENT in seen
        infer(pb_grpc.GRPCInferenceServiceStub(channel))


@pytest.mark.parametrize(
    ("fields", "raw", "says"),
    [
        ({"datatype": "INT32"}, ROW.tobytes(), "got datatype 'INT32'"),
        ({"shape": [8]}, ROW.tobytes(), "rank 1"),
        ({"shape": [1, 7]}, ROW.tobytes(), "28 bytes, not 32"),
        ({"shape": [1 << 62, 1 << 62]}, b"", "a dimension is 0 to"),
        ({"shape": [1 << 32, 1 << 32]}, b"", "a dimension is 0 to"),
        ({"shape": [(1 << 31) - 1, (1 << 31) - 1]}, b"", "more than 2147483647 elements"),
        ({"shape": [(1 << 31) - 1, 8]}, ROW.tobytes(), "more than 2147483647 elements"),
        ({"shape": [-1, 8]}, ROW.tobytes(), "a dimension is 0 to"),
        ({"shape": [-(1 << 63), 8]}, b"", "a dimension is 0 to"),
        ({"shape": [0, (1 << 31) - 1]}, b"", "2147483647"),
        ({"shape": [1] * 17}, b"", "17 dimensions"),
        ({"shape": [1] * 100_000}, b"", "100000 dimensions"),
        ({"datatype": "BYTES", "shape": [(1 << 31) - 1, 8]}, b"", "got datatype 'BYTES'"),
        ({"shape": [0, 8]}, b"", "holds no sample"),
        ({"name": "y"}, ROW.tobytes(), "no such input"),
        ({}, ROW.tobytes() + b"!", "32 bytes, not 33"),
        ({}, b"", "32 bytes, not 0"),
    ],
)
def test_tensors_that_do_not_fit(address: str, fields: dict[str, object], raw: bytes, says: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        request = pb.ModelInferRequest(model_name="tiny", inputs=[tensor(**fields)], raw_input_contents=[raw])
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert says in caught.value.details()
        infer(stub)
