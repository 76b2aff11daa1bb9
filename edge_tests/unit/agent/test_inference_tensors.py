"""Requests become arrays, arrays responses; whatever a request holds, it is decoded or INPUT_INVALID."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import tensors as codec
from agent.limits import MAX_DIMENSION
from agent.messages import Response, of_message, parse_request, serialize_response
from agent.shared_memory import Region, Regions
from agent.tensors import Wanted, encode_outputs
from inference import open_inference_pb2 as pb
from runtimes.datatypes import DATATYPES, decode, encode, to_dtype
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

Tensor = pb.ModelInferRequest.InferInputTensor
Contents = pb.InferTensorContents

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-32768, 32767],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP16": [0.5, -65504.0],
    "FP32": [0.5, float("inf")],
    "FP64": [0.1, -1e308],
    "BF16": [0x3F80, 0x8000],  # the raw bits
    "BYTES": [b"", b"\x00\xff text"],
}
FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def array_of(datatype: str) -> np.ndarray:
    array = np.empty((1, 2), to_dtype(datatype))
    array[0, :] = VALUES[datatype]
    return array


def spec(datatype: str, *shape: int, name: str = "x") -> TensorSpec:
    return TensorSpec(name, datatype, shape or (-1, 2))


def no_region(name: str) -> Region:
    return Regions().find(name, None)


def decode_inputs(request: pb.ModelInferRequest, specs: list[TensorSpec]) -> dict[str, np.ndarray]:
    return codec.decode_inputs(of_message(request), specs, no_region)


def whole(response: Response) -> pb.ModelInferResponse:
    return pb.ModelInferResponse.FromString(serialize_response(response))


def is_raw(request: pb.ModelInferRequest, *outputs: TensorSpec) -> bool:
    return codec.answers_raw(of_message(request), [Wanted(item) for item in outputs])


def requested_outputs(request: pb.ModelInferRequest, specs: list[TensorSpec]) -> tuple[Wanted, ...]:
    return codec.requested_outputs(request, specs, no_region)


def refused(request: pb.ModelInferRequest, *specs: TensorSpec) -> str:
    with pytest.raises(SluiceError) as caught:
        decode_inputs(request, list(specs))
    assert caught.value.reason == errors_pb2.INPUT_INVALID
    assert len(caught.value.message) < 1000
    return caught.value.message


def test_every_datatype_is_covered() -> None:
    assert set(VALUES) == set(DATATYPES)
    assert set(DATATYPES) - set(FIELDS) == {"FP16", "BF16"}


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_contents(datatype: str) -> None:
    array = array_of(datatype)
    request = pb.ModelInferRequest(
        inputs=[Tensor(name="x", datatype=datatype, shape=[1, 2])], raw_input_contents=[encode(array)]
    )
    decoded = decode_inputs(request, [spec(datatype)])["x"]
    assert decoded.dtype == array.dtype
    assert decoded.tolist() == array.tolist()
    assert is_raw(request)


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_contents(datatype: str) -> None:
    array = array_of(datatype)
    contents = Contents(**{FIELDS[datatype]: VALUES[datatype]})
    request = pb.ModelInferRequest(
        inputs=[Tensor(name="x", datatype=datatype, shape=[1, 2], contents=contents)]
    )
    decoded = decode_inputs(request, [spec(datatype)])["x"]
    assert decoded.dtype == array.dtype
    assert decoded.shape == (1, 2)
    assert decoded.tolist() == array.tolist()
    assert not is_raw(request)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_travel_raw_only(datatype: str) -> None:
    contents = Contents(fp32_contents=[1, 2])
    request = pb.ModelInferRequest(
        inputs=[Tensor(name="x", datatype=datatype, shape=[1, 2], contents=contents)]
    )
    assert "send it in raw_input_contents" in refused(request, spec(datatype))


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_outputs(datatype: str, raw: bool) -> None:
    array = array_of(datatype)
    arrays = {"y": array, "unasked": array}
    if datatype not in FIELDS:
        assert is_raw(pb.ModelInferRequest(inputs=[FLOATS]), spec(datatype))
        raw = True
    encoded = encode_outputs(pb.ModelInferResponse(), arrays, [Wanted(spec(datatype, name="y"))], raw=raw)
    response = whole(encoded)
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", datatype, [1, 2])
    if raw:
        assert decode(datatype, [1, 2], response.raw_output_contents[0]).tolist() == array.tolist()
        assert not output.HasField("contents")
    else:
        assert list(getattr(output.contents, FIELDS[datatype])) == VALUES[datatype]
        assert not response.raw_output_contents


def test_one_raw_only_output_makes_all_raw() -> None:
    arrays = {"a": array_of("FP16"), "b": array_of("INT64")}
    wanted = [Wanted(spec("FP16", name="a")), Wanted(spec("INT64", name="b"))]
    raw = codec.answers_raw(of_message(pb.ModelInferRequest(inputs=[FLOATS])), wanted)
    response = whole(encode_outputs(pb.ModelInferResponse(), arrays, wanted, raw=raw))
    assert len(response.raw_output_contents) == 2
    assert not any(output.HasField("contents") for output in response.outputs)


FLOATS = Tensor(name="x", datatype="FP32", shape=[1, 2], contents=Contents(fp32_contents=[1, 2]))


@pytest.mark.parametrize(
    ("tensors", "raw", "says"),
    [
        ([Tensor(name="z", datatype="FP32", shape=[1, 2])], [bytes(8)], "no such input; its inputs are 'x'"),
        ([Tensor(name="z" * 5000, datatype="FP32", shape=[1, 2])], [bytes(8)], "no such input"),
        ([FLOATS, FLOATS], [], "given twice"),
        ([Tensor(name="x", datatype="FP64", shape=[1, 2])], [bytes(16)], "got datatype 'FP64'"),
        ([Tensor(name="x", datatype="q" * 9999, shape=[1, 2])], [bytes(16)], "got datatype 'qqq"),
        ([FLOATS], [bytes(8)], "contents beside raw_input_contents"),
        ([FLOATS], [bytes(8), bytes(8)], "1 inputs outside shared memory but 2 entries"),
        ([Tensor(name="x", datatype="FP32", shape=[1, 2])], [bytes(7)], "8 bytes, not 7"),
        ([Tensor(name="x", datatype="FP32", shape=[1, 2])], [], "has 0"),
        ([Tensor(name="x", datatype="FP32", shape=[-1, 2])], [bytes(8)], "a dimension is 0 to"),
        ([Tensor(name="x", datatype="FP32", shape=[1 << 62, 1 << 62])], [b""], "a dimension is 0 to"),
        ([Tensor(name="x", datatype="FP32", shape=[0, MAX_DIMENSION + 1])], [b""], "a dimension is 0 to"),
        (
            [Tensor(name="x", datatype="FP32", shape=[MAX_DIMENSION, MAX_DIMENSION, 0])],
            [b""],
            "more than",
        ),
        ([Tensor(name="x", datatype="FP32", shape=[1] * 17)], [bytes(4)], "17 dimensions"),
        (
            [Tensor(name="x", datatype="FP32", shape=[1, 2], contents=Contents(fp64_contents=[1, 2]))],
            [],
            "FP32 belongs in fp32_contents, and fp64_contents came",
        ),
        (
            [
                Tensor(
                    name="x",
                    datatype="FP32",
                    shape=[1, 2],
                    contents=Contents(fp32_contents=[1, 2], int_contents=[1]),
                )
            ],
            [],
            "int_contents, fp32_contents came",
        ),
        (
            [Tensor(name="x", datatype="FP32", shape=[1, 2], contents=Contents(fp32_contents=[1] * 3))],
            [],
            "is 2 elements, and fp32_contents has 3",
        ),
    ],
)
def test_what_is_refused(tensors: list[Tensor], raw: list[bytes], says: str) -> None:
    request = pb.ModelInferRequest(inputs=tensors, raw_input_contents=raw)
    assert says in refused(request, spec("FP32"))


@pytest.mark.parametrize(
    ("datatype", "values", "says"),
    [
        ("INT8", [0, 128], "element 1 is 128, outside -128 to 127"),
        ("INT16", [-32769, 0], "element 0 is -32769"),
        ("UINT8", [0, 256], "element 1 is 256"),
        ("UINT16", [65536, 0], "element 0 is 65536"),
    ],
)
def test_values_outside_the_datatype(datatype: str, values: list[int], says: str) -> None:
    contents = Contents(**{FIELDS[datatype]: values})
    request = pb.ModelInferRequest(
        inputs=[Tensor(name="x", datatype=datatype, shape=[1, 2], contents=contents)]
    )
    assert says in refused(request, spec(datatype))


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "says"),
    [
        ("BOOL", [2], b"\x01\x02", "byte other than 0 and 1"),
        ("BYTES", [1], b"\xff\xff\xff\xff", "claims 4294967295 bytes"),
        ("BYTES", [2], b"\x01\x00\x00\x00a", "does not fit"),
        ("BYTES", [1], b"\x00\x00\x00\x00!", "followed by 1 bytes"),
    ],
)
def test_raw_contents_that_contradict_themselves(
    datatype: str, shape: list[int], raw: bytes, says: str
) -> None:
    request = pb.ModelInferRequest(
        inputs=[Tensor(name="x", datatype=datatype, shape=shape)], raw_input_contents=[raw]
    )
    assert says in refused(request, spec(datatype, -1))


def test_too_many_inputs() -> None:
    request = pb.ModelInferRequest(inputs=[FLOATS] * 300)
    assert "at most" in refused(request, spec("FP32"))


def test_unknown_parameters_are_ignored() -> None:
    tensor = Tensor()
    tensor.CopyFrom(FLOATS)
    tensor.parameters["binary_data_size"].int64_param = 8
    request = pb.ModelInferRequest(inputs=[tensor], parameters={"priority": pb.InferParameter(int64_param=1)})
    assert decode_inputs(request, [spec("FP32")])["x"].tolist() == [[1, 2]]


def test_requested_outputs() -> None:
    specs = [spec("FP32", name="a"), spec("FP32", name="b")]
    wanted = pb.ModelInferRequest.InferRequestedOutputTensor
    assert requested_outputs(pb.ModelInferRequest(), specs) == tuple(Wanted(item) for item in specs)
    some = pb.ModelInferRequest(outputs=[wanted(name="b")])
    assert requested_outputs(some, specs) == (Wanted(specs[1]),)
    for names, says in ((["c"], "no such output; its outputs are 'a'"), (["a", "a"], "asked for twice")):
        with pytest.raises(SluiceError, match=says) as caught:
            requested_outputs(pb.ModelInferRequest(outputs=[wanted(name=name) for name in names]), specs)
        assert caught.value.reason == errors_pb2.INPUT_INVALID
    classes = wanted(name="a", parameters={"classification": pb.InferParameter(int64_param=3)})
    with pytest.raises(SluiceError, match="classification"):
        requested_outputs(pb.ModelInferRequest(outputs=[classes]), specs)


SPECS = [spec(datatype, -1, name=datatype.lower()) for datatype in DATATYPES] + [spec("FP32")]

names = st.sampled_from([item.name for item in SPECS]) | st.text(max_size=5)
contents = st.builds(
    Contents,
    bool_contents=st.lists(st.booleans(), max_size=3),
    int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
    int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    uint_contents=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    uint64_contents=st.lists(st.integers(0, 2**64 - 1), max_size=3),
    fp32_contents=st.lists(st.floats(width=32), max_size=3),
    fp64_contents=st.lists(st.floats(), max_size=3),
    bytes_contents=st.lists(st.binary(max_size=5), max_size=3),
)
one_field = st.sampled_from(sorted(set(FIELDS.values()))).flatmap(
    lambda field: contents.map(lambda item: Contents(**{field: getattr(item, field)}))
)
tensors = st.builds(
    Tensor,
    name=names,
    datatype=st.sampled_from(DATATYPES) | st.text(max_size=5),
    shape=st.lists(st.integers(-2, 3) | st.integers(-(2**63), 2**63 - 1), max_size=4),
    contents=st.none() | contents | one_field,
)
requests = st.builds(
    pb.ModelInferRequest,
    inputs=st.lists(tensors, max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=20), max_size=3),
)


def decode_or_refuse(request: pb.ModelInferRequest) -> None:
    try:
        arrays = decode_inputs(request, SPECS)
    except SluiceError as error:
        assert error.reason == errors_pb2.INPUT_INVALID
        assert error.message
        return
    assert len(arrays) == len(request.inputs)
    for tensor in request.inputs:
        array = arrays[tensor.name]
        assert array.dtype == to_dtype(tensor.datatype)
        assert list(array.shape) == list(tensor.shape)


@settings(max_examples=500, deadline=None)
@given(requests)
def test_any_request_is_decoded_or_refused(request: pb.ModelInferRequest) -> None:
    decode_or_refuse(request)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.lists(st.integers(0, 3), max_size=2),
    st.binary(max_size=24),
)
def test_any_raw_contents_are_decoded_or_refused(wanted: TensorSpec, shape: list[int], raw: bytes) -> None:
    tensor = Tensor(name=wanted.name, datatype=wanted.datatype, shape=shape)
    decode_or_refuse(pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[raw]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SPECS), st.lists(st.integers(0, 3), max_size=2), one_field)
def test_any_typed_contents_are_decoded_or_refused(
    wanted: TensorSpec, shape: list[int], given_contents: Contents
) -> None:
    tensor = Tensor(name=wanted.name, datatype=wanted.datatype, shape=shape, contents=given_contents)
    decode_or_refuse(pb.ModelInferRequest(inputs=[tensor]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    request = parse_request(data)
    try:
        codec.decode_inputs(request, SPECS, no_region)
    except SluiceError as error:
        assert error.reason == errors_pb2.INPUT_INVALID
    else:
        assert not request.fault
