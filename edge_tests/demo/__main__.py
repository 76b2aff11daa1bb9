"""The demo: one model update, end to end, on real input (`make demo`).

Trains a classifier in two versions, quantises both to int8 as ONNX and as TensorFlow Lite, starts a control
plane and three agents as processes, ships version 1, then version 2 while a client beside each agent keeps
predicting, and prints what it cost. Everything lives in a temporary directory that is removed at the end,
also after Ctrl-C; `--keep DIR` keeps it, with the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from edge_tests.demo import digits
from edge_tests.demo.client import PredictingClient, Question, served_accuracy
from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator
from fleet.profile import Profile

ROOT = Path(__file__).resolve().parents[2]
MODEL = "digits"
# Two boxes take the ONNX variant and one the TFLite variant, by the runtimes that they are allowed.
BOXES = {"box-1": "onnxruntime", "box-2": "onnxruntime", "box-3": "litert"}
COMMAND_S = 120.0
SETTLE_S = 1.0  # how long clients predict before and after the update

console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)


@dataclass(frozen=True)
class Outcome:
    """What the update cost one box. Sizes in bytes, times in seconds, accuracies 0 to 1."""

    box: str
    runtime: str
    v2_files: int
    v2_full: int
    v2_delta: int
    first_answer_s: float
    v1_accuracy: float
    v2_accuracy: float
    requests: int
    failed: int


def sluice(address: str, *arguments: str) -> None:
    """Runs one `sluice` command as an operator would, on this terminal; an empty address is left out."""
    console.print(f"[bold]$ sluice {' '.join(arguments)}[/bold]", soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-m", "fleet.cli.main", *(("--control", address) if address else ()), *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
        timeout=COMMAND_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"`sluice {' '.join(arguments)}` ended with {done.returncode}")


def write_recipe(models: digits.DemoModels, version: int) -> Path:
    """The model.yaml of a version: two variants, each with golden inputs and outputs."""
    lines = [f"model: {MODEL}", "variants:"]
    for name in models.variant_names:
        lines.append(f"  - name: {name}")
        lines.append(f"    file: {models.model_path(version, name).name}")
        lines.append(f"    golden: {models.golden_path(version, name).name}")
    path = models.model_path(version, models.variant_names[0]).with_name("model.yaml")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def push_and_roll_out(
    address: str, models: digits.DemoModels, version: int, agents: list[AgentProcess]
) -> None:
    """Publishes a version and waits until every box has it loaded."""
    sluice(address, "model", "push", "-f", str(write_recipe(models, version)))
    sluice(address, "rollout", "start", f"{MODEL}@{version}", "--watch")
    for agent in agents:
        agent.wait_for_version(MODEL, version)


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM end the demo as Ctrl-C does, so that everything started is stopped and removed."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(directory: Path) -> list[Outcome]:
    """The whole demo below `directory`; stops all it started, whatever happens."""
    console.print("[bold]training[/bold] version 1, fine-tuning version 2, quantising both to int8 …")
    models = digits.build(directory / "models")
    question = Question(MODEL, models.input_name, models.output_name, models.images, models.labels)
    samples = directory / "held-out.npz"
    np.savez(samples, **{models.input_name: models.images})

    # One operator; the keys are sealed with a passphrase that a person would be asked for.
    os.environ |= {
        "SLUICE_PROFILE": str(directory / "operator"),
        "SLUICE_TRUST": str(directory / "trust"),
        "SLUICE_PASSPHRASE": secrets.token_hex(16),
    }
    sluice("", "control", "init", "--data", str(directory / "control"))
    with ExitStack() as stack:
        control = stack.enter_context(ControlPlane(directory / "control"))
        console.print(f"control plane at {control.address}, process {_pid(control)}")
        agents = []
        for name, runtime in BOXES.items():
            agent = AgentProcess(
                directory / name,
                control.address,
                name,
                runtimes=[runtime],
                settings=control.enrolling(name) | {"trust.root": os.environ["SLUICE_TRUST"] + "/root.json"},
                enrolled=False,
                start=False,
            )
            stack.enter_context(agent)
            agent.start()
            console.print(f"agent {name} ({runtime}) serves at {agent.address}, process {_pid(agent)}")
            agents.append(agent)

        push_and_roll_out(control.address, models, 1, agents)
        before = {agent.device_id: served_accuracy(agent.address, question) for agent in agents}

        clients = {}
        for agent in agents:
            client = PredictingClient(agent.address, MODEL, samples)
            stack.callback(client.stop)
            clients[agent.device_id] = client
        _wait_until_answered(clients, "1")
        time.sleep(SETTLE_S)

        console.print("three clients predict without stopping while version 2 comes …")
        began = time.time()
        push_and_roll_out(control.address, models, 2, agents)
        _wait_until_answered(clients, "2")
        time.sleep(SETTLE_S)
        tallies = {name: client.stop() for name, client in clients.items()}
        after = {agent.device_id: served_accuracy(agent.address, question) for agent in agents}

        outcomes = []
        for agent in agents:
            name = agent.device_id
            report = agent.model(MODEL)
            if (before[name][0], after[name][0]) != ("1", "2"):
                raise RuntimeError(
                    f"{name} answered by {before[name][0]} then {after[name][0]}, not 1 then 2"
                )
            for error in tallies[name].errors:
                console.print(f"[red]{name}: a request failed: {error}[/red]")
            outcomes.append(
                Outcome(
                    box=name,
                    runtime=BOXES[name],
                    v2_files=models.model_path(2, report.variant).stat().st_size
                    + models.golden_path(2, report.variant).stat().st_size,
                    v2_full=full_bytes(control.address, report.variant),
                    v2_delta=report.fetched_bytes,
                    first_answer_s=tallies[name].first_answer["2"] - began,
                    v1_accuracy=before[name][1],
                    v2_accuracy=after[name][1],
                    requests=tallies[name].requests,
                    failed=tallies[name].failed,
                )
            )
        return outcomes


def full_bytes(address: str, variant: str) -> int:
    """What version 2 costs a box that holds nothing: the full copies that the control plane offers."""
    with Operator(address, channel=Profile.open().credentials().channel(address)) as operator:
        return sum(file.full.size for file in operator.plan(MODEL, 2, variant=variant).files)


def _pid(owner: ControlPlane | AgentProcess) -> int:
    assert owner.process is not None
    return owner.process.pid


def _wait_until_answered(clients: dict[str, PredictingClient], version: str) -> None:
    deadline = time.monotonic() + COMMAND_S
    for name, client in clients.items():
        while version not in client.tally.first_answer:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name}: version {version} never answered; {client.tally.errors}")
            time.sleep(0.01)


def show(outcomes: list[Outcome]) -> None:
    """The table that the demo ends with."""
    table = Table(
        title="One update: digits@1 → digits@2", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    table.add_column("box")
    headings = ("files of v2", "v2 in full\nas delta", "first answer\nby v2", "accuracy\nas served")
    for heading in (*headings, "requests\nfailed"):
        table.add_column(heading, justify="right")
    for row in outcomes:
        table.add_row(
            f"{row.box}\n{row.runtime}",
            f"{row.v2_files:,} B",
            f"{row.v2_full:,} B\n{row.v2_delta:,} B",
            f"{row.first_answer_s:.1f} s",
            f"v1 {row.v1_accuracy:.1%}\nv2 {row.v2_accuracy:.1%}",
            f"{row.requests:,}\n{row.failed}",
        )
    console.print(table)
    console.print(
        "Files: model and golden inputs as they are. In full: compressed, for a box that holds nothing; as "
        "delta: what crossed the wire. The first answer by v2 is counted from the start of `sluice model "
        "push`. Accuracy on 360 held-out digits."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="keep models, state and logs in this directory")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    arguments = parser.parse_args()
    start = time.monotonic()
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="sluice-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with interruptible():
            outcomes = run(directory)
    except KeyboardInterrupt:
        console.print("interrupted: everything that was started has been stopped")
        return 130
    finally:
        if arguments.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    show(outcomes)
    console.print(f"{time.monotonic() - start:.0f} s in all, {os.cpu_count()} cores")
    if arguments.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    failed = sum(outcome.failed for outcome in outcomes)
    if failed:
        console.print(f"[red]{failed} requests failed[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
