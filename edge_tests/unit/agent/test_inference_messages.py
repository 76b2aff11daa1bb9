"""Requests taken apart by hand are those that protobuf reads, whatever the bytes; responses likewise."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import messages
from agent.limits import SPLIT_MESSAGE_BYTES
from agent.messages import Response, parse_request, serialize_response
from inference import open_inference_pb2 as pb

Tensor = pb.ModelInferRequest.InferInputTensor


@pytest.fixture(autouse=True)
def always_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "SPLIT_MESSAGE_BYTES", 0)


requests = st.builds(
    pb.ModelInferRequest,
    model_name=st.text(max_size=5),
    id=st.text(max_size=5),
    inputs=st.lists(
        st.builds(
            Tensor,
            name=st.text(max_size=3),
            shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
            contents=st.none()
            | st.builds(pb.InferTensorContents, fp32_contents=st.lists(st.floats(width=32), max_size=3)),
        ),
        max_size=3,
    ),
    raw_input_contents=st.lists(st.binary(max_size=300), max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(requests)
def test_requests_are_those_that_protobuf_reads(request: pb.ModelInferRequest) -> None:
    found = parse_request(request.SerializeToString())
    assert not found.fault
    assert [bytes(part) for part in found.raw] == list(request.raw_input_contents)
    del request.raw_input_contents[:]
    assert found.message == request


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_there_is_a_request_or_a_fault(data: bytes) -> None:
    found = parse_request(data)
    try:
        read = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        read = None
    if found.fault:
        # Groups are skipped by protobuf and refused here; no client's encoder writes them.
        assert read is None or "wire type" in found.fault
    elif read is not None:
        assert [bytes(part) for part in found.raw] == list(read.raw_input_contents)
        assert (found.message.model_name, found.message.inputs) == (read.model_name, read.inputs)


@settings(max_examples=200, deadline=None)
@given(requests, st.data())
def test_a_damaged_request_does_no_harm(request: pb.ModelInferRequest, data: st.DataObject) -> None:
    blob = bytearray(request.SerializeToString())
    if blob:
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    parse_request(bytes(blob[: data.draw(st.integers(0, len(blob)))]))


def test_large_contents_are_views_of_the_bytes_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    body = np.arange(SPLIT_MESSAGE_BYTES, dtype=np.uint8)
    data = pb.ModelInferRequest(raw_input_contents=[body.tobytes()]).SerializeToString()
    (part,) = parse_request(data).raw
    assert isinstance(part, memoryview)
    assert part.obj is data
    (part,) = parse_request(pb.ModelInferRequest(raw_input_contents=[b"ab"]).SerializeToString()).raw
    assert part == b"ab"


@given(st.lists(st.binary(max_size=300), max_size=4), st.text(max_size=5))
def test_responses_are_those_that_protobuf_reads(raw: list[bytes], name: str) -> None:
    response = Response(pb.ModelInferResponse(model_name=name), [memoryview(part) for part in raw])
    data = serialize_response(response)
    assert response.byte_size() == len(data)
    read = pb.ModelInferResponse.FromString(data)
    assert (read.model_name, list(read.raw_output_contents)) == (name, raw)
    assert response.whole() == read
