"""Shared memory regions: whose they are, what may be opened, and that no client harms the agent with one."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest

from agent.limits import MAX_PEERS, MAX_REGIONS
from agent.messages import of_message, serialize_response
from agent.peer import Peers
from agent.shared_memory import Regions
from agent.tensors import decode_inputs, encode_outputs, requested_outputs
from inference import open_inference_pb2 as pb
from runtimes.datatypes import encode
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

ME = os.getuid()
Tensor = pb.ModelInferRequest.InferInputTensor
Output = pb.ModelInferRequest.InferRequestedOutputTensor


@pytest.fixture
def shared() -> Iterator[shared_memory.SharedMemory]:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    yield memory
    memory.close()
    memory.unlink()


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def refused(call: object, *arguments: object, reason: int = 0) -> str:
    with pytest.raises(SluiceError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.reason in (
        {reason} if reason else {errors_pb2.REQUEST_INVALID, errors_pb2.INPUT_INVALID}
    )
    return caught.value.message


def test_register_status_unregister(shared: shared_memory.SharedMemory) -> None:
    before = open_descriptors()
    regions = Regions()
    regions.register("frames", "/" + shared.name, 64, 1024, ME)
    regions.register("rest", shared.name, 2048, 2048, ME)
    assert [(item.name, item.key, item.offset, item.size) for item in regions.status("", ME)] == [
        ("frames", "/" + shared.name, 64, 1024),
        ("rest", shared.name, 2048, 2048),
    ]
    assert [item.name for item in regions.status("rest", ME)] == ["rest"]
    assert "not registered" in refused(regions.status, "none", ME, reason=errors_pb2.REGION_UNKNOWN)
    taken = refused(regions.register, "frames", shared.name, 0, 1, ME, reason=errors_pb2.REGION_EXISTS)
    assert "in use" in taken
    regions.unregister("none", ME)
    regions.unregister("frames", ME)
    assert [item.name for item in regions.status("", ME)] == ["rest"]
    regions.unregister("", ME)
    assert regions.status("", ME) == []
    assert open_descriptors() == before


def test_contents_are_read_and_written_in_place(shared: shared_memory.SharedMemory) -> None:
    regions = Regions()
    regions.register("r", shared.name, 64, 256, ME)
    region = regions.find("r", ME)
    shared.buf[64:320] = bytes(range(256))
    assert region.read(250, 6).tolist() == [250, 251, 252, 253, 254, 255]
    region.write(252, memoryview(b"abcd"))
    assert bytes(shared.buf[314:321]) == b"\xfa\xfbabcd\x00"
    for offset, size in ((0, 257), (256, 1), (257, 0), (-1, 1), (1, -1), (1 << 62, 1 << 62)):
        assert "has 256 bytes" in refused(region.read, offset, size)
    assert "has 256 bytes" in refused(region.write, 253, memoryview(b"abcd"))


@pytest.mark.parametrize(
    "key", ["", "/", "..", "/..", "../etc/passwd", "/a/b", "a\0b", "x" * 300, "none-such", "."]
)
def test_only_objects_below_the_directory_are_opened(key: str) -> None:
    before = open_descriptors()
    refused(Regions().register, "r", key, 0, 1, ME)
    assert open_descriptors() == before


def test_links_pipes_and_directories_are_not_followed(tmp_path: Path) -> None:
    regions = Regions(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe"):
        refused(regions.register, name, name, 0, 1, ME)
    regions.register("r", "secret", 0, 8, ME)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 4097), (4096, 1), (1 << 63, 1), (1, (1 << 64) - 1)])
def test_parts_outside_the_object(shared: shared_memory.SharedMemory, offset: int, size: int) -> None:
    before = open_descriptors()
    refused(Regions().register, "r", shared.name, offset, size, ME)
    assert open_descriptors() == before


def test_a_region_is_its_users_alone(shared: shared_memory.SharedMemory) -> None:
    regions = Regions()
    other = ME + 1
    assert "another user" in refused(regions.register, "r", shared.name, 0, 8, other)
    regions.register("r", shared.name, 0, 8, ME)
    assert "not registered" in refused(regions.find, "r", other, reason=errors_pb2.REGION_UNKNOWN)
    assert regions.status("", other) == []
    regions.unregister("", other)
    regions.unregister("r", other)
    assert regions.find("r", ME)


def test_a_caller_without_a_known_user_needs_an_object_open_to_all(
    shared: shared_memory.SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = Regions()
    monkeypatch.setattr(os, "geteuid", lambda: ME + 1)
    assert "another user" in refused(regions.register, "r", shared.name, 0, 8, None)
    (Path("/dev/shm") / shared.name).chmod(0o666)
    regions.register("r", shared.name, 0, 8, None)
    assert regions.find("r", None)


def test_an_object_that_shrank_is_an_error_and_no_crash(shared: shared_memory.SharedMemory) -> None:
    regions = Regions()
    regions.register("r", shared.name, 0, 4096, ME)
    os.truncate(Path("/dev/shm") / shared.name, 100)
    region = regions.find("r", ME)
    assert "ends before" in refused(region.read, 0, 4096)
    assert "ends before" in refused(region.write, 200, memoryview(b"x"))
    assert region.read(0, 100).nbytes == 100
    os.truncate(Path("/dev/shm") / shared.name, 4096)


def test_no_more_regions_than_allowed(shared: shared_memory.SharedMemory) -> None:
    regions = Regions()
    before = open_descriptors()
    for number in range(MAX_REGIONS):
        regions.register(str(number), shared.name, 0, 8, ME)
    with pytest.raises(SluiceError) as caught:
        regions.register("more", shared.name, 0, 8, ME)
    assert caught.value.reason == errors_pb2.LIMIT_EXCEEDED
    regions.unregister("", ME)
    assert open_descriptors() == before


def place(region: str = "r", size: object = 8, offset: object = 0) -> dict[str, pb.InferParameter]:
    return {
        "shared_memory_region": pb.InferParameter(string_param=region),
        "shared_memory_byte_size": pb.InferParameter(int64_param=size),  # type: ignore[arg-type]
        "shared_memory_offset": pb.InferParameter(int64_param=offset),  # type: ignore[arg-type]
    }


SPECS = [TensorSpec("x", "FP32", (-1, 2)), TensorSpec("t", "BYTES", (-1,)), TensorSpec("z", "INT32", (-1,))]


def test_inputs_by_region_beside_others(shared: shared_memory.SharedMemory) -> None:
    regions = Regions()
    regions.register("r", shared.name, 0, 4096, ME)
    texts = encode(np.array([b"ab", b""], object))
    shared.buf[:8] = np.array([1.5, 2.5], np.float32).tobytes()
    shared.buf[100 : 100 + len(texts)] = texts
    request = pb.ModelInferRequest(
        inputs=[
            Tensor(name="x", datatype="FP32", shape=[1, 2], parameters=place()),
            Tensor(name="z", datatype="INT32", shape=[1]),
            Tensor(name="t", datatype="BYTES", shape=[2], parameters=place(size=len(texts), offset=100)),
        ],
        raw_input_contents=[np.array([7], np.int32).tobytes()],
    )
    arrays = decode_inputs(of_message(request), SPECS, lambda name: regions.find(name, ME))
    assert arrays["x"].tolist() == [[1.5, 2.5]]
    assert arrays["z"].tolist() == [7]
    assert arrays["t"].tolist() == [b"ab", b""]


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (place(size=7), "takes 8 bytes; shared_memory_byte_size is 7"),
        (place(size=8, offset=4089), "has 4096 bytes"),
        (place(size=-1), "has 4096 bytes"),
        (place(offset=-1), "has 4096 bytes"),
        ({**place(), "shared_memory_byte_size": pb.InferParameter(string_param="8")}, "whole number"),
        ({**place(), "shared_memory_region": pb.InferParameter(int64_param=8)}, "is a text"),
        ({"shared_memory_region": place()["shared_memory_region"]}, "needs shared_memory_byte_size"),
    ],
)
def test_places_that_are_refused(
    shared: shared_memory.SharedMemory, parameters: dict[str, pb.InferParameter], says: str
) -> None:
    regions = Regions()
    regions.register("r", shared.name, 0, 4096, ME)
    request = pb.ModelInferRequest(
        inputs=[Tensor(name="x", datatype="FP32", shape=[1, 2], parameters=parameters)]
    )
    found = refused(decode_inputs, of_message(request), SPECS, lambda name: regions.find(name, ME))
    assert says in found
    assert "input 'x'" in found


def test_a_region_that_is_not_registered() -> None:
    tensor = Tensor(name="x", datatype="FP32", shape=[1, 2], parameters=place("none"))
    request = of_message(pb.ModelInferRequest(inputs=[tensor]))
    why = refused(
        decode_inputs,
        request,
        SPECS,
        lambda name: Regions().find(name, ME),
        reason=errors_pb2.REGION_UNKNOWN,
    )
    assert "'none' is not registered" in why


def test_outputs_by_region(shared: shared_memory.SharedMemory) -> None:
    regions = Regions()
    regions.register("r", shared.name, 0, 4096, ME)
    message = pb.ModelInferRequest(
        outputs=[Output(name="x", parameters=place(size=100, offset=50)), Output(name="z")]
    )
    wanted = requested_outputs(message, SPECS, lambda name: regions.find(name, ME))
    arrays = {"x": np.array([[1, 2]], np.float32), "z": np.array([3], np.int32)}
    encoded = encode_outputs(pb.ModelInferResponse(), arrays, wanted, raw=True)
    response = pb.ModelInferResponse.FromString(serialize_response(encoded))
    assert bytes(shared.buf[50:58]) == arrays["x"].tobytes()
    assert list(response.raw_output_contents) == [b"", arrays["z"].tobytes()]
    first = response.outputs[0].parameters
    assert first["shared_memory_region"].string_param == "r"
    assert first["shared_memory_byte_size"].int64_param == 8
    assert first["shared_memory_offset"].int64_param == 50
    small = requested_outputs(
        pb.ModelInferRequest(outputs=[Output(name="x", parameters=place(size=7))]),
        SPECS,
        lambda name: regions.find(name, ME),
    )
    with pytest.raises(SluiceError, match="it takes 8 bytes"):
        encode_outputs(pb.ModelInferResponse(), arrays, small, raw=True)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_user_behind_a_connection(family: socket.AddressFamily, host: str) -> None:
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} on this machine")
    with server, socket.create_connection(server.getsockname()[:2]) as client:
        port = client.getsockname()[1]
        peer = f"ipv4:{host}:{port}" if family is socket.AF_INET else f"ipv6:%5B{host}%5D:{port}"
        assert Peers().user(peer) == ME


def test_a_mapped_address_is_found(tmp_path: Path) -> None:
    """A server that listens on [::] has clients of IPv4 in the table for IPv6."""
    head = "  sl  local_address remote_address st tx rx tr tm retrnsmt uid timeout inode\n"
    row = "   0: {} 0100007F:1F90 01 0:0 00:0 0 {} 0 1 1\n"
    table = tmp_path / "tcp"
    table.write_text(head + row.format("0000000000000000FFFF00000100007F:9C40", 1234))
    assert Peers((table,)).user("ipv4:127.0.0.1:40000") == 1234
    table.write_text(head + row.format("0100007F:9C40", 1) + row.format("0100007F:9C40", 2))
    with pytest.raises(SluiceError, match="cannot be told"):
        Peers((table,)).user("ipv4:127.0.0.1:40000")


def test_callers_elsewhere_are_refused() -> None:
    peers = Peers()
    assert peers.user("unix:") is None
    for peer in ("ipv4:192.0.2.1:40000", "ipv6:%5B2001:db8::1%5D:1", "ipv4:127.0.0.1:1", "strange"):
        with pytest.raises(SluiceError) as caught:
            peers.user(peer)
        assert caught.value.reason == errors_pb2.REQUEST_INVALID


def test_remembered_callers_are_bounded(tmp_path: Path) -> None:
    row = "   0: 0100007F:{:04X} 0100007F:1F90 01 0:0 00:0 0 5 0 1 1\n"
    table = tmp_path / "tcp"
    table.write_text("head\n" + "".join(row.format(port) for port in range(MAX_PEERS + 50)))
    peers = Peers((table,))
    for port in range(MAX_PEERS + 50):
        assert peers.user(f"ipv4:127.0.0.1:{port}") == 5
    assert len(peers._known) == MAX_PEERS
