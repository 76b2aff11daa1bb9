"""Swaps and crashes under load: what callers notice of them. `make bench-swap`.

Swaps: one model under open-loop load is turned between two versions whose answers differ, so that each answer
is attributable to one of them; every change is a whole activation (files hashed, worker, warm-up, golden
inputs, batches tried, slots written, turn, soak, old worker drained). Counted: failed and wrong requests, the
99th percentile of requests due during a change and outside, resident memory after the tenth and the last.

Kills: several models, so that kills of one are KILL_EVERY_S apart and thus no crash loop; kill -9 of one
worker after the other under load. Counted: failed requests, all of which must have been in that worker when
it died; the time until the model answers again; whether the agent is the same process as before.

Ends with 1 when a request failed or was wrong that must not, or memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from agent.limits import CRASH_LOOP_DEATHS, CRASH_LOOP_WINDOW_S, RESTART_WAIT_S
from benchmarks import report
from benchmarks.report import Table
from edge_tests.harness.models import golden, samples, tiny_onnx
from runtimes import registry

SWAPS, KILLS, KILLED_MODELS = 1000, 200, 20
SWAP_P99_RATIO = 1.5  # during a change to outside; wanted
SWAP_MEMORY_RATIO = 1.05  # after the last change to after the tenth; at most
RATE = 20.0  # requests a second, in all
PAUSE_S = 0.4  # at least, between two changes; else as long as the change took: both see the same other load
KILL_EVERY_S = CRASH_LOOP_WINDOW_S / (CRASH_LOOP_DEATHS - 1) + 1.0
SETTLED = 10  # changes after which memory is first looked at
SLACK_S = 0.1  # between a kill's time as noted here and the kernel's doing it
HIDDEN, ROWS = 256, 16
ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 180.0


@dataclass
class Swapped:
    """What the swaps came to. Times in seconds, memory in bytes."""

    swaps: int
    requests: int
    failed: int
    wrong: int
    versions: dict[int, int]
    inside: list[float] = field(default_factory=list)  # of requests due during a change
    outside: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)  # from beginning to turn
    memory: tuple[int, int] = (0, 0)  # agent and workers, after the tenth and after the last
    descriptors: tuple[int, int] = (0, 0)
    errors: list[str] = field(default_factory=list)


@dataclass
class Killed:
    """What the kills came to."""

    kills: int
    requests: int
    failed: int
    wrong: int
    late: int  # failures after RESTART_WAIT_S, because the restart took longer than requests wait for it
    strange: int  # failures that are neither those nor of a request that the killed worker was running
    back: list[float]  # seconds from a kill to the beginning of an answer
    same_agent: bool
    errors: list[str]


class Agent:
    """The server process and its load."""

    def __init__(self, folder: Path, models: Sequence[str], rate: float) -> None:
        self.folder = folder
        paths = {
            number: tiny_onnx(folder / f"{number}.onnx", seed=number, hidden=HIDDEN) for number in (1, 2)
        }
        inputs = samples(ROWS)
        outputs = []
        goldens = {}
        for number, path in paths.items():
            goldens[number] = golden(folder / f"golden-{number}.npz", path, samples(4))
            with registry.load(path) as model:
                outputs.append(model.run(inputs)["y"])
        self.samples, self.result = folder / "samples.npz", folder / "result.npz"
        np.savez(self.samples, inputs=inputs["x"], outputs=np.stack(outputs))
        self.models = list(models)
        self.rate = rate
        wanted = {
            "models": self.models,
            "versions": {number: str(path) for number, path in paths.items()},
            "golden": {number: str(path) for number, path in goldens.items()},
        }
        self.log = (folder / "server.log").open("wb")
        self.server = _start(
            "benchmarks.swap_server", str(folder / "box"), json.dumps(wanted), stderr=self.log
        )
        self.address: str = json.loads(self._line())["address"]

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        if not line:
            log = (self.folder / "server.log").read_text("utf-8", "replace")
            raise RuntimeError(f"the server ended: {log[-3000:]}")
        return line

    @contextmanager
    def load(self, seed: int) -> Iterator[None]:
        """Load while the block runs; `loaded` then has what came of it."""
        arguments = (self.address, str(self.rate), str(seed), json.dumps(self.models))
        client = _start("benchmarks.swap_load", *arguments, str(self.samples), str(self.result))
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        time.sleep(1)
        try:
            yield
        finally:
            time.sleep(1)
            client.communicate(timeout=WAIT_S)

    def loaded(self) -> dict[str, Any]:
        with np.load(self.result) as archive:
            return {name: archive[name] for name in archive.files}

    def memory(self) -> int:
        """Resident bytes of the agent and its workers."""
        process = psutil.Process(self.server.pid)
        return sum(each.memory_info().rss for each in (process, *process.children()))

    def descriptors(self) -> int:
        return psutil.Process(self.server.pid).num_fds()

    def close(self) -> None:
        self.server.communicate(timeout=WAIT_S)
        self.log.close()


def _start(module: str, *arguments: str, stderr: Any = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def swaps(folder: Path, count: int, rate: float = RATE, pause_s: float = PAUSE_S) -> Swapped:
    """Turns one model `count` times under load."""
    agent = Agent(folder, ["m0"], rate)
    windows, memory, descriptors = [], [0, 0], [0, 0]
    try:
        with agent.load(seed=1):
            for number in range(count):
                window = agent.ask(op="swap", model="m0", version=2 - number % 2)
                windows.append(window)
                time.sleep(max(pause_s, window["ended"] - window["began"]))
                if number + 1 in (min(SETTLED, count), count):
                    at = 0 if number + 1 < count else 1
                    memory[at], descriptors[at] = agent.memory(), agent.descriptors()
                if sys.stderr.isatty() and number % 10 == 9:
                    sys.stderr.write(f"\r{number + 1} swaps")
        seen = agent.loaded()
    finally:
        agent.close()
    due, seconds = seen["due"], seen["seconds"]
    inside = np.zeros(len(due), bool)
    for window in windows:
        inside |= (due >= window["began"]) & (due <= window["ended"])
    answered = seen["version"] > 0
    return Swapped(
        swaps=count,
        requests=int(seen["sent"]),
        failed=int(seen["sent"]) - int(answered.sum()),
        wrong=int((answered & ~seen["right"]).sum()),
        versions={number: int((seen["version"] == number).sum()) for number in (1, 2)},
        inside=list(seconds[inside & answered]),
        outside=list(seconds[~inside & answered]),
        changes=[window["turned"] - window["began"] for window in windows],
        memory=(memory[0], memory[1]),
        descriptors=(descriptors[0], descriptors[1]),
        errors=[str(text) for text in seen["errors"]],
    )


def kills(
    folder: Path,
    count: int,
    models: int = KILLED_MODELS,
    rate: float = RATE,
    every_s: float = KILL_EVERY_S,
) -> Killed:
    """Kills `count` workers under load, each model's at least `every_s` apart."""
    names = [f"m{number}" for number in range(models)]
    agent = Agent(folder, names, rate)
    process = psutil.Process(agent.server.pid)
    born = process.create_time()
    killed: list[tuple[float, int]] = []
    try:
        with agent.load(seed=2):
            for number in range(count):
                model = number % models
                wait_s = every_s / models
                if number >= models:
                    wait_s = killed[number - models][0] + every_s - time.monotonic()
                time.sleep(max(0.0, wait_s))
                pid = agent.ask(op="workers")["workers"][names[model]]
                killed.append((time.monotonic(), model))
                os.kill(pid, signal.SIGKILL)
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{number + 1} kills")
            time.sleep(RESTART_WAIT_S)
            same = process.is_running() and process.create_time() == born
        seen = agent.loaded()
    finally:
        agent.close()
    due, seconds, which, answered = seen["due"], seen["seconds"], seen["model"], seen["version"] > 0
    ended = due + seconds
    texts = [str(text) for text in seen["errors"]]
    running = sum("UNAVAILABLE" in text and "it was running this request" in text for text in texts)
    late = sum("UNAVAILABLE" in text and "is being started again" in text for text in texts)
    amid = sum(
        any(
            model == which[at] and due[at] <= moment + SLACK_S and moment <= ended[at]
            for moment, model in killed
        )
        for at in np.flatnonzero(~answered)
    )
    back = []
    for moment, model in killed:
        later = (which == model) & answered & (due > moment)
        back.append(float((ended[later] - moment).min()) if later.any() else float("inf"))
    return Killed(
        kills=count,
        requests=int(seen["sent"]),
        failed=int(seen["sent"]) - int(answered.sum()),
        wrong=int((answered & ~seen["right"]).sum()),
        late=late,
        strange=max(len(texts) - running - late, len(texts) - late - amid),
        back=back,
        same_agent=same,
        errors=texts,
    )


def percentile(seconds: Sequence[float], share: float) -> float:
    return float(np.quantile(seconds, share)) if len(seconds) else float("nan")


def tables(swapped: Swapped | None, killed: Killed | None) -> list[Table]:
    found = []
    if swapped is not None:
        p99 = [percentile(swapped.inside, 0.99), percentile(swapped.outside, 0.99)]
        growth = swapped.memory[1] / swapped.memory[0]
        rows = [
            ("requests, failed, wrong", "0 failed, 0 wrong",
             f"{swapped.requests:,}, {swapped.failed}, {swapped.wrong}"),
            ("answers of version 1, of version 2", "all",
             " and ".join(f"{n:,}" for n in swapped.versions.values())),
            ("p50 during a change and outside, ms", "",
             f"{percentile(swapped.inside, 0.5) * 1000:.2f}, {percentile(swapped.outside, 0.5) * 1000:.2f}"),
            ("p99 during a change and outside, ms", f"at most {SWAP_P99_RATIO} times",
             f"{p99[0] * 1000:.2f}, {p99[1] * 1000:.2f}: {p99[0] / p99[1]:.2f} times"),
            ("resident memory after the 10th and the last, MB", f"at most {SWAP_MEMORY_RATIO} times",
             f"{swapped.memory[0] / 1e6:.1f}, {swapped.memory[1] / 1e6:.1f}: {growth:.3f} times"),
            ("descriptors of the agent, then", "", f"{swapped.descriptors[0]}, {swapped.descriptors[1]}"),
            ("from the beginning of a change to its turn, median and most, s", "",
             f"{statistics.median(swapped.changes):.2f}, {max(swapped.changes):.2f}"),
        ]  # fmt: skip
        found.append(Table(f"{swapped.swaps:,} swaps", ("figure", "wanted", "measured"), rows, text=(0, 1)))
    if killed is not None:
        rows = [
            ("requests, failed", "only those that ran", f"{killed.requests:,}, {killed.failed}"),
            ("waited too long for a restart, failed otherwise, wrong", "0, 0, 0",
             f"{killed.late}, {killed.strange}, {killed.wrong}"),
            ("until the model answers again, median and most, s", f"at most {RESTART_WAIT_S:g}",
             f"{statistics.median(killed.back):.2f}, {max(killed.back):.2f}"),
            ("the agent is the same process", "yes", "yes" if killed.same_agent else "NO"),
        ]  # fmt: skip
        title = f"kill -9 of a worker {killed.kills:,} times"
        found.append(Table(title, ("figure", "wanted", "measured"), rows, text=(0, 1)))
    return found


def sound(swapped: Swapped | None, killed: Killed | None) -> bool:
    """What must hold on any machine, however busy."""
    good = True
    if swapped is not None:
        good &= not swapped.failed and not swapped.wrong
        good &= swapped.memory[1] <= SWAP_MEMORY_RATIO * swapped.memory[0]
    if killed is not None:
        good &= not killed.late and not killed.strange and not killed.wrong and killed.same_agent
        good &= max(killed.back) <= RESTART_WAIT_S
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=SWAPS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    arguments = parser.parse_args()
    swapped = killed = None
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="sluice-swaps-") as name:
        for part in ("swaps", "kills"):
            (Path(name) / part).mkdir()
        if arguments.swaps:
            swapped = swaps(Path(name) / "swaps", arguments.swaps, arguments.rate)
            load.append(os.getloadavg()[0])
        if arguments.kills:
            killed = kills(Path(name) / "kills", arguments.kills, rate=arguments.rate)
            load.append(os.getloadavg()[0])
    made = tables(swapped, killed)
    for table in made:
        print(table.markdown())
    for found in (swapped, killed):
        for text in (found.errors if found is not None else [])[:5]:
            print(f"error: {text}")
    averages = ", ".join(f"{each:.1f}" for each in load)
    print(f"on {report.machine()}; load average before and after each part: {averages}")
    if arguments.write:
        where = (
            f"Open loop at {arguments.rate:g} requests a second on a network of {HIDDEN} hidden units. A"
            ' latency begins when its request was due; "during a change" is from the beginning of an'
            " activation to the end of the old worker. Memory is that of the agent and its workers. Front,"
            " router, workers, supervisor, slots and activation are the agent's, in a process without a"
            " control plane."
        )
        spread = f"Kills are spread over {KILLED_MODELS} models: those of one are {KILL_EVERY_S:g} s apart."
        busy = f"Load average of the machine before and after each part: {averages}."
        body = report.section("Swaps and crashes under load", "make bench-swap", [where, spread, busy], made)
        report.write_section("swaps", body)
    return 0 if sound(swapped, killed) else 1


if __name__ == "__main__":
    sys.exit(main())
