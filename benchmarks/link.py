"""One update over a link of 57.5 Mbit/s: full against delta. `make bench-link`; needs root and iproute2.

A real control plane on one side of a veth pair, a real agent and a predicting client on the other, both ends
capped by `tc tbf`; no delay is added. For each pair of models: a box that serves version 1 is told to take
version 2 and gets a delta, which the control plane has built before; a box without any version is told the
same and gets the full copy; and the bare file is fetched over HTTP, the least that a full download can take.
Seconds run from the moment the box learns of version 2, just before it asks for the first byte (its own log),
to the first prediction answered by version 2. Of several runs the median is printed, and the fastest.
"""

from __future__ import annotations

import argparse
import http.server
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import minilm, network, report
from benchmarks.network import HERE, Link
from benchmarks.report import Table
from edge_tests.demo.__main__ import interruptible
from edge_tests.demo.client import PredictingClient
from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.models import write_golden
from edge_tests.harness.operator import Operator
from edge_tests.harness.signing import OperatorTrust
from fleet.client import ControlClient
from fleet.publish import Published, prepare, publish
from fleet.recipe import Recipe, VariantRecipe
from runtimes import registry
from sluice.api.v1 import devices_pb2, rollouts_pb2

BITS_PER_S = 57_500_000
# Pair: seconds that the update by delta may take.
AT_MOST_S = {"minilm_i8_tensor": 1.0, "minilm_f32_two_layers": 2.2}
INSIDE = "SLUICE_BENCH_LINK_INSIDE"
BUILD_S = 900.0
ANSWER_S = 120.0
TOKENS = 16
SETTLE_S = 1.0
FETCH = "import sys, urllib.request; print(len(urllib.request.urlopen(sys.argv[1], timeout=120).read()))"


@dataclass(frozen=True)
class Update:
    """One update of one box: bytes over the link to it, seconds to the first prediction."""

    sent_bytes: int
    seconds: float


def write_inputs(path: Path) -> dict[str, np.ndarray]:
    """What the client predicts on: one sentence of token numbers."""
    ids = np.arange(2000, 2000 + TOKENS, dtype=np.int64).reshape(1, TOKENS)
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    np.savez(path, **arrays)
    return arrays


class Fleet:
    """A control plane on this side of the link, with both versions of each model published."""

    def __init__(self, folder: Path, link: Link) -> None:
        self.folder = folder
        self.link = link
        self.samples = folder / "samples.npz"
        self._inputs = write_inputs(self.samples)
        self._stack = ExitStack()
        self._boxes = 0

    def __enter__(self) -> Fleet:
        control = ControlPlane(self.folder / "control")
        control.address = f"{HERE}:0"
        self.control = self._stack.enter_context(control)
        self.client = self._stack.enter_context(ControlClient(control.address))
        self._trust = OperatorTrust(self.folder / "trust", self.client)
        self._stack.callback(self._trust.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def publish(self, model: str, files: Sequence[Path]) -> list[Published]:
        """Version 1, 2, … of a model, each with a golden answer of its own."""
        published = []
        for number, file in enumerate(files, 1):
            golden = self.folder / f"{model}-{number}.npz"
            with registry.load(file) as loaded:
                write_golden(golden, self._inputs, loaded.run(self._inputs))
            recipe = Recipe(model=model, variants=(VariantRecipe(file, name="cpu", golden=golden),))
            published.append(publish(self.client, prepare(recipe), sign=self._trust.signing.sign_version))
        return published

    def build(self, versions: Sequence[Published]) -> float:
        """Has the control plane make what boxes will ask for, from version 1 and from nothing; seconds."""
        old, new = (item.manifest for item in versions)
        start = time.perf_counter()
        with Operator(self.control.address) as operator:
            for bases in ([file.digest for file in old.variants[0].files], []):
                while any(
                    plan.WhichOneof("how") == "pending"
                    for plan in operator.plan(new.model, new.version, bases, variant="cpu").files
                ):
                    if time.perf_counter() - start > BUILD_S:
                        raise RuntimeError(
                            f"no delta of {new.model} within {BUILD_S:g} s\n{self.control.log}"
                        )
        return time.perf_counter() - start

    def update(self, model: str, *, full: bool) -> Update:
        """A fresh box takes version 2 over the capped link; unless `full`, it serves version 1 before."""
        self._boxes += 1
        name = f"box-{self._boxes}"
        agent = AgentProcess(self.folder / name, self.control.address, name, wrapper=self.link.wrapper)
        with agent:
            client = PredictingClient(agent.address, model, self.samples, wrapper=self.link.wrapper)
            try:
                self._wait_for_device(name)
                if not full:
                    self._wait_for_end(self._roll_out(model, 1, name))
                    _wait_for_answer(client, "1")
                time.sleep(SETTLE_S)
                with self.link.capped(BITS_PER_S):
                    before = self.link.bytes_to_box()
                    rollout = self._roll_out(model, 2, name)
                    answered = _wait_for_answer(client, "2")
                    sent = self.link.bytes_to_box() - before
                self._wait_for_end(rollout)
                return Update(sent, answered - _learned(agent.log, model, 2))
            finally:
                client.stop()

    def _roll_out(self, model: str, version: int, device: str) -> str:
        selector = devices_pb2.Selector(device_ids=[device])
        phase = rollouts_pb2.Phase(selector=selector, deadline_s=600, max_failed_percent=0)
        return self.client.create_rollout(model, version, [phase]).id

    def _wait_for_device(self, device: str) -> None:
        _until(lambda: device in {item.id for item in self.client.list_devices()}, f"{device} registers")

    def _wait_for_end(self, rollout: str) -> None:
        """So that the next rollout of the model may start; fails unless all of it was well."""

        def ended() -> bool:
            return self.client.get_rollout(rollout).state != rollouts_pb2.ROLLOUT_STATE_RUNNING

        _until(ended, f"rollout {rollout} ends")
        state = self.client.get_rollout(rollout).state
        if state != rollouts_pb2.ROLLOUT_STATE_SUCCEEDED:
            raise RuntimeError(f"a rollout ended as {rollouts_pb2.RolloutState.Name(state)}")


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + ANSWER_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {ANSWER_S:g} s: {what}")
        time.sleep(0.05)


def _wait_for_answer(client: PredictingClient, version: str) -> float:
    """When the version first answered, seconds since the epoch."""
    _until(lambda: version in client.tally.first_answer, f"a prediction by version {version}")
    return client.tally.first_answer[version]


def _learned(log: Path, model: str, version: int) -> float:
    """When the box learned what it shall run, by its log; seconds since the epoch."""
    for line in log.read_text("utf-8").splitlines():
        if f"desired: {model}@{version} " in line and line.startswith("time="):
            stamp = line.partition(" ")[0].removeprefix("time=").removesuffix("Z")
            return datetime.fromisoformat(stamp).replace(tzinfo=UTC).timestamp()
    raise RuntimeError(f"{log} does not say when {model}@{version} was desired")


def fetch_bare(file: Path, link: Link) -> Update:
    """The bare file by HTTP over the capped link: nothing is checked, stored or loaded."""
    handler = partial(QuietHandler, directory=str(file.parent))
    with http.server.ThreadingHTTPServer((HERE, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with link.capped(BITS_PER_S):
                before, start = link.bytes_to_box(), time.perf_counter()
                url = f"http://{HERE}:{server.server_address[1]}/{file.name}"
                command = [*link.wrapper, sys.executable, "-c", FETCH, url]
                done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
                seconds = time.perf_counter() - start
        finally:
            server.shutdown()
            thread.join()
        if int(done.stdout) != file.stat().st_size:
            raise RuntimeError(f"{file.name} came with {done.stdout.strip()} bytes")
        return Update(link.bytes_to_box() - before, seconds)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and logs nothing."""

    def log_message(self, *_: object) -> None: ...


def rows_of(pair: minilm.MiniLmPair, fleet: Fleet, runs: int) -> tuple[list[list[str]], bool]:
    """The pair's rows, and whether its delta came in time."""
    built = fleet.publish(pair.name, [pair.old, pair.new])
    print(f"{pair.name}: built in {fleet.build(built):.0f} s, before the clock runs", file=sys.stderr)
    ways = {
        "file over HTTP": [fetch_bare(pair.new, fleet.link) for _ in range(runs)],
        "sluice, full copy": [fleet.update(pair.name, full=True) for _ in range(runs)],
        "sluice, delta": [fleet.update(pair.name, full=False) for _ in range(runs)],
    }
    rows, medians = [], {}
    for way, updates in ways.items():
        medians[way] = statistics.median(update.seconds for update in updates)
        sent = statistics.median(update.sent_bytes for update in updates)
        fewer = pair.new.stat().st_size / sent
        sooner = medians["file over HTTP"] / medians[way]
        target, met = "-", "-"
        if way == "sluice, delta":
            target = f"{AT_MOST_S[pair.name]:.1f}"
            met = "yes" if medians[way] <= AT_MOST_S[pair.name] else "NO"
        fastest = min(update.seconds for update in updates)
        figures = [f"{sent:,.0f}", f"{medians[way]:.2f}", f"{fastest:.2f}", f"{fewer:.1f}", f"{sooner:.1f}"]
        rows.append([pair.name, way, *figures, target, met])
    return rows, rows[-1][-1] == "yes"


def inside(wanted: Sequence[str], runs: int, *, write: bool) -> int:
    """The benchmark, in a network namespace of its own."""
    pairs = [pair for pair in minilm.pairs() if pair.name in (wanted or AT_MOST_S)]
    rows, in_time = [], True
    with (
        tempfile.TemporaryDirectory(prefix="sluice-link-") as name,
        Link() as link,
        Fleet(Path(name), link) as fleet,
    ):
        for pair in pairs:
            found, met = rows_of(pair, fleet, runs)
            rows += found
            in_time = in_time and met
    headings = ["pair", "way", "bytes over the link", "median, s", "fastest, s", "times fewer bytes"]
    headings += ["times sooner", "target, s", "met"]
    table = Table("From the first byte asked for to the first prediction", headings, rows, text=(0, 1))
    print(table.markdown())
    print(f"{BITS_PER_S / 1e6:g} Mbit/s each way, no added delay, median of {runs}, on {report.machine()}")
    if write:
        note = (
            f"{BITS_PER_S / 1e6:g} Mbit/s each way (`tc tbf` on a veth pair), no added delay, gRPC without "
            f"TLS, median of {runs} runs; control plane, agent and client share the machine's cores. The "
            "delta was built before. The file over HTTP is only fetched: nothing is checked, stored or "
            "loaded. Times fewer bytes and sooner are relative to the file."
        )
        report.write_section("link", report.section("A capped link", "make bench-link", [note], [table]))
    return 0 if in_time else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", nargs="*", choices=[[], *AT_MOST_S], help="only these (default: all)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    arguments = parser.parse_args()
    if INSIDE in os.environ:
        with interruptible():
            return inside(arguments.pair, arguments.runs, write=arguments.write)
    if why := network.missing():
        print(f"SKIPPED, nothing was measured: {why}")
        return 0
    # In place of this process, so that whoever ends it ends the benchmark, which then removes what it made.
    command = ["unshare", "--net", sys.executable, "-m", "benchmarks.link", *sys.argv[1:]]
    return os.execvpe(command[0], command, os.environ | {INSIDE: "1"})


if __name__ == "__main__":
    sys.exit(main())
