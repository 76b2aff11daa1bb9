"""The Sync client against a real gRPC server of the test's own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from agent.sync import Sync, poll_delay_s
from edge_tests.harness import trust
from edge_tests.harness.serving import eventually
from sluice.api.v1 import sync_pb2, sync_pb2_grpc


class Server(sync_pb2_grpc.SyncServicer):
    """Says what the test tells it to say; remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[sync_pb2.ConnectRequest] = []
        self.polls: list[sync_pb2.PollRequest] = []
        self.say: queue.Queue[sync_pb2.ConnectResponse | None] = queue.Queue()
        self.streams = 0
        self.refuse_streams = False
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        sync_pb2_grpc.add_SyncServicer_to_server(self, self._server)
        self.port = self._server.add_secure_port("127.0.0.1:0", trust.server_credentials())
        self._server.start()

    def Connect(self, request_iterator, context):  # noqa: N802
        if self.refuse_streams:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no streams through this proxy")
        self.streams += 1
        self.heard.append(next(request_iterator))
        threading.Thread(target=self._listen, args=(request_iterator,), daemon=True).start()
        yield sync_pb2.ConnectResponse(
            welcome=sync_pb2.Welcome(heartbeat_interval_ms=300, poll_interval_ms=200)
        )
        while (message := self.say.get(timeout=20)) is not None:
            yield message

    def _listen(self, requests) -> None:
        try:
            self.heard.extend(requests)
        except grpc.RpcError:
            return

    def Poll(self, request, context):  # noqa: N802
        self.polls.append(request)
        return sync_pb2.PollResponse(desired=sync_pb2.DesiredState(generation=9))

    def stop(self) -> None:
        self.say.put(None)
        self._server.stop(0).wait(5)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


class Client:
    def __init__(self, port: int) -> None:
        self.desired: list[sync_pb2.DesiredState] = []
        self.connects = 0
        self.generation = 0
        self.sync = Sync(
            f"127.0.0.1:{port}",
            identity=trust.BoxChannels(),
            device_id="box",
            hello=lambda: sync_pb2.Hello(device_id="box"),
            reported=lambda: sync_pb2.ReportedState(desired_generation=self.generation),
            on_desired=self.desired.append,
            on_connected=self._connected,
            poll_interval_s=0.2,
            reconnect_max_s=0.5,
        )
        self.sync.start()

    def _connected(self) -> None:
        self.connects += 1


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    made = Client(server.port)
    yield made
    made.sync.stop(5)
    assert not made.sync.alive()


def test_hello_first_then_reports_on_change_and_at_each_heartbeat(server: Server, client: Client) -> None:
    eventually(lambda: client.sync.connected, "connected")
    eventually(lambda: len(server.heard) >= 4, "heartbeats")
    assert server.heard[0].hello.device_id == "box"
    assert all(item.WhichOneof("message") == "reported" for item in server.heard[1:])
    client.generation = 5
    client.sync.changed()
    eventually(lambda: server.heard[-1].reported.desired_generation == 5, "the change was reported")


def test_desired_state_is_handed_on(server: Server, client: Client) -> None:
    server.say.put(sync_pb2.ConnectResponse(desired=sync_pb2.DesiredState(generation=3)))
    eventually(lambda: [item.generation for item in client.desired] == [3], "desired state arrived")


def test_reconnects_after_the_stream_ends(server: Server, client: Client) -> None:
    eventually(lambda: client.sync.connected, "connected")
    server.say.put(None)
    eventually(lambda: server.streams == 2 and client.sync.connected, "a second stream")
    assert client.connects >= 2
    assert client.sync.error == ""


def test_polls_while_no_stream_stands(server: Server) -> None:
    server.refuse_streams = True
    client = Client(server.port)
    try:
        eventually(lambda: len(server.polls) >= 2, "polls")
        assert not client.sync.connected
        assert "no streams through this proxy" in client.sync.error
        assert client.desired[0].generation == 9
        assert server.polls[0].hello.device_id == "box"
        server.refuse_streams = False
        eventually(lambda: client.sync.connected, "a stream at last")
    finally:
        client.sync.stop(5)


def test_stop_ends_at_once_without_a_server() -> None:
    client = Client(1)
    eventually(lambda: "CONTROL_UNREACHABLE" in client.sync.error, "it noticed")
    began = time.monotonic()
    client.sync.stop(10)
    assert not client.sync.alive()
    assert time.monotonic() - began < 10


def test_each_device_has_its_own_moment_to_poll() -> None:
    phases = []
    for number in range(1000):
        delay = poll_delay_s(f"box-{number}", 900, 12_345.0)
        assert 0 < delay <= 900
        later = 12_345.0 + delay
        assert poll_delay_s(f"box-{number}", 900, later + 0.5) == pytest.approx(899.5, abs=1e-3)
        phases.append(later % 900)
    per_tenth = [sum(90 * n <= phase < 90 * (n + 1) for phase in phases) for n in range(10)]
    assert min(per_tenth) > 60
