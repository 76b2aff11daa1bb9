"""Helpers for tests of serving: a model of any duration, workers, the tritonclient process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from edge_tests.harness.models import write_onnx

START_S = 30.0
CLIENT_MODULE = "edge_tests.harness.triton_client"
EXTENSIONS_MODULE = "edge_tests.harness.triton_extensions"
ROOT = Path(__file__).resolve().parent.parent.parent


def start_worker(path: Path, model: str = "tiny", version: int = 1, **options: Any) -> Worker:
    form = path.suffix.removeprefix(".")
    return Worker.start(WorkerSpec(model=model, version=version, path=path, format=form, **options), START_S)


def slow_onnx(path: Path) -> Path:
    """A model with y = x, after as many turns of a loop as "steps" says: it takes as long as a test wants."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["state", "one"], ["next_state"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.INT64, []),
        ],
        [numpy_helper.from_array(np.array(1, np.int64), "one")],
    )
    return write_onnx(
        path,
        [
            helper.make_node("Squeeze", ["steps"], ["trips"]),
            helper.make_node("Loop", ["trips", "true", "zero"], ["counted"], body=body),
            helper.make_node("Sub", ["counted", "counted"], ["nothing"]),
            helper.make_node("Cast", ["nothing"], ["nought"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "nought"], ["y"]),
        ],
        inputs={"x": (TensorProto.FLOAT, ["batch", 2]), "steps": (TensorProto.INT64, [1])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 2])},
        constants=[
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.array(0, np.int64), "zero"),
        ],
    )


def slow_inputs(value: float, steps: int) -> dict[str, NDArray[Any]]:
    return {"x": np.full((1, 2), value, np.float32), "steps": np.array([steps], np.int64)}


def steps_for(worker: Worker, seconds: float) -> int:
    """How many steps of `slow_onnx` take about so long here and now."""
    steps = 20_000
    began = time.perf_counter()
    worker.infer(slow_inputs(0, steps), START_S)
    return max(1, int(steps * seconds / (time.perf_counter() - began)))


def kill(worker: Worker) -> None:
    """Kills a worker's process; returns once its handle knows."""
    os.kill(worker.pid, signal.SIGKILL)
    eventually(lambda: not worker.alive, "the death was noticed")


def eventually(condition: Callable[[], bool], what: str, within_s: float = START_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.005)


class TritonCommands:
    """The client process, one call at a time; with `extensions` the one for Triton's, see its module."""

    def __init__(self, address: str, *, extensions: bool = False, aio: bool = False) -> None:
        if extensions:
            arguments = ["--address", address, *(["--aio"] if aio else [])]
            self._process = _start_client(*arguments, module=EXTENSIONS_MODULE)
        else:
            self._process = _start_client("--address", address, "--commands")

    def ask(self, **command: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the client process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> TritonCommands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=START_S)


class TritonLoad:
    """The client process predicting in a loop; `lines` grows while it runs."""

    def __init__(
        self,
        address: str,
        model: str,
        samples: Mapping[str, NDArray[Any]],
        directory: Path,
        *options: str,
    ) -> None:
        archive = directory / f"samples-{model}.npz"
        with archive.open("wb") as file:
            np.savez(file, **samples)
        self.lines: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self._succeeded: Counter[str] = Counter()
        self._process = _start_client(
            "--address", address, "--model", model, "--input", str(archive), "--until-stdin-closes", *options
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def succeeded(self, version: str = "") -> int:
        """Requests answered so far, by any version or this one."""
        return self._succeeded[version] if version else self._succeeded.total()

    def failed(self) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if not line["ok"]]

    def stop(self) -> dict[str, Any]:
        """Ends the process; returns its summary."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join(START_S)
        code = self._process.wait(START_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        assert code == 0, f"the client process exited with {code}"
        return self.summary

    def __enter__(self) -> TritonLoad:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.stop()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line = json.loads(text)
            if "summary" in line:
                self.summary = line["summary"]
            else:
                self.lines.append(line)
                if line["ok"]:
                    self._succeeded[line["version"]] += 1


def _start_client(*arguments: str, module: str = CLIENT_MODULE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
