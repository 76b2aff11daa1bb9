"""A predicting client on `tritonclient`, run as a process of its own.

tritonclient registers the same protobuf messages as our stubs, so the two cannot share a process: this file
imports nothing of ours. Two ways to use it:

    python -m edge_tests.harness.triton_client --address 127.0.0.1:8500 --model digits --input samples.npz \\
        --until-stdin-closes [--interval-s 0.01] [--clients 4] [--no-answers]

predicts without pause (or at that interval) in so many threads until its standard input ends, printing one
JSON line for each request: {"t": seconds since the epoch when it began, "s": seconds it took, "client": n,
"row": index of the sample, "version": "2", "ok": true, "outputs": {name: [[...]]}}, or {..., "version": "",
"ok": false, "error": text, "status": code}; and at the end one line {"summary": {"requests": n, "ok": n,
"failed": n, "versions": {"1": n, "2": n}, "errors": {text: n}}}. Client c's request i sends row (c + i)
modulo the number of rows of every array in the .npz. Its keys are the input names; a leading "input." is
taken off and "output.…" is left out, so a golden file serves.

    python -m edge_tests.harness.triton_client --address 127.0.0.1:8500 --commands

reads one JSON command a line and prints one JSON answer a line:
    {"call": "live"} | {"call": "ready"} | {"call": "server"}
    {"call": "model_ready" | "metadata", "model": m, "version": v}
    {"call": "infer", "model": m, "version": v, "inputs": {name: {"datatype": d, "data": nested lists}},
     "outputs": [names], "id": text, "timeout_s": s}
Answers are {"ok": true, ...} or {"ok": false, "error": text, "status": "StatusCode.NOT_FOUND"}.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

REQUEST_TIMEOUT_S = 30.0


def failure(error: InferenceServerException) -> dict[str, Any]:
    return {"ok": False, "error": error.message(), "status": str(error.status())}


def make_input(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    item = triton.InferInput(name, list(array.shape), datatype)
    item.set_data_from_numpy(array)
    return item


def output_lists(result: triton.InferResult) -> dict[str, Any]:
    outputs = {}
    for output in result.get_response().outputs:
        array = result.as_numpy(output.name)
        if array.dtype == np.object_:
            array = np.array([item.decode() for item in array.reshape(-1)], np.object_).reshape(array.shape)
        outputs[output.name] = array.tolist()
    return outputs


def run_command(client: triton.InferenceServerClient, command: dict[str, Any]) -> dict[str, Any]:
    call, model, version = command["call"], command.get("model", ""), command.get("version", "")
    if call == "live":
        return {"live": client.is_server_live()}
    if call == "ready":
        return {"ready": client.is_server_ready()}
    if call == "server":
        return dict(client.get_server_metadata(as_json=True))
    if call == "model_ready":
        return {"ready": client.is_model_ready(model, version)}
    if call == "metadata":
        return dict(client.get_model_metadata(model, version, as_json=True))
    if call == "infer":
        inputs = []
        for name, given in command["inputs"].items():
            array = np.array(given["data"], triton_to_np_dtype(given["datatype"]))
            inputs.append(make_input(name, array, given["datatype"]))
        wanted = [triton.InferRequestedOutput(name) for name in command.get("outputs", [])] or None
        result = client.infer(
            model,
            inputs,
            model_version=version,
            outputs=wanted,
            request_id=command.get("id", ""),
            client_timeout=command.get("timeout_s", REQUEST_TIMEOUT_S),
        )
        response = result.get_response()
        return {"outputs": output_lists(result), "version": response.model_version, "id": response.id}
    raise ValueError(f"unknown call {call!r}")


def command_loop(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        for line in sys.stdin:
            try:
                answer = {"ok": True, **run_command(client, json.loads(line))}
            except InferenceServerException as error:
                answer = failure(error)
            print(json.dumps(answer), flush=True)


class Load:
    """Threads that predict until told to stop, and what they counted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        with np.load(options.input, allow_pickle=False) as archive:
            self.arrays = {
                key.removeprefix("input."): archive[key]
                for key in archive.files
                if not key.startswith("output.")
            }
        self.rows = min(len(array) for array in self.arrays.values())
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.versions: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self.predict, args=(number,)) for number in range(self.options.clients)
        ]
        for thread in threads:
            thread.start()
        while sys.stdin.read(4096):
            pass
        self.stop.set()
        for thread in threads:
            thread.join()
        good, bad = sum(self.versions.values()), sum(self.errors.values())
        summary = {"requests": good + bad, "ok": good, "failed": bad}
        self.print({"summary": {**summary, "versions": dict(self.versions), "errors": dict(self.errors)}})

    def predict(self, client_number: int) -> None:
        row = client_number
        with triton.InferenceServerClient(self.options.address) as client:
            while not self.stop.is_set():
                self.predict_one(client, client_number, row % self.rows)
                row += 1
                if self.options.interval_s:
                    self.stop.wait(self.options.interval_s)

    def predict_one(self, client: triton.InferenceServerClient, number: int, row: int) -> None:
        inputs = [
            make_input(name, array[row : row + 1], np_to_triton_dtype(array.dtype))
            for name, array in self.arrays.items()
        ]
        line: dict[str, Any] = {"t": time.time(), "client": number, "row": row}
        began = time.perf_counter()
        try:
            result = client.infer(
                self.options.model,
                inputs,
                model_version=self.options.version,
                client_timeout=self.options.timeout_s,
            )
        except InferenceServerException as error:
            line.update(failure(error), version="")
            with self.lock:
                self.errors[f"{error.status()}: {error.message()}"[:300]] += 1
        else:
            version = result.get_response().model_version
            line.update(ok=True, version=version)
            if not self.options.no_answers:
                line["outputs"] = output_lists(result)
            with self.lock:
                self.versions[version] += 1
        line["s"] = time.perf_counter() - began
        self.print(line)

    def print(self, line: dict[str, Any]) -> None:
        with self.lock:
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--version", default="")
    parser.add_argument("--input", help="an .npz file of samples")
    parser.add_argument("--interval-s", type=float, default=0.0)
    parser.add_argument("--timeout-s", type=float, default=REQUEST_TIMEOUT_S)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--no-answers", action="store_true", help="leave the outputs out of the lines")
    parser.add_argument("--until-stdin-closes", action="store_true")
    parser.add_argument("--commands", action="store_true")
    options = parser.parse_args()
    if options.commands == options.until_stdin_closes:
        parser.error("give one of --commands and --until-stdin-closes")
    if options.commands:
        command_loop(options.address)
    elif not options.model or not options.input:
        parser.error("--until-stdin-closes needs --model and --input")
    else:
        Load(options).run()


if __name__ == "__main__":
    main()
