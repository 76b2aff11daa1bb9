"""The channel between agent and worker: what goes in comes out, and nothing foreign gets through."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent import transport
from agent.limits import MAX_FRAME_HEADER_BYTES, MAX_FRAME_PAYLOAD_BYTES, MAX_TENSORS_PER_MESSAGE
from agent.transport import Channel, ChannelBroken, ChannelClosed, MessageTooLarge
from runtimes.interface import InputInvalid

DTYPES = ["?", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"]


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield Channel(ours), theirs
    ours.close()
    theirs.close()


def frame(header: bytes, payload: bytes = b"", magic: bytes = b"SLW1") -> bytes:
    return transport._PREFIX.pack(magic, len(header), len(payload)) + header + payload


arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    )
)
texts = st.lists(st.binary(max_size=40), max_size=6).map(lambda items: np.array([*items, None], object)[:-1])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=20), arrays | texts, max_size=5), st.text(max_size=50))
def test_round_trip(tensors: dict[str, np.ndarray], note: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours).send({"note": note}, tensors)
        message = Channel(theirs).receive(5)
    assert message.header == {"note": note}
    assert list(message.tensors) == list(tensors)
    for name, array in tensors.items():
        received = message.tensors[name]
        assert received.dtype == array.dtype
        assert received.shape == array.shape
        assert received.tobytes() == array.tobytes() if not array.dtype.hasobject else True
        assert received.tolist() == array.tolist() or array.dtype.kind == "f"
        assert array.dtype.hasobject or not array.size or received.ctypes.data % 64 == 0


def test_strided_and_large_arrays(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    large = np.arange(3_000_000, dtype=np.float64).reshape(1000, 3000).T[::2]
    received: dict[str, Any] = {}
    reader = threading.Thread(target=lambda: received.update(Channel(other).receive(10).tensors))
    reader.start()
    channel.send({}, {"large": large})
    reader.join(10)
    np.testing.assert_array_equal(received["large"], large)


def test_messages_over_a_limit_are_not_sent(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    with pytest.raises(MessageTooLarge, match="tensors take"):
        channel.send({}, {"x": np.zeros(MAX_FRAME_PAYLOAD_BYTES + 1, np.uint8)})
    with pytest.raises(MessageTooLarge, match="header takes"):
        channel.send({"text": "x" * MAX_FRAME_HEADER_BYTES})
    with pytest.raises(MessageTooLarge, match="at most"):
        channel.send({}, {str(n): np.zeros(1, np.uint8) for n in range(MAX_TENSORS_PER_MESSAGE + 1)})
    with pytest.raises(InputInvalid, match="complex"):
        channel.send({}, {"x": np.zeros(1, np.complex64)})
    assert not Channel(other).readable(0)


def table(*entries: Any) -> bytes:
    return json.dumps({"op": "infer", "tensors": entries}).encode()


@pytest.mark.parametrize(
    "data",
    [
        frame(table(), magic=b"HTTP"),
        transport._PREFIX.pack(b"SLW1", MAX_FRAME_HEADER_BYTES + 1, 0),
        transport._PREFIX.pack(b"SLW1", 2, MAX_FRAME_PAYLOAD_BYTES + 1),
        frame(b"{"),
        frame(b"\xff\xfe"),
        frame(b"[]"),
        frame(b"{}"),
        frame(b'{"tensors": 3}'),
        frame(table(["x", "FP32", [1]])),
        frame(table(["x", "FP32", [1], 4])),  # no payload
        frame(table(["x", "FP32", [2], 4]), bytes(64)),
        frame(table(["x", "FP32", [-1, -1], 4]), bytes(64)),
        frame(table(["x", "FP32", ["a"], 4]), bytes(64)),
        frame(table(["x", "FP32", [1], -4]), bytes(64)),
        frame(table(["x", "FP99", [1], 4]), bytes(64)),
        frame(table(["x", "BYTES", [1], 4]), b"\xff" * 64),
        frame(table(["x", "BYTES", [1 << 40], 64]), bytes(64)),
        frame(table(["x", "UINT8", [0] * 99, 0])),
        frame(table()) * 2,
    ],
)
def test_what_is_no_message_breaks_the_channel(ends: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, other = ends
    other.sendall(data)
    with pytest.raises(ChannelBroken):
        channel.receive(5)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_end_in_a_named_error(data: bytes, framed: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame(data) if framed else data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((ChannelBroken, ChannelClosed)):
            while True:
                Channel(ours).receive(5)


def test_a_frame_that_stops_half_way(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "FRAME_S", 0.1)
    channel, other = ends
    other.sendall(frame(table(["x", "UINT8", [64], 64]), bytes(64))[:-1])
    with pytest.raises(ChannelBroken, match="stopped half-way"):
        channel.receive(5)


def test_a_side_that_takes_nothing(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "FRAME_S", 0.1)
    with pytest.raises(ChannelBroken, match="took no data"):
        ends[0].send({}, {"x": np.zeros(16 << 20, np.uint8)})


def test_waiting_ends_with_nothing_taken(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    with pytest.raises(TimeoutError):
        channel.receive(0.01)
    Channel(other).send({"n": 1})
    assert channel.receive(5).header == {"n": 1}


def test_the_other_side_is_gone(ends: tuple[Channel, socket.socket]) -> None:
    channel, other = ends
    other.close()
    with pytest.raises(ChannelClosed):
        channel.receive(5)
    with pytest.raises(ChannelClosed):
        channel.send({})
