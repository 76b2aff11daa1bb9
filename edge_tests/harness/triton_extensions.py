"""A client of Triton's extensions on `tritonclient`, sync or aio, run as a process of its own.

    python -m edge_tests.harness.triton_extensions --address 127.0.0.1:8500 [--aio]

reads one JSON command a line and prints one JSON answer a line, as triton_client.py does; this file imports
no stubs of ours either.
    {"call": "config" | "statistics", "model": m, "version": v} | {"call": "index"}
    {"call": "load" | "unload", "model": m}
    {"call": "create", "key": k, "bytes": n}: makes a shared memory object, removed when the process ends
    {"call": "register", "name": n, "key": k, "bytes": n, "offset": o}
    {"call": "unregister" | "regions", "name": n}
    {"call": "shared", "model": m, "key": k, "name": n, "rows": nested lists}: the input "x" and the output
        "y" in one region; answers with what the region and the response then hold
    {"call": "infer", ...} as triton_client.py, also with aio
    {"call": "stream", "model": m, "requests": [rows, ...]}: each over one stream; answers in their order
    {"call": "descriptors"}: what tritonclient's compiled messages are called and numbered
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from tritonclient import grpc as triton
from tritonclient.grpc import aio as triton_aio
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException, shared_memory, triton_to_np_dtype

from edge_tests.harness.descriptors import describe
from edge_tests.harness.triton_client import failure, make_input, output_lists

STREAM_S = 30.0


class Client:
    """The sync client, or the aio client driven to each call's end."""

    def __init__(self, address: str, *, aio: bool) -> None:
        self.loop = asyncio.new_event_loop() if aio else None
        self.address = address
        self.objects: dict[str, Any] = {}
        self.client: Any = self.run(self.connect()) if aio else triton.InferenceServerClient(address)

    async def connect(self) -> triton_aio.InferenceServerClient:
        return triton_aio.InferenceServerClient(self.address)

    def run(self, value: Any) -> Any:
        return value if self.loop is None else self.loop.run_until_complete(value)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self.run(getattr(self.client, name)(*arguments, **options))

    def command(self, command: dict[str, Any]) -> dict[str, Any]:
        call, model, version = command["call"], command.get("model", ""), command.get("version", "")
        name = command.get("name", "")
        if call == "config":
            return dict(self.call("get_model_config", model, version, as_json=True)["config"])
        if call == "statistics":
            found = self.call("get_inference_statistics", model, version, as_json=True)
            return {"models": found.get("model_stats", [])}
        if call == "index":
            return {"models": self.call("get_model_repository_index", as_json=True).get("models", [])}
        if call in ("load", "unload"):
            self.call(f"{call}_model", model)
            return {}
        if call == "create":
            made = shared_memory.create_shared_memory_region(command["key"], command["key"], command["bytes"])
            self.objects[command["key"]] = made
            return {}
        if call == "register":
            self.call(
                "register_system_shared_memory",
                name,
                command["key"],
                command["bytes"],
                command.get("offset", 0),
            )
            return {}
        if call == "unregister":
            self.call("unregister_system_shared_memory", name)
            return {}
        if call == "regions":
            found = self.call("get_system_shared_memory_status", name, as_json=True)
            return {"regions": found.get("regions", {})}
        if call == "shared":
            return self.shared(command)
        if call == "infer":
            return self.infer(command)
        if call == "stream":
            requests = [np.array(rows, np.float32) for rows in command["requests"]]
            both = (
                self.stream(model, requests) if self.loop is None else self.run(self.astream(model, requests))
            )
            return {"answers": both}
        if call == "descriptors":
            return {"files": [describe(module.DESCRIPTOR) for module in (service_pb2, model_config_pb2)]}
        raise ValueError(f"unknown call {call!r}")

    def infer(self, command: dict[str, Any]) -> dict[str, Any]:
        inputs = [
            make_input(name, np.array(item["data"], triton_to_np_dtype(item["datatype"])), item["datatype"])
            for name, item in command["inputs"].items()
        ]
        options = command.get("options", {})
        result = self.call("infer", command["model"], inputs, client_timeout=STREAM_S, **options)
        return {"outputs": output_lists(result), "version": result.get_response().model_version}

    def shared(self, command: dict[str, Any]) -> dict[str, Any]:
        rows = np.array(command["rows"], np.float32)
        memory, name = self.objects[command["key"]], command["name"]
        shared_memory.set_shared_memory_region(memory, [rows])
        entry = triton.InferInput("x", list(rows.shape), "FP32")
        entry.set_shared_memory(name, rows.nbytes)
        exit_ = triton.InferRequestedOutput("y")
        exit_.set_shared_memory(name, command.get("output_bytes", rows.shape[0] * 16), rows.nbytes)
        result = self.call("infer", command["model"], [entry], outputs=[exit_], client_timeout=STREAM_S)
        output = result.get_output("y")
        shape = [int(size) for size in output.shape]
        found = shared_memory.get_contents_as_numpy(memory, np.float32, shape, offset=rows.nbytes)
        return {"y": found.tolist(), "response": MessageToDict(result.get_response())}

    def stream(self, model: str, requests: list[np.ndarray]) -> list[dict[str, Any]]:
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: answers.put(answer(result, error)))
        try:
            for number, rows in enumerate(requests):
                self.client.async_stream_infer(
                    model,
                    [make_input("x", rows, "FP32")],
                    request_id=str(number),
                    enable_empty_final_response=True,
                )
            return [answers.get(timeout=STREAM_S) for _ in requests]
        finally:
            self.client.stop_stream()

    async def astream(self, model: str, requests: list[np.ndarray]) -> list[dict[str, Any]]:
        async def asked() -> AsyncIterator[dict[str, Any]]:
            for number, rows in enumerate(requests):
                yield {
                    "model_name": model,
                    "inputs": [make_input("x", rows, "FP32")],
                    "request_id": str(number),
                }

        found = self.client.stream_infer(asked(), stream_timeout=STREAM_S)
        return [answer(result, error) async for result, error in found]

    def close(self) -> None:
        self.call("close")
        for made in self.objects.values():
            shared_memory.destroy_shared_memory_region(made)


def answer(result: Any, error: InferenceServerException | None) -> dict[str, Any]:
    if error is not None:
        return failure(error)
    response = result.get_response()
    return {
        "ok": True,
        "id": response.id,
        "version": response.model_version,
        "outputs": output_lists(result),
        "final": response.parameters["triton_final_response"].bool_param,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--aio", action="store_true")
    options = parser.parse_args()
    client = Client(options.address, aio=options.aio)
    try:
        for line in sys.stdin:
            try:
                answered = {"ok": True, **client.command(json.loads(line))}
            except InferenceServerException as error:
                answered = failure(error)
            print(json.dumps(answered), flush=True)
    finally:
        client.close()


if __name__ == "__main__":
    main()
