"""What mutual TLS costs: the time of an update and the memory of a connection, beside plaintext.

Only this benchmark can serve plaintext: `serve_plain` puts the control plane's services behind a port that no
program of sluice offers. Both kinds run in processes of their own on the same machine and files.

An update: a fresh connection, Poll, GetVersion, Plan, then Fetch applied while it arrives and checked, as a
box does it; the kinds take turns, so that whatever else the machine does meets both. Connections: so many
devices, each with a connection and a certificate of its own and a Sync stream that stands; counted is what
the server's process grew by (private memory), for each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc import aio

from benchmarks import report
from benchmarks.report import Table
from edge_tests.harness import trust
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.models import tiny_onnx
from edge_tests.harness.operator import Operator
from fleet.config import ControlConfig
from fleet.control import Control
from fleet.server import make_server
from sluice.api.v1 import (
    diff_pb2,
    diff_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    rollouts_pb2,
    rollouts_pb2_grpc,
    sync_pb2,
    sync_pb2_grpc,
)
from updater.credentials import Credentials, name_options
from updater.delta import FEATURES, Applier
from updater.digests import digest_bytes

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = 40_000  # of the network that is updated: 2 MB; with 400,000 it is 21 MB
MOST_TIME = 0.10  # that an update may take longer
MOST_BYTES = 12 << 10  # that a connection may take more
ROUNDS = 15
CONNECTIONS = 2_000
SETTLE_S = 3.0
AT_ONCE = 50  # connections opened together
CALL_S = 120.0
KINDS = ("plaintext", "mutual TLS")


@dataclass(frozen=True)
class Side:
    """One kind of server."""

    address: str
    process: int
    credentials: Credentials | None

    def channel(self) -> grpc.Channel:
        alone = [("grpc.use_local_subchannel_pool", 1)]
        if self.credentials is None:
            return grpc.insecure_channel(self.address, alone)
        return self.credentials.channel(self.address, alone)


async def _serve_plain(data: Path) -> None:
    control = Control(ControlConfig(data=data, disk_reserve_bytes=0))
    await control.start()
    server = make_server(control)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    control.end_streams()
    await server.stop(1)
    await control.stop()


def start_plain(stack: ExitStack, data: Path) -> Side:
    """The services without TLS, until the stack ends."""
    data.mkdir()
    trust.install(data)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.tls", "--serve-plain", str(data)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def stop() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)

    stack.callback(stop)
    assert process.stdout is not None
    return Side(process.stdout.readline().strip(), process.pid, None)


def start_secure(stack: ExitStack, data: Path) -> Side:
    """A control plane as it is."""
    control = stack.enter_context(ControlPlane(data, "--disk-reserve-bytes", "0"))
    assert control.process is not None
    return Side(control.address, control.process.pid, trust.device("box"))


def publish(side: Side, models: list[bytes]) -> None:
    """Versions 1 and 2 on one side, and the delta between them built."""
    operator = Operator(side.address)
    operator.channel.close()
    who = None if side.credentials is None else trust.operator()
    channel = Side(side.address, side.process, who).channel()
    operator.channel = channel
    operator.registry = registry_pb2_grpc.RegistryStub(channel)
    operator.diff = diff_pb2_grpc.DiffModelStub(channel)
    with operator:
        for number, model in enumerate(models, 1):
            operator.push("tiny", number, model)
        base = digest_bytes(models[0])
        while any(file.WhichOneof("how") == "pending" for file in operator.plan("tiny", 2, [base]).files):
            time.sleep(0.2)
        give(side, channel)


def give(side: Side, operators: grpc.Channel) -> None:
    """Makes the box known and gives it both versions: a device sees no others, and no other bases count."""
    with side.channel() as own:
        hello = sync_pb2.Hello(device_id="box")
        sync_pb2_grpc.SyncStub(own).Poll(sync_pb2.PollRequest(hello=hello), timeout=CALL_S)
    rollouts = rollouts_pb2_grpc.RolloutsStub(operators)
    for number in (1, 2):
        request = rollouts_pb2.CreateRolloutRequest(model="tiny", version=number)
        begun = rollouts.CreateRollout(request, timeout=CALL_S)
        rollouts.AbortRollout(rollouts_pb2.AbortRolloutRequest(id=begun.id), timeout=CALL_S)


def update(side: Side, base: Path, target: Path) -> float:
    """Seconds of one update on a fresh connection."""
    began = time.perf_counter()
    with side.channel() as channel:
        hello = sync_pb2.Hello(device_id="box", agent_version="bench")
        sync_pb2_grpc.SyncStub(channel).Poll(sync_pb2.PollRequest(hello=hello), timeout=CALL_S)
        version = registry_pb2.GetVersionRequest(model="tiny", version=2)
        registry_pb2_grpc.RegistryStub(channel).GetVersion(version, timeout=CALL_S)
        stub = diff_pb2_grpc.DiffModelStub(channel)
        request = diff_pb2.PlanRequest(
            model="tiny",
            version=2,
            variant="default",
            base_digests=[digest_bytes(base.read_bytes())],
            features=FEATURES,
        )
        (file,) = stub.Plan(request, timeout=CALL_S).files
        offer = getattr(file, file.WhichOneof("how"))
        target.unlink(missing_ok=True)
        applier = Applier(base, target)
        for part in stub.Fetch(diff_pb2.FetchRequest(digest=offer.digest), timeout=CALL_S):
            applier.feed(part.data)
        applier.finish()
    return time.perf_counter() - began


def private_bytes(process: int) -> int:
    """Memory that is a process's own."""
    return int(psutil.Process(process).memory_full_info().uss)


async def grow(side: Side, count: int) -> int:
    """Bytes that a server's process grows by when so many devices hold streams."""
    before = private_bytes(side.process)
    channels: list[aio.Channel] = []
    calls = []
    go_on = asyncio.Event()

    async def connect(number: int) -> None:
        name = f"box-{number}"
        options = [("grpc.use_local_subchannel_pool", 1)]
        if side.credentials is None:
            channel = aio.insecure_channel(side.address, options)
        else:
            held = trust.issue(trust.Identity(trust.TRUST_DOMAIN, trust.Kind.DEVICE, name))
            secure = grpc.ssl_channel_credentials(held.bundle, held.key, held.chain)
            channel = aio.secure_channel(side.address, secure, [*options, *name_options(held.server_name)])

        async def said() -> object:
            yield sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id=name))
            await go_on.wait()

        call = sync_pb2_grpc.SyncStub(channel).Connect(said())
        for _ in range(2):  # Welcome, then the desired state
            await call.read()
        channels.append(channel)
        calls.append(call)

    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*(connect(number) for number in range(start, min(start + AT_ONCE, count))))
    await asyncio.sleep(SETTLE_S)
    grown = private_bytes(side.process) - before
    go_on.set()
    for call in calls:
        call.cancel()
    for channel in channels:
        await channel.close()
    return grown


def measure(rounds: int, connections: int, hidden: int) -> tuple[list[Table], bool]:
    """Both comparisons, and whether they are within what is allowed."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-tls-")))
        sides = {
            KINDS[0]: start_plain(stack, scratch / "plain"),
            KINDS[1]: start_secure(stack, scratch / "secure"),
        }
        base = tiny_onnx(scratch / "base.onnx", hidden=hidden)
        models = [
            base.read_bytes(),
            tiny_onnx(scratch / "target.onnx", hidden=hidden, change=0.0005).read_bytes(),
        ]
        for side in sides.values():
            publish(side, models)
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds + 1):
            for kind in KINDS if number % 2 else KINDS[::-1]:
                took = update(sides[kind], base, scratch / "made.onnx")
                if number:  # the first warms caches
                    times[kind].append(took)
        grown = {kind: asyncio.run(grow(sides[kind], connections)) / connections for kind in KINDS}
    ratios = [secure / plain for plain, secure in zip(*(times[kind] for kind in KINDS), strict=True)]
    more, bytes_more = statistics.median(ratios) - 1, grown[KINDS[1]] - grown[KINDS[0]]
    load = os.getloadavg()[0]
    tables = [
        Table(
            f"An update of {len(models[1]) / 1e6:.0f} MB by delta, loopback, {rounds} of each kind in turn",
            ("", "median", "fastest"),
            [(kind, f"{statistics.median(times[kind]):.3f} s", f"{min(times[kind]):.3f} s") for kind in KINDS]
            + [
                (
                    "more (median of pairs)",
                    f"{more:+.1%}",
                    f"{min(times[KINDS[1]]) / min(times[KINDS[0]]) - 1:+.1%}",
                )
            ],
        ),
        Table(
            f"Server memory of a connection with its stream, {connections} of them (load {load:.1f})",
            ("", "bytes"),
            [(kind, f"{grown[kind]:,.0f}") for kind in KINDS] + [("more", f"{bytes_more:,.0f}")],
        ),
    ]
    return tables, more <= MOST_TIME and bytes_more <= MOST_BYTES


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="units of the network that is updated")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--serve-plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_plain:
        asyncio.run(_serve_plain(options.serve_plain))
        return 0
    tables, within = measure(options.rounds, options.connections, options.hidden)
    for table in tables:
        print(table.markdown())
    print(f"on {report.machine()}")
    if options.write:
        note = (
            "Each update on a fresh connection: handshake, plan, delta fetched and applied. Plaintext is in "
            "this benchmark alone. Memory is private memory (USS) of the control plane's process."
        )
        report.write_section("tls", report.section("Mutual TLS", "make bench-tls", [note], tables))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
