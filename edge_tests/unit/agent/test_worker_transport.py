"""The channel between agent and worker: what goes in comes out, and nothing foreign gets through."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent import transport
from agent.arena import ARENA_BYTES, Arena
from agent.limits import (
    ARENA_KEEP_BYTES,
    MAX_FRAME_HEADER_BYTES,
    MAX_FRAME_PAYLOAD_BYTES,
    MAX_LAYOUTS,
    MAX_TENSORS_PER_MESSAGE,
)
from agent.transport import Channel, ChannelBroken, ChannelClosed, Message, MessageTooLarge
from runtimes.interface import InputInvalid

DTYPES = ["?", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"]


class Ends:
    """Both ends of a channel, and what is under them."""

    def __init__(self) -> None:
        there, back_again = os.pipe(), os.pipe()
        self.out, self.back = Arena.create(), Arena.create()
        self.channel = Channel(back_again[0], there[1], self.out, self.back)
        others = [Arena(os.dup(arena.descriptor)) for arena in (self.out, self.back)]
        self.theirs = back_again[1]
        self.other = Channel(there[0], self.theirs, others[1], others[0], views=True)

    def close(self) -> None:
        self.channel.close()
        self.other.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Ends]:
    """For many examples: making arenas takes time."""
    ends = Ends()
    yield ends
    ends.close()


def frame(header: bytes, payload: int = 0, magic: bytes = transport._MAGIC, start: int = 0) -> bytes:
    return transport._PREFIX.pack(magic, len(header), start, payload) + header


arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    )
)
texts = st.lists(st.binary(max_size=40), max_size=6).map(lambda items: np.array([*items, None], object)[:-1])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=20), arrays | texts, max_size=5), st.text(max_size=50), st.booleans())
def test_round_trip(shared: Ends, tensors: dict[str, np.ndarray], note: str, there: bool) -> None:
    sender, receiver = (shared.channel, shared.other) if there else (shared.other, shared.channel)
    for _ in range(2):  # the second time from memory
        sender.send({"op": note}, tensors)
        message = receiver.receive(5)
        assert message.header == {"op": note}
        assert list(message.tensors) == list(tensors)
        for name, array in tensors.items():
            received = message.tensors[name]
            assert received.dtype == array.dtype
            assert received.shape == array.shape
            assert received.tobytes() == array.tobytes() if not array.dtype.hasobject else True
            assert received.tolist() == array.tolist() or array.dtype.kind == "f"
            views_aligned = there and not array.dtype.hasobject and array.size
            assert not views_aligned or received.ctypes.data % 64 == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), st.sampled_from([*DTYPES, "O"]), st.integers(0, 3)
)
def test_sets_are_joined(shared: Ends, rows: list[int], dtype: str, width: int) -> None:
    parts = []
    for number, count in enumerate(rows):
        array = np.empty((count, width), dtype)
        array[...] = str(number).encode() if dtype == "O" else number % 2
        parts.append({"x": array, "y": array[:, :0]})
    shared.channel.send({"op": "infer"}, *parts)
    found = shared.other.receive(5).tensors
    for name in "xy":
        expected = np.concatenate([part[name] for part in parts])
        assert found[name].shape == expected.shape
        assert found[name].tolist() == expected.tolist()


def test_sets_that_do_not_fit_together_are_not_sent(ends: Ends) -> None:
    one = np.zeros((1, 2), np.float32)
    for other in (np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float64), np.zeros((), np.float32)):
        with pytest.raises(InputInvalid, match="cannot be joined"):
            ends.channel.send({}, {"x": one}, {"x": other})
    assert not ends.other.readable(0)


def test_views_are_of_the_arena_and_copies_are_not(ends: Ends) -> None:
    ends.channel.send({}, {"x": np.arange(4, dtype=np.int32)})
    view = ends.other.receive(5).tensors["x"]
    ends.other.send({}, {"y": view})
    copy = ends.channel.receive(5).tensors["y"]
    ends.channel.send({}, {"x": np.full(4, 9, np.int32)})
    assert view.tolist() == [9] * 4
    assert copy.tolist() == [0, 1, 2, 3]


def test_strided_and_large_arrays_and_their_memory(ends: Ends) -> None:
    large = np.arange(3_000_000, dtype=np.float64).reshape(1000, 3000).T[::2]

    def resident() -> int:
        return os.fstat(ends.back.descriptor).st_blocks * 512

    ends.other.send({}, {"large": large})
    np.testing.assert_array_equal(ends.channel.receive(5).tensors["large"], large)
    assert resident() >= large.nbytes
    ends.other.send({}, {"small": large[:1]})
    assert resident() < ARENA_KEEP_BYTES
    assert ends.channel.receive(5).tensors["small"].shape == (1, 1000)


def test_an_arena_cannot_be_made_smaller(ends: Ends) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(ends.back.descriptor, 10)


def test_messages_over_a_limit_are_not_sent(ends: Ends) -> None:
    channel = ends.channel
    with pytest.raises(MessageTooLarge, match="tensors take"):
        channel.send({}, {"x": np.zeros(MAX_FRAME_PAYLOAD_BYTES + 1, np.uint8)})
    with pytest.raises(MessageTooLarge, match="header takes"):
        channel.send({"text": "x" * MAX_FRAME_HEADER_BYTES})
    with pytest.raises(MessageTooLarge, match="at most"):
        channel.send({}, {str(n): np.zeros(1, np.uint8) for n in range(MAX_TENSORS_PER_MESSAGE + 1)})
    with pytest.raises(InputInvalid, match="complex"):
        channel.send({}, {"x": np.zeros(1, np.complex64)})
    assert not ends.other.readable(0)


def test_long_headers_arrive_whole(ends: Ends) -> None:
    text = "x" * (MAX_FRAME_HEADER_BYTES - 100)
    received: list[Message] = []
    reader = threading.Thread(target=lambda: received.append(ends.other.receive(10)))
    reader.start()
    ends.channel.send({"text": text})
    reader.join(10)
    assert received[0].header == {"text": text}


def table(*entries: Any) -> bytes:
    return json.dumps({"op": "infer", "tensors": entries}).encode()


@pytest.mark.parametrize(
    "data",
    [
        frame(table(), magic=b"HTTP"),
        transport._PREFIX.pack(transport._MAGIC, MAX_FRAME_HEADER_BYTES + 1, 0, 0),
        transport._PREFIX.pack(transport._MAGIC, 2, 0, MAX_FRAME_PAYLOAD_BYTES + 1),
        frame(table(), start=ARENA_BYTES + 64),
        frame(table(), start=2**64 - 64),
        frame(table(["x", "UINT8", [64], 64]), 64, start=ARENA_BYTES),
        frame(table(["x", "UINT8", [64], 64]), 64, start=1),
        frame(b"{"),
        frame(b"\xff\xfe"),
        frame(b"[]"),
        frame(b"{}"),
        frame(b'{"tensors": 3}'),
        frame(table(["x", "FP32", [1]])),
        frame(table(["x", "FP32", [1], 4])),  # no payload
        frame(table(["x", "FP32", [2], 4]), 64),
        frame(table(["x", "FP32", [-1, -1], 4]), 64),
        frame(table(["x", "FP32", ["a"], 4]), 64),
        frame(table(["x", "FP32", [1], -4]), 64),
        frame(table(["x", "FP32", [1.5], 6]), 64),
        frame(table(["x", "FP32", [1], 4.0]), 64),
        frame(table([["x"], "FP32", [1], 4]), 64),
        frame(table(["x", ["FP32"], [1], 4]), 64),
        frame(table(["x", "FP99", [1], 4]), 64),
        frame(table(["x", "BYTES", [1], 3]), 64),
        frame(table(["x", "BYTES", [1 << 40], 64]), 64),
        frame(table(["x", "UINT8", [0] * 99, 0])),
        frame(table()) * 2,
    ],
)
def test_what_is_no_message_breaks_the_channel(ends: Ends, data: bytes) -> None:
    os.write(ends.theirs, data)
    with pytest.raises(ChannelBroken):
        ends.channel.receive(5)


def test_strings_that_claim_more_than_there_is_break_the_channel(ends: Ends) -> None:
    ends.back.bytes[:64] = 255
    os.write(ends.theirs, frame(table(["x", "BYTES", [1], 64]), 64))
    with pytest.raises(ChannelBroken, match="claims 4294967295 bytes"):
        ends.channel.receive(5)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_end_in_a_named_error(data: bytes, framed: bool) -> None:
    reader, theirs = os.pipe()
    os.write(theirs, frame(data) if framed else data)
    os.close(theirs)
    arena = Arena.create(64)
    channel = Channel(reader, os.open(os.devnull, os.O_WRONLY), arena, arena)
    with pytest.raises((ChannelBroken, ChannelClosed)):
        while True:
            channel.receive(5)
    channel.close()


def test_a_frame_that_stops_half_way(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FRAME_S", 0.1)
    os.write(ends.theirs, frame(table(["x", "UINT8", [64], 64]), 64)[:-1])
    with pytest.raises(ChannelBroken, match="stopped half-way"):
        ends.channel.receive(5)


def test_a_side_that_takes_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FRAME_S", 0.1)
    with pytest.raises(ChannelBroken, match="took no data"):
        for _ in range(1000):
            ends.channel.send({"text": "x" * 100_000})


def test_waiting_ends_with_nothing_taken(ends: Ends) -> None:
    with pytest.raises(TimeoutError):
        ends.channel.receive(0.01)
    ends.other.send({"n": 1})
    assert ends.channel.receive(5).header == {"n": 1}


def test_the_other_side_is_gone(ends: Ends) -> None:
    ends.other.close()
    with pytest.raises(ChannelClosed):
        ends.channel.receive(5)
    with pytest.raises(ChannelClosed):
        ends.channel.send({})


def test_what_a_channel_remembers_is_bounded(ends: Ends) -> None:
    for size in range(3 * MAX_LAYOUTS):
        ends.channel.send({"op": "infer"}, {"x": np.zeros(size, np.uint8)})
        assert ends.other.receive(5).tensors["x"].size == size
    assert len(ends.channel._plans) == len(ends.other._known) == MAX_LAYOUTS
