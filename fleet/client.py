"""ControlClient: the operator's side of the wire, one method for each call, synchronous.

What every method keeps, so that callers need not think of it: a call ends after `timeout_s`, retries
included; calls that may safely be sent twice are sent again while the control plane cannot be reached, with
backoff, jitter and a limit; every failure is a SluiceError. Uploading is in client_upload.py.

Rules: no call waits without a deadline. A call that must not happen twice (creating or aborting a rollout) is
never repeated: whether it arrived is unknown, and the caller is told. Watching reopens its stream every
`watch_s`, so that a link that died silently is noticed.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grpc

from fleet.client_identities import IdentityCalls
from fleet.client_upload import Progress, UploadLimits, send_file
from fleet.profile import Profile
from sluice.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    diff_pb2,
    diff_pb2_grpc,
    errors_pb2,
    registry_pb2,
    registry_pb2_grpc,
    rollouts_pb2,
    rollouts_pb2_grpc,
    trust_pb2,
    trust_pb2_grpc,
)
from updater.credentials import Credentials
from updater.errors import SluiceError
from updater.wire import from_rpc_error

DEFAULT_ADDRESS = "127.0.0.1:8470"
DEFAULT_PORT = 8470

# A rollout over 10,000 devices that all failed with the longest message.
MAX_RECEIVE_BYTES = 32 << 20
CONNECT_TIMEOUT_MS = 10_000
PAGE_SIZE = 200  # entries asked for at a time; a page stays far below the limit above

_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_LOOPBACK = re.compile(r"(127\.|localhost|\[::1\]|unix:)")

# What gRPC says when a connection was never made, so that nothing can have arrived.
_NEVER_SENT = ("Connection refused", "DNS resolution failed", "No route to host")

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how soon a call is sent again.

    Attributes:
        attempts: calls in all, the first included.
        first_s: the first pause; each later one is twice as long.
        longest_s: no pause is longer.
    """

    attempts: int = 5
    first_s: float = 0.2
    longest_s: float = 5.0

    def pause_s(self, failures: int) -> float:
        """The pause after so many failures (1 or more), between half and all of its step, at random."""
        step = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 30))
        return step * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


@dataclass(frozen=True)
class ClientLimits:
    """The client's waits, in seconds, and its retries.

    Attributes:
        timeout_s: one call, retries included; listing counts each page.
        watch_s: how long one watch stream stands before it is opened anew.
        upload: limits of uploads.
    """

    timeout_s: float = 30.0
    watch_s: float = 60.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    upload: UploadLimits = field(default_factory=UploadLimits)


def check_address(address: str) -> str:
    """A gRPC target for what an operator writes: host, host:port, [v6]:port or unix:/path.

    Raises SluiceError(REQUEST_INVALID).
    """
    if address.startswith("unix:") and len(address) > len("unix:"):
        return address
    match = _HOST_PORT.fullmatch(address)
    port = int(match[2]) if match and match[2] else DEFAULT_PORT
    if not match or not 0 < port < 65536:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"not an address of a control plane: {address[:200]!r}",
            hint=f"write host:port, for example --control {DEFAULT_ADDRESS}",
            obj=address[:200],
        )
    return f"{match[1]}:{port}"


class ControlClient:
    """A connection to one control plane.

    Opening it does not connect: the first call does. Safe to use from several threads. Use it as a
    context manager or call `close`.

    Args:
        address: host:port, host (port 8470) or unix:/path.
        limits: waits and retries.
        credentials: to call with; None: those of the operator's profile.

    Raises SluiceError(REQUEST_INVALID | UNAUTHENTICATED | KEY_UNAVAILABLE).
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        limits: ClientLimits | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.address = check_address(address)
        self.limits = limits or ClientLimits()
        held = credentials or Profile.open().credentials()
        self._channel = held.channel(
            self.address,
            [
                ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
                # gRPC's own pause after a refused connection starts at 1 s; ours decides instead.
                ("grpc.initial_reconnect_backoff_ms", 100),
                # How long connecting may take, whatever its name: a TLS handshake is two ways there and back.
                ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
                ("grpc.max_reconnect_backoff_ms", 2000),
                # A proxy for the web does not lead to this machine.
                ("grpc.enable_http_proxy", 0 if _LOOPBACK.match(self.address) else 1),
            ],
        )
        self._registry = registry_pb2_grpc.RegistryStub(self._channel)
        self._devices = devices_pb2_grpc.DevicesStub(self._channel)
        self._rollouts = rollouts_pb2_grpc.RolloutsStub(self._channel)
        self.identities = IdentityCalls(self._channel, self._call, _pages)
        self._diff = diff_pb2_grpc.DiffModelStub(self._channel)
        self._trust = trust_pb2_grpc.TrustStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    @property
    def channel(self) -> grpc.Channel:
        """For the stubs of services that have no methods here."""
        return self._channel

    def call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, doing: str
    ) -> Response:
        """One call of such a stub that may safely be sent twice, with everything that the others have.

        Args:
            method: the stub's.
            request: its message.
            doing: the call as a phrase, for errors.
        """
        return self._call(method, request, doing)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Registry.

    def get_model(self, name: str) -> registry_pb2.Model:
        """Raises SluiceError(MODEL_UNKNOWN)."""
        request = registry_pb2.GetModelRequest(name=name)
        return self._call(self._registry.GetModel, request, f"reading model {name}")

    def list_models(self) -> Iterator[registry_pb2.Model]:
        """All models by name."""

        def page(token: str) -> tuple[Sequence[registry_pb2.Model], str]:
            request = registry_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=token)
            response = self._call(self._registry.ListModels, request, "listing models")
            return response.models, response.next_page_token

        return _pages(page)

    def get_version(self, model: str, version: int = 0, *, alias: str = "") -> registry_pb2.Version:
        """A version with its manifest: by number, by alias, or the latest.

        Raises SluiceError(MODEL_UNKNOWN | VERSION_UNKNOWN | ALIAS_UNKNOWN).
        """
        request = registry_pb2.GetVersionRequest(model=model)
        if alias:
            request.alias = alias
        elif version:
            request.version = version
        return self._call(self._registry.GetVersion, request, f"reading a version of {model}")

    def list_versions(self, model: str) -> Iterator[registry_pb2.Version]:
        """A model's versions without manifests, newest first. Raises SluiceError(MODEL_UNKNOWN)."""

        def page(token: str) -> tuple[Sequence[registry_pb2.Version], str]:
            request = registry_pb2.ListVersionsRequest(model=model, page_size=PAGE_SIZE, page_token=token)
            response = self._call(self._registry.ListVersions, request, f"listing versions of {model}")
            return response.versions, response.next_page_token

        return _pages(page)

    def publish_version(
        self, manifest: bytes, metadata: Sequence[tuple[str, bytes]] = ()
    ) -> registry_pb2.PublishVersionResponse:
        """Commits a manifest whose files were uploaded, with signed metadata that names it. Safe to repeat.

        Raises SluiceError(MANIFEST_INVALID | VERSION_NOT_NEXT | VERSION_CONFLICT | FILE_UNKNOWN |
        MODEL_FILE_INVALID | MODEL_FILE_TRUNCATED | VERSION_NOT_SIGNED), and as `publish_metadata`.
        """
        request = registry_pb2.PublishVersionRequest(
            manifest=manifest,
            metadata=[trust_pb2.RoleMetadata(role=role, metadata=data) for role, data in metadata],
        )
        return self._call(self._registry.PublishVersion, request, "publishing the version")

    def set_alias(self, model: str, alias: str, version: int) -> registry_pb2.Model:
        """Points an alias at a version; version 0 removes it."""
        request = registry_pb2.SetAliasRequest(model=model, alias=alias, version=version)
        return self._call(self._registry.SetAlias, request, f"setting alias {alias} of {model}")

    def retire_version(self, model: str, version: int) -> registry_pb2.Version:
        """Bars a version from new rollouts."""
        request = registry_pb2.RetireVersionRequest(model=model, version=version)
        return self._call(self._registry.RetireVersion, request, f"retiring {model}@{version}")

    def get_upload(self, digest: str) -> registry_pb2.GetUploadResponse:
        """How much of a file the control plane holds."""
        request = registry_pb2.GetUploadRequest(digest=digest)
        return self._call(self._registry.GetUpload, request, f"asking what is held of {digest}")

    def upload_file(self, path: Path, digest: str, size: int, progress: Progress | None = None) -> int:
        """Brings one file into the store, going on where an earlier upload stopped.

        A cut link is retried while it keeps bringing bytes forward; the limit counts cuts in a row that
        brought none. While another stream uploads the same file (another push, or ours that was cut and that
        the control plane still waits for) this one waits. Whatever happens, bytes that the control plane
        committed are kept for the next attempt.

        Args:
            path: the file.
            digest: of its content.
            size: bytes.
            progress: called with (bytes held, size) from this thread.

        Returns the bytes that this call brought into the store; 0 when the file was there already.

        Raises SluiceError(FILE_DIGEST_MISMATCH | LIMIT_EXCEEDED | DISK_FULL | CONTROL_UNREACHABLE |
        IO_FAILED).
        """
        tries, first, reached, moved = 0, -1, -1, time.monotonic()
        while True:
            held = self.get_upload(digest)
            if first < 0:
                first = size if held.complete else held.committed_bytes
            if held.complete:
                if progress is not None:
                    progress(size, size)
                return size - first
            if held.committed_bytes > reached:
                tries, reached, moved = 0, held.committed_bytes, time.monotonic()
            try:
                send_file(
                    self._registry.UploadFile,
                    path,
                    digest,
                    size,
                    held.committed_bytes,
                    peer=self.address,
                    limits=self.limits.upload,
                    progress=progress,
                )
                return size - first
            except SluiceError as error:
                tries += 1
                if not self._may_go_on(error, digest, held.committed_bytes, tries, time.monotonic() - moved):
                    raise
            time.sleep(self.limits.retry.pause_s(tries))

    def _may_go_on(self, error: SluiceError, digest: str, offset: int, tries: int, idle_s: float) -> bool:
        """Whether an upload that stopped is worth another stream; says how to resume where it is not."""
        limits = self.limits
        if error.reason == errors_pb2.REQUEST_INVALID:
            # An earlier stream of ours may have moved the offset after we asked for it.
            return tries < limits.retry.attempts and self.get_upload(digest).committed_bytes != offset
        if error.reason == errors_pb2.CONTROL_UNREACHABLE and tries < limits.retry.attempts:
            return True
        if error.reason == errors_pb2.STATE_LOCKED and idle_s < limits.upload.locked_s:
            return True
        if error.reason in (errors_pb2.CONTROL_UNREACHABLE, errors_pb2.STATE_LOCKED):
            error.hint = "run the same command again: it goes on where this one stopped"
        return False

    # DiffModel.

    def describe_delta(self, base_digest: str, target_digest: str) -> diff_pb2.DescribeResponse:
        """The anatomy of the delta between two stored files; waits while it is being computed.

        Raises SluiceError(FILE_UNKNOWN), SluiceError(DELTA_NOT_READY) when `timeout_s` was not enough.
        """
        request = diff_pb2.DescribeRequest(base_digest=base_digest, target_digest=target_digest)
        return self._call(
            self._diff.Describe, request, "describing the delta", wait=errors_pb2.DELTA_NOT_READY
        )

    # Devices.

    def get_device(self, device_id: str) -> devices_pb2.Device:
        """Raises SluiceError(DEVICE_UNKNOWN)."""
        request = devices_pb2.GetDeviceRequest(id=device_id)
        return self._call(self._devices.GetDevice, request, f"reading device {device_id}")

    def list_devices(self, labels: Mapping[str, str] | None = None) -> Iterator[devices_pb2.Device]:
        """Devices by id; with labels, those that have them all."""
        selector = devices_pb2.Selector(labels=dict(labels or {}))

        def page(token: str) -> tuple[Sequence[devices_pb2.Device], str]:
            request = devices_pb2.ListDevicesRequest(selector=selector, page_size=PAGE_SIZE, page_token=token)
            response = self._call(self._devices.ListDevices, request, "listing devices")
            return response.devices, response.next_page_token

        return _pages(page)

    def label_device(
        self, device_id: str, labels: Mapping[str, str], remove: Sequence[str] = ()
    ) -> devices_pb2.Device:
        """Sets and removes the operator's labels. Raises SluiceError(DEVICE_UNKNOWN)."""
        request = devices_pb2.LabelDeviceRequest(id=device_id, set=dict(labels), remove=list(remove))
        return self._call(self._devices.LabelDevice, request, f"labelling device {device_id}")

    # Trust.

    def get_trust(self) -> trust_pb2.GetTrustResponse:
        """How far trust is set up there, and the online key."""
        return self._call(self._trust.GetTrust, trust_pb2.GetTrustRequest(), "asking about trust")

    def get_metadata(self, role: str, version: int | None = None) -> bytes:
        """One role's signed metadata, not verified; empty where there is none."""
        request = trust_pb2.GetMetadataRequest(role=role, version=version or 0)
        return self._call(self._trust.GetMetadata, request, f"reading the {role} metadata").metadata

    def publish_metadata(
        self, metadata: Sequence[tuple[str, bytes]], *, replace_root: bool = False
    ) -> trust_pb2.PublishMetadataResponse:
        """Publishes signed metadata, roots by version. Safe to repeat.

        Raises SluiceError(METADATA_INVALID | SIGNATURE_INVALID | METADATA_ROLLED_BACK | METADATA_EXPIRED |
        LIMIT_EXCEEDED | KEY_UNAVAILABLE).
        """
        request = trust_pb2.PublishMetadataRequest(
            metadata=[trust_pb2.RoleMetadata(role=role, metadata=data) for role, data in metadata],
            replace_root=replace_root,
        )
        return self._call(self._trust.PublishMetadata, request, "publishing signed metadata")

    # Rollouts.

    def create_rollout(
        self, model: str, version: int, phases: Sequence[rollouts_pb2.Phase] = ()
    ) -> rollouts_pb2.Rollout:
        """Starts a rollout; version 0 is the latest. Sent once only.

        Raises SluiceError(MODEL_UNKNOWN | VERSION_UNKNOWN | VERSION_RETIRED | ROLLOUT_EMPTY |
        ROLLOUT_STATE | REQUEST_INVALID).
        """
        request = rollouts_pb2.CreateRolloutRequest(model=model, version=version, phases=phases)
        return self._call(self._rollouts.CreateRollout, request, f"starting a rollout of {model}", once=True)

    def get_rollout(self, rollout_id: str) -> rollouts_pb2.Rollout:
        """Raises SluiceError(ROLLOUT_UNKNOWN)."""
        request = rollouts_pb2.GetRolloutRequest(id=rollout_id)
        return self._call(self._rollouts.GetRollout, request, f"reading rollout {rollout_id}")

    def list_rollouts(self, model: str = "") -> Iterator[rollouts_pb2.Rollout]:
        """Rollouts without their devices, newest first."""

        def page(token: str) -> tuple[Sequence[rollouts_pb2.Rollout], str]:
            request = rollouts_pb2.ListRolloutsRequest(model=model, page_size=PAGE_SIZE, page_token=token)
            response = self._call(self._rollouts.ListRollouts, request, "listing rollouts")
            return response.rollouts, response.next_page_token

        return _pages(page)

    def watch_rollout(self, rollout_id: str) -> Iterator[rollouts_pb2.Rollout]:
        """The rollout now and after each change, until it has ended.

        A stream that ends or breaks is opened anew, and may begin with a state that was seen already.

        Raises SluiceError(ROLLOUT_UNKNOWN), SluiceError(CONTROL_UNREACHABLE) after as many failures in a row
        as the retry policy allows.
        """
        request = rollouts_pb2.WatchRolloutRequest(id=rollout_id)
        failures = 0
        while True:
            stream = self._rollouts.WatchRollout(request, timeout=self.limits.watch_s)
            heard = False
            try:
                for rollout in stream:
                    heard = True
                    yield rollout
                    if rollout.HasField("end_time"):
                        return
            except grpc.RpcError as error:
                failure = from_rpc_error(error, f"watching rollout {rollout_id}", self.address)
                if failure.reason != errors_pb2.CONTROL_UNREACHABLE:
                    raise failure from error
                failures = 0 if heard else failures + 1
                if failures >= self.limits.retry.attempts:
                    raise failure from error
            finally:
                stream.cancel()
            time.sleep(self.limits.retry.pause_s(max(1, failures)))

    def abort_rollout(self, rollout_id: str, *, revert: bool, why: str = "") -> rollouts_pb2.Rollout:
        """Ends a running rollout. Sent once only. Raises SluiceError(ROLLOUT_UNKNOWN | ROLLOUT_STATE)."""
        request = rollouts_pb2.AbortRolloutRequest(id=rollout_id, revert=revert, why=why)
        return self._call(self._rollouts.AbortRollout, request, f"aborting rollout {rollout_id}", once=True)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        doing: str,
        *,
        once: bool = False,
        wait: errors_pb2.ErrorReason.ValueType | None = None,
    ) -> Response:
        """One unary call with its deadline, and its retries unless `once`.

        `wait` is a reason that means "not yet": asked again, with pauses, until the deadline.
        """
        policy = self.limits.retry
        deadline = time.monotonic() + self.limits.timeout_s
        for failures in itertools.count(1):
            try:
                return method(request, timeout=max(0.001, deadline - time.monotonic()))
            except grpc.RpcError as error:
                failure = from_rpc_error(error, doing, self.address)
                pause = max(policy.pause_s(failures), failure.retry_s)
                lost = failure.reason == errors_pb2.CONTROL_UNREACHABLE and not once
                # A caller that asks too often is told when to come back; nothing was done then.
                early = failure.reason == errors_pb2.LIMIT_EXCEEDED and failure.retry_s > 0
                again = failure.reason == wait or ((lost or early) and failures < policy.attempts)
                if not again or time.monotonic() + pause >= deadline:
                    raise _with_doubt(failure, once) from error
            time.sleep(pause)
        raise AssertionError("unreachable: the loop above has no end")


def _with_doubt(failure: SluiceError, once: bool) -> SluiceError:
    """Says of a call that is never repeated that it may have arrived nevertheless."""
    never_sent = any(sign in failure.message for sign in _NEVER_SENT)
    if once and failure.reason == errors_pb2.CONTROL_UNREACHABLE and not never_sent:
        failure.hint = "whether it took effect is unknown: look with `sluice rollout list` first"
    return failure


def _pages(page: Callable[[str], tuple[Sequence[Response], str]]) -> Iterator[Response]:
    """Every entry of a paged list. Raises SluiceError(INTERNAL) when the server repeats a token."""
    token = ""
    while True:
        entries, following = page(token)
        yield from entries
        if not following:
            return
        if following == token:
            raise SluiceError(errors_pb2.INTERNAL, "the control plane gave the same page token twice")
        token = following
