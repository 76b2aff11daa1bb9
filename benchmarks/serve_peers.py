"""The servers that ours is measured beside: each started, and stopped; or a word why it cannot be.

MLServer and pytriton have dependencies of their own, so they live in virtual environments of their own
(`make bench-serve` makes them below .cache). Both run the same ONNX files in ONNX Runtime with the same
number of threads, written as their manuals show it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc

from benchmarks.serve_models import Subject
from benchmarks.serve_server import ALONE
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parents[1]
START_S = 90.0
STOP_S = 10.0

# What both peers run, in a file of its own so that their environments need nothing of ours.
_MLSERVER_RUNTIME = """
import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Ort(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        path = self.settings.parameters.uri
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        inputs = {item.name: NumpyCodec.decode_input(item) for item in payload.inputs}
        (y,) = self.session.run(None, inputs)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output(name="y", payload=y)]
        )
"""
_PYTRITON_SERVER = """
import json, sys
import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

wanted = json.loads(sys.argv[1])
config = TritonConfig(
    http_port=wanted["ports"][0], grpc_port=wanted["ports"][1], allow_metrics=False, log_verbose=0
)


def tensor(item):
    dtype = {"FP32": np.float32, "INT64": np.int64}[item["datatype"]]
    return Tensor(name=item["name"], dtype=dtype, shape=tuple(item["shape"]))


def bind(triton, model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = wanted["threads"]
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model["path"], options, providers=["CPUExecutionProvider"])

    @batch
    def infer(**inputs):
        (y,) = session.run(None, inputs)
        return {model["output"]["name"]: y}

    triton.bind(
        model_name=model["name"],
        infer_func=infer,
        inputs=[tensor(item) for item in model["inputs"]],
        outputs=[tensor(model["output"])],
        config=ModelConfig(max_batch_size=64),
        strict=False,
    )


with Triton(config=config) as triton:
    for model in wanted["models"]:
        bind(triton, model)
    triton.run()
    print("ready", flush=True)
    sys.stdin.read()
"""


class CannotRun(Exception):
    """Why a server is left out."""


@contextmanager
def ours(kind: str, subjects: Sequence[Subject], threads: int, directory: Path) -> Iterator[str]:
    """`ours` or `bare` of serve_server.py; yields its address."""
    del directory
    models = [f"{each.name}={each.path}{'' if each.batches else ALONE}" for each in subjects]
    command = [sys.executable, "-m", "benchmarks.serve_server", kind, str(threads), *models]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise CannotRun(f"it ended with code {process.wait(STOP_S)}")
        try:
            yield address
        finally:
            process.stdin.close()
            _end(process)


@contextmanager
def mlserver(subjects: Sequence[Subject], threads: int, directory: Path) -> Iterator[str]:
    """MLServer with a runtime of six lines, one inference process, defaults otherwise; yields its address."""
    python = _python("mlserver-venv")
    home = directory / "mlserver"
    home.mkdir(exist_ok=True)
    (home / "ort_runtime.py").write_text(_MLSERVER_RUNTIME.replace("THREADS", str(threads)), "utf-8")
    ports = _free_ports(3)
    settings = {"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2]}
    (home / "settings.json").write_text(json.dumps({**settings, "debug": False}), "utf-8")
    for subject in subjects:
        folder = home / subject.name
        folder.mkdir(exist_ok=True)
        model = {
            "name": subject.name,
            "implementation": "ort_runtime.Ort",
            "parameters": {"uri": str(subject.path)},
        }
        (folder / "model-settings.json").write_text(json.dumps(model), "utf-8")
    yield from _foreign([str(python.parent / "mlserver"), "start", "."], home, ports[1], subjects)


@contextmanager
def pytriton(subjects: Sequence[Subject], threads: int, directory: Path) -> Iterator[str]:
    """Pytriton with its default batcher; yields its address."""
    python = _python("pytriton-venv")
    home = directory / "pytriton"
    home.mkdir(exist_ok=True)
    (home / "server.py").write_text(_PYTRITON_SERVER, "utf-8")
    ports = _free_ports(2)
    models = [
        {
            "name": subject.name,
            "path": str(subject.path),
            "inputs": [asdict(item) for item in subject.inputs],
            "output": asdict(subject.output),
        }
        for subject in subjects
    ]
    wanted = json.dumps({"ports": ports, "threads": threads, "models": models})
    yield from _foreign([str(python), "server.py", wanted], home, ports[1], subjects)


def _foreign(command: list[str], home: Path, port: int, subjects: Sequence[Subject]) -> Iterator[str]:
    """Starts it in a session of its own and waits until it answers."""
    log = home / "log.txt"
    environment = {**os.environ, "PYTHONPATH": str(home)}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    address = f"127.0.0.1:{port}"
    try:
        _wait(process, address, log, subjects)
        yield address
    finally:
        assert process.stdin is not None
        process.stdin.close()
        _end(process)


def _wait(process: subprocess.Popen[str], address: str, log: Path, subjects: Sequence[Subject]) -> None:
    """Until the server says that every model is ready."""
    deadline = time.monotonic() + START_S
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                asked = [pb.ModelReadyRequest(name=subject.name) for subject in subjects]
                if all(stub.ModelReady(request, timeout=5).ready for request in asked):
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.5)
    tail = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
    raise CannotRun(f"it did not become ready; its log ends: {' '.join(tail)[:200]}")


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process and, if it leads a session, what it started."""
    leads = os.getpgid(process.pid) == process.pid if process.poll() is None else False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            process.wait(STOP_S)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number) if leads else process.send_signal(number)
    if leads:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _python(venv: str) -> Path:
    python = ROOT / ".cache" / venv / "bin" / "python"
    if not python.exists():
        raise CannotRun(f".cache/{venv} is not there: `make bench-serve` makes it where it can be installed")
    return python


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in held]
    for item in held:
        item.close()
    return ports
