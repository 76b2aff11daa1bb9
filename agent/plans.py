"""How requests of one form are answered by one worker: worked out at the first, followed by those after it.

A plan holds what a request's form and its worker settle between them: where the inputs lie among the raw
contents or in shared memory, their datatypes and shapes, checked against the model; the outputs asked for;
the priority; and how the answer begins. What is left for each request is to compare lengths and to lay its
inputs where the worker reads them.

Rules: a plan is followed only if nothing but contents can differ in the next request: inputs with typed
contents, BYTES and BOOL (whose bytes are checked one by one) are read anew each time. A plan holds for one
worker; what it cannot follow it leaves to tensors.py, which refuses by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.arena import padded
from agent.batch_terms import Kind, kind_of
from agent.limits import MAX_ANSWER_HEADS, STAGE_BYTES
from agent.messages import Request, Response, answer_id
from agent.scheduling import Priority
from agent.staging import Staged
from agent.tensors import (
    FindRegion,
    Wanted,
    answers_raw,
    buffer,
    encode_outputs,
    in_region,
    region_of,
    requested_outputs,
    whole_number,
)
from agent.worker import Worker
from inference import open_inference_pb2 as pb
from runtimes.datatypes import BYTES
from runtimes.interface import InputInvalid, TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

Arrays = dict[str, NDArray[Any]]
_CHECKED_EACH_TIME = (BYTES, "BOOL")


@dataclass(frozen=True)
class _Part:
    """One input: its name, dtype, shape and bytes, where it begins in a staged message, and where it comes
    from: an entry of the raw contents, or (entry -1) a region by name and an offset in it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int
    start: int
    entry: int
    region: str
    offset: int


@dataclass(frozen=True)
class Plan:
    """See above; made by `make`.

    Attributes:
        specs: the inputs of the worker that it is for: the very object.
        parts: the inputs in the model's order; none if they must be read anew each time.
        entries: raw contents that the request has.
        size: bytes of a staged message.
        shared: whether some inputs lie in shared memory.
        samples: that the request holds.
        kind: which requests may go together with it.
        wanted: the outputs to give; None if some lie in shared memory, which is looked up each time.
        raw: whether the answer carries raw contents.
        priority: in the queue.
        patience_s: for how long the request may wait there, seconds.
        heads: beginnings of answers by the outputs' shapes.
    """

    specs: tuple[TensorSpec, ...]
    parts: tuple[_Part, ...]
    entries: int
    size: int
    shared: bool
    samples: int
    kind: Kind
    wanted: tuple[Wanted, ...] | None
    raw: bool
    priority: Priority
    patience_s: float
    heads: dict[tuple[tuple[int, ...], ...], bytes] = field(default_factory=dict)

    def read(self, request: Request, worker: Worker, find: FindRegion) -> Mapping[str, NDArray[Any]] | None:
        """The inputs of a request of this form, staged if large or shared; None: this plan does not serve."""
        raw = request.raw
        if len(raw) != self.entries or not self.parts:
            return None
        for part in self.parts:
            if part.entry >= 0 and len(raw[part.entry]) != part.size:
                return None
        if self.size >= STAGE_BYTES or self.shared:
            return self._stage(raw, worker, find)
        return {
            part.name: np.frombuffer(raw[part.entry], part.dtype).reshape(part.shape) for part in self.parts
        }

    def outputs(self, request: Request, worker: Worker, find: FindRegion) -> tuple[Wanted, ...]:
        """The outputs that this request wants. Raises SluiceError(INPUT_INVALID) for one's region."""
        return self.wanted or requested_outputs(request.message, worker.outputs, find)

    def answer(
        self, request: Request, worker: Worker, outputs: Arrays, wanted: tuple[Wanted, ...]
    ) -> Response:
        """The response that carries these outputs.

        Raises:
            SluiceError: INPUT_INVALID when an output is too large for its region.
        """
        if self.wanted is None or not self.raw:
            message = pb.ModelInferResponse(
                model_name=worker.model, model_version=str(worker.version), id=request.id
            )
            return encode_outputs(message, outputs, wanted, raw=self.raw)
        shapes = tuple([outputs[item.spec.name].shape for item in wanted])
        head = self.heads.get(shapes)
        if head is None:
            message = pb.ModelInferResponse(model_name=worker.model, model_version=str(worker.version))
            head = encode_outputs(message, outputs, wanted, raw=True).head
            if len(self.heads) < MAX_ANSWER_HEADS:
                self.heads[shapes] = head
        if request.id:
            head += answer_id(request.id)
        return Response(head, [buffer(outputs[item.spec.name], item.spec.datatype) for item in wanted])

    def _stage(self, raw: Any, worker: Worker, find: FindRegion) -> Staged | None:
        staged = worker.stage(self.size, self.kind.key if worker.queue.policy.max_batch > 1 else None)
        if staged is None:
            return None
        inputs, room = staged
        try:
            for part in self.parts:
                target = room[part.start : part.start + part.size]
                if part.entry >= 0:
                    np.copyto(target, np.frombuffer(raw[part.entry], np.uint8))
                else:
                    find(part.region).read_into(part.offset, target.data)
                inputs[part.name] = target.view(part.dtype).reshape(part.shape)
        except BaseException as error:
            inputs.drop()
            if isinstance(error, SluiceError):  # of the region: said better by who reads it anew
                return None
            raise
        return inputs


def make(request: Request, worker: Worker, inputs: Arrays, find: FindRegion) -> Plan:
    """The plan for requests like this one, whose `inputs` were decoded and checked against the worker's.

    Raises:
        SluiceError: INPUT_INVALID for parameters or outputs that cannot be.
    """
    message = request.message
    priority, patience_s = _handling(message)
    wanted = requested_outputs(message, worker.outputs, find)
    parts = _parts(message, inputs)
    return Plan(
        specs=worker.inputs,
        parts=parts,
        entries=len(request.raw),
        size=sum(padded(part.size) for part in parts),
        shared=any(part.entry < 0 for part in parts),
        samples=worker.samples(inputs),
        kind=kind_of(inputs),
        wanted=None if any(item.place is not None for item in wanted) else wanted,
        raw=answers_raw(request, wanted),
        priority=priority,
        patience_s=patience_s,
    )


def _parts(message: pb.ModelInferRequest, inputs: Arrays) -> tuple[_Part, ...]:
    """The inputs in the order of `inputs`; none if they must be read anew each time."""
    entries = iter(range(len(message.inputs)))
    sources: dict[str, tuple[int, str, int]] = {}
    for tensor in message.inputs:
        if tensor.datatype in _CHECKED_EACH_TIME or tensor.HasField("contents"):
            return ()
        if in_region(tensor.parameters):
            sources[tensor.name] = (-1, *region_of(tensor.parameters))
        else:
            sources[tensor.name] = (next(entries), "", 0)
    parts, start = [], 0
    for name, array in inputs.items():
        parts.append(_Part(name, array.dtype, array.shape, array.nbytes, start, *sources[name]))
        start += padded(array.nbytes)
    return tuple(parts)


def _handling(message: pb.ModelInferRequest) -> tuple[Priority, float]:
    """The request's priority, and for how long it may wait in the queue, seconds."""
    parameters = message.parameters
    if not parameters:
        return Priority.NORMAL, math.inf
    sequence = parameters.get("sequence_id")
    if sequence is not None and (sequence.int64_param or sequence.uint64_param or sequence.string_param):
        raise _invalid("sequence_id: sequences are not offered; send each request whole")
    try:
        level = whole_number(parameters, "priority")
        timeout_us = whole_number(parameters, "timeout")
    except InputInvalid as error:
        raise _invalid(error.message) from error
    if level not in (0, *Priority):
        raise _invalid(f"priority {level}: it is 1 (high), 2 (normal) or 3 (low)")
    if timeout_us < 0:
        raise _invalid(f"timeout {timeout_us}: it is a number of microseconds")
    return Priority(level) if level else Priority.NORMAL, timeout_us / 1e6 if timeout_us else math.inf


def _invalid(why: str) -> SluiceError:
    return SluiceError(errors_pb2.INPUT_INVALID, f"the request's parameter {why}")
