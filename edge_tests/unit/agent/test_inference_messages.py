"""Requests taken apart by hand are those that protobuf reads, whatever the bytes; responses likewise."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import messages
from agent.limits import MAX_FORM_BYTES, MAX_FORMS
from agent.messages import Response, answer_id, parse_request, serialize_response, serialize_streamed
from inference import open_inference_pb2 as pb

Tensor = pb.ModelInferRequest.InferInputTensor


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
    assert found.id == request.id
    del request.raw_input_contents[:]
    request.id = ""
    assert found.message == request
    again = parse_request(b"\x1a\x01i" + request.SerializeToString())
    assert again.id == "i"
    assert again.message == request


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_there_is_a_request_or_a_fault(data: bytes) -> None:
    found = parse_request(data)
    try:
        read = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        read = None
    assert bool(found.fault) == (read is None)
    if read is not None:
        assert [bytes(part) for part in found.raw] == list(read.raw_input_contents)
        assert found.id == read.id
        assert (found.message.model_name, found.message.inputs) == (read.model_name, read.inputs)


@settings(max_examples=200, deadline=None)
@given(requests, st.data())
def test_a_damaged_request_does_no_harm(request: pb.ModelInferRequest, data: st.DataObject) -> None:
    blob = bytearray(request.SerializeToString())
    if blob:
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    parse_request(bytes(blob[: data.draw(st.integers(0, len(blob)))]))


def test_contents_are_views_of_the_bytes_received() -> None:
    body = np.arange(5000, dtype=np.uint8)
    data = pb.ModelInferRequest(raw_input_contents=[body.tobytes()]).SerializeToString()
    (part,) = parse_request(data).raw
    assert isinstance(part, memoryview)
    assert part.obj is data


def test_a_form_is_parsed_once_and_few_are_remembered() -> None:
    def form(name: str, contents: bytes = b"", **fields: Any) -> messages.Form:
        request = pb.ModelInferRequest(model_name=name, raw_input_contents=[contents], **fields)
        return parse_request(request.SerializeToString()).form

    assert form("m", b"1", id="a") is form("m", b"22", id="b")
    assert form("m") is not form("n")
    long = "m" * MAX_FORM_BYTES
    assert form(long) is not form(long)
    typed = [Tensor(name="x", contents=pb.InferTensorContents(fp32_contents=[1]))]
    assert form("m", inputs=typed) is not form("m", inputs=typed)
    for number in range(2 * MAX_FORMS):
        form(f"m{number}")
    assert len(messages._forms._known) == MAX_FORMS


@given(st.lists(st.binary(max_size=300), max_size=4), st.text(max_size=5), st.text(max_size=200))
def test_responses_are_those_that_protobuf_reads(raw: list[bytes], name: str, request_id: str) -> None:
    head = pb.ModelInferResponse(model_name=name).SerializeToString() + answer_id(request_id)
    response = Response(head, [memoryview(part) for part in raw])
    data = serialize_response(response)
    assert response.byte_size() == len(data)
    read = pb.ModelInferResponse.FromString(data)
    assert (read.model_name, read.id, list(read.raw_output_contents)) == (name, request_id, raw)
    streamed = pb.ModelStreamInferResponse.FromString(serialize_streamed(response))
    assert streamed == pb.ModelStreamInferResponse(infer_response=read)
    more = response.with_parameters({"p": pb.InferParameter(bool_param=True)})
    assert pb.ModelInferResponse.FromString(serialize_response(more)).parameters["p"].bool_param
