"""Serving beside its peers: `make bench-serve`, or `python -m benchmarks.serve [--seconds 4] [--write]`.

Every server is started, and they are measured in turns, round after round, so that whatever else the machine
does falls on all of them: closed loop with 1, 8 and 32 clients; then open loop at 80 % of the server's own
capacity (its best closed-loop rate), and at one rate for all, 80 % of the slowest server's capacity. The
figures are medians over the rounds; the client is the same for all (serve_load.py). A server or model that is
not here is left out with the reason. Then what the project holds itself to is printed, with what an agent and
a worker cost (serve_figures.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console

from benchmarks import serve_figures, serve_models, serve_peers, serve_server
from benchmarks.report import Table, machine, section, write_section
from benchmarks.serve_figures import Costs
from benchmarks.serve_models import Subject
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

OURS, SHARED, BARE = "sluice", "sluice, shared memory", "bare gRPC"
MLSERVER, PYTRITON = "MLServer", "pytriton"
NONE = "-"
CLIENTS = (1, 8, 32)
SHARE = 0.8  # of a capacity, for open loops
IN_PROCESS_S = 1.0
DIGITS = {"": 4, "ms": 3, "%": 3}  # shown of a unit's figures; else 2
NOTE = (
    "The servers run beside each other and are measured in turns; figures are medians over the rounds. On a "
    "machine that others use too, ratios hold better than times."
)
LOAD_EXTRA_S = 120.0

Found = dict[str, float]
Start = Callable[[Sequence[Subject], int, Path], AbstractContextManager[str]]
SERVERS: dict[str, Start] = {
    OURS: partial(serve_peers.ours, "ours"),
    BARE: partial(serve_peers.ours, "bare"),
    MLSERVER: serve_peers.mlserver,
    PYTRITON: serve_peers.pytriton,
}


MODELS: dict[str, Callable[[Path], Subject]] = {
    "mlp": serve_models.mlp,
    "cnn": serve_models.cnn,
    "minilm": serve_models.minilm,
    "minilm_short": serve_models.minilm_short,
    "minilm_alone": serve_models.minilm_alone,
}


@dataclass
class Results:
    """Medians to be: by model, server and kind of load ("1", "8", "32", "own", "equal")."""

    runs: dict[tuple[str, str, str], list[Found]] = field(default_factory=lambda: defaultdict(list))
    in_process: dict[str, Found] = field(default_factory=dict)
    cosine: float | None = None
    costs: Costs | None = None

    def of(self, model: str, server: str, load: str) -> Found | None:
        runs = self.runs.get((model, server, load))
        if not runs:
            return None
        return {name: statistics.median(run[name] for run in runs) for name in runs[0]}

    def capacity(self, model: str, server: str) -> float:
        return max((found["rate"] for c in CLIENTS if (found := self.of(model, server, str(c)))), default=0.0)


def load(address: str, requests: Sequence[Path], seconds: float, **wanted: object) -> Found:
    """One run of serve_load.py."""
    order = json.dumps(
        {"address": address, "requests": [str(each) for each in requests], "seconds": seconds, **wanted}
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve_load", order],
        cwd=serve_peers.ROOT,
        capture_output=True,
        text=True,
        timeout=seconds + LOAD_EXTRA_S,
        check=True,
    )
    found: Found = json.loads(done.stdout)
    found["rate"] = found["requests"] / found["seconds"]
    return found


def in_process(subject: Subject, threads: int) -> Found:
    """ONNX Runtime called directly; milliseconds."""
    session, x = serve_server.session(subject.path, threads), subject.sample()
    spent: list[float] = []
    end = time.perf_counter() + IN_PROCESS_S
    while (began := time.perf_counter()) < end or len(spent) < 20:
        session.run(None, x)
        spent.append((time.perf_counter() - began) * 1000)
    spent.sort()
    return {"p50": spent[len(spent) // 2], "p99": spent[len(spent) * 99 // 100]}


def write_requests(subject: Subject, directory: Path) -> list[Path]:
    """Requests with one sample each, one for each length of the model's; returns their files."""
    made = []
    for number, length in enumerate(subject.lengths or (0,)):
        request = pb.ModelInferRequest(model_name=subject.name)
        for name, array in subject.sample(number, length).items():
            datatype = "INT64" if array.dtype == np.int64 else "FP32"
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        made.append(directory / f"{subject.name}-{number}.request")
        made[-1].write_bytes(request.SerializeToString())
    return made


def write_shared(subject: Subject, path: Path, offset: int) -> Path:
    """A request whose only input lies at an offset of the region of the model's name; returns its file."""
    ((name, x),) = subject.sample().items()
    request = pb.ModelInferRequest(model_name=subject.name)
    parameters = request.inputs.add(name=name, datatype="FP32", shape=x.shape).parameters
    parameters["shared_memory_region"].string_param = subject.name
    parameters["shared_memory_offset"].int64_param = offset
    parameters["shared_memory_byte_size"].int64_param = x.nbytes
    path.write_bytes(request.SerializeToString())
    return path


def nbytes(subject: Subject) -> int:
    """Of a sample."""
    return sum(array.nbytes for array in subject.sample().values())


def share(subject: Subject, address: str, undo: ExitStack) -> str:
    """Makes and registers a region with room for each client's sample; returns its key."""
    key = f"sluice-bench-{os.getpid()}-{subject.name}"
    size = nbytes(subject) * max(CLIENTS)
    path = Path("/dev/shm") / key
    undo.callback(path.unlink, missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    channel = undo.enter_context(grpc.insecure_channel(address))
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    stub.SystemSharedMemoryRegister(
        pb.SystemSharedMemoryRegisterRequest(name=subject.name, key=key, byte_size=size)
    )
    return key


def measure(
    subjects: Sequence[Subject], servers: dict[str, Start], options: argparse.Namespace, say: Console
) -> Results:
    results = Results()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        addresses: dict[str, str] = {}
        for name, start in servers.items():
            try:
                known = [each for each in subjects if each.batches or name == OURS]
                addresses[name] = running.enter_context(start(known, options.threads, Path(scratch)))
            except serve_peers.CannotRun as why:
                say.print(f"[yellow]{name} is left out: {why}")
        for subject in subjects:
            results.in_process[subject.name] = in_process(subject, options.threads)
            sent = write_requests(subject, Path(scratch))
            shares = OURS in addresses and len(subject.inputs) == 1
            key = share(subject, addresses[OURS], running) if shares else ""
            beside = {name: address for name, address in addresses.items() if subject.batches or name == OURS}
            for number in range(options.rounds):
                for clients in CLIENTS:
                    for name, address in beside.items():
                        run = load(address, sent, options.seconds, clients=clients)
                        results.runs[subject.name, name, str(clients)].append(run)
                    if key:
                        x = nbytes(subject)
                        files = [
                            str(write_shared(subject, Path(scratch) / f"{c}.shared", c * x))
                            for c in range(clients)
                        ]
                        shared = {"key": key, "requests": files, "bytes": x}
                        run = load(addresses[OURS], sent, options.seconds, clients=clients, shared=shared)
                        results.runs[subject.name, SHARED, str(clients)].append(run)
                say.print(f"{subject.name}: round {number + 1} of {options.rounds}, closed loops done")
            if not subject.batches:
                continue
            slowest = min(results.capacity(subject.name, name) for name in beside)
            for _ in range(options.rounds):
                for name, address in beside.items():
                    own = SHARE * results.capacity(subject.name, name)
                    for kind, rate in (("own", own), ("equal", SHARE * slowest)):
                        run = load(address, sent, options.seconds, rate=rate)
                        results.runs[subject.name, name, kind].append({**run, "offered": rate})
    return results


def tables(results: Results, subjects: Sequence[Subject], threads: int) -> list[Table]:
    names = [*SERVERS]
    names.insert(1, SHARED)
    made = []
    for subject in subjects:
        direct = results.in_process[subject.name]
        rows = [["ONNX Runtime in process", f"{direct['p50']:.3f} / {direct['p99']:.3f}", "", "", "", ""]]
        for name in names:
            cells = [name]
            for kind in (*map(str, CLIENTS), "own", "equal"):
                found = results.of(subject.name, name, kind)
                if found is None:
                    cells.append(NONE)
                    continue
                cell = f"{found['p50']:.2f} / {found['p99']:.2f}"
                if "offered" in found:
                    cell += f" / {found['p999']:.2f} at {found['offered']:.0f}/s"
                elif kind != "1":
                    cell += f", {found['rate']:.0f}/s"
                if found["failed"]:
                    cell += f", {found['failed']:.0f} failed"
                cells.append(cell)
            if set(cells[1:]) != {NONE}:
                rows.append(cells)
        headings = [
            "p50 / p99 (open loop: / p99.9), ms",
            *(f"{count} client{'s' if count > 1 else ''}" for count in CLIENTS),
            "open loop, 80 % of its own capacity",
            "open loop, one rate",
        ]
        made.append(Table(f"{subject.name}, {threads} thread(s) an inference", headings, rows))
    return made


def ratios(results: Results, subjects: Sequence[Subject]) -> Table:
    """What issue 4 asks for, and what was measured."""
    rows: list[list[str]] = []

    def add(what: str, wanted: str, value: float | None, unit: str, *, most: bool) -> None:
        bound = float(wanted)
        met = NONE if value is None else ("yes" if (value <= bound if most else value >= bound) else "no")
        shown = "not measured" if value is None else f"{value:.{DIGITS.get(unit, 2)}f} {unit}".strip()
        rows.append([what, f"{'≤' if most else '≥'} {wanted} {unit}".strip(), shown, met])

    def p50(model: str, server: str) -> float | None:
        found = results.of(model, server, "1")
        return None if found is None else found["p50"]

    def faster(model: str, server: str, than: str) -> float | None:
        mine, theirs = results.of(model, server, "8"), results.of(model, than, "8")
        return None if mine is None or theirs is None or not theirs["rate"] else mine["rate"] / theirs["rate"]

    def above(model: str, server: str, base: float | None) -> float | None:
        mine = p50(model, server)
        return None if mine is None or base is None else mine - base

    have = {subject.name for subject in subjects}
    if "mlp" in have:
        add("mlp, 1 client: over bare gRPC", "0.10", above("mlp", OURS, p50("mlp", BARE)), "ms", most=True)
    if "cnn" in have:
        add("cnn, 1 client: over bare gRPC", "0.20", above("cnn", OURS, p50("cnn", BARE)), "ms", most=True)
        direct = results.in_process["cnn"]["p50"]
        what = "cnn, 1 client, shared memory: over ONNX Runtime"
        add(what, "0.75", above("cnn", SHARED, direct), "ms", most=True)
    for model in sorted(subject.name for subject in subjects if subject.batches):
        add(
            f"{model}, 8 clients: rate to MLServer", "2.5", faster(model, OURS, MLSERVER), "times", most=False
        )
    for model, server, wanted in (("mlp", OURS, "2"), ("cnn", OURS, "1.2"), ("cnn", SHARED, "2")):
        if model in have:
            via = ", shared memory" if server == SHARED else ""
            what = f"{model}, 8 clients{via}: rate to pytriton"
            add(what, wanted, faster(model, server, PYTRITON), "times", most=False)
    if "mlp" in have:
        add("mlp, 8 clients: rate to bare gRPC", "1", faster("mlp", OURS, BARE), "times", most=False)
    short, alone = (results.of(f"minilm_{name}", OURS, "8") for name in ("short", "alone"))
    if short is not None and alone is not None:
        gain = short["rate"] / alone["rate"]
        add("minilm, 8 clients, at most 16 tokens: to unbatched", "1.6", gain, "times", most=False)
        add(
            "minilm: least cosine of a batched answer",
            str(serve_server.COSINE_MIN),
            results.cosine,
            "",
            most=False,
        )
    if results.costs is not None:
        found = results.costs
        add("agent alone: resident memory", "80", found.agent_bytes / 1e6, "MB", most=True)
        add("agent alone: one processor's time", "0.3", found.agent_share * 100, "%", most=True)
        add("a worker's memory over ONNX Runtime's", "8", found.worker_bytes / 1e6, "MB", most=True)
        add("a worker's start beyond the model's load", "0.3", found.start_s, "s", most=True)
    return Table("What was asked for (p50, requests a second)", ["figure", "wanted", "measured", "met"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of one inference, for every server")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--servers", default=",".join(SERVERS), help="names, separated by commas")
    parser.add_argument("--write", action="store_true", help="also into docs/benchmarks.md")
    options = parser.parse_args()
    say = Console()
    with tempfile.TemporaryDirectory() as directory:
        subjects = []
        for name in options.models.split(","):
            try:
                subjects.append(MODELS[name](Path(directory)))
            except FileNotFoundError as why:
                say.print(f"[yellow]{name} is left out: {why}")
        servers = {name: start for name, start in SERVERS.items() if name in options.servers.split(",")}
        results = measure(subjects, servers, options, say)
        for subject in subjects:
            if subject.name == "minilm_short":
                results.cosine = serve_models.least_cosine(subject)
            elif subject.name == "mlp":
                results.costs = serve_figures.costs(subject)
    made = [*tables(results, subjects, options.threads), ratios(results, subjects)]
    say.print(machine())
    for table in made:
        say.print(table.rich())
    if options.write:
        body = section("Serving", "make bench-serve ARGS=--write", [NOTE], made)
        write_section("serving", body)


if __name__ == "__main__":
    main()
