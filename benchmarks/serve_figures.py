"""What serving costs a box beside the inferences: memory, idle processor time and the start of a worker.

The agent is the real one with a control plane that is not there, so that it tries again and again. The cost
of a worker is held against ONNX Runtime alone: a Python process that loads the same model with NumPy and the
library and runs it once.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from agent.worker import Worker, WorkerSpec
from benchmarks.serve_models import Subject
from benchmarks.serve_peers import ROOT
from edge_tests.harness.agent import AgentProcess

SETTLE_S = 5.0
IDLE_S = 20.0
STARTS = 5
LOAD_S = 60.0
NOBODY = "127.0.0.1:9"  # the discard port
# What an installation has, where the harness is in a hurry.
SETTINGS = {"telemetry.interval_s": 60, "control.reconnect_max_s": 300}

# Loads and runs a model in nothing but ONNX Runtime; prints how long the load took, then waits.
_BARE = """
import sys, time
import numpy as np
import onnxruntime
began = time.monotonic()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.monotonic() - began, flush=True)
session.run(None, dict(np.load(sys.argv[2])))
print("ran", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Costs:
    """Medians.

    Attributes:
        agent_bytes: resident memory of an agent without models.
        agent_share: of one processor that it takes while idle, 0 to 1.
        worker_bytes: private memory of a worker beyond that of ONNX Runtime alone with the model.
        start_s: from the wish for a worker until it is ready, beyond the model's own load.
    """

    agent_bytes: float
    agent_share: float
    worker_bytes: float
    start_s: float


def costs(subject: Subject) -> Costs:
    """Measures them; `subject` is what the worker loads."""
    with tempfile.TemporaryDirectory() as directory:
        agent_bytes, agent_share = _agent(Path(directory))
        inputs = Path(directory) / "inputs.npz"
        np.savez(inputs, **subject.sample())
        rows = [_worker(subject, inputs) for _ in range(STARTS)]
    return Costs(
        agent_bytes,
        agent_share,
        statistics.median(row[0] for row in rows),
        statistics.median(row[1] for row in rows),
    )


def _agent(directory: Path) -> tuple[float, float]:
    """Resident bytes and share of a processor of an idle agent."""
    with AgentProcess(directory / "agent", NOBODY, "bench", settings=SETTINGS) as agent:
        assert agent.process is not None
        pid = agent.process.pid
        time.sleep(SETTLE_S)
        before, began = _ran_s(pid), time.monotonic()
        time.sleep(IDLE_S)
        share = (_ran_s(pid) - before) / (time.monotonic() - began)
        return float(psutil.Process(pid).memory_info().rss), share


def _worker(subject: Subject, inputs: Path) -> tuple[float, float]:
    """A worker's private bytes over the bare library's, and its start over the bare library's load."""
    with subprocess.Popen(
        [sys.executable, "-c", _BARE, str(subject.path), str(inputs)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as bare:
        assert bare.stdin is not None
        assert bare.stdout is not None
        load_s = float(bare.stdout.readline())
        bare.stdout.readline()
        bare_bytes = _private(bare.pid)
        bare.stdin.close()
    began = time.monotonic()
    worker = Worker.start(WorkerSpec(subject.name, 1, subject.path, "onnx"), LOAD_S)
    took_s = time.monotonic() - began
    try:
        worker.infer(subject.sample(), LOAD_S)
        return _private(worker.pid) - bare_bytes, took_s - load_s
    finally:
        worker.close(0)


def _ran_s(pid: int) -> float:
    """Processor time of a process's threads, seconds, finer than clock ticks."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text("ascii").split()[0]) for task in tasks) / 1e9


def _private(pid: int) -> float:
    return float(psutil.Process(pid).memory_full_info().uss)
