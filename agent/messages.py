"""ModelInfer's messages between bytes and values, without copying tensors more often than needed. Pure.

Protobuf's Python gives out every entry of a `bytes` field as a new copy, and copies it in again when it is
set. So a large request is taken apart by its outermost fields: raw_input_contents stay where they are, as
views of the bytes that gRPC received, and only the rest is parsed by protobuf. An answer is serialised
without its raw contents, which are then joined behind it in one copy.

Rules: any bytes give a `Request`, if need be one that says in `fault` what is wrong, so that a malformed
message is answered as INPUT_INVALID; views keep the received bytes alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from agent.limits import SPLIT_MESSAGE_BYTES
from inference import open_inference_pb2 as pb

Buffer = bytes | memoryview

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUT_TAG = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | 2])
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True)
class Request:
    """A ModelInferRequest.

    Attributes:
        message: all of it but, in a large one, `raw_input_contents`.
        raw: the entries of `raw_input_contents`.
        fault: why the bytes are no such message; empty if they are.
    """

    message: pb.ModelInferRequest
    raw: Sequence[Buffer]
    fault: str = ""


@dataclass(frozen=True)
class Response:
    """A ModelInferResponse: a message without raw contents, and those; one for each output, or none."""

    message: pb.ModelInferResponse
    raw: Sequence[Buffer]

    def byte_size(self) -> int:
        """Bytes on the wire."""
        raw = sum(1 + len(_varint(_size(part))) + _size(part) for part in self.raw)
        return self.message.ByteSize() + raw

    def whole(self) -> pb.ModelInferResponse:
        """The message with its raw contents, for a stream."""
        self.message.raw_output_contents.extend(bytes(part) for part in self.raw)
        return self.message


def parse_request(data: bytes) -> Request:
    """The request in `data`; never raises."""
    try:
        if len(data) < SPLIT_MESSAGE_BYTES:
            return of_message(pb.ModelInferRequest.FromString(data))
        rest, raw = _split(memoryview(data))
        return Request(pb.ModelInferRequest.FromString(b"".join(rest)), raw)
    except (DecodeError, ValueError) as error:
        return Request(pb.ModelInferRequest(), (), f"the message is no ModelInferRequest: {error}")


def of_message(message: pb.ModelInferRequest) -> Request:
    """The request that protobuf parsed whole, e.g. on a stream."""
    return Request(message, list(message.raw_input_contents))


def serialize_response(response: Response) -> bytes:
    """The bytes of a response."""
    parts: list[Buffer] = [response.message.SerializeToString()]
    for part in response.raw:
        parts += (_RAW_OUTPUT_TAG, _varint(_size(part)), part)
    return b"".join(parts)


def _split(data: memoryview) -> tuple[list[memoryview], list[memoryview]]:
    """The stretches between raw contents, and those; raises ValueError for what is no protobuf message."""
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    at = kept_from = 0
    while at < len(data):
        field_start = at
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _read_varint(data, at)
            at += size
            if at > len(data):
                raise ValueError(f"a field at byte {field_start} ends behind the message")
            if tag >> 3 == _RAW_INPUT:
                rest.append(data[kept_from:field_start])
                raw.append(data[at - size : at])
                kept_from = at
        elif kind == _VARINT:
            _, at = _read_varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field at byte {field_start} has the wire type {kind}")
    rest.append(data[kept_from:])
    return rest, raw


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if at >= len(data):
            raise ValueError("the message ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number before byte {at} is too long")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _size(part: Buffer) -> int:
    return part.nbytes if isinstance(part, memoryview) else len(part)
