"""A link with a bandwidth: a network namespace for the box, a veth pair, `tc tbf` on both ends.

Meant to run inside a network namespace of its own (`unshare --net`), so that nothing of the machine's network
is touched: the control plane is on this side, the box on the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from types import TracebackType

HERE, THERE = "10.203.0.1", "10.203.0.2"  # inside the namespaces only
BURST_BYTES = 32 << 10
QUEUE_MS = 50  # what waits longer is dropped
COMMAND_S = 30.0


def missing() -> str:
    """Why no such link can be made here, with what installs it; empty when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
    absent = sorted(program for program in packages if shutil.which(program) is None)
    if absent:
        names = sorted({packages[program] for program in absent})
        return f"{', '.join(absent)} not found: apt-get install {' '.join(names)}"
    probe = (
        "ip link add probe0 type veth peer name probe1 && "
        f"tc qdisc add dev probe0 root tbf rate 1mbit burst {BURST_BYTES} latency {QUEUE_MS}ms"
    )
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", probe],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    return f"the kernel has no veth or no tbf: {done.stderr.strip()}" if done.returncode else ""


def run(command: str) -> str:
    """Runs a command given as words; its output. Raises RuntimeError with what it said."""
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`{command}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Link:
    """The link, without a cap but inside `capped`; `wrapper` puts a command on the other side."""

    def __init__(self) -> None:
        self.namespace = f"sluice-box-{os.getpid()}"
        self.wrapper = ["ip", "netns", "exec", self.namespace]

    def __enter__(self) -> Link:
        run(f"ip netns add {self.namespace}")
        try:
            run("ip link set lo up")
            run("ip link add here0 type veth peer name there0")
            run(f"ip link set there0 netns {self.namespace}")
            run(f"ip addr add {HERE}/24 dev here0")
            run("ip link set here0 up")
            run(f"ip -n {self.namespace} addr add {THERE}/24 dev there0")
            run(f"ip -n {self.namespace} link set there0 up")
            run(f"ip -n {self.namespace} link set lo up")
        except BaseException:
            run(f"ip netns delete {self.namespace}")
            raise
        return self

    @contextlib.contextmanager
    def capped(self, bits_per_s: int) -> Iterator[None]:
        """Holds both directions to a rate."""
        ends = (("", "here0"), (f" -n {self.namespace}", "there0"))
        for where, device in ends:
            shape = f"tbf rate {bits_per_s} burst {BURST_BYTES} latency {QUEUE_MS}ms"
            run(f"tc{where} qdisc replace dev {device} root {shape}")
        try:
            yield
        finally:
            for where, device in ends:
                run(f"tc{where} qdisc delete dev {device} root")

    def bytes_to_box(self) -> int:
        """Bytes that went over the link to the box so far, headers included."""
        shown = json.loads(run("ip -s -j link show dev here0"))
        return int(shown[0]["stats64"]["tx"]["bytes"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The veth pair goes with the namespace that holds its other end.
        run(f"ip netns delete {self.namespace}")
