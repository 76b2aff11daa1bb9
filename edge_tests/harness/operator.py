"""An operator's and a device's calls against a real control plane, and small real models to send it.

`Operator` holds one channel; `failing` gives the SluiceError that a call ended with.
"""

from __future__ import annotations

import contextlib
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from edge_tests.harness import trust
from edge_tests.harness.models import tiny_onnx
from sluice.api.v1 import (
    devices_pb2_grpc,
    diff_pb2,
    diff_pb2_grpc,
    identity_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    rollouts_pb2_grpc,
    sync_pb2,
    sync_pb2_grpc,
    telemetry_pb2_grpc,
)
from updater.delta import FEATURES
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.manifest import File, Manifest, Variant
from updater.wire import from_rpc_error

CALL_S = 60.0
CHUNK = 64 << 10


def onnx_model(seed: int = 0, *, drift: float = 0.0) -> bytes:
    """A small classifier as ONNX, 53 KB. With `drift`, the weights of `seed` moved a little, as by tuning."""
    with tempfile.TemporaryDirectory() as directory:
        return tiny_onnx(Path(directory) / "model.onnx", seed, hidden=1024, change=drift).read_bytes()


def manifest(
    name: str,
    version: int,
    model: bytes,
    *others: tuple[str, str, bytes],
    variant: str = "default",
    model_format: str = "onnx",
    **annotations: str,
) -> Manifest:
    """A manifest of one variant. `others` are (path, role, content)."""
    files = [("model." + model_format, "model", model), *others]
    return Manifest(
        name,
        version,
        (
            Variant(
                variant,
                model_format,
                tuple(File(path, role, digest_bytes(data), len(data)) for path, role, data in files),
            ),
        ),
        annotations=annotations,
    )


def failing(call: Callable[[], Any]) -> SluiceError:
    """The error that a call must end with."""
    try:
        call()
    except grpc.RpcError as error:
        return from_rpc_error(error, "testing", "the control plane")
    raise AssertionError("the call succeeded")


def eventually(check: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """The first truthy value of `check`; fails when there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.05)


class AsDevices:
    """What devices call, each call over a connection of the device that it names."""

    def __init__(self, address: str, operators: grpc.Channel) -> None:
        self._address = address
        self._channels: dict[str, grpc.Channel] = {}
        self.QueryMetrics = telemetry_pb2_grpc.TelemetryStub(operators).QueryMetrics

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def Poll(  # noqa: N802 - named as the stubs' are
        self, request: sync_pb2.PollRequest, **options: Any
    ) -> sync_pb2.PollResponse:
        return sync_pb2_grpc.SyncStub(self._channel(request.hello.device_id)).Poll(request, **options)

    def Connect(  # noqa: N802
        self, requests: Iterator[sync_pb2.ConnectRequest], **options: Any
    ) -> Any:
        return sync_pb2_grpc.SyncStub(self._channel("")).Connect(requests, **options)

    def Report(self, request: Any, **options: Any) -> Any:  # noqa: N802
        return telemetry_pb2_grpc.TelemetryStub(self._channel(request.device_id)).Report(request, **options)

    def _channel(self, device_id: str) -> grpc.Channel:
        if device_id not in self._channels:
            self._channels[device_id] = trust.channel(self._address, trust.device(device_id))
        return self._channels[device_id]


class Operator:
    """Every service of one control plane: devices' calls as devices, all others as an admin.

    Args:
        address: of the control plane.
        channel: instead, somebody's own, over which every call goes.
    """

    def __init__(self, address: str, *, channel: grpc.Channel | None = None) -> None:
        self.channel = channel or trust.channel(address)
        self.registry = registry_pb2_grpc.RegistryStub(self.channel)
        self.diff = diff_pb2_grpc.DiffModelStub(self.channel)
        self.devices = devices_pb2_grpc.DevicesStub(self.channel)
        self.rollouts = rollouts_pb2_grpc.RolloutsStub(self.channel)
        self._devices = None if channel is not None else AsDevices(address, self.channel)
        self.sync = self._devices or sync_pb2_grpc.SyncStub(self.channel)
        self.identities = identity_pb2_grpc.IdentitiesStub(self.channel)
        self.telemetry = self._devices or telemetry_pb2_grpc.TelemetryStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        if self._devices is not None:
            self._devices.close()

    def upload(self, data: bytes, *, offset: int = 0, end: int | None = None, digest: str = "") -> Any:
        """Sends a file's bytes from `offset` to `end`."""
        name = digest or digest_bytes(data)

        def parts() -> Iterator[registry_pb2.UploadFileRequest]:
            header = registry_pb2.UploadHeader(digest=name, size=len(data), offset=offset)
            yield registry_pb2.UploadFileRequest(header=header)
            stop = len(data) if end is None else end
            for start in range(offset, stop, CHUNK):
                yield registry_pb2.UploadFileRequest(chunk=data[start : min(start + CHUNK, stop)])

        return self.registry.UploadFile(parts(), timeout=CALL_S)

    def publish(self, wanted: Manifest) -> registry_pb2.PublishVersionResponse:
        request = registry_pb2.PublishVersionRequest(manifest=wanted.to_bytes())
        return self.registry.PublishVersion(request, timeout=CALL_S)

    def push(self, name: str, version: int, model: bytes, *others: tuple[str, str, bytes]) -> Manifest:
        """Uploads and publishes a version of one ONNX variant."""
        for data in (model, *(content for _, _, content in others)):
            self.upload(data)
        wanted = manifest(name, version, model, *others)
        assert self.publish(wanted).created
        return wanted

    def plan(
        self,
        name: str,
        version: int,
        bases: Sequence[str] = (),
        *,
        variant: str = "default",
        wait_ms: int = 30_000,
        accept_full: bool = False,
        features: Sequence[str] = FEATURES,
    ) -> diff_pb2.PlanResponse:
        request = diff_pb2.PlanRequest(
            model=name,
            version=version,
            variant=variant,
            base_digests=bases,
            wait_ms=wait_ms,
            accept_full=accept_full,
            features=features,
        )
        return self.diff.Plan(request, timeout=CALL_S)

    def fetch(self, digest: str, path: Path, offset: int = 0) -> Path:
        """Writes an offered delta's bytes from `offset` to a file."""
        with path.open("wb") as file:
            expected = offset
            for part in self.diff.Fetch(diff_pb2.FetchRequest(digest=digest, offset=offset), timeout=CALL_S):
                assert part.offset == expected
                assert 0 < len(part.data) <= 256 << 10
                expected += len(part.data)
                file.write(part.data)
        return path


class Device:
    """A device's Sync stream, driven by a test: it says what the test tells it to say."""

    def __init__(self, address: str, device_id: str, *, labels: dict[str, str] | None = None) -> None:
        self.id = device_id
        self._channel = trust.channel(address, trust.device(device_id))
        self._outgoing: queue.SimpleQueue[sync_pb2.ConnectRequest | None] = queue.SimpleQueue()
        self.hello = sync_pb2.Hello(device_id=device_id, agent_version="0.1.0", boot_id="b", labels=labels)
        self.send(sync_pb2.ConnectRequest(hello=self.hello))
        self.call = sync_pb2_grpc.SyncStub(self._channel).Connect(iter(self._outgoing.get, None))

    def __enter__(self) -> Self:
        self.welcome = next(self.call).welcome
        self.desired = next(self.call).desired
        return self

    def __exit__(self, *_: object) -> None:
        self._outgoing.put(None)
        self.call.cancel()
        self._channel.close()

    def send(self, request: sync_pb2.ConnectRequest) -> None:
        self._outgoing.put(request)

    def next_desired(self) -> sync_pb2.DesiredState:
        """Waits for the next desired state. The test's own timeout bounds it."""
        self.desired = next(self.call).desired
        return self.desired

    def report(self, *models: sync_pb2.ReportedModel, generation: int | None = None) -> None:
        number = self.desired.generation if generation is None else generation
        state = sync_pb2.ReportedState(desired_generation=number, models=models)
        state.time.GetCurrentTime()
        self.send(sync_pb2.ConnectRequest(reported=state))

    def ended(self) -> SluiceError:
        """The error that the control plane ended the stream with."""

        def drain() -> None:
            for _ in self.call:
                pass

        return failing(drain)


def running(of: Manifest, **fields: Any) -> sync_pb2.ReportedModel:
    """What a device says that serves a version in health."""
    variant = of.variants[0]
    return sync_pb2.ReportedModel(
        **{
            "model": of.model,
            "active_version": of.version,
            "active_manifest_digest": of.digest,
            "variant": variant.name,
            "loaded_digests": [file.digest for file in variant.files],
            "healthy": True,
            "step": sync_pb2.UPDATE_STEP_COMMITTED,
            **fields,
        }
    )


@contextlib.contextmanager
def devices(address: str, *ids: str) -> Iterator[list[Device]]:
    """Several connected devices."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Device(address, device_id)) for device_id in ids]
