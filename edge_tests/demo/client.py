"""A predicting client beside one agent, as a user would run it: tritonclient in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_tests.demo.network import Array, accuracy

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 30.0
ANSWER_S = 60.0
PAUSE_S = 0.01  # between two requests of a client: load enough to notice a gap, light enough for two cores


@dataclass
class Tally:
    """What the client saw.

    Attributes:
        first_answer: when each version first answered, seconds since the epoch.
        requests: in all.
        failed: of them.
        errors: the texts of the failures, each once.
    """

    first_answer: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)


class PredictingClient:
    """Predicts without stopping until `stop`; a thread of ours reads what it prints.

    `wrapper` is a command line to put before the client's, e.g. to enter a network namespace.
    """

    def __init__(self, address: str, model: str, samples: Path, *, wrapper: Sequence[str] = ()) -> None:
        self.tally = Tally()
        self._process = subprocess.Popen(
            [
                *wrapper,
                *(sys.executable, "-m", "edge_tests.harness.triton_client", "--address", address),
                *("--model", model, "--input", str(samples), "--until-stdin-closes", "--no-answers"),
                *("--interval-s", str(PAUSE_S)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the demo, and the demo stops this
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line = json.loads(text)
            if "summary" in line:
                continue
            self.tally.requests += 1
            if line["ok"]:
                self.tally.first_answer.setdefault(line["version"], line["t"] + line["s"])
            else:
                self.tally.failed += 1
                if line["error"] not in self.tally.errors:
                    self.tally.errors.append(line["error"])

    def stop(self) -> Tally:
        """Lets the request in flight finish and returns what was seen."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_S)
        return self.tally


@dataclass(frozen=True)
class Question:
    """One batch with its right answers: images float32 [n, 64], labels int64 [n]."""

    model: str
    input_name: str
    output_name: str
    images: Array
    labels: Array


def served_accuracy(address: str, question: Question) -> tuple[str, float]:
    """Sends the whole batch; returns the version that answered and its share of right answers."""
    command = {
        "call": "infer",
        "model": question.model,
        "inputs": {question.input_name: {"datatype": "FP32", "data": question.images.tolist()}},
    }
    done = subprocess.run(
        [sys.executable, "-m", "edge_tests.harness.triton_client", "--address", address, "--commands"],
        cwd=ROOT,
        input=json.dumps(command) + "\n",
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=True,
    )
    answer = json.loads(done.stdout)
    if not answer["ok"]:
        raise RuntimeError(f"{address} refused the held-out images: {answer['error']}")
    outputs = np.array(answer["outputs"][question.output_name], np.float32)
    return answer["version"], accuracy(outputs, question.labels)
