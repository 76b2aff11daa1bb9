"""Unix sockets that know their callers: who gets in, as real processes of other users."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from agent.inference import InferenceServer
from agent.local_socket import LocalSocket
from agent.peer import Peers
from agent.peer_credentials import PeerCredentials, credentials_of, group_id
from agent.router import Router
from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.as_users import User, call_as
from edge_tests.harness.operator import eventually
from inference import open_inference_pb2, open_inference_pb2_grpc
from updater.errors import SluiceError

MEMBERS, OTHERS = 61_001, 61_002  # groups that no box has
MEMBER = User(51_001, OTHERS, (MEMBERS,))
PRIMARY = User(51_002, MEMBERS)
STRANGER = User(51_003, OTHERS)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes other users")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="sluice-sockets-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class Echo(grpc.GenericRpcHandler):
    """Answers with the peer as gRPC gives it."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.peer().encode())


@pytest.fixture
def served(place: Path) -> Iterator[LocalSocket]:
    """A socket with a server that tells who it thinks calls."""
    local = LocalSocket(place / "echo.sock", place / "private", "echo", group=None, allow=None, most=3)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([Echo()])
    server.add_insecure_port(local.address)
    server.start()
    local.start()
    yield local
    server.stop(0).wait(5)
    local.stop()


def peer_over(path: Path, *, keep: list[grpc.Channel] | None = None) -> str:
    channel = grpc.insecure_channel(f"unix:{path}", options=(("grpc.use_local_subchannel_pool", 1),))
    found: str = channel.unary_unary("/test/Peer")(b"", timeout=5).decode()
    if keep is None:
        channel.close()
    else:
        keep.append(channel)
    return found


def test_a_handler_learns_who_calls_while_the_connection_stands(served: LocalSocket) -> None:
    kept: list[grpc.Channel] = []
    peer = peer_over(served.path, keep=kept)
    caller = served.caller(peer)
    assert caller is not None
    assert (caller.user, caller.process) == (os.geteuid(), os.getpid())
    assert os.getegid() in caller.groups
    assert Peers(local=served).user(peer) == os.geteuid()
    assert served.caller(peer_over(served.path)) != served.caller("unix-abstract:sluice-guessed")
    for channel in kept:
        channel.close()
    eventually(lambda: served.caller(peer) is None, "the caller forgotten")


def test_whoever_goes_round_it_is_not_known(served: LocalSocket, place: Path) -> None:
    assert (place / "private").stat().st_mode & 0o777 == 0o700
    assert served.caller(peer_over(place / "private" / "echo")) is None


def test_connections_are_bounded(served: LocalSocket) -> None:
    kept: list[grpc.Channel] = []
    for _ in range(3):
        peer_over(served.path, keep=kept)
    with pytest.raises(grpc.RpcError) as caught:
        peer_over(served.path)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    kept.pop().close()
    eventually(lambda: _answers(served.path), "room again")
    for channel in kept:
        channel.close()


def _answers(path: Path) -> bool:
    try:
        return bool(peer_over(path))
    except grpc.RpcError:
        return False


def test_large_messages_pass_whole(place: Path) -> None:
    """Both directions at once, far beyond what the kernel buffers."""
    local = LocalSocket(place / "big.sock", place / "private", "big", group=None, allow=None, most=2)
    with socket.socket(socket.AF_UNIX) as behind, socket.socket(socket.AF_UNIX) as client:
        behind.bind(local.address.removeprefix("unix:"))
        behind.listen()
        local.start()
        client.connect(str(local.path))
        server, _ = behind.accept()
        data = os.urandom(5 << 20)
        received: dict[str, bytes] = {}

        def read(name: str, end: socket.socket) -> None:
            got = bytearray()
            while len(got) < len(data):
                got += end.recv(1 << 16)
            received[name] = bytes(got)

        readers = [
            threading.Thread(target=read, args=pair) for pair in (("client", client), ("server", server))
        ]
        writers = [threading.Thread(target=end.sendall, args=(data,)) for end in (client, server)]
        for thread in readers + writers:
            thread.start()
        for thread in readers + writers:
            thread.join(30)
        assert received == {"client": data, "server": data}
        server.close()
        assert client.recv(1) == b""
    local.stop()
    assert not local.path.exists()


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    one, two = socket.socketpair()
    with one, two:
        found = credentials_of(one)
    assert found.user == os.geteuid()
    assert set(os.getgroups()) <= found.groups


def test_who_may_is_decided_by_user_and_group() -> None:
    def may(user: int, *groups: int, group: int | None = 7) -> bool:
        return PeerCredentials(1, user, frozenset(groups)).may(own_user=5, group=group)

    assert may(0)
    assert may(5)
    assert may(9, 6, 7)
    assert not may(9, 6)
    assert not may(9, 7, group=None)


def test_groups_go_by_name_or_number() -> None:
    assert group_id("0", "admin.group") == 0
    assert group_id("root", "admin.group") == 0
    with pytest.raises(SluiceError) as caught:
        group_id("no-such-group", "admin.group")
    assert (caught.value.code, caught.value.obj) == ("CONFIG_INVALID", "admin.group")


@needs_root
def test_inference_is_open_to_a_group_and_nobody_else(place: Path) -> None:
    local = LocalSocket(
        place / "inference.sock",
        place / "private",
        "inference",
        group=MEMBERS,
        allow=lambda caller: caller.may(os.geteuid(), MEMBERS),
        most=8,
    )
    server = InferenceServer(Router(), [], local=local)
    server.start()
    assert server.addresses == (f"unix:{local.path}",)
    found = local.path.stat()
    assert (found.st_mode & 0o777, found.st_gid) == (0o660, MEMBERS)
    root = User(0, 0)
    assert call_as("inference", local.path, root, MEMBER, PRIMARY, STRANGER) == [
        "OK",
        "OK",
        "OK",
        "UNAVAILABLE",  # the kernel lets them not even connect
    ]
    local.path.chmod(0o666)  # somebody opened it by mistake: the credentials still count
    assert call_as("inference", local.path, STRANGER, MEMBER) == ["UNAVAILABLE", "OK"]
    # Nor is there another way round.
    assert call_as("inference", place / "private" / "inference", MEMBER, STRANGER) == ["UNAVAILABLE"] * 2
    with grpc.insecure_channel(f"unix:{local.path}") as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(open_inference_pb2.ServerLiveRequest(), timeout=5).live
    server.stop(1)


@needs_root
def test_an_agent_is_administered_by_root_itself_and_a_group(place: Path) -> None:
    """A whole agent that is not root: its own user and a group may; others are told that they may not."""
    own = User(51_000, OTHERS)
    shutil.rmtree(place / "agent", ignore_errors=True)
    agent = AgentProcess(
        place / "agent",
        "127.0.0.1:1",
        "box-1",
        settings={
            "admin.socket": str(place / "admin.sock"),
            "admin.group": str(MEMBERS),
            "inference.socket": str(place / "inference.sock"),
            "inference.group": str(MEMBERS),
        },
        start=False,
        enrolled=False,  # what root makes the agent could not read
    )
    agent.socket = place / "admin.sock"
    place.chmod(0o777)
    for path in (agent.directory, agent.config):
        os.chown(path, own.user, own.group)
    agent.wrapper = [
        "setpriv",
        f"--reuid={own.user}",
        f"--regid={own.group}",
        f"--groups={MEMBERS}",
        "--",
    ]
    with agent:
        agent.start()
        assert agent.status().inference_address.startswith("127.0.0.1:")
        root = User(0, 0)
        users = (root, own, MEMBER, PRIMARY, STRANGER)
        allowed = ["OK", "OK", "OK", "OK"]
        assert call_as("admin", agent.socket, *users) == [*allowed, "AGENT_UNREACHABLE"]
        assert call_as("inference", place / "inference.sock", *users) == [*allowed, "UNAVAILABLE"]
        agent.socket.chmod(0o666)
        assert call_as("admin", agent.socket, STRANGER) == ["PERMISSION_DENIED"]
        assert f"user {STRANGER.user} may not administer this agent" in agent.tail()
