"""A form's plan gives what reading the request anew gives, or leaves the request to be refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from agent.limits import STAGE_BYTES
from agent.messages import parse_request, serialize_response
from agent.peer import Peers
from agent.requests import Inference
from agent.router import Router
from agent.shared_memory import Regions
from agent.worker import Worker
from edge_tests.harness import serving
from inference import open_inference_pb2 as pb
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

Parameter = pb.InferParameter


class Context:
    """As much of a call as one inference looks at: over a unix socket, with all the time there is."""

    def time_remaining(self) -> None:
        return None

    def add_callback(self, callback: Any) -> bool:
        return callback is not None

    def is_active(self) -> bool:
        return True

    def peer(self) -> str:
        return "unix:"


class Box:
    """One model, p = a + b and q = a - b, and what answers for it."""

    def __init__(self, directory: Path) -> None:
        tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in "abpq"]
        nodes = [helper.make_node("Add", ["a", "b"], ["p"]), helper.make_node("Sub", ["a", "b"], ["q"])]
        graph = helper.make_graph(nodes, "sums", tensors[:2], tensors[2:])
        path = directory / "sums.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
        self.worker: Worker = serving.start_worker(path, "sums")
        router = Router()
        router.activate("sums", 1, self.worker)
        self.regions = Regions()
        self.inference = Inference(router, self.regions, Peers())

    def answer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        asked = parse_request(request.SerializeToString())
        return pb.ModelInferResponse.FromString(
            serialize_response(self.inference.answer(asked, Context()))  # type: ignore[arg-type]
        )

    def staged(self) -> int:
        return len(self.worker.staging.places)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("sums"))
    yield box
    box.worker.close(0)


def request(
    a: np.ndarray, b: np.ndarray, order: str = "ab", outputs: str = "", **fields: Any
) -> pb.ModelInferRequest:
    arrays = {"a": a, "b": b}
    return pb.ModelInferRequest(
        model_name="sums",
        inputs=[
            pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=arrays[name].shape)
            for name in order
        ],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[arrays[name].tobytes() for name in order],
        **fields,
    )


def values(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.frombuffer(raw, np.float32).reshape(tuple(tensor.shape))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, STAGE_BYTES // 8, STAGE_BYTES]),
    st.integers(1, 3),
    st.sampled_from(["ab", "ba"]),
    st.sampled_from(["", "p", "qp"]),
    st.text(max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_followed_or_not_the_answer_is_the_same(
    box: Box, width: int, rows: int, order: str, outputs: str, request_id: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(2):  # the second at the latest follows a plan
        a, b = rng.standard_normal((2, rows, width)).astype(np.float32)
        response = box.answer(request(a, b, order, outputs, id=request_id))
        assert (response.id, response.model_version) == (request_id, "1")
        found = values(response)
        assert list(found) == list(outputs or "pq")
        for name, array in found.items():
            np.testing.assert_array_equal(array, a + b if name == "p" else a - b)
    assert box.staged() == 0


@pytest.mark.parametrize("width", [2, STAGE_BYTES])
def test_lengths_that_do_not_fit_are_refused_by_name(box: Box, width: int) -> None:
    good = request(*np.ones((2, 1, width), np.float32))
    box.answer(good)
    for damage in (good.raw_input_contents[1][:-1], b"", good.raw_input_contents[1] + b"\0"):
        bad = pb.ModelInferRequest()
        bad.CopyFrom(good)
        bad.raw_input_contents[1] = damage
        with pytest.raises(SluiceError, match=r"input 'b': expected .* bytes, not") as caught:
            box.answer(bad)
        assert caught.value.reason == errors_pb2.INPUT_INVALID
    del bad.raw_input_contents[1]
    with pytest.raises(SluiceError, match="2 inputs outside shared memory but 1 entries"):
        box.answer(bad)
    assert box.staged() == 0
    assert box.answer(good)


def test_parameters_are_part_of_the_form(box: Box) -> None:
    arrays = np.ones((2, 1, 2), np.float32)
    assert box.answer(request(*arrays))
    with pytest.raises(SluiceError, match="priority 9"):
        box.answer(request(*arrays, parameters={"priority": Parameter(int64_param=9)}))


def test_inputs_and_outputs_in_shared_memory(box: Box) -> None:
    width = STAGE_BYTES
    a, b = np.random.default_rng(1).standard_normal((2, 1, width)).astype(np.float32)
    path = Path(f"/dev/shm/sluice-test-{os.getpid()}-plans")
    try:
        path.write_bytes(bytes(3 * a.nbytes))
        path.chmod(0o666)
        box.regions.register("r", path.name, 0, 3 * a.nbytes, None)
        asked = request(a, b, outputs="p")
        del asked.raw_input_contents[:]
        asked.raw_input_contents.append(b.tobytes())
        for tensor, offset in ((asked.inputs[0], 0), (asked.outputs[0], 2 * a.nbytes)):
            tensor.parameters["shared_memory_region"].string_param = "r"
            tensor.parameters["shared_memory_offset"].int64_param = offset
            tensor.parameters["shared_memory_byte_size"].int64_param = a.nbytes
        for scale in (1, 2, 3):
            with path.open("r+b") as file:
                file.write((scale * a).tobytes())
            response = box.answer(asked)
            assert list(response.raw_output_contents) == [b""]
            found = np.frombuffer(path.read_bytes()[2 * a.nbytes :], np.float32)
            np.testing.assert_array_equal(found, (scale * a + b)[0])
        os.truncate(path, 10)
        with pytest.raises(SluiceError, match=r"'a': .* ends before the size"):
            box.answer(asked)
        box.regions.unregister("r", None)
        with pytest.raises(SluiceError, match=r"'a': .* is not registered"):
            box.answer(asked)
    finally:
        path.unlink()
    assert box.staged() == 0


def test_without_room_inputs_are_copied_when_they_run(box: Box) -> None:
    arrays = np.ones((2, 1, STAGE_BYTES), np.float32)
    box.answer(request(*arrays))
    staging = box.worker.staging
    everything = staging.take(staging.arena.bytes.size // 3)
    assert everything is not None
    np.testing.assert_array_equal(values(box.answer(request(*arrays)))["p"], arrays[0] + arrays[1])
    everything.drop()


def test_a_plan_is_one_workers(box: Box, tmp_path: Path) -> None:
    other = Box(tmp_path)
    try:
        arrays = np.ones((2, 1, STAGE_BYTES), np.float32)
        for each in (box, other, box, other):
            assert values(each.answer(request(*arrays)))["p"].sum() == 2 * STAGE_BYTES
    finally:
        other.worker.close(0)
