"""Bytes as inference requests: what the front makes of them beside what protobuf reads, for the fuzzer.

The front takes requests apart by hand (agent/messages.py). For any bytes: protobuf and it agree whether they
are a ModelInferRequest, and on all that it says; and its tensors are decoded, or refused as INPUT_INVALID.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from agent.messages import parse_request
from agent.shared_memory import Region, Regions
from agent.tensors import decode_inputs
from edge_tests.fuzz.examine import BrokenWordError
from inference import open_inference_pb2 as pb
from runtimes.datatypes import DATATYPES, to_dtype
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

SPECS = tuple(TensorSpec(datatype.lower(), datatype, (-1, -1)) for datatype in DATATYPES)
_REGIONS = Regions()


def seeds() -> list[bytes]:
    """A small request of each kind, for a fuzzer to begin with."""
    tensor = pb.ModelInferRequest.InferInputTensor
    made = []
    for spec in SPECS:
        size = 2 * to_dtype(spec.datatype).itemsize
        message = pb.ModelInferRequest(
            model_name="m",
            model_version="1",
            id="r",
            parameters={"priority": pb.InferParameter(int64_param=1)},
            inputs=[tensor(name=spec.name, datatype=spec.datatype, shape=[1, 2])],
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="y")],
            raw_input_contents=[bytes(size)],
        )
        made.append(message.SerializeToString())
    typed = tensor(name="fp32", datatype="FP32", shape=[1, 1])
    typed.contents.fp32_contents.append(1)
    shared = tensor(name="fp32", datatype="FP32", shape=[1, 1])
    shared.parameters["shared_memory_region"].string_param = "r"
    shared.parameters["shared_memory_byte_size"].int64_param = 4
    made += [pb.ModelInferRequest(inputs=[each]).SerializeToString() for each in (typed, shared)]
    return made


def examine_request(data: bytes) -> str:
    """What became of it: "no message", "refused" or "read". Raises BrokenWordError."""
    found = parse_request(data)
    try:
        read = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        if not found.fault:
            raise BrokenWordError("protobuf does not read what the front reads") from None
        return "no message"
    if found.fault:
        raise BrokenWordError(f"the front does not read what protobuf reads: {found.fault}")
    if [bytes(part) for part in found.raw] != list(read.raw_input_contents) or found.id != read.id:
        raise BrokenWordError("the front reads another id or other contents than protobuf")
    form = pb.ModelInferRequest()
    form.CopyFrom(found.message)
    for message in (form, read):
        del message.raw_input_contents[:]
        message.id = ""
    if form.SerializeToString(deterministic=True) != read.SerializeToString(deterministic=True):
        raise BrokenWordError("the front reads another message than protobuf")
    try:
        arrays = decode_inputs(found, SPECS, _no_region)
    except SluiceError as error:
        if error.reason not in (errors_pb2.INPUT_INVALID, errors_pb2.REGION_UNKNOWN):
            raise BrokenWordError(f"tensors are refused as {error.reason}") from error
        return "refused"
    for tensor in form.inputs:
        array = arrays[tensor.name]
        if list(array.shape) != list(tensor.shape) or array.dtype != to_dtype(tensor.datatype):
            raise BrokenWordError(f"input {tensor.name!r} became {array.dtype} of shape {array.shape}")
    return "read"


def _no_region(name: str) -> Region:
    return _REGIONS.find(name, None)
