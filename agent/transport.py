"""Messages between the agent and one worker process, over a Unix socket pair.

A frame is a fixed prefix (magic, header length, payload length), a JSON header and a payload. The header is a
small object that both sides agree on and lists the tensors under "tensors" as [name, datatype, shape, bytes];
the payload holds their raw contents as the Open Inference Protocol lays them out, each padded to a multiple
of 64 bytes, so that every array starts aligned. Nothing is pickled. `Channel` alone knows how elements
travel: shared memory can take the payload's place behind the same two calls.

Rules: every length is checked against a limit before memory is taken for it; a frame once begun is finished
within FRAME_S or the channel counts as broken; one message is on its way in each direction at a time, which
the protocol above keeps (a request, then its answer).
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.limits import (
    FRAME_S,
    MAX_FRAME_HEADER_BYTES,
    MAX_FRAME_PAYLOAD_BYTES,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS_PER_MESSAGE,
    SOCKET_BUFFER_BYTES,
)
from runtimes.datatypes import BYTES, decode, encode, of_dtype
from runtimes.interface import InputInvalid

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"SLW1"
_ALIGNMENT = 64
_PADDING = bytes(_ALIGNMENT)
_FIRST_READ_BYTES = 16 << 10  # small messages arrive in one call
_LEAST_TIMEOUT_S = 0.001  # 0 would mean "never wait" to the socket
# The kernel refuses more pieces in one call (UIO_MAXIOV is 1024).
_MAX_PIECES = 512


class ChannelClosed(Exception):
    """The other side is gone: end of file, or a broken pipe."""


class ChannelBroken(Exception):
    """The bytes are no frame, a frame stopped half-way, or it is over a limit; the channel cannot go on."""


class MessageTooLarge(Exception):
    """The message to send is over a limit; nothing was sent."""


@dataclass(frozen=True)
class Message:
    """One received message: its header without the tensor table, and its tensors by name."""

    header: dict[str, Any]
    tensors: dict[str, NDArray[Any]]


class Channel:
    """One end of a socket pair. Not thread-safe: the owner lets one caller in at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._first = bytearray(_FIRST_READ_BYTES)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Sends one message within FRAME_S.

        Raises MessageTooLarge and runtimes.InputInvalid (no datatype carries the array; both: nothing was
        sent), ChannelClosed, ChannelBroken.
        """
        table, pieces, payload_bytes = _lay_out(tensors or {})
        head = json.dumps({**header, "tensors": table}, separators=(",", ":")).encode()
        if len(head) > MAX_FRAME_HEADER_BYTES:
            raise MessageTooLarge(
                f"the header takes {len(head)} bytes; at most {MAX_FRAME_HEADER_BYTES} are allowed"
            )
        prefix = _PREFIX.pack(_MAGIC, len(head), payload_bytes)
        self._write([memoryview(prefix + head), *pieces], time.monotonic() + FRAME_S)

    def receive(self, timeout_s: float | None) -> Message:
        """Waits for a message to begin, then takes it whole.

        Args:
            timeout_s: how long to wait for its first byte; None: for ever.

        Raises TimeoutError (nothing was taken), ChannelClosed, ChannelBroken.
        """
        first = memoryview(self._first)
        got = self._read_some(first, timeout_s)
        deadline = time.monotonic() + FRAME_S
        while got < _PREFIX.size:
            got += self._read_more(first[got : _PREFIX.size], deadline)
        magic, head_bytes, payload_bytes = _PREFIX.unpack_from(first)
        if magic != _MAGIC:
            raise ChannelBroken("the bytes received are not a frame")
        if head_bytes > MAX_FRAME_HEADER_BYTES or payload_bytes > MAX_FRAME_PAYLOAD_BYTES:
            raise ChannelBroken(
                f"a frame announces {head_bytes} + {payload_bytes} bytes; at most "
                f"{MAX_FRAME_HEADER_BYTES} + {MAX_FRAME_PAYLOAD_BYTES} are allowed"
            )
        rest = first[_PREFIX.size : got]
        if rest.nbytes > head_bytes + payload_bytes:
            raise ChannelBroken("a second message came before the first was answered")
        head, payload = bytearray(head_bytes), _aligned(payload_bytes)
        for target in (memoryview(head), payload.data):
            done = min(rest.nbytes, target.nbytes)
            target[:done] = rest[:done]
            rest = rest[done:]
            while done < target.nbytes:
                done += self._read_more(target[done:], deadline)
        return _parse(head, payload)

    def readable(self, timeout_s: float | None) -> bool:
        """Whether bytes or the end of the stream are there within `timeout_s`."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        wait_ms = None if timeout_s is None else math.ceil(max(0.0, timeout_s) * 1000)
        return bool(poll.poll(wait_ms))

    def shutdown(self) -> None:
        """Ends the stream for both sides, also for a caller that is waiting here; `close` is still needed."""
        with contextlib.suppress(OSError):  # not connected any more, or closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes this end; nobody may be using it."""
        self._socket.close()

    def _write(self, pieces: list[memoryview], deadline: float) -> None:
        waiting = [piece for piece in pieces if piece.nbytes]
        while waiting:
            try:
                self._socket.settimeout(max(_LEAST_TIMEOUT_S, deadline - time.monotonic()))
                sent = self._socket.sendmsg(waiting[:_MAX_PIECES])
            except TimeoutError:
                raise ChannelBroken(f"the other side took no data for {FRAME_S} s") from None
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            while waiting and sent >= waiting[0].nbytes:
                sent -= waiting.pop(0).nbytes
            if sent:
                waiting[0] = waiting[0][sent:]

    def _read_more(self, into: memoryview, deadline: float) -> int:
        try:
            return self._read_some(into, deadline - time.monotonic())
        except TimeoutError:
            raise ChannelBroken(f"a frame stopped half-way for {FRAME_S} s") from None

    def _read_some(self, into: memoryview, timeout_s: float | None) -> int:
        """Takes at least one byte, at most what fits. Raises TimeoutError or ChannelClosed."""
        try:
            self._socket.settimeout(None if timeout_s is None else max(_LEAST_TIMEOUT_S, timeout_s))
            count = self._socket.recv_into(into)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not count:
            raise ChannelClosed("the stream ended")
        return count


def _lay_out(tensors: Mapping[str, NDArray[Any]]) -> tuple[list[list[Any]], list[memoryview], int]:
    """The tensor table, the pieces of the payload and its size in bytes."""
    if len(tensors) > MAX_TENSORS_PER_MESSAGE:
        raise MessageTooLarge(f"{len(tensors)} tensors; at most {MAX_TENSORS_PER_MESSAGE} are allowed")
    table: list[list[Any]] = []
    pieces: list[memoryview] = []
    total = 0
    for name, array in tensors.items():
        datatype = of_dtype(array.dtype)
        if datatype in ("", BYTES):
            data = memoryview(encode(array))
        else:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        table.append([name, datatype, array.shape, data.nbytes])
        padded = _padded(data.nbytes)
        pieces += (data, memoryview(_PADDING)[: padded - data.nbytes])
        total += padded
    if total > MAX_FRAME_PAYLOAD_BYTES:
        raise MessageTooLarge(
            f"the tensors take {total} bytes; at most {MAX_FRAME_PAYLOAD_BYTES} are allowed"
        )
    return table, pieces, total


def _parse(head: bytearray, payload: NDArray[np.uint8]) -> Message:
    """The message of a frame; anything that contradicts itself raises ChannelBroken."""
    try:
        header = json.loads(head)
        table = header.pop("tensors")
        tensors = dict(_tensors(table, payload))
    except (InputInvalid, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ChannelBroken(f"a frame's header contradicts its payload: {error}") from error
    return Message(header, tensors)


def _tensors(
    table: Iterable[tuple[str, str, list[int], int]], payload: NDArray[np.uint8]
) -> Iterable[tuple[str, NDArray[Any]]]:
    start = 0
    for name, datatype, shape, size in table:
        data = payload[start : start + size]
        if len(data) != size or len(shape) > MAX_TENSOR_DIMENSIONS:
            raise ValueError(f"tensor {name!r} does not fit")
        yield name, decode(datatype, shape, data.data)
        start += _padded(size)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned(size: int) -> NDArray[np.uint8]:
    """`size` bytes that start at a multiple of 64; NumPy alone promises 16."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size]
