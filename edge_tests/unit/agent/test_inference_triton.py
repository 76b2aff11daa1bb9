"""The front as the field's own client sees it: tritonclient, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.inference import InferenceServer
from agent.router import Router
from edge_tests.harness import models, serving

DATATYPES = {
    "BOOL": (TensorProto.BOOL, [[True, False]]),
    "UINT8": (TensorProto.UINT8, [[0, 255]]),
    "UINT16": (TensorProto.UINT16, [[0, 65535]]),
    "UINT32": (TensorProto.UINT32, [[0, 4294967295]]),
    "UINT64": (TensorProto.UINT64, [[0, 18446744073709551615]]),
    "INT8": (TensorProto.INT8, [[-128, 127]]),
    "INT16": (TensorProto.INT16, [[-32768, 32767]]),
    "INT32": (TensorProto.INT32, [[-5, 5]]),
    "INT64": (TensorProto.INT64, [[-(2**63), 2**63 - 1]]),
    "FP16": (TensorProto.FLOAT16, [[0.5, -2.0]]),
    "FP32": (TensorProto.FLOAT, [[0.5, -2.25]]),
    "FP64": (TensorProto.DOUBLE, [[0.1, -1e300]]),
    "BYTES": (TensorProto.STRING, [["", "text"]]),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.TritonCommands]:
    """A client on a box that serves `tiny` 1 and 2, and one model with an input of every datatype."""
    directory = tmp_path_factory.mktemp("triton")
    router, workers = Router(), []
    for version in (1, 2):
        workers.append(
            serving.start_worker(
                models.tiny_onnx(directory / f"{version}.onnx", seed=version), version=version
            )
        )
        router.activate("tiny", version, workers[-1])
    names = {name: name.lower() for name in DATATYPES}
    every = models.write_onnx(
        directory / "every.onnx",
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names.values()],
        inputs={name.lower(): (kind, [1, 2]) for name, (kind, _) in DATATYPES.items()},
        outputs={f"{name.lower()}_out": (kind, [1, 2]) for name, (kind, _) in DATATYPES.items()},
    )
    workers.append(serving.start_worker(every, "every", 4))
    router.activate("every", 4, workers[-1])
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    with serving.TritonCommands(server.addresses[0]) as commands:
        yield commands
    server.stop(1)
    for worker in workers:
        worker.close(1)


def tiny_inputs(row: list[float]) -> dict[str, object]:
    return {"x": {"datatype": "FP32", "data": [row]}}


def test_health_and_metadata(client: serving.TritonCommands) -> None:
    assert client.ask(call="live") == {"ok": True, "live": True}
    assert client.ask(call="ready") == {"ok": True, "ready": True}
    assert client.ask(call="server")["name"] == "sluice"
    assert client.ask(call="model_ready", model="tiny")["ready"]
    assert not client.ask(call="model_ready", model="none")["ready"]
    found = client.ask(call="metadata", model="tiny")
    assert found["versions"] == ["1", "2"]
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "8"]}]


def test_versions(client: serving.TritonCommands) -> None:
    answers = {
        version: client.ask(
            call="infer", model="tiny", version=version, inputs=tiny_inputs([1.0] * 8), id="a7"
        )
        for version in ("", "1", "2")
    }
    assert {version: answer["version"] for version, answer in answers.items()} == {
        "": "2",
        "1": "1",
        "2": "2",
    }
    assert answers[""]["outputs"] == answers["2"]["outputs"] != answers["1"]["outputs"]
    assert answers[""]["id"] == "a7"


def test_every_datatype_comes_back(client: serving.TritonCommands) -> None:
    inputs = {name.lower(): {"datatype": name, "data": values} for name, (_, values) in DATATYPES.items()}
    answer = client.ask(call="infer", model="every", inputs=inputs)
    assert answer["ok"], answer
    assert answer["outputs"] == {f"{name.lower()}_out": values for name, (_, values) in DATATYPES.items()}
    some = client.ask(call="infer", model="every", inputs=inputs, outputs=["bytes_out", "fp16_out"])
    assert list(some["outputs"]) == ["bytes_out", "fp16_out"]


def test_errors_as_the_client_shows_them(client: serving.TritonCommands) -> None:
    wrong = client.ask(call="infer", model="tiny", inputs={"x": {"datatype": "FP64", "data": [[1.0] * 8]}})
    assert wrong["status"] == "StatusCode.INVALID_ARGUMENT"
    assert wrong["error"] == "input 'x': expected 'x' FP32[-1, 8], got datatype 'FP64'"
    absent = client.ask(call="infer", model="none", inputs=tiny_inputs([1.0] * 8))
    assert absent["status"] == "StatusCode.NOT_FOUND"
    assert absent["error"] == "this box serves no model 'none'; it serves every, tiny"
    old = client.ask(call="infer", model="tiny", version="3", inputs=tiny_inputs([1.0] * 8))
    assert (old["ok"], old["status"]) == (False, "StatusCode.NOT_FOUND")


def test_the_load_counts_what_it_did(client: serving.TritonCommands, tmp_path: Path) -> None:
    del client  # its box is not used; this one has one version and loses it
    router = Router()
    worker = serving.start_worker(models.tiny_onnx(tmp_path / "tiny.onnx"), version=5)
    router.activate("tiny", 5, worker)
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    samples = models.samples(6)
    expected = worker.infer(samples, 10)["y"]
    try:
        with serving.TritonLoad(server.addresses[0], "tiny", samples, tmp_path, "--clients", "2") as load:
            serving.eventually(lambda: load.succeeded() > 50, "predictions came")
            router.remove("tiny")
            serving.eventually(lambda: len(load.failed()) > 5, "failures came")
            summary = load.stop()
    finally:
        server.stop(1)
        worker.close(1)
    assert summary["versions"] == {"5": load.succeeded("5")}
    assert summary["failed"] == len(load.failed())
    assert summary["requests"] == len(load.lines) == summary["ok"] + summary["failed"]
    assert {line["status"] for line in load.failed()} == {"StatusCode.NOT_FOUND"}
    for line in load.lines:
        if line["ok"]:
            np.testing.assert_allclose(
                line["outputs"]["y"], expected[line["row"]][None], rtol=1e-5, atol=1e-6
            )
