"""The load for benchmarks.swaps, as a process of its own: open loop, every answer checked.

    python -m benchmarks.swap_load ADDRESS RATE SEED MODELS.json INPUT.npz RESULT.npz

sends requests at random times (exponential gaps, RATE a second in all) to the models in turn, until its
standard input ends, whatever became of earlier requests. INPUT.npz has "inputs" [rows, features] and
"outputs" [versions, rows, classes]. RESULT.npz gets, for each request, when it was due ("due",
CLOCK_MONOTONIC, s), how long from then to its answer ("seconds"), the index of its model, the version that
the answer names (0: failed) and whether the answer is that version's and nobody else's ("right"); and
"errors", texts.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from inference import open_inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 30.0
CONNECTIONS = 4
ROUGH, FINE = (
    1e-2,
    1e-4,
)  # of an output: the versions differ by more than the one, an answer by less than the other
SETTLE_S = 1.0


class Load:
    """What was sent, and what came of it."""

    def __init__(self, inputs: Any, outputs: Any, models: list[str]) -> None:
        self.outputs, self.models = outputs, models
        self.rows = len(inputs)
        self.requests = [[_request(model, row) for row in inputs] for model in models]
        self.lock, self.left = threading.Lock(), threading.Semaphore(0)
        self.records: list[tuple[float, float, int, int, bool]] = []
        self.errors: list[str] = []

    def answered(self, future: Any, due: float, model: int, row: int) -> None:
        seconds, version, right, error = time.monotonic() - due, 0, False, ""
        try:
            response = pb.ModelInferResponse.FromString(future.result())
            version = int(response.model_version)
            answer = np.frombuffer(response.raw_output_contents[0], np.float32)
            distances = np.abs(self.outputs[:, row] - answer).max(axis=1)
            others = np.delete(distances, version - 1)
            right = bool(distances[version - 1] < FINE and (others > ROUGH).all())
            right = right and response.model_name == self.models[model]
        except grpc.RpcError as failed:
            error = f"{self.models[model]} {failed.code().name} {failed.details()}"
        except Exception as failed:  # noqa: BLE001 - a wrong answer, whatever is wrong with it
            error = f"{self.models[model]} {failed!r}"
        with self.lock:
            self.records.append((due, seconds, model, version, right))
            if error:
                self.errors.append(error)
        self.left.release()


def _request(model: str, row: Any) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, len(row)])
    request = pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[row.tobytes()])
    return request.SerializeToString()


def main() -> None:
    address, rate, seed, models, given, result = sys.argv[1:]
    with np.load(given) as archive:
        load = Load(archive["inputs"], archive["outputs"], json.loads(models))
    calls = []
    for number in range(CONNECTIONS):
        channel = grpc.insecure_channel(address, options=(("bench.number", number),))
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
        calls.append(channel.unary_unary(METHOD))
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    rng = random.Random(int(seed))
    print("ready", flush=True)
    due, sent = time.monotonic(), 0
    while not ended.is_set():
        due += rng.expovariate(float(rate))
        wait_s = due - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        model, row = sent % len(load.models), rng.randrange(load.rows)
        future = calls[sent % CONNECTIONS].future(load.requests[model][row], timeout=TIMEOUT_S)
        future.add_done_callback(
            lambda future, due=due, model=model, row=row: load.answered(future, due, model, row)
        )
        sent += 1
    for _ in range(sent):
        load.left.acquire(timeout=TIMEOUT_S + SETTLE_S)
    due_s, seconds, which, versions, right = (np.array(column) for column in zip(*load.records, strict=True))
    np.savez(
        Path(result), due=due_s, seconds=seconds, model=which, version=versions, right=right,
        sent=sent, errors=np.array(load.errors),
    )  # fmt: skip


if __name__ == "__main__":
    main()
