"""Messages between the agent and one worker process: a small frame over a Unix socket pair, tensors in shared
memory.

A frame is a fixed prefix (magic, header length, payload length) and a JSON header: a small object that both
sides agree on, with the tensors under "tensors" as [name, datatype, shape, bytes]. The payload lies in the
sender's arena (arena.py): the tensors' raw contents as the Open Inference Protocol lays them out, each padded
to a multiple of 64 bytes, so that every array starts aligned. Nothing is pickled. Headers repeat, so both
sides remember those they have built and read.

Rules: every length is checked against a limit before memory is touched for it; a frame once begun is finished
within FRAME_S or the channel counts as broken; one message is on its way in each direction at a time, which
the protocol above keeps (a request, then its answer). Received arrays are copies, or, if asked for, views of
the arena that hold until the answer is sent.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.arena import Arena
from agent.limits import (
    FRAME_S,
    MAX_FRAME_HEADER_BYTES,
    MAX_FRAME_PAYLOAD_BYTES,
    MAX_LAYOUTS,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS_PER_MESSAGE,
)
from runtimes.datatypes import BYTES, decode, encode, of_dtype, to_dtype
from runtimes.interface import InputInvalid

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"SLW2"
_ALIGNMENT = 64
_FIRST_READ_BYTES = 16 << 10  # most messages arrive in one call
_LEAST_TIMEOUT_S = 0.001  # 0 would mean "for ever" to the socket
_TICK_S = 0.5  # longest single wait in the kernel for one with a deadline
_TIME = struct.Struct("@ll")

Tensors = Mapping[str, NDArray[Any]]


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


@dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies in a payload; `dtype` is None for one that has to be decoded (BYTES, BOOL)."""

    name: str
    datatype: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class _Layout:
    """A header as it was read, where its tensors lie, up to where they reach, and views of them by name.

    There are no views if a tensor has to be decoded.
    """

    header: dict[str, Any]
    tensors: tuple[_Tensor, ...]
    end: int
    views: dict[str, NDArray[Any]] | None


@dataclass(frozen=True)
class _Plan:
    """How a message of the same op and layout was sent: its frame, and where its tensors go."""

    frame: bytes
    targets: tuple[NDArray[Any], ...]
    payload_bytes: int


class Channel:
    """One end of a socket pair and of two arenas. Not thread-safe: the owner lets one caller in at a time.

    Args:
        connected: the socket.
        outgoing: written by this end.
        incoming: written by the other.
        views: whether received arrays are views of the arena, which hold until the next `send`.
    """

    def __init__(
        self, connected: socket.socket, outgoing: Arena, incoming: Arena, *, views: bool = False
    ) -> None:
        connected.settimeout(None)  # the kernel keeps the times: one system call instead of two
        self._socket = connected
        self._send_timeout_s = self._receive_timeout_s = 0.0
        self._outgoing = outgoing
        self._incoming = incoming
        self._views = views
        self._first = bytearray(_FIRST_READ_BYTES)
        self._last_sent = 0
        self._plans: dict[Any, _Plan] = {}
        self._read: dict[bytes, _Layout] = {}

    def send(self, header: Mapping[str, Any], *tensors: Tensors) -> None:
        """Sends one message within FRAME_S.

        Args:
            header: a small JSON object.
            tensors: one or more sets of the same tensors, to be joined along their first dimension.

        Raises MessageTooLarge and runtimes.InputInvalid (no datatype carries the array, or the sets do not
        fit together; all: nothing was sent), ChannelClosed, ChannelBroken.
        """
        key: Any = None
        if len(tensors) == 1 and len(header) == 1:
            key = (header.get("op"), *((name, item.dtype, item.shape) for name, item in tensors[0].items()))
            plan = self._plans.get(key)
            if plan is not None:
                self._outgoing.make_way(self._last_sent, plan.payload_bytes)
                for target, array in zip(plan.targets, tensors[0].values()):
                    np.copyto(target, array)
                self._last_sent = plan.payload_bytes
                self._write(plan.frame)
                return
        table, payload_bytes = self._lay_out(tensors)
        head = json.dumps({**header, "tensors": table}, separators=(",", ":")).encode()
        if len(head) > MAX_FRAME_HEADER_BYTES:
            raise MessageTooLarge(
                f"the header takes {len(head)} bytes; at most {MAX_FRAME_HEADER_BYTES} are allowed"
            )
        frame = _PREFIX.pack(_MAGIC, len(head), payload_bytes) + head
        if key is not None and all(datatype != BYTES for _, datatype, _, _ in table):
            _bound(self._plans)
            self._plans[key] = _Plan(frame, self._targets(tensors[0]), payload_bytes)
        self._last_sent = payload_bytes
        self._write(frame)

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
            got += self._read_more(first[got:], deadline)
        magic, head_bytes, payload_bytes = _PREFIX.unpack_from(first)
        if magic != _MAGIC:
            raise ChannelBroken("the bytes received are not a frame")
        if head_bytes > MAX_FRAME_HEADER_BYTES or payload_bytes > MAX_FRAME_PAYLOAD_BYTES:
            raise ChannelBroken(
                f"a frame announces {head_bytes} + {payload_bytes} bytes; at most "
                f"{MAX_FRAME_HEADER_BYTES} + {MAX_FRAME_PAYLOAD_BYTES} are allowed"
            )
        if got > _PREFIX.size + head_bytes:
            raise ChannelBroken("a second message came before the first was answered")
        head = bytes(first[_PREFIX.size : got])
        if len(head) < head_bytes:
            rest = bytearray(head_bytes - len(head))
            done = 0
            while done < len(rest):
                done += self._read_more(memoryview(rest)[done:], deadline)
            head += rest
        return self._parse(head, payload_bytes)

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
        self._plans.clear()
        self._read.clear()
        self._outgoing.close()
        self._incoming.close()

    # Sending.

    def _lay_out(self, sets: Sequence[Tensors]) -> tuple[tuple[Any, ...], int]:
        """Puts the tensors into the arena; their table and the payload's size in bytes."""
        names = sets[0] if sets else {}
        if len(names) > MAX_TENSORS_PER_MESSAGE:
            raise MessageTooLarge(f"{len(names)} tensors; at most {MAX_TENSORS_PER_MESSAGE} are allowed")
        plan, start = [], 0
        for name in names:
            parts = [tensors[name] for tensors in sets]
            datatype = of_dtype(parts[0].dtype)
            if datatype in ("", BYTES):
                encoded = [np.frombuffer(encode(part), np.uint8) for part in parts]
                size = sum(part.nbytes for part in encoded)
            else:
                encoded, size = parts, sum(part.nbytes for part in parts)
            plan.append((name, datatype, _joined_shape(parts), start, size, encoded))
            start += _padded(size)
        if start > MAX_FRAME_PAYLOAD_BYTES:
            raise MessageTooLarge(
                f"the tensors take {start} bytes; at most {MAX_FRAME_PAYLOAD_BYTES} are allowed"
            )
        self._outgoing.make_way(self._last_sent, start)
        for _name, _datatype, _shape, at, _size, parts in plan:
            place = at
            for part in parts:
                target = self._outgoing.bytes[place : place + part.nbytes]
                np.copyto(target.view(part.dtype).reshape(part.shape), part)
                place += part.nbytes
        return tuple((name, datatype, shape, size) for name, datatype, shape, _, size, _ in plan), start

    def _targets(self, tensors: Tensors) -> tuple[NDArray[Any], ...]:
        """Views of the arena where these tensors go, in their order."""
        targets, start = [], 0
        for array in tensors.values():
            place = self._outgoing.bytes[start : start + array.nbytes]
            targets.append(place.view(array.dtype).reshape(array.shape))
            start += _padded(array.nbytes)
        return tuple(targets)

    def _write(self, frame: bytes) -> None:
        if self._send_timeout_s != FRAME_S:
            self._send_timeout_s = FRAME_S
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _time(FRAME_S))
        try:
            self._socket.sendall(frame)
        except BlockingIOError:
            raise ChannelBroken(f"the other side took no data for {FRAME_S} s") from None
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    # Receiving.

    def _parse(self, head: bytes, payload_bytes: int) -> Message:
        """The message of a frame; anything that contradicts itself raises ChannelBroken."""
        try:
            layout = self._read.get(head)
            if layout is None:
                layout = _layout(head, self._incoming)
                if len(head) <= _FIRST_READ_BYTES:
                    _bound(self._read)
                    self._read[head] = layout
            if layout.end > payload_bytes:
                raise ValueError(f"its tensors take {layout.end} bytes, and it has {payload_bytes}")
            if layout.views is None:
                tensors = {item.name: self._tensor(item) for item in layout.tensors}
            elif self._views:
                tensors = dict(layout.views)
            else:
                tensors = {name: array.copy() for name, array in layout.views.items()}
        except (InputInvalid, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChannelBroken(f"a frame's header contradicts its payload: {error}") from error
        return Message(layout.header.copy(), tensors)

    def _tensor(self, item: _Tensor) -> NDArray[Any]:
        data = self._incoming.bytes[item.start : item.start + item.size]
        if item.dtype is not None:
            array = data.view(item.dtype).reshape(item.shape)
            return array if self._views else array.copy()
        return decode(item.datatype, item.shape, (data if self._views else data.copy()).data)

    def _read_more(self, into: memoryview, deadline: float) -> int:
        try:
            return self._read_some(into, deadline - time.monotonic())
        except TimeoutError:
            raise ChannelBroken(f"a frame stopped half-way for {FRAME_S} s") from None

    def _read_some(self, into: memoryview, timeout_s: float | None) -> int:
        """Takes at least one byte, at most what fits. Raises TimeoutError or ChannelClosed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._wait_at_most(0.0 if timeout_s is None else min(_TICK_S, max(_LEAST_TIMEOUT_S, timeout_s)))
            try:
                count = self._socket.recv_into(into)
            except BlockingIOError:
                timeout_s = None if deadline is None else deadline - time.monotonic()
                if timeout_s is not None and timeout_s <= 0:
                    raise TimeoutError from None
                continue
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not count:
                raise ChannelClosed("the stream ended")
            return count

    def _wait_at_most(self, seconds: float) -> None:
        """Of one `recv`; 0: for ever. Most waits are a tick, so that this rarely costs a system call."""
        if seconds != self._receive_timeout_s:
            self._receive_timeout_s = seconds
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _time(seconds))
            except OSError as error:
                raise ChannelClosed(str(error)) from error


def _time(seconds: float) -> bytes:
    """A `struct timeval`."""
    whole = int(seconds)
    return _TIME.pack(whole, int((seconds - whole) * 1_000_000))


def _joined_shape(parts: Sequence[NDArray[Any]]) -> tuple[int, ...]:
    first = parts[0]
    if len(parts) == 1:
        return first.shape
    if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype or not part.ndim for part in parts):
        raise InputInvalid("tensors of different shapes cannot be joined")
    return (sum(part.shape[0] for part in parts), *first.shape[1:])


def _layout(head: bytes, arena: Arena) -> _Layout:
    """Reads a header; raises what a header that is none makes."""
    header = json.loads(head)
    table = header.pop("tensors")
    found, start = [], 0
    for name, datatype, shape, size in table:
        dtype = to_dtype(datatype)
        if len(shape) > MAX_TENSOR_DIMENSIONS or size < 0 or any(length < 0 for length in shape):
            raise ValueError(f"tensor {name!r} does not fit")
        decoded = datatype in (BYTES, "BOOL")
        if not decoded and math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"tensor {name!r} of shape {shape} does not have {size} bytes")
        found.append(_Tensor(name, datatype, None if decoded else dtype, tuple(shape), start, size))
        start += _padded(size)
        if start > MAX_FRAME_PAYLOAD_BYTES:
            raise ValueError(f"tensor {name!r} ends behind the largest payload")
    views: dict[str, NDArray[Any]] = {}
    for item in found:
        if item.dtype is None:
            return _Layout(header, tuple(found), start, None)
        place = arena.bytes[item.start : item.start + item.size]
        views[item.name] = place.view(item.dtype).reshape(item.shape)
    return _Layout(header, tuple(found), start, views)


def _bound(remembered: dict[Any, Any]) -> None:
    if len(remembered) >= MAX_LAYOUTS:
        remembered.pop(next(iter(remembered)))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
