"""The protocol as Triton's own client speaks it: tritonclient, sync and aio, in processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.inference import InferenceServer
from agent.repository import Held, Repository
from agent.router import Router
from edge_tests.harness import models, serving
from edge_tests.harness.descriptors import describe
from edge_tests.harness.serving import TritonCommands
from inference import model_config_pb2, open_inference_pb2
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

VALUES: dict[str, tuple[int, list[Any]]] = {
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
    "BF16": (TensorProto.BFLOAT16, [[0.5, -2.0]]),
    "BYTES": (TensorProto.STRING, [["", "text"]]),
}
ROW = [[0.25 * number for number in range(8)]]


def identity_onnx(path: Path, datatypes: list[str]) -> Path:
    """A model that answers each input, one of each datatype, as it came."""
    return models.write_onnx(
        path,
        [helper.make_node("Identity", [name.lower()], [f"{name.lower()}_out"]) for name in datatypes],
        inputs={name.lower(): (VALUES[name][0], [1, 2]) for name in datatypes},
        outputs={f"{name.lower()}_out": (VALUES[name][0], [1, 2]) for name in datatypes},
    )


class Box:
    """A router with `tiny` 1 and 2, `every` 4 and `half` 4, and a holder that loads and unloads `tiny`."""

    def __init__(self, directory: Path) -> None:
        self.router = Router()
        self.paths = {
            version: models.tiny_onnx(directory / f"{version}.onnx", seed=version) for version in (1, 2)
        }
        for version in self.paths:
            self.load_version(version)
        # ONNX Runtime's Python interface takes no model with both BF16 and texts.
        for model, names in (("every", [name for name in VALUES if name != "BF16"]), ("half", ["BF16"])):
            path = identity_onnx(directory / f"{model}.onnx", names)
            self.router.activate(model, 4, serving.start_worker(path, model, 4))
        self.server = InferenceServer(
            self.router, "127.0.0.1:0", repository=Repository(self.router, self, control=True)
        )
        self.server.start()

    def load_version(self, version: int) -> None:
        self.router.activate("tiny", version, serving.start_worker(self.paths[version], version=version))

    def held(self) -> list[Held]:
        return [Held("tiny", 1), Held("tiny", 2), Held("every", 4), Held("half", 4)]

    def load(self, model: str) -> None:
        if model != "tiny":
            raise SluiceError(errors_pb2.MODEL_UNKNOWN, f"this box has no model {model!r}")
        self.load_version(2)

    def unload(self, model: str) -> None:
        workers = self.router.remove(model)
        if not workers:
            raise SluiceError(errors_pb2.MODEL_UNKNOWN, f"this box has no model {model!r}")
        for worker in workers:
            worker.close(1)

    def close(self) -> None:
        self.server.stop(1)
        for served in self.router.models():
            for worker in served.workers:
                worker.close(0)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("protocol"))
    yield box
    box.close()


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "aio"])
def aio(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def client(box: Box, aio: bool) -> Iterator[TritonCommands]:
    with TritonCommands(box.server.addresses[0], extensions=True, aio=aio) as commands:
        yield commands


def test_messages_are_named_and_numbered_as_tritons(client: TritonCommands) -> None:
    theirs: dict[str, Any] = {}
    for file in client.ask(call="descriptors")["files"]:
        theirs.update(file)
    ours: dict[str, Any] = {}
    for module in (open_inference_pb2, model_config_pb2):
        ours.update(describe(module.DESCRIPTOR))
    assert len(ours) > 200
    assert {name: theirs.get(name) for name in ours} == ours
    methods = {name.rpartition(".")[2] for name in theirs if ".GRPCInferenceService." in name}
    offered = {name.rpartition(".")[2] for name in ours if ".GRPCInferenceService." in name}
    assert methods - offered == {
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
    }


# Fields of Triton's answers that say nothing here: what each is for that a box does not have.
LEFT_OUT = {
    "ModelConfig": {
        "batch_input": "ragged batches",
        "batch_output": "ragged batches",
        "cc_model_filenames": "files by a GPU's generation",
        "ensemble_scheduling": "graphs of models; a cascade is no such graph",
        "metric_tags": "labels of Triton's metrics",
        "model_metrics": "settings of Triton's metrics",
        "model_operations": "libraries with custom operators",
        "model_repository_agents": "plugins of the repository",
        "sequence_batching": "sequences",
    },
    "ModelStatistics": {},
    "InferStatistics": {},
    "InferBatchStatistics": {},
    "MemoryUsage": {},
    "ModelDynamicBatching": {"priority_queue_policy": "every priority has the same queue"},
    "ModelInput": {
        "allow_ragged_batch": "ragged batches",
        "format": "image layouts",
        "is_non_linear_format_io": "TensorRT",
        "is_shape_tensor": "TensorRT",
        "optional": "inputs that may be missing",
        "reshape": "shapes are the file's own",
    },
}


def test_every_field_that_means_something_here_is_filled_in(client: TritonCommands) -> None:
    theirs: dict[str, Any] = {}
    for file in client.ask(call="descriptors")["files"]:
        theirs.update(file)
    for message, left_out in LEFT_OUT.items():
        module = open_inference_pb2 if hasattr(open_inference_pb2, message) else model_config_pb2
        ours = {field.name for field in getattr(module, message).DESCRIPTOR.fields}
        prefix = f"inference.{message}."
        fields = {
            name.removeprefix(prefix)
            for name, value in theirs.items()
            if name.startswith(prefix) and "." not in name.removeprefix(prefix) and isinstance(value, list)
        }
        assert ours | set(left_out) == fields, message
        assert not ours & set(left_out), message


def test_every_datatype_comes_back(client: TritonCommands) -> None:
    outputs: dict[str, Any] = {}
    for model, names in (("every", [name for name in VALUES if name != "BF16"]), ("half", ["BF16"])):
        inputs = {name.lower(): {"datatype": name, "data": VALUES[name][1]} for name in names}
        answer = client.ask(call="infer", model=model, inputs=inputs)
        assert answer["ok"], answer
        outputs |= answer["outputs"]
    assert outputs == {f"{name.lower()}_out": values for name, (_, values) in VALUES.items()}


def test_model_config(client: TritonCommands) -> None:
    config = client.ask(call="config", model="tiny")
    assert (config["name"], config["platform"], config["backend"]) == (
        "tiny",
        "onnxruntime_onnx",
        "onnxruntime",
    )
    assert config["version_policy"] == {"specific": {"versions": ["1", "2"]}}
    assert [item["name"] for item in config["input"]] == ["x"]
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert config["optimization"] == {"graph": {}}, "Triton's level 0 is all"
    assert config["parameters"]["threads"] == {"string_value": "1"}
    assert config["parameters"]["accelerator"] == {"string_value": "cpu"}
    (warm_up,) = config["model_warmup"]
    assert warm_up["inputs"]["x"] == {"data_type": "TYPE_FP32", "dims": ["1", "8"], "zero_data": True}
    every = client.ask(call="config", model="every", version="4")
    assert {item["data_type"] for item in every["input"]} == {
        "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in VALUES if name != "BF16"
    }
    assert client.ask(call="config", model="half")["input"][0]["data_type"] == "TYPE_BF16"
    absent = client.ask(call="config", model="none")
    assert absent["status"] == "StatusCode.NOT_FOUND"


def test_statistics_count_what_was_asked(client: TritonCommands) -> None:
    def figures() -> dict[str, Any]:
        (found,) = client.ask(call="statistics", model="tiny", version="1")["models"]
        return found

    def count(found: dict[str, Any], what: str) -> int:
        return int(found["inference_stats"][what].get("count", 0))

    before = figures()
    row = {"x": {"datatype": "FP32", "data": ROW}}
    for _ in range(3):
        assert client.ask(call="infer", model="tiny", inputs=row, options={"model_version": "1"})["ok"]
    wrong = {"x": {"datatype": "FP32", "data": [[1.0]]}}
    assert not client.ask(call="infer", model="tiny", inputs=wrong, options={"model_version": "1"})["ok"]
    after = figures()
    assert count(after, "success") - count(before, "success") == 3
    assert count(after, "fail") - count(before, "fail") == 1
    assert int(after["inference_count"]) - int(before.get("inference_count", 0)) == 3
    assert int(after["execution_count"]) - int(before.get("execution_count", 0)) == 3
    assert int(after["inference_stats"]["compute_infer"]["ns"]) > 0
    assert int(after["memory_usage"][0]["byte_size"]) > 1 << 20
    assert abs(int(after["last_inference"]) / 1000 - time.time()) < 60
    every = [f"{item['name']}@{item['version']}" for item in client.ask(call="statistics")["models"]]
    assert every == ["every@4", "half@4", "tiny@1", "tiny@2"]
    assert client.ask(call="statistics", model="none")["status"] == "StatusCode.NOT_FOUND"
    assert client.ask(call="statistics", model="tiny", version="9")["status"] == "StatusCode.NOT_FOUND"


def test_system_shared_memory(client: TritonCommands) -> None:
    key = f"/sluice-test-{os.getpid()}-{id(client)}"
    assert client.ask(call="create", key=key, bytes=4096)["ok"]
    assert client.ask(call="register", name="r", key=key, bytes=1024, offset=0)["ok"]
    try:
        again = client.ask(call="register", name="r", key=key, bytes=1024)
        assert again["status"] == "StatusCode.ALREADY_EXISTS"
        assert "in use" in again["error"]
        (region,) = client.ask(call="regions")["regions"].values()
        assert (region["name"], region["key"], region["byte_size"]) == ("r", key, "1024")
        sent = client.ask(call="infer", model="tiny", inputs={"x": {"datatype": "FP32", "data": ROW}})
        shared = client.ask(call="shared", model="tiny", key=key, name="r", rows=ROW)
        assert shared["ok"], shared
        np.testing.assert_array_equal(shared["y"], sent["outputs"]["y"])
        assert shared["response"]["rawOutputContents"] == [""]
        far = client.ask(call="shared", model="tiny", key=key, name="r", rows=ROW, output_bytes=2000)
        assert far["status"] == "StatusCode.INVALID_ARGUMENT"
        assert "has 1024 bytes" in far["error"]
        small = client.ask(call="shared", model="tiny", key=key, name="r", rows=ROW, output_bytes=8)
        assert "takes 16 bytes" in small["error"]
    finally:
        assert client.ask(call="unregister", name="")["ok"]
    gone = client.ask(call="shared", model="tiny", key=key, name="r", rows=ROW)
    assert gone["status"] == "StatusCode.NOT_FOUND"
    assert "not registered" in gone["error"]
    absent = client.ask(call="register", name="r", key="/sluice-none-such", bytes=8)
    assert "cannot be opened" in absent["error"]
    assert client.ask(call="regions")["regions"] == {}
    assert client.ask(call="regions", name="r")["status"] == "StatusCode.NOT_FOUND"
    assert client.ask(call="unregister", name="r")["ok"], (
        "as with Triton, forgetting what is not known is no error"
    )


def test_a_stream_answers_in_order_and_outlives_a_bad_request(client: TritonCommands, aio: bool) -> None:
    good = [[[float(number)] * 8] for number in range(5)]
    answers = client.ask(call="stream", model="tiny", requests=[*good, [[1.0]], good[0]])["answers"]
    assert [item["ok"] for item in answers] == [True] * 5 + [False, True]
    assert [item["id"] for item in answers if item["ok"]] == ["0", "1", "2", "3", "4", "6"]
    # The aio client has no way to ask for the mark of a final answer.
    assert {item["final"] for item in answers if item["ok"]} == {not aio}
    assert "[StatusCode.INVALID_ARGUMENT]" in answers[5]["error"]
    alone = client.ask(call="infer", model="tiny", inputs={"x": {"datatype": "FP32", "data": good[3]}})
    assert answers[3]["outputs"] == alone["outputs"]
    assert answers[0]["outputs"] == answers[6]["outputs"]


def test_the_repository(client: TritonCommands, box: Box) -> None:
    def states() -> dict[str, str]:
        found = client.ask(call="index")["models"]
        return {f"{item['name']}@{item['version']}": item["state"] for item in found}

    others = {"every@4": "READY", "half@4": "READY"}
    assert states() == {**others, "tiny@1": "READY", "tiny@2": "READY"}
    assert client.ask(call="unload", model="none")["status"] == "StatusCode.NOT_FOUND"
    try:
        assert client.ask(call="unload", model="tiny")["ok"]
        assert states() == {**others, "tiny@1": "UNAVAILABLE", "tiny@2": "UNAVAILABLE"}
        row = {"x": {"datatype": "FP32", "data": ROW}}
        assert client.ask(call="infer", model="tiny", inputs=row)["status"] == "StatusCode.NOT_FOUND"
        assert client.ask(call="load", model="tiny")["ok"]
        assert client.ask(call="infer", model="tiny", inputs=row)["version"] == "2"
    finally:
        if box.router.serving("tiny") is not None:
            box.unload("tiny")
        box.load_version(1)
        box.load_version(2)
