"""The Open Inference Protocol's tensors: from a request to arrays, and from arrays to a response. Pure.

A request carries its elements either all in `raw_input_contents`, one entry an input, or typed, in each
input's `contents`. A response carries them the way the request did, so that a client that writes typed
contents by hand can read the answer too; FP16 and BF16 have no typed field and always travel raw, and then
all outputs do. Parameters are ignored, except those that would change the meaning of the tensors.

Rules: whatever the bytes of a request, `decode_inputs` returns arrays or raises SluiceError(INPUT_INVALID)
naming the input, what was expected and what came; nothing is allocated that the request's own bytes do not
fill. Shapes and missing inputs are checked against the model in `Worker.infer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.limits import MAX_DIMENSION, MAX_NAME_CHARACTERS, MAX_TENSOR_DIMENSIONS, MAX_TENSORS_PER_MESSAGE
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
_REFUSED_PARAMETERS = {
    "shared_memory_region": "tensors in shared memory are not offered; send the contents",
    "classification": "classification of outputs is not offered; take the output itself",
}


def is_raw(request: pb.ModelInferRequest) -> bool:
    """Whether the response should carry raw contents, as the request does (or has no contents at all)."""
    return bool(request.raw_input_contents) or not any(
        tensor.HasField("contents") for tensor in request.inputs
    )


def decode_inputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """The inputs of a request by name; arrays over raw contents are read-only views of the request.

    Args:
        request: as it came.
        specs: the model's inputs.

    Raises:
        SluiceError: INPUT_INVALID.
    """
    if len(request.inputs) > MAX_TENSORS_PER_MESSAGE:
        raise _invalid("", f"{len(request.inputs)} inputs; at most {MAX_TENSORS_PER_MESSAGE} are allowed")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise _invalid(
            "",
            f"{len(request.inputs)} inputs but {len(raw)} entries in raw_input_contents: send one for each",
        )
    wanted = {spec.name: spec for spec in specs}
    arrays: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
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
        try:
            if not raw:
                arrays[tensor.name] = _typed(tensor, shape)
            elif tensor.HasField("contents"):
                raise _invalid(tensor.name, "it has contents beside raw_input_contents; send one of them")
            else:
                arrays[tensor.name] = decode(tensor.datatype, shape, raw[index])
        except (InputInvalid, UnicodeError, ValueError) as error:
            raise _invalid(tensor.name, f"expected {spec}: {error}") from error
    return arrays


def requested_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The outputs that the request asks for, in its order; all of them if it names none.

    Raises:
        SluiceError: INPUT_INVALID for an unknown or repeated one.
    """
    if not request.outputs:
        return tuple(specs)
    by_name = {spec.name: spec for spec in specs}
    chosen: dict[str, TensorSpec] = {}
    for output in request.outputs:
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
        chosen[output.name] = spec
    return tuple(chosen.values())


def encode_outputs(
    response: pb.ModelInferResponse,
    arrays: Mapping[str, NDArray[Any]],
    specs: Sequence[TensorSpec],
    *,
    raw: bool,
) -> None:
    """Adds the outputs to a response.

    Args:
        response: to be filled.
        arrays: by name; at least those of `specs`.
        specs: the outputs to add, in order.
        raw: as `is_raw` says; typed contents are used only if every output has a typed field.
    """
    raw = raw or any(spec.datatype not in _FIELDS for spec in specs)
    for spec in specs:
        array = arrays[spec.name]
        tensor = response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if raw:
            response.raw_output_contents.append(encode(array))
        else:
            values = bytes_elements(array) if spec.datatype == BYTES else array
            getattr(tensor.contents, _FIELDS[spec.datatype]).extend(values.reshape(-1).tolist())


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
