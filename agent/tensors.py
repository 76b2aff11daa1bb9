"""The Open Inference Protocol's tensors: from a request to arrays, and from arrays to a response. Pure.

A request carries its elements in `raw_input_contents`, one entry an input, or typed, in each input's
`contents`; beside either, an input may lie in a region of shared memory. A response carries them the way the
request did, so that a client that writes typed contents by hand can read the answer too; FP16 and BF16 have
no typed field and always travel raw, and then all outputs do. An output that was asked for in shared memory
is written there, and its entry among the raw contents is empty. Other parameters are ignored, except those
that would change the meaning of the tensors.

Rules: whatever the bytes of a request, `decode_inputs` returns arrays or raises SluiceError(INPUT_INVALID)
naming the input, what was expected and what came; nothing is allocated that the request's own bytes do not
fill, but for inputs in shared memory: no more than one message to a worker may hold, and than the caller's
`reserve` grants. Shapes and missing inputs are checked against the model in `Worker.check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.limits import (
    MAX_DIMENSION,
    MAX_FRAME_PAYLOAD_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS_PER_MESSAGE,
)
from agent.messages import Buffer, Request, Response
from agent.shared_memory import Region
from inference import open_inference_pb2 as pb
from runtimes.datatypes import BYTES, bytes_elements, decode, encode, to_dtype
from runtimes.interface import InputInvalid, TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

# The field of InferTensorContents that carries a datatype.
_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
# Extensions of other servers under which the tensors mean something else: refused rather than ignored.
_REFUSED_PARAMETERS = {"classification": "classification of outputs is not offered; take the output itself"}
_REGION, _REGION_BYTES, _REGION_OFFSET = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)

FindRegion = Callable[[str], Region]  # by name; raises SluiceError(REGION_UNKNOWN)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in shared memory: the region, and offset and size in it, bytes."""

    region: Region
    offset: int
    size: int


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for, and where it is to be written; None: into the response."""

    spec: TensorSpec
    place: Place | None = None


def answers_raw(request: Request, wanted: Sequence[Wanted]) -> bool:
    """Whether the response carries raw contents: as the request does (or has no contents at all), and always
    where an output has no typed field.
    """
    typed = not request.raw and any(tensor.HasField("contents") for tensor in request.message.inputs)
    return not typed or any(item.spec.datatype not in _FIELDS for item in wanted)


def in_region(parameters: Mapping[str, Any]) -> bool:
    """Whether a tensor with these parameters lies in shared memory."""
    return _REGION in parameters


def region_of(parameters: Mapping[str, Any]) -> tuple[str, int]:
    """The name of that region, and the tensor's offset in it, bytes."""
    return _text(parameters[_REGION]), whole_number(parameters, _REGION_OFFSET)


def decode_inputs(
    request: Request,
    specs: Sequence[TensorSpec],
    find: FindRegion,
    reserve: Callable[[int], None] = lambda _size: None,
) -> dict[str, NDArray[Any]]:
    """The inputs of a request by name; arrays over raw contents are read-only views of the request.

    Args:
        request: as it came.
        specs: the model's inputs.
        find: looks up the caller's shared memory regions.
        reserve: called with the bytes of an input before it is read from a region; may raise SluiceError.

    Raises:
        SluiceError: INPUT_INVALID, and what `reserve` raises.
    """
    tensors = request.message.inputs
    if request.fault:
        raise _invalid("", request.fault)
    if len(tensors) > MAX_TENSORS_PER_MESSAGE:
        raise _invalid("", f"{len(tensors)} inputs; at most {MAX_TENSORS_PER_MESSAGE} are allowed")
    shared = [in_region(tensor.parameters) for tensor in tensors]
    if request.raw and len(request.raw) != shared.count(False):
        raise _invalid(
            "",
            f"{shared.count(False)} inputs outside shared memory but {len(request.raw)} entries in "
            "raw_input_contents: send one for each",
        )
    wanted = {spec.name: spec for spec in specs}
    raw = iter(request.raw)
    arrays: dict[str, NDArray[Any]] = {}
    from_regions = 0
    for tensor, from_region in zip(tensors, shared):
        spec = wanted.get(tensor.name)
        if spec is None:
            have = ", ".join(map(str, specs))
            raise _invalid(tensor.name, f"the model has no such input; its inputs are {have}")
        if tensor.name in arrays:
            raise _invalid(tensor.name, "it is given twice")
        if tensor.datatype != spec.datatype:
            raise _invalid(tensor.name, f"expected {spec}, got datatype {_short(tensor.datatype)!r}")
        _check_parameters(tensor.name, tensor.parameters)
        shape = _shape(tensor, spec)
        if tensor.HasField("contents") and (request.raw or from_region):
            beside = _REGION if from_region else "raw_input_contents"
            raise _invalid(tensor.name, f"it has contents beside {beside}; send one of them")
        try:
            if from_region:
                place = _place(tensor.name, tensor.parameters, find, "input")
                from_regions += place.size
                _check_place(tensor.datatype, shape, place, from_regions)
                reserve(place.size)
                arrays[tensor.name] = _from_region(tensor.datatype, shape, place)
            elif request.raw:
                arrays[tensor.name] = decode(tensor.datatype, shape, next(raw))
            else:
                arrays[tensor.name] = _typed(tensor, shape)
        except (InputInvalid, UnicodeError, ValueError) as error:
            raise _invalid(tensor.name, f"expected {spec}: {error}") from error
    return arrays


def requested_outputs(
    message: pb.ModelInferRequest, specs: Sequence[TensorSpec], find: FindRegion
) -> tuple[Wanted, ...]:
    """The outputs that the request asks for, in its order; all of them if it names none.

    Raises:
        SluiceError: INPUT_INVALID for an unknown or repeated one, or a region that cannot take it.
    """
    if not message.outputs:
        return tuple(Wanted(spec) for spec in specs)
    by_name = {spec.name: spec for spec in specs}
    chosen: dict[str, Wanted] = {}
    for output in message.outputs:
        spec = by_name.get(output.name)
        if spec is None:
            raise _invalid(
                output.name,
                f"the model has no such output; its outputs are {', '.join(map(str, specs))}",
                "output",
            )
        if output.name in chosen:
            raise _invalid(output.name, "it is asked for twice", "output")
        _check_parameters(output.name, output.parameters, "output")
        place = None
        if in_region(output.parameters):
            place = _place(output.name, output.parameters, find, "output")
        chosen[output.name] = Wanted(spec, place)
    return tuple(chosen.values())


def encode_outputs(
    message: pb.ModelInferResponse,
    arrays: Mapping[str, NDArray[Any]],
    wanted: Sequence[Wanted],
    *,
    raw: bool,
) -> Response:
    """The response with the outputs added; those that belong there are written to shared memory.

    Args:
        message: to be filled.
        arrays: by name; at least those of `wanted`. They must not change until the response is serialised.
        wanted: the outputs to add, in order.
        raw: as `answers_raw` says.

    Raises:
        SluiceError: INPUT_INVALID when an output does not fit its place in shared memory.
    """
    parts: list[Buffer] = []
    for item in wanted:
        spec, array = item.spec, arrays[item.spec.name]
        tensor = message.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if item.place is not None:
            _to_region(tensor, array, item.place)
            parts.append(b"")
        elif raw:
            parts.append(buffer(array, spec.datatype))
        else:
            values = bytes_elements(array) if spec.datatype == BYTES else array
            getattr(tensor.contents, _FIELDS[spec.datatype]).extend(values.reshape(-1).tolist())
            parts.append(b"")
    return Response(message.SerializeToString(), parts if raw else ())


def buffer(array: NDArray[Any], datatype: str) -> Buffer:
    """The raw contents, without a copy where the array's memory is laid out like them."""
    if datatype == BYTES or not array.flags.c_contiguous:
        return encode(array)
    return array.reshape(-1).view(np.uint8).data


def _place(name: str, parameters: Mapping[str, Any], find: FindRegion, what: str) -> Place:
    try:
        key = _text(parameters[_REGION])
    except InputInvalid as error:
        raise _invalid(name, error.message, what) from error
    try:
        region = find(key)
    except SluiceError as error:
        raise SluiceError(error.reason, f"{what} {_short(name)!r}: {error.message}", obj=error.obj) from error
    try:
        size = whole_number(parameters, _REGION_BYTES)
        place = Place(region, whole_number(parameters, _REGION_OFFSET), size)
        if _REGION_BYTES not in parameters:
            raise InputInvalid(f"{_REGION} needs {_REGION_BYTES}")
        region.check(place.offset, place.size)
    except (InputInvalid, SluiceError) as error:
        raise _invalid(name, error.message, what) from error
    return place


def _text(parameter: pb.InferParameter) -> str:
    if parameter.WhichOneof("parameter_choice") != "string_param":
        raise InputInvalid(f"{_REGION} is a text")
    return parameter.string_param


def whole_number(parameters: Mapping[str, pb.InferParameter], name: str) -> int:
    """A parameter that is a whole number; 0 when it is not given."""
    if name not in parameters:
        return 0
    kind = parameters[name].WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InputInvalid(f"{name} is a whole number")
    return int(getattr(parameters[name], kind))


def _check_place(datatype: str, shape: tuple[int, ...], place: Place, total: int) -> None:
    """Raises InputInvalid unless the place has the tensor's size, and all together are not too large."""
    if total > MAX_FRAME_PAYLOAD_BYTES:
        raise InputInvalid(f"the inputs in shared memory take over {MAX_FRAME_PAYLOAD_BYTES} bytes")
    if datatype != BYTES:
        expected = math.prod(shape) * to_dtype(datatype).itemsize
        if place.size != expected:
            raise InputInvalid(f"shape {list(shape)} takes {expected} bytes; {_REGION_BYTES} is {place.size}")


def _from_region(datatype: str, shape: tuple[int, ...], place: Place) -> NDArray[Any]:
    """An input that lies in shared memory, read in one copy."""
    try:
        return decode(datatype, shape, place.region.read(place.offset, place.size).data)
    except SluiceError as error:
        raise InputInvalid(error.message) from error


def _to_region(tensor: pb.ModelInferResponse.InferOutputTensor, array: NDArray[Any], place: Place) -> None:
    data = memoryview(buffer(array, tensor.datatype))
    if data.nbytes > place.size:
        raise _invalid(
            tensor.name, f"it takes {data.nbytes} bytes, and {_REGION_BYTES} is {place.size}", "output"
        )
    try:
        place.region.write(place.offset, data)
    except SluiceError as error:
        raise _invalid(tensor.name, error.message, "output") from error
    tensor.parameters[_REGION].string_param = place.region.name
    tensor.parameters[_REGION_BYTES].int64_param = data.nbytes
    tensor.parameters[_REGION_OFFSET].int64_param = place.offset


def _shape(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if len(shape) > MAX_TENSOR_DIMENSIONS:
        raise _invalid(tensor.name, f"expected {spec}, got a shape of {len(shape)} dimensions")
    if any(not 0 <= size <= MAX_DIMENSION for size in shape):
        raise _invalid(
            tensor.name, f"expected {spec}, got shape {list(shape)}: a dimension is 0 to {MAX_DIMENSION}"
        )
    if math.prod(size for size in shape if size) > MAX_DIMENSION:
        raise _invalid(
            tensor.name,
            f"expected {spec}, got shape {list(shape)}, which is more than {MAX_DIMENSION} elements",
        )
    return shape


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, shape: tuple[int, ...]) -> NDArray[Any]:
    """The typed contents as an array; raises InputInvalid, OverflowError or ValueError."""
    expected = _FIELDS.get(tensor.datatype)
    if expected is None:
        raise InputInvalid(f"{tensor.datatype} has no typed contents; send it in raw_input_contents")
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if any(name != expected for name in filled):
        raise InputInvalid(f"{tensor.datatype} belongs in {expected}, and {', '.join(filled)} came")
    values = getattr(tensor.contents, expected)
    count = math.prod(shape)
    if len(values) != count:
        raise InputInvalid(f"shape {list(shape)} is {count} elements, and {expected} has {len(values)}")
    if tensor.datatype == BYTES:
        elements = np.empty(count, np.object_)
        elements[:] = list(values)
        return elements.reshape(shape)
    dtype = to_dtype(tensor.datatype)
    array = np.array(values, dtype=np.int64 if dtype.kind in "iu" and dtype.itemsize < 8 else dtype)
    if array.dtype != dtype:
        bounds = np.iinfo(dtype)
        outside = (array < bounds.min) | (array > bounds.max)
        if outside.any():
            first = int(np.argmax(outside))
            raise InputInvalid(f"element {first} is {array[first]}, outside {bounds.min} to {bounds.max}")
    return array.astype(dtype, copy=False).reshape(shape)


def _check_parameters(name: str, parameters: Mapping[str, Any], what: str = "input") -> None:
    for refused, why in _REFUSED_PARAMETERS.items():
        if refused in parameters:
            raise _invalid(name, f"parameter {refused!r}: {why}", what)


def _invalid(name: str, why: str, what: str = "input") -> SluiceError:
    where = f"{what} {_short(name)!r}: " if name else ""
    return SluiceError(errors_pb2.INPUT_INVALID, where + why, obj=_short(name))


def _short(text: str) -> str:
    return text[:MAX_NAME_CHARACTERS]
