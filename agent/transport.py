"""Messages between the agent and one worker process: a small frame through a pair of pipes, tensors in shared
memory.

A frame is a fixed prefix (magic, header length, where the payload begins and its length) and a JSON header: a
small object that both sides agree on, with the tensors under "tensors" as [name, datatype, shape, bytes]. The
payload lies at the beginning of the sender's arena (arena.py), or where staging.py had it put in the arena
that the processes of a version share, whose places are numbered on behind the sender's: the tensors' raw
contents as the Open Inference Protocol lays them out, each padded to a multiple of 64 bytes, so that every
array starts aligned. Nothing is pickled. Headers repeat, so both sides remember those they have built
and read. Pipes, because waking the other side through one takes less than through a socket, and unlike an
eventfd a pipe ends when the other side does.

Rules: every length is checked against a limit before memory is touched for it; a frame once begun is finished
within FRAME_S or the channel counts as broken; one message is on its way in each direction at a time, which
the protocol above keeps (a request, then its answer). Received arrays are copies, or, if asked for, views of
the arena that hold until the answer is sent.
"""

from __future__ import annotations

import json
import math
import os
import select
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.arena import ALIGNMENT, ARENA_BYTES, Arena, padded
from agent.limits import (
    ARENA_KEEP_BYTES,
    FRAME_S,
    MAX_FRAME_HEADER_BYTES,
    MAX_FRAME_PAYLOAD_BYTES,
    MAX_LAYOUTS,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS_PER_MESSAGE,
)
from agent.staging import Staged
from runtimes.datatypes import BYTES, decode, encode, of_dtype, to_dtype
from runtimes.interface import InputInvalid

_PREFIX = struct.Struct("<4sIQQ")
_MAGIC = b"SLW3"
_READ_BYTES = 16 << 10  # most messages arrive in one call
_REMEMBERED_BYTES = 4 << 10  # of a frame that is worth remembering

Tensors = Mapping[str, NDArray[Any]]


class ChannelClosed(Exception):
    """The other side is gone: end of file, or a broken pipe."""


class ChannelBroken(Exception):
    """The bytes are no frame, a frame stopped half-way, or it is over a limit; the channel cannot go on."""


class MessageTooLarge(Exception):
    """The message to send is over a limit; nothing was sent."""


class Message:
    """One received message: its header without the tensor table, and its tensors by name; both to be read."""

    __slots__ = ("header", "tensors")

    def __init__(self, header: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
        self.header = header
        self.tensors = tensors

    def copy(self) -> Message:
        """The same with tensors of its own."""
        return Message(self.header, {name: array.copy() for name, array in self.tensors.items()})


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
class _Plan:
    """How a message of the same op and layout was sent: its header, its frame for a payload at the arena's
    beginning, and where its tensors go there.
    """

    head: bytes
    frame: bytes
    targets: tuple[NDArray[Any], ...]
    payload_bytes: int


class Channel:
    """One end of two pipes and of two arenas. Not thread-safe: the owner lets one caller in at a time; only
    `shutdown` may come from elsewhere.

    Args:
        reader: the pipe to read from; the channel closes both.
        writer: the pipe to write to.
        outgoing: written by this end.
        incoming: written by the other.
        staged: of inputs that the other had put there; stays open with the channel. None: it never does.
        views: whether received arrays are views of the arena, which hold until the next `send`.
    """

    def __init__(
        self,
        reader: int,
        writer: int,
        outgoing: Arena,
        incoming: Arena,
        *,
        staged: Arena | None = None,
        views: bool = False,
    ) -> None:
        os.set_blocking(writer, False)
        self._reader = reader
        self._writer = writer
        self._writing = threading.Lock()  # a descriptor's number may be another file's once it is closed
        self._poll = select.poll()
        self._poll.register(reader, select.POLLIN)
        self._outgoing = outgoing
        self._incoming = incoming
        self._staged = staged
        self._views = views
        self._last_sent = 0
        self._plans: dict[Any, _Plan] = {}
        self._known: dict[bytes, Message] = {}

    def send(self, header: Mapping[str, Any], *tensors: Tensors) -> None:
        """Sends one message within FRAME_S.

        Args:
            header: a small JSON object.
            tensors: one or more sets of the same tensors, to be joined along their first dimension. One that
                is `Staged` is not copied: the other end must have been given the arena where it lies.

        Raises MessageTooLarge and runtimes.InputInvalid (no datatype carries the array, or the sets do not
        fit together; all: nothing was sent), ChannelClosed, ChannelBroken.
        """
        if len(tensors) != 1 or len(header) != 1:
            self._send_new(None, header, tensors)
            return
        (given,) = tensors
        key = (header.get("op"), *[(name, item.dtype, item.shape) for name, item in given.items()])
        plan = self._plans.get(key)
        if isinstance(given, Staged):
            if plan is None:
                plan = self._remember(key, header, given)
            start = ARENA_BYTES + given.start
            self._write(_PREFIX.pack(_MAGIC, len(plan.head), start, plan.payload_bytes) + plan.head)
        elif plan is None:
            self._send_new(key, header, tensors)
        else:
            if self._last_sent > ARENA_KEEP_BYTES:
                self._outgoing.make_way(self._last_sent, plan.payload_bytes)
            for target, array in zip(plan.targets, given.values()):
                np.copyto(target, array)
            self._last_sent = plan.payload_bytes
            self._write(plan.frame)

    def receive(self, timeout_s: float | None) -> Message:
        """Waits for a message to begin, then takes it whole.

        Args:
            timeout_s: how long to wait for its first byte; None: for ever.

        Raises TimeoutError (nothing was taken), ChannelClosed, ChannelBroken.
        """
        data = self._read_some(_READ_BYTES, timeout_s)
        known = self._known.get(data)
        if known is not None:
            return known if self._views else known.copy()
        if len(data) < _PREFIX.size:
            data = self._read_up_to(_PREFIX.size, data)
        magic, head_bytes, start, payload_bytes = _PREFIX.unpack_from(data)
        if magic != _MAGIC:
            raise ChannelBroken("the bytes received are not a frame")
        if head_bytes > MAX_FRAME_HEADER_BYTES or payload_bytes > MAX_FRAME_PAYLOAD_BYTES:
            raise ChannelBroken(
                f"a frame announces {head_bytes} + {payload_bytes} bytes; at most "
                f"{MAX_FRAME_HEADER_BYTES} + {MAX_FRAME_PAYLOAD_BYTES} are allowed"
            )
        if start % ALIGNMENT or payload_bytes > self._room(start):
            raise ChannelBroken(f"a frame's payload lies at byte {start}, which is no place for it")
        size = _PREFIX.size + head_bytes
        if len(data) < size:
            data = self._read_up_to(size, data)
        if len(data) > size:
            raise ChannelBroken("a second message came before the first was answered")
        return self._parse(data, start, payload_bytes)

    def readable(self, timeout_s: float | None) -> bool:
        """Whether bytes or the end of the stream are there within `timeout_s`."""
        return bool(self._poll.poll(None if timeout_s is None else math.ceil(max(0.0, timeout_s) * 1000)))

    def shutdown(self) -> None:
        """Ends the stream to the other side, which then ends its own; `close` is still needed."""
        with self._writing:
            if self._writer >= 0:
                os.close(self._writer)
                self._writer = -1

    def close(self) -> None:
        """Closes this end; nobody may be using it."""
        self.shutdown()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1
        self._plans.clear()
        self._known.clear()
        self._outgoing.close()
        self._incoming.close()

    # Sending.

    def _send_new(self, key: Any, header: Mapping[str, Any], tensors: Sequence[Tensors]) -> None:
        """Lays the tensors out and sends them; remembers how under `key`."""
        table, payload_bytes = self._lay_out(tensors)
        head = _head(header, table)
        frame = _PREFIX.pack(_MAGIC, len(head), 0, payload_bytes) + head
        if key is not None and all(datatype != BYTES for _, datatype, _, _ in table):
            _bound(self._plans)
            self._plans[key] = _Plan(head, frame, self._targets(tensors[0]), payload_bytes)
        self._last_sent = payload_bytes
        self._write(frame)

    def _remember(self, key: Any, header: Mapping[str, Any], staged: Staged) -> _Plan:
        table = tuple((name, of_dtype(item.dtype), item.shape, item.nbytes) for name, item in staged.items())
        head, payload_bytes = _head(header, table), sum(padded(item.nbytes) for item in staged.values())
        frame = _PREFIX.pack(_MAGIC, len(head), 0, payload_bytes) + head
        plan = _Plan(head, frame, self._targets(staged), payload_bytes)
        _bound(self._plans)
        self._plans[key] = plan
        return plan

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
            start += padded(size)
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
            start += padded(array.nbytes)
        return tuple(targets)

    def _write(self, frame: bytes) -> None:
        with self._writing:
            if self._writer < 0:
                raise ChannelClosed("this end was closed")
            try:
                written = os.write(self._writer, frame)
            except BlockingIOError:
                written = 0
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if written < len(frame):
                self._write_rest(memoryview(frame)[written:])

    def _write_rest(self, rest: memoryview) -> None:
        """What the pipe had no room for."""
        deadline = time.monotonic() + FRAME_S
        poll = select.poll()
        poll.register(self._writer, select.POLLOUT)
        while rest:
            left_ms = math.ceil((deadline - time.monotonic()) * 1000)
            if left_ms <= 0 or not poll.poll(left_ms):
                raise ChannelBroken(f"the other side took no data for {FRAME_S} s")
            try:
                rest = rest[os.write(self._writer, rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelClosed(str(error)) from error

    # Receiving.

    def _parse(self, frame: bytes, start: int, payload_bytes: int) -> Message:
        """The message of a frame; anything that contradicts itself raises ChannelBroken."""
        try:
            header, tensors = _read_head(frame[_PREFIX.size :])
            end = max((item.start + item.size for item in tensors), default=0)
            if end > payload_bytes:
                raise ValueError(f"its tensors take {end} bytes, and it has {payload_bytes}")
            message = Message(header, {item.name: self._tensor(item, start) for item in tensors})
        except (InputInvalid, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChannelBroken(f"a frame's header contradicts its payload: {error}") from error
        if len(frame) <= _REMEMBERED_BYTES and all(item.dtype is not None for item in tensors):
            _bound(self._known)
            self._known[frame] = message
            return message if self._views else message.copy()
        return message

    def _room(self, start: int) -> int:
        """Bytes from this place on to the end of its arena; negative where there is no such arena."""
        if start < ARENA_BYTES:
            return self._incoming.bytes.size - start
        return -1 if self._staged is None else ARENA_BYTES + self._staged.bytes.size - start

    def _tensor(self, item: _Tensor, start: int) -> NDArray[Any]:
        """A view of the arena, or what its bytes there stand for."""
        arena = self._incoming
        if start >= ARENA_BYTES and self._staged is not None:
            arena, start = self._staged, start - ARENA_BYTES
        data = arena.bytes[start + item.start : start + item.start + item.size]
        if item.dtype is not None:
            return data.view(item.dtype).reshape(item.shape)
        return decode(item.datatype, item.shape, (data if self._views else data.copy()).data)

    def _read_up_to(self, size: int, data: bytes) -> bytes:
        """The rest of a frame that has begun with `data`, up to `size` bytes of it."""
        deadline = time.monotonic() + FRAME_S
        parts, missing = [data], size - len(data)
        while missing > 0:
            try:
                parts.append(self._read_some(missing, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                raise ChannelBroken(f"a frame stopped half-way for {FRAME_S} s") from None
            missing -= len(parts[-1])
        return b"".join(parts)

    def _read_some(self, most: int, timeout_s: float | None) -> bytes:
        """At least one byte, at most `most`. Raises TimeoutError or ChannelClosed."""
        try:
            if timeout_s is not None and not self._poll.poll(math.ceil(max(0.0, timeout_s) * 1000)):
                raise TimeoutError
            data = os.read(self._reader, most)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not data:
            raise ChannelClosed("the stream ended")
        return data


def _head(header: Mapping[str, Any], table: tuple[Any, ...]) -> bytes:
    head = json.dumps({**header, "tensors": table}, separators=(",", ":")).encode()
    if len(head) > MAX_FRAME_HEADER_BYTES:
        raise MessageTooLarge(
            f"the header takes {len(head)} bytes; at most {MAX_FRAME_HEADER_BYTES} are allowed"
        )
    return head


def _joined_shape(parts: Sequence[NDArray[Any]]) -> tuple[int, ...]:
    first = parts[0]
    if len(parts) == 1:
        return first.shape
    if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype or not part.ndim for part in parts):
        raise InputInvalid("tensors of different shapes cannot be joined")
    return (sum(part.shape[0] for part in parts), *first.shape[1:])


def _read_head(head: bytes) -> tuple[dict[str, Any], tuple[_Tensor, ...]]:
    """A header without its table, and that; raises what a header that is none makes."""
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
        start += padded(size)
        if start > MAX_FRAME_PAYLOAD_BYTES:
            raise ValueError(f"tensor {name!r} ends behind the largest payload")
    return header, tuple(found)


def _bound(remembered: dict[Any, Any]) -> None:
    if len(remembered) >= MAX_LAYOUTS:
        remembered.pop(next(iter(remembered)))
