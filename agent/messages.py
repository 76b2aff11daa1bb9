"""Messages of ModelInfer and its stream between bytes and values, tensors copied no more than needed. Pure.

Protobuf's Python gives out every entry of a `bytes` field as a new copy, and copies it in again when it is
set; and clients send the same names, shapes and parameters with every request. So a request is taken apart by
its outermost fields: `raw_input_contents` stay where they are, as views of the bytes that gRPC received, `id`
is set aside to be given back, and what is left, the request's *form*, is parsed by protobuf the first time it
comes and remembered. An answer is serialised without its raw contents, which are then joined behind it in one
copy.

Rules: any bytes give a `Request`, if need be one that says in `fault` what is wrong, so that a malformed
message is answered as INPUT_INVALID; bytes that no client's encoder writes are left to protobuf to judge;
views keep the received bytes alive; what is remembered is bounded in number and size.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from agent.limits import MAX_FORM_BYTES, MAX_FORMS
from inference import open_inference_pb2 as pb

Buffer = bytes | memoryview

_REQUEST, _RESPONSE = pb.ModelInferRequest, pb.ModelInferResponse
_LENGTH = 2  # the wire type of texts, bytes and messages
_ID_TAG = _REQUEST.ID_FIELD_NUMBER << 3 | _LENGTH
_RAW_INPUT_TAG = _REQUEST.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH
_ANSWER_ID_TAG = bytes([_RESPONSE.ID_FIELD_NUMBER << 3 | _LENGTH])
_RAW_OUTPUT_TAG = bytes([_RESPONSE.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH])
_STREAMED_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | _LENGTH])
_MORE = 0x80  # the bit of a number's byte that says that another follows
_MAX_LENGTH_BYTES = 5


class Form:
    """What a request says beside its id and raw contents; shared by all requests that say the same.

    Attributes:
        message: it, parsed; never changed.
        fault: why the bytes are no ModelInferRequest; empty if they are.
        plan: what was worked out from it for one worker, see plans.py; replaced as a whole.
    """

    __slots__ = ("fault", "message", "plan")

    def __init__(self, message: pb.ModelInferRequest, fault: str = "") -> None:
        self.message = message
        self.fault = fault
        self.plan: Any = None


class Request:
    """A ModelInferRequest.

    Attributes:
        form: all of it but id and raw contents.
        id: as it came.
        raw: the entries of `raw_input_contents`.
    """

    __slots__ = ("form", "id", "raw")

    def __init__(self, form: Form, request_id: str, raw: Sequence[Buffer]) -> None:
        self.form = form
        self.id = request_id
        self.raw = raw

    @property
    def message(self) -> pb.ModelInferRequest:
        return self.form.message

    @property
    def fault(self) -> str:
        return self.form.fault


class Response:
    """A ModelInferResponse.

    Attributes:
        head: the message without raw contents, serialised.
        raw: those; one for each output, or none.
    """

    __slots__ = ("head", "raw")

    def __init__(self, head: bytes, raw: Sequence[Buffer]) -> None:
        self.head = head
        self.raw = raw

    def byte_size(self) -> int:
        """Bytes on the wire."""
        return len(self.head) + sum(1 + len(_varint(_size(part))) + _size(part) for part in self.raw)

    def with_parameters(self, more: Mapping[str, pb.InferParameter]) -> Response:
        """The same that says this too."""
        added = _RESPONSE()
        for name, value in more.items():
            added.parameters[name].CopyFrom(value)
        return Response(self.head + added.SerializeToString(), self.raw)


class _Forms:
    """Forms by their bytes; the one remembered longest is forgotten first."""

    def __init__(self) -> None:
        self._known: dict[bytes, Form] = {}
        self._lock = threading.Lock()

    def of(self, data: bytes) -> Form:
        """The form in `data`. Raises DecodeError."""
        form = self._known.get(data)
        if form is None:
            form = Form(_REQUEST.FromString(data))
            # Typed contents are tensors: no other request has the same.
            if len(data) <= MAX_FORM_BYTES and not any(
                tensor.HasField("contents") for tensor in form.message.inputs
            ):
                with self._lock:
                    while len(self._known) >= MAX_FORMS:
                        self._known.pop(next(iter(self._known)))
                    self._known[data] = form
        return form


_forms = _Forms()


def parse_request(data: bytes) -> Request:
    """The request in `data`; never raises."""
    try:
        taken_apart = _split(data)
        if taken_apart is not None:
            form, request_id, raw = taken_apart
            return Request(_forms.of(form), request_id, raw)
        return of_message(_REQUEST.FromString(data))
    except DecodeError as error:
        return Request(Form(_REQUEST(), f"the message is no ModelInferRequest: {error}"), "", ())


def of_message(message: pb.ModelInferRequest) -> Request:
    """The request that protobuf parsed whole."""
    return Request(Form(message), message.id, list(message.raw_input_contents))


def answer_id(request_id: str) -> bytes:
    """The field of a serialised response that gives a request's id back."""
    if not request_id:
        return b""
    encoded = request_id.encode()
    return b"".join((_ANSWER_ID_TAG, _varint(len(encoded)), encoded))


def serialize_response(response: Response) -> bytes:
    """The bytes of a response."""
    parts: list[Buffer] = [response.head]
    for part in response.raw:
        parts += (_RAW_OUTPUT_TAG, _varint(_size(part)), part)
    return b"".join(parts)


def serialize_streamed(answer: Response | pb.ModelStreamInferResponse) -> bytes:
    """The bytes of what a stream gives: a response, or a failure as a message."""
    if not isinstance(answer, Response):
        return answer.SerializeToString()
    return b"".join((_STREAMED_TAG, _varint(answer.byte_size()), serialize_response(answer)))


def _split(data: bytes) -> tuple[bytes, str, list[memoryview]] | None:
    """The form's bytes, the id and the raw contents; None for what only protobuf should judge.

    Understood are fields of numbers up to 15 that have a length, each within the message: that is all that a
    ModelInferRequest has.
    """
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    view, end, request_id = memoryview(data), len(data), ""
    at = kept_from = 0
    try:
        while at < end:
            start, tag = at, data[at]
            if tag & 7 != _LENGTH or tag >= _MORE:
                return None
            size, at = data[at + 1], at + 2
            if size >= _MORE:
                size, at = _long_size(data, at - 1)
            at += size
            if at > end:
                return None
            if tag == _RAW_INPUT_TAG:
                raw.append(view[at - size : at])
            elif tag == _ID_TAG:
                request_id = data[at - size : at].decode()
            else:
                continue
            if start > kept_from:
                rest.append(view[kept_from:start])
            kept_from = at
    except (IndexError, ValueError):  # it ends inside a number; a number is too long; the id is no UTF-8
        return None
    if end > kept_from:
        rest.append(view[kept_from:])
    return b"".join(rest), request_id, raw


def _long_size(data: bytes, at: int) -> tuple[int, int]:
    """A length of several bytes, and where it ends."""
    value = 0
    for index in range(_MAX_LENGTH_BYTES):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < _MORE:
            return value, at
    raise ValueError("a length of too many bytes")


def _varint(value: int) -> bytes:
    if value < _MORE:
        return bytes((value,))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _size(part: Buffer) -> int:
    return part.nbytes if isinstance(part, memoryview) else len(part)
