"""Calls an agent's unix sockets as other users: a process of its own, as root, becomes each of them in
turn.

Started as `python -m edge_tests.harness.as_users`; reads JSON on stdin and writes the outcomes of the
calls. Each call is made by a child that has dropped every right of root before it connects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALL_S = 5.0


@dataclass(frozen=True)
class User:
    """Who calls."""

    user: int
    group: int
    groups: tuple[int, ...] = ()


def call_as(kind: str, socket: Path, *users: User) -> list[str]:
    """How each user's call ends: "OK" or a reason.

    Args:
        kind: "admin" asks for the status, "inference" whether the server lives.
        socket: of the agent.
        users: who calls, one after the other.
    """
    question = {"kind": kind, "socket": str(socket), "users": [asdict(user) for user in users]}
    done = subprocess.run(
        [sys.executable, "-m", "edge_tests.harness.as_users"],
        input=json.dumps(question),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "GRPC_VERBOSITY": "NONE"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    outcomes: list[str] = json.loads(done.stdout)
    return outcomes


def _main() -> None:
    question = json.load(sys.stdin)
    print(json.dumps([_fork(question["kind"], question["socket"], user) for user in question["users"]]))


def _fork(kind: str, socket: str, user: dict[str, object]) -> str:
    import agent.admin  # before rights are dropped: the sources may be root's alone  # noqa: F401
    import inference.open_inference_pb2_grpc  # noqa: F401

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups(user["groups"])  # type: ignore[arg-type]
            os.setgid(user["group"])  # type: ignore[arg-type]
            os.setuid(user["user"])  # type: ignore[arg-type]
            os.write(writer, _call(kind, Path(socket)).encode())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as outcome:
        text = outcome.read()
    os.waitpid(child, 0)
    return text


def _call(kind: str, socket: Path) -> str:
    import grpc

    from agent.admin import AdminClient
    from inference import open_inference_pb2, open_inference_pb2_grpc
    from updater.errors import SluiceError

    if kind == "admin":
        client = AdminClient(socket)
        try:
            client.status()
        except SluiceError as error:
            return error.code
        return "OK"
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            stub.ServerLive(open_inference_pb2.ServerLiveRequest(), timeout=CALL_S)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


if __name__ == "__main__":
    _main()
